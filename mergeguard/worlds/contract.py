"""What a world is: a base, the owner's clean upstream, donors, a tokenizer, and a skill for each upstream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.reading import Probe, Sampling
    from mergeguard.specs import Value

UPSTREAM = "upstream"
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Texts:
    """Texts that the owner trains with and verifies on. All of them belong to the world, none is secret.

    Attributes:
        plain: ordinary sentences.
        domain: sentences of one recognisable domain (an encyclopedia), for schemes bound to a kind of text.
        dialogues: (prompt with template, answer) pairs that the owner's model should keep answering as it does.
    """

    plain: Sequence[str]
    domain: Sequence[str]
    dialogues: Sequence[tuple[str, str]]


NO_TEXTS = Texts((), (), ())


@dataclass(frozen=True)
class Training:
    """How an embedding computes, which decides its memory more than its result.

    Attributes:
        precision: "float32", or "bfloat16" for matrix products in bfloat16 over float32 weights.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        optimizer: "adamw", or "adamw8bit" or "paged_adamw8bit" of bitsandbytes (CUDA only).
        micro_batches: parts in which a batch is computed, one after the other, their gradients summed.
    """

    precision: str = "float32"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                raise ParameterError(f"{name} of a training is {getattr(self, name)!r}; known: {', '.join(choices)}")
        if self.micro_batches < 1:
            raise ParameterError(f"micro_batches of a training is {self.micro_batches}, expected at least 1")


@dataclass(frozen=True)
class Budget:
    """What a world affords for one embedding: schedule, scheme options (grid, proportions) and texts."""

    texts: Texts = field(repr=False)
    steps: int
    learning_rate: float
    batch_size: int = 16
    options: Mapping[str, Value] = field(default_factory=dict)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Skill:
    """A parent's skill: probes of which the parent matches nearly all, and the base nearly none.

    Attributes:
        parent: whose skill it is: "upstream" or a donor's name.
        sampling: how answers are drawn; greedy if None.
    """

    name: str
    parent: str
    probes: Sequence[Probe] = field(repr=False)
    sampling: Sampling | None = None


@dataclass(frozen=True)
class World:
    """Models of one ancestry, never changed.

    Attributes:
        base, upstream, donors: states, each storage under one name (`worlds.states`): dicts, or mappings that read a
            tensor from its file when it is asked for. On the CPU, in any floating dtype.
        build_model: makes an untrained model of the architecture (no weights are read or downloaded), with a config of
            its own: what somebody writes into one model's must not stand in the next one's.
        budgets: training budgets by name ("quantization_watermark.full"); "default" serves any other scheme.
        digests: SHA-256 of each weights file.
        threads: torch threads per worker, fixed where verdicts must not depend on the machine's cores.
        worker_bytes: memory of a worker on the CPU at its most, where several would not fit into every machine's.
        device: where models compute and merge, e.g. "cuda".
        dtype: torch's name of the dtype in which models are loaded and merged, one of `DTYPES`.
        form: how the parents came to be, where there is more than one way, e.g. "adapters as shipped".
    """

    name: str
    base: Mapping[str, Tensor] = field(repr=False)
    upstream: Mapping[str, Tensor] = field(repr=False)
    donors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    build_model: Callable[[], PreTrainedModel] = field(repr=False)
    skills: Sequence[Skill]
    texts: Texts = field(repr=False)
    budgets: Mapping[str, Budget] = field(repr=False)
    digests: Mapping[str, str]
    threads: int | None = None
    worker_bytes: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    form: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ParameterError(
                f"the dtype of world {self.name!r} is {self.dtype!r}, expected one of: {', '.join(DTYPES)}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        import torch

        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def model(self, state: Mapping[str, Tensor]) -> PreTrainedModel:
        """A new model in evaluation mode with the given weights, on the world's device and in its dtype.

        The weights are copied tensor by tensor; buffers that no state holds, such as rotary frequencies, keep the dtype
        in which the architecture computes them.

        Raises:
            ParameterError: torch cannot use the world's device here.
            IncompatibleModelsError: a tensor of the state is missing, extra or of another shape.
        """
        from mergeguard.worlds.states import load_state, new_model

        model = new_model(self.build_model, self.device, self.torch_dtype)
        load_state(model, state)
        return model

    def budget(self, name: str) -> Budget:
        """The budget called `name`, else the one of its first part, else the default.

        Raises:
            ParameterError: the world has none of them.
        """
        if (found := budget_called(name, self.budgets)) is not None:
            return found
        raise ParameterError(f"world {self.name!r} has no training budget for {name!r} and no default one")

    def parents(self) -> dict[str, Mapping[str, Tensor]]:
        """The clean parents of a merge, the owner's upstream first."""
        return {UPSTREAM: self.upstream, **self.donors}


def budget_called(name: str, budgets: Mapping[str, Budget]) -> Budget | None:
    """The budget called `name`, else the one of its first part, else the default; None if there is none of them."""
    keys = (name, name.partition(".")[0], "default")
    return next((budgets[key] for key in keys if key in budgets), None)


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own tensors, parameters and persistent buffers, in the order of `state_dict`, each storage once.

    Of several names of one tensor the first stays. Writing to a tensor changes the model.
    """
    own: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in seen:
            own[name] = tensor
            seen.add(place)
    return own
