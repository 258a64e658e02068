"""Protections by name, ours and those of entry points in the group `mergeguard.protections`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import MergeguardError
from mergeguard.registry import Registry
from mergeguard.specs import Spec, parse_spec

if TYPE_CHECKING:
    from mergeguard.protections.contract import Protection

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
    scheme = PROTECTIONS.get(parsed.name)
    try:
        protection = scheme.create(**dict(parsed.parameters))
    except TypeError as error:
        raise MergeguardError(f"protection {parsed.name!r} cannot be made: {error}") from error
    return protection
