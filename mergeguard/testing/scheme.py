"""What may be gated: an instance of a class that keeps the contract's form. Looked at before anything is measured."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergeguard.errors import MergeguardError, ParameterError
from mergeguard.protections.contract import Access, Claim, Protection, TextProtection
from mergeguard.protections.registry import PROTECTIONS, make_protection
from mergeguard.specs import parse_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embed": (("model", "tokenizer"), ("rng", "budget")),
    "decoys": (("evidence", "n", "rng"), ()),
    "read": (("model", "tokenizer", "evidence", "references"), ()),
}
_TEXT_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "probes": (("evidence",), ()),
    "judge": (("answers", "evidence"), ()),
}


def find_scheme(text: str) -> Protection:
    """The scheme that `text` names: `NAME` as registered, or `MODULE:CLASS`, each with `(parameters)` or without.

    A module is found where Python finds it, the current folder included.

    Raises:
        MergeguardError: there is no such module, class or name; or the class is not one that can be gated.
        ParameterError, UnknownNameError: a parameter is out of its domain or unknown.
    """
    spec = parse_spec(text)
    if ":" not in spec.name:
        return checked(make_protection(spec))
    module, _, attribute = spec.name.partition(":")
    found = _load(module, attribute)
    _check_class(found)
    return checked(_made(found, dict(spec.parameters)))


def checked(scheme: object) -> Protection:
    """`scheme`, if it is an instance of a protection that keeps the contract's form.

    Raises:
        MergeguardError: it is not; the line says what to change.
    """
    if isinstance(scheme, type):
        raise MergeguardError(f"{scheme.__name__} is a class; give an instance: {scheme.__name__}()")
    if not isinstance(scheme, Protection):
        raise MergeguardError(f"{scheme!r} is no protection; give an instance of a class derived from Protection")
    _check_class(type(scheme))
    _made(type(scheme), dict(scheme.parameters))
    return scheme


def made_anew(protection: Protection) -> Protection:
    """Another instance of the same class with the same parameters.

    Raises:
        MergeguardError: the class cannot be made of its parameters alone.
    """
    return _made(type(protection), dict(protection.parameters))


def _load(module: str, attribute: str) -> Any:
    try:
        found: Any = import_module(module)
    except (Exception, SystemExit) as error:  # anybody's code runs at import
        raise MergeguardError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise MergeguardError(f"{module} has no {attribute!r}; expected MODULE:CLASS, e.g. my_package.scheme:Mine")
        found = getattr(found, part)
    return found


def _check_class(scheme: object) -> None:
    if not (isinstance(scheme, type) and issubclass(scheme, Protection)):
        raise MergeguardError(f"{scheme!r} is no class derived from mergeguard.protections.contract.Protection")
    name = scheme.__qualname__
    if inspect.isabstract(scheme):
        missing = ", ".join(sorted(scheme.__abstractmethods__))
        raise MergeguardError(f"{name} is abstract; it has to define {missing}")
    written: object = getattr(scheme, "name", None)
    if not _is_name(written):
        raise MergeguardError(f"{name}.name is {written!r}; expected a word such as my_scheme, which ids begin with")
    declared: tuple[object, object] = scheme.access, scheme.claim  # anybody's class may say anything
    if not (isinstance(declared[0], Access) and isinstance(declared[1], Claim)):
        raise MergeguardError(f"{name}.access and {name}.claim have to be members of Access and of Claim")
    needs: object = scheme.needs
    if not isinstance(needs, frozenset | set):
        raise MergeguardError(f"{name}.needs is {needs!r}; expected a frozenset of names, e.g. {{'base'}}")
    methods = {**_ARGUMENTS, **(_TEXT_ARGUMENTS if issubclass(scheme, TextProtection) else {})}
    for method, (positional, keywords) in methods.items():
        _check_signature(scheme, method, positional, keywords)


def _is_name(text: object) -> bool:
    try:
        return isinstance(text, str) and text.isidentifier() and parse_spec(text).name == text
    except ParameterError:
        return False


def _check_signature(scheme: type, method: str, positional: tuple[str, ...], keywords: tuple[str, ...]) -> None:
    """Whether the method can be called as mergeguard calls it."""
    function = getattr(scheme, method)
    written = f"{', '.join((*positional, *(f'{name}=...' for name in keywords)))}"
    if not callable(function):
        raise MergeguardError(f"{scheme.__qualname__}.{method} is no method; expected {method}({written})")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise MergeguardError(f"{scheme.__qualname__}.{method} has to be a plain function: no async, no yield")
    own = () if isinstance(inspect.getattr_static(scheme, method), staticmethod | classmethod) else (None,)
    try:
        inspect.signature(function).bind(*own, *positional, **dict.fromkeys(keywords))
    except TypeError as error:
        raise MergeguardError(
            f"{scheme.__qualname__}.{method} has a wrong signature: {error}; it is called as {method}({written})"
        ) from error


def _made(scheme: type[Protection], parameters: dict[str, Any]) -> Protection:
    try:
        made: object = scheme.create(**parameters)
    except MergeguardError:
        raise
    except Exception as error:  # a third party's constructor may fail in any way
        raise MergeguardError(
            f"{scheme.__qualname__} cannot be made of its parameters: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, Protection):
        raise MergeguardError(f"{scheme.__qualname__}.create returned {type(made).__name__}, expected a Protection")
    if not hasattr(made, "spec"):
        raise MergeguardError(f"{scheme.__qualname__}.__init__ has to call super().__init__(**parameters)")
    return made


@contextmanager
def known(protection: Protection) -> Iterator[None]:
    """Within it the registry knows the protection's class by its name, so that written forms can be made.

    Raises:
        MergeguardError: another class is registered under the name.
    """
    name, scheme = protection.name, type(protection)
    if name in PROTECTIONS:
        other = PROTECTIONS.get(name)
        if _place(other) != _place(scheme) and not issubclass(scheme, other):
            raise MergeguardError(
                f"two protections are named {name!r}: {_place(scheme)} and {_place(other)}; choose another name"
            )
        yield
        return
    PROTECTIONS.register(name, scheme)
    try:
        yield
    finally:
        PROTECTIONS.unregister(name)


def _place(scheme: Any) -> str:
    return f"{scheme.__module__}:{scheme.__qualname__}"


def address(protection: Protection) -> dict[str, str]:
    """Where another process finds the class: its module, the module's file, and its name there.

    Raises:
        MergeguardError: it is defined where no other process looks.
    """
    scheme = type(protection)
    file = getattr(sys.modules.get(scheme.__module__), "__file__", None) or ""
    if "<locals>" in scheme.__qualname__ or (scheme.__module__ == "__main__" and not file):
        raise MergeguardError(
            f"{scheme.__qualname__} is defined where no other process finds it; define it at the top of a module"
        )
    return {"module": scheme.__module__, "file": file, "class": scheme.__qualname__}
