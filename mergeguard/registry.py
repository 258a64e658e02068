"""A registry of named things: ours, loaded on first use, and third parties' through an entry-point group."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mergeguard.errors import MergeguardError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects given as such, as `module:attribute`, or as entry points of one group.

    Args:
        kind: what the registry holds, in the singular ("merger"); used in messages.
        group: entry-point group of third parties ("mergeguard.mergers").
        builtin: our own names and `module:attribute` targets.
    """

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._targets: dict[str, str | EntryPoint] = dict(builtin)
        self._loaded: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str, item: T) -> None:
        """Add `item` under `name`.

        Raises:
            MergeguardError: the name is taken.
        """
        if name in self:
            raise MergeguardError(f"a {self.kind} named {name!r} is registered already; choose another name")
        self._loaded[name] = item
        self._targets[name] = ""

    def offer(self, name: str, target: str) -> None:
        """Let `name` stand for `module:attribute` unless it is known: how a worker learns what its parent runs."""
        if name not in self:
            self._targets[name] = target

    def unregister(self, name: str) -> None:
        """Remove a name that `register` added."""
        del self._loaded[name], self._targets[name]

    def get(self, name: str) -> T:
        """The object registered as `name`.

        Raises:
            UnknownNameError: there is none.
            MergeguardError: it fails to import.
        """
        self._discover()
        if name not in self._targets:
            raise UnknownNameError(self.kind, name, self._targets)
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self._targets[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._targets

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._targets))

    def _discover(self) -> None:
        if self._discovered:
            return
        found: dict[str, str | EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self._targets or point.name in found:
                source = point.dist.name if point.dist else point.value
                raise MergeguardError(
                    f"two {self.kind}s are named {point.name!r}, one of them from {source}; "
                    "uninstall one or rename its entry point"
                )
            found[point.name] = point
        self._targets.update(found)
        self._discovered = True  # only now: an error is one for every later call too

    def _load(self, name: str, target: str | EntryPoint) -> Any:
        try:
            if isinstance(target, EntryPoint):
                return target.load()
            module, _, attribute = target.partition(":")
            return attrgetter(attribute)(import_module(module))
        except MergeguardError:
            raise
        except (Exception, SystemExit) as error:  # it may fail in any way; none may vanish from a gate in silence
            raise MergeguardError(f"{self.kind} {name!r} failed to load: {type(error).__name__}: {error}") from error
