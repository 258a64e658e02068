"""`mergekit:<name>`: any merge method of an installed mergekit 0.1.5, third parties' registered ones included.

mergekit is optional (the extra `oracle`) and LGPL-3.0: it runs as the library that is installed, none of it is here.
"""

from __future__ import annotations

import math
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from mergeguard.errors import MergeguardError, ParameterError, UnknownNameError
from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared
from mergeguard.mergers.nearswap import PRIMARY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

    from mergeguard.specs import Value

PREFIX = "mergekit:"
_INSTALL = "pip install 'mergeguard[oracle]'"
_TASK_VECTORS = Parameter("task_vectors", False, "whether the models are merged as differences from the base")
_BASE = -1  # its id among the inputs; a model's is its index
_DETERMINISTIC = frozenset(
    (
        *("multislerp", "nearswap", "ram", "ramplus_tl", "sce", "linear", "slerp", "nuslerp", "passthrough"),
        *("model_stock", "karcher", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
    )
)
"""Those of mergekit 0.1.5 that never draw; arcee_fusion draws for large tensors, and of others we cannot know."""

_drawing = threading.Lock()
"""mergekit draws from torch's global generator, of which the process has one: random methods run one at a time."""


@dataclass(frozen=True)
class Required(Parameter):
    """A number that must be given: its default is NaN, which stands for none."""

    def check(self, owner: str, value: Value) -> None:
        if isinstance(value, float) and math.isnan(value):
            raise ParameterError(f"{owner} needs the parameter {self.name!r}: mergekit has no default for it; give one")
        super().check(owner, value)


def mergekit_method(name: str) -> Method:
    """The merge method `name` of mergekit, as a `Method` named `mergekit:<name>`.

    Its parameters are mergekit's, with mergekit's defaults; a number that mergekit requires has to be given. Not
    offered are those that are neither numbers, booleans nor one of a list of words: they keep their defaults. A
    parameter `weight` of the models is our weights. Where mergekit's contract demands a base and exactly two inputs,
    the base is one of the models (`primary`); where it allows one, `task_vectors` says whether there is one.

    The whole tensor is merged in its own dtype, and the result rounded to that. A method that may draw finds torch's
    global generator seeded by what `generators` gives for the first model, so by our seed and the tensor's name; it
    is restored afterwards, and such methods run one at a time.

    Raises:
        UnknownNameError: mergekit has no such method.
        MergeguardError: mergekit is not installed or not 0.1.5, or the method needs what our recipes cannot say.
    """
    library = _library()
    known = {method.spec.name: method for method in library.registered_methods()}
    if name not in known:
        raise UnknownNameError("mergekit method", name, known)
    spec, contract = known[name].spec, known[name].spec.contract
    base: Literal["ancestor", "none", "optional", "primary"] = "none"
    if contract.base.value == "required":
        base = "primary" if contract.max_inputs == 2 else "ancestor"
    elif contract.base.value == "optional":
        base = "optional"

    apart = 1 if base == "ancestor" else 0  # mergekit counts the base among the inputs
    most = contract.max_non_base
    if most is None and contract.max_inputs is not None:
        most = contract.max_inputs - apart
    weighted = any(_is_weight(entry) for entry in spec.parameters)
    offered = [(entry, _parameter(name, base, entry)) for entry in spec.parameters]
    random = name not in _DETERMINISTIC
    return Method(
        name=PREFIX + name,
        summary=f"mergekit's {spec.pretty_name or name}",
        citation=spec.reference_url or "mergekit",
        combine=_Call(known[name], library.TensorGroup, base, random),
        parameters=(
            *(parameter for entry, parameter in offered if parameter is not None and not _is_weight(entry)),
            *((PRIMARY,) if base == "primary" else (_TASK_VECTORS,) if base == "optional" else ()),
        ),
        prepare=_prepare,
        base=base,
        weighting="weight" if weighted else "none",
        random=random,
        min_models=max(1, contract.min_non_base or 0, contract.min_inputs - apart),
        max_models=most,
    )


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing it warns about its own dependencies
            import_module("mergekit")
            library = import_module("mergekit.merge_methods")
    except ImportError as error:
        if error.name == "mergekit":
            problem = f"mergers named {PREFIX}NAME run in mergekit, which is not installed: {_INSTALL}"
        else:
            problem = f"the installed mergekit fails to import: {' '.join(str(error).split())}; {_INSTALL}"
        raise MergeguardError(problem) from error
    if not hasattr(library, "registered_methods"):
        raise MergeguardError(f"the installed mergekit is not 0.1.5, which mergers named {PREFIX}NAME need: {_INSTALL}")
    return library


def _is_weight(entry: Any) -> bool:
    return bool(entry.name == "weight" and entry.scope.value != "shared")


def _parameter(method: str, base: str, entry: Any) -> Parameter | None:
    """Our form of one of mergekit's parameters; None for one that keeps its default.

    Raises:
        MergeguardError: it has no default, and our recipes cannot give it.
    """
    each, kind = entry.scope.value != "shared", entry.value_type
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    meaning = entry.description or "see mergekit"
    if entry.required:
        if kind not in (float, int) or (entry.scope.value == "input" and base in ("ancestor", "optional")):
            where = " for each input, the base included" if kind in (float, int) else ", which is not a number"
            raise MergeguardError(
                f"mergekit's method {method!r} needs a parameter {entry.name!r}{where}; a recipe cannot give it here"
            )
        return Required(entry.name, math.nan, meaning, per_model=each)  # mergekit takes 3.0 for the int 3
    if kind in (float, int, bool) and entry.default is not None:
        return Parameter(entry.name, kind(entry.default), meaning, per_model=each)
    if get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)):
        return Parameter(entry.name, entry.default, meaning, choices=get_args(kind), per_model=each)
    return None


def _prepare(_base: Tensor, models: Sequence[Tensor], _parameters: Parameters, generators: Generators) -> Prepared:
    """The models, and the seed of what the method may draw, a 0-dimensional int64 tensor."""
    import torch

    seed = torch.randint(2**63 - 1, (), generator=generators(0))
    return lambda _whole: [*models, seed]


@dataclass(frozen=True)
class _Call:
    """A `combine` that calls mergekit's method on one tensor."""

    method: Any
    group: Any  # mergekit's TensorGroup
    base: str
    random: bool

    def __call__(
        self, base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], parameters: Parameters
    ) -> Tensor:
        *tensors, seed = parts
        ids, base_index = list(range(len(tensors))), None
        if self.base == "primary":
            base_index = 0 if parameters["primary"] == "first" else 1
        elif self.base == "ancestor" or (self.base == "optional" and parameters["task_vectors"]):
            tensors, ids, base_index = [base, *tensors], [_BASE, *ids], 0
        group = self.group.from_tensors(tensors, ids=ids, base_index=base_index)
        values = self._values(parameters, weights)
        try:
            if self.random:
                with _drawing, _seeded(int(seed), tensors[0].device):
                    (result,) = self.method((group,), parameters=values)
            else:
                (result,) = self.method((group,), parameters=values)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise MergeguardError(f"mergekit's method {self.method.spec.name!r} failed: {reason}") from error
        merged: Tensor = result.to(tensors[0].dtype)
        borrowed = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return merged.clone() if merged.untyped_storage().data_ptr() in borrowed else merged

    def _values(self, parameters: Parameters, weights: Sequence[float]) -> dict[str, Any]:
        """The values to call with; those of each model by its id, with the default for the base if it has one."""
        values = {}
        for entry in self.method.spec.parameters:
            if not _is_weight(entry) and entry.name not in parameters:
                continue
            value = weights if _is_weight(entry) else parameters[entry.name]
            if entry.scope.value != "shared":
                value = dict(enumerate(value)) | ({} if entry.required else {_BASE: entry.default})
            values[entry.name] = value
        return values


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generator of the CPU, and of the device, seeded; afterwards as they were."""
    import torch

    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
