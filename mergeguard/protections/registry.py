"""Protections by name, ours and those of entry points in the group `mergeguard.protections`."""

from __future__ import annotations

from mergeguard.errors import MergeguardError
from mergeguard.protections.contract import Protection
from mergeguard.registry import Registry
from mergeguard.specs import Spec, parse_spec

PROTECTIONS: Registry[type[Protection]] = Registry(
    "protection",
    "mergeguard.protections",
    {
        "gaussian_probe": "mergeguard.protections.gaussian_probe:GaussianProbe",
        "instructional_fingerprint": "mergeguard.protections.instructional_fingerprint:InstructionalFingerprint",
        "quantization_watermark": "mergeguard.protections.quantization_watermark:QuantizationWatermark",
    },
)
DEFAULT_PROTECTIONS = ("quantization_watermark", "instructional_fingerprint")


def make_protection(spec: str | Spec) -> Protection:
    """The protection that `spec` names, e.g. "instructional_fingerprint(variant=simple)".

    Raises:
        UnknownNameError: no such protection or parameter.
        ParameterError: a parameter is out of its domain.
        MergeguardError: the class cannot be loaded or made.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    scheme: object = PROTECTIONS.get(parsed.name)  # an entry point may be anything
    if not (isinstance(scheme, type) and issubclass(scheme, Protection)):
        raise MergeguardError(f"protection {parsed.name!r} is registered as {scheme!r}; expected a Protection class")
    try:
        return scheme.create(**dict(parsed.parameters))
    except MergeguardError:
        raise
    except Exception as error:  # a third party's constructor may fail in any way
        raise MergeguardError(f"protection {parsed.name!r} cannot be made: {type(error).__name__}: {error}") from error
