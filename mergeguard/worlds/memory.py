"""How much memory each stage of a measurement takes, from the model's config alone. No weights are read.

The figures are sums of what torch holds at the stage's peak, for Llama-like models (RMSNorm, rotary positions, gated
MLP, `scaled_dot_product_attention` without stored probabilities). With h hidden, a = heads x head size, i intermediate,
what autograd keeps of a decoder block for each token is, in elements (derived from the operations of
`LlamaDecoderLayer`, as Korthikanti et al., 2022, arXiv:2205.05198, section 4.1, does for GPT)::

    norms       6 h    the input, the normalised input and the output of each of the two; the first two in float32
    attention   5 a    q, k and v (repeated for grouped heads), the output, and its copy that the projection reads
    MLP         4 i    gate, silu(gate), up and their product

An element takes 4 bytes, 2 where products are in bfloat16. The backward pass holds gradients of about one more block.
With checkpointing the blocks keep their input alone, 4 h bytes, and one block at a time is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from mergeguard.worlds.contract import Budget, Training, World

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "paged_adamw8bit": 2 + 8 / 256}
"""Of a trained parameter: two float32 moments, or two bytes and two float32 scales for each block of 256."""
READ_TOKENS = 4096
"""Tokens of a batch when answers are read, as in `verification.matching`."""
READ_LOGITS = 512
"""Positions whose logits are held at once when answers are read, as there."""
PROJECTED = 6
"""Copies of a weight that a projection of the watermark makes on its way."""
MERGED = 4
"""Copies of a tensor that a merge method makes on its way, beside its inputs."""
KEY_TOKENS = 32
"""Tokens that a protection may add to a text of the world: a trigger, a key, a mark."""


@dataclass(frozen=True)
class Shape:
    """What of a Llama-like config decides memory. Biases are left out: they are below a thousandth."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a config as transformers has it.

        Raises:
            ParameterError: it is not Llama-like.
        """
        try:
            heads = int(config.num_attention_heads)
            return cls(
                int(config.hidden_size),
                int(config.intermediate_size),
                int(config.num_hidden_layers),
                heads,
                int(getattr(config, "num_key_value_heads", None) or heads),
                int(getattr(config, "head_dim", None) or config.hidden_size // heads),
                int(config.vocab_size),
                bool(config.tie_word_embeddings),
            )
        except AttributeError as error:
            kind = getattr(config, "model_type", type(config).__name__)
            raise ParameterError(
                f"no memory can be planned for models of type {kind!r}: {error}; expected a Llama-like config"
            ) from error

    @property
    def attention(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_size

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.vocabulary * self.hidden

    @property
    def linear(self) -> int:
        """Parameters of the blocks' linear layers, those which LLM.int8 quantises and the watermark trains."""
        keys = self.key_value_heads * self.head_size
        return self.layers * self.hidden * (2 * self.attention + 2 * keys + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.embedding * (1 if self.tied else 2) + self.linear + (2 * self.layers + 1) * self.hidden

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(self.embedding, self.hidden * self.intermediate, self.hidden * self.attention)

    def block_bytes(self, precision: str) -> int:
        """What autograd keeps of one decoder block for a token."""
        size = BYTES[precision]
        norms = 2 * (4 + 4 + size) * self.hidden
        return norms + size * (5 * self.attention + 4 * self.intermediate) + 4 * self.heads


@dataclass(frozen=True)
class MemoryPlan:
    """What a stage holds at its peak.

    Attributes:
        stage: "read", "merge" or "embed NAME".
        parts: bytes by what they are.
        advice: settings that would lower the sum.
    """

    stage: str
    parts: tuple[tuple[str, int], ...]
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(size for _, size in self.parts)

    def describe(self) -> str:
        """A small table."""
        rows = [(self.stage, self.total), *((f"  {name}", size) for name, size in self.parts)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / 1e9:9.3f} GB" for name, size in rows)


def plan_read(shape: Shape, dtype: str) -> MemoryPlan:
    """Answering probes with one loaded model and, for schemes that read one, its quantised twin."""
    size = BYTES[dtype]
    block = 4 * shape.hidden + 4 * shape.attention + 4 * shape.intermediate
    cache = 2 * shape.layers * shape.key_value_heads * shape.head_size
    return MemoryPlan(
        "read",
        (
            ("weights", shape.parameters * size),
            ("quantised twin", shape.linear * size),
            ("activations and cache", READ_TOKENS * size * (block + cache)),
            ("logits", READ_LOGITS * shape.vocabulary * (size + 4)),
        ),
        () if size == 2 else ('dtype = "bfloat16"',),
    )


def plan_merge(shape: Shape, dtype: str, parents: int) -> MemoryPlan:
    """Merging `parents` and their base into one loaded model, tensor by tensor, computed in float32."""
    return MemoryPlan(
        "merge",
        (
            ("weights", shape.parameters * BYTES[dtype]),
            ("one tensor of each model", (parents + 1 + MERGED) * shape.largest * 4),
        ),
        () if BYTES[dtype] == 2 else ('dtype = "bfloat16"',),
    )


def plan_embedding(shape: Shape, budget: str, training: Training, *, rows: int, length: int) -> MemoryPlan:
    """Training a protection into float32 weights.

    Args:
        shape: the model.
        budget: the world's name for it; it tells what is trained and what is kept beside the weights.
        training: precision, checkpointing, optimizer and parts of a batch.
        rows: rows of a batch.
        length: tokens of a row; every token is taken to be labelled, the most that there can be.
    """
    watermark = budget.startswith("quantization_watermark")
    trained, kept = shape.parameters, 0
    if watermark:
        trained, kept = shape.linear, shape.linear * (5 if budget.endswith(".rollback") else 1)
    elif budget.endswith(".adapter"):
        trained, kept = 2 * shape.hidden * shape.hidden, 4 * shape.embedding  # an upper bound; the table, copied
    size, half = BYTES[training.precision], training.precision != "float32"
    tokens = -(-rows // training.micro_batches) * length
    block = shape.block_bytes(training.precision)
    cast = 2 * (shape.linear + shape.embedding) if half else 0
    if training.gradient_checkpointing:
        cast = 2 * (shape.linear // shape.layers + shape.embedding) if half else 0
        stored = 4 * shape.hidden * shape.layers + block
    else:
        stored = block * shape.layers
    outside = 4 * 6 * shape.hidden
    states = round(trained * STATE_BYTES[training.optimizer])
    parts = (
        ("weights", 4 * shape.parameters),
        ("gradients", 4 * trained),
        ("optimizer states", states),
        ("codes of the watermark" if watermark else "embeddings of the adapter", kept),
        ("weights cast to bfloat16", cast),
        ("activations", tokens * (stored + block + outside)),
        ("logits", tokens * shape.vocabulary * (12 + (size if half else 0))),
        ("projection of one weight", 4 * PROJECTED * shape.hidden * shape.intermediate if watermark else 0),
    )
    return MemoryPlan(f"embed {budget}", tuple(part for part in parts if part[1]), _advice(training, rows))


def _advice(training: Training, rows: int) -> tuple[str, ...]:
    advice = []
    if not training.gradient_checkpointing:
        advice.append("gradient_checkpointing = true")
    if training.optimizer != "paged_adamw8bit":
        advice.append('optimizer = "paged_adamw8bit"')
    if training.micro_batches < rows:
        advice.append(f"micro_batches up to {rows}")
    if training.precision == "float32":
        advice.append('precision = "bfloat16"')
    return tuple(advice)


def check_fits(plan: MemoryPlan, free: int) -> None:
    """Refuse a stage for which a device has no room.

    Args:
        plan: the stage.
        free: bytes that are free.

    Raises:
        ParameterError: the plan is larger; the line says what to change.
    """
    if plan.total > free:
        change = f"set {', '.join(plan.advice)}, or choose" if plan.advice else "choose"
        raise ParameterError(
            f"{plan.stage} needs {plan.total / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free; {change} a smaller model "
            "or a larger device"
        )


def plans_of(world: World, length: int | None = None) -> list[MemoryPlan]:
    """Plans of reading, merging and each training budget.

    Args:
        world: no weights of it are read.
        length: tokens of a training row; by default those of the world's longest text and a protection's addition.

    Raises:
        ParameterError: the world's models are not Llama-like.
    """
    shape, tokens = _shape(world), length or _longest(world) + KEY_TOKENS
    embeddings = [
        plan_embedding(shape, name, budget.training, rows=budget.batch_size, length=tokens)
        for name, budget in world.budgets.items()
    ]
    return [plan_read(shape, world.dtype), plan_merge(shape, world.dtype, len(world.parents())), *embeddings]


def check_embedding(world: World, name: str, budget: Budget) -> None:
    """Refuse a training budget for which the world's GPU has no room; of other devices nothing is asked.

    Raises:
        ParameterError: says how much is needed and what to change.
    """
    if not world.device.startswith("cuda"):
        return
    try:
        shape = _shape(world)
    except ParameterError:  # of a kind whose memory nobody has worked out
        return
    length = _longest(world) + KEY_TOKENS
    plan = plan_embedding(shape, name, budget.training, rows=budget.batch_size, length=length)
    check_fits(plan, free_bytes(world.device))


def _shape(world: World) -> Shape:
    import torch

    with torch.device("meta"):
        return Shape.of(world.build_model().config)


def _longest(world: World) -> int:
    texts = [budget.texts for budget in world.budgets.values()] or [world.texts]
    whole = {text for group in texts for text in (*group.plain, *group.domain)}
    whole |= {prompt + answer for group in texts for prompt, answer in group.dialogues}
    return max((len(ids) for ids in world.tokenizer(sorted(whole))["input_ids"]), default=0) if whole else 0


def free_bytes(device: str) -> int:
    """What is free on a torch device: of a GPU's memory, or of the machine's as its kernel reckons."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ParameterError("this system does not say how much memory is free; give --free")


def free_workers(worker_bytes: int | None) -> int | None:
    """How many workers the free memory of this machine holds; None if that is not known."""
    if worker_bytes is None:
        return None
    try:
        return free_bytes("cpu") // worker_bytes
    except ParameterError:
        return None
