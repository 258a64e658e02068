"""Which cases a run consists of."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.matrix.cases import check_coefficients, expand, parse_coefficients, with_axes
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, MERGERS, parse_merger
from mergeguard.protections.registry import DEFAULT_PROTECTIONS

if TYPE_CHECKING:
    from mergeguard.mergers.contract import Merger

QUICK = settings(max_examples=40, deadline=None)
PROTECTIONS = ("gaussian_probe", "quantization_watermark(bits=4)", "quantization_watermark")
hundredths = st.lists(st.integers(0, 100), unique=True, min_size=1, max_size=12)


def unweighted(name: str) -> Merger:
    """A merger whose method takes no weights."""
    return replace(MERGERS.get("linear"), name=name, weighting="none")()


def test_the_default_matrix_has_45_cells_a_protection() -> None:
    cases = expand(DEFAULT_PROTECTIONS)
    assert [case.id for case in cases] == [
        f"{protection}-{merger}-0.{tenth}"
        for protection, merger, tenth in product(DEFAULT_PROTECTIONS, DEFAULT_MERGERS, range(1, 10))
    ]
    assert len(cases) == 45 * len(DEFAULT_PROTECTIONS)
    assert {(case.world, case.seed) for case in cases} == {("tiny", 0)}


def test_protections_are_outermost_and_coefficients_innermost_in_ascending_order() -> None:
    cases = expand(["gaussian_probe", "quantization_watermark"], ["ties", "linear"], [0.5, 0.25], world="w", seed=3)
    assert [case.id for case in cases] == [
        "gaussian_probe-ties-0.25",
        "gaussian_probe-ties-0.5",
        "gaussian_probe-linear-0.25",
        "gaussian_probe-linear-0.5",
        "quantization_watermark-ties-0.25",
        "quantization_watermark-ties-0.5",
        "quantization_watermark-linear-0.25",
        "quantization_watermark-linear-0.5",
    ]
    assert {(case.world, case.seed) for case in cases} == {("w", 3)}


def test_ids_write_parameters_sorted_and_without_spaces() -> None:
    (case,) = expand(["quantization_watermark( bits=4 )"], ["ties(normalize=true, density=0.4)"], [1])
    assert case.id == "quantization_watermark(bits=4)-ties(density=0.4,normalize=true)-1"


def test_a_merger_without_a_coefficient_has_one_case() -> None:
    cases = expand(["gaussian_probe"], [unweighted("slerpless"), "linear"], [0.2, 0.8])
    assert [case.id for case in cases] == [
        "gaussian_probe-slerpless-none",
        "gaussian_probe-linear-0.2",
        "gaussian_probe-linear-0.8",
    ]
    assert cases[0].coefficient is None


@QUICK
@given(st.permutations(PROTECTIONS), st.permutations([*DEFAULT_MERGERS, "ties(density=0.25)"]), hundredths)
def test_every_combination_occurs_once_under_an_id_of_its_own(
    protections: list[str], mergers: list[str], percent: list[int]
) -> None:
    coefficients = [value / 100 for value in percent]
    cases = expand(protections, mergers, coefficients)
    cells = [(str(case.protection), str(case.merger), case.coefficient) for case in cases]
    assert cells == list(product(protections, mergers, sorted(coefficients)))
    assert len({case.id for case in cases}) == len(cases) == len(protections) * len(mergers) * len(coefficients)
    assert expand(protections, mergers, coefficients[::-1]) == cases


@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_accepted_coefficients_never_share_an_id(values: list[float]) -> None:
    try:
        accepted = check_coefficients(values)
    except ParameterError:
        assert len({f"{value:g}" for value in map(abs, values)}) < len(values)
        return
    assert list(accepted) == sorted(values)
    cases = expand(["gaussian_probe"], ["linear"], values)
    assert len({case.id for case in cases}) == len(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5", "coefficient 1.5 is outside [0, 1]"),
        ("1.0000001", "coefficient 1.0000001 is outside [0, 1]"),
        ("0.5,-0.1", "coefficient -0.1 is outside [0, 1]"),
        ("nan", "coefficient nan is outside [0, 1]"),
        ("inf", "coefficient inf is outside [0, 1]"),
        ("0.1,0.5,0.1", "coefficient 0.1 is given more than once"),
        ("0,-0.0", "coefficient 0 is given more than once"),
        ("0.3,0.30000000000000004", "coefficient 0.3 is given more than once"),
        ("", "cannot read the coefficients ''; expected numbers such as 0.1,0.5"),
        ("0.1,,0.5", "cannot read the coefficients '0.1,,0.5'"),
        ("half", "cannot read the coefficients 'half'"),
    ],
)
def test_a_bad_coefficient_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_coefficients(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_coefficients_are_read_sorted_and_with_both_ends() -> None:
    assert parse_coefficients(" 1, 0,0.25") == (0.0, 0.25, 1.0)
    assert str(parse_coefficients("-0.0")[0]) == "0.0"


@pytest.mark.parametrize("nothing", ["protection", "merger", "coefficient"])
def test_nothing_to_run_is_refused(nothing: str) -> None:
    given = {"protection": ["gaussian_probe"], "merger": ["linear"], "coefficient": [0.5]}
    given[nothing] = []
    with pytest.raises(ParameterError, match=f"no {nothing} is given"):
        expand(given["protection"], given["merger"], given["coefficient"])


@pytest.mark.parametrize(
    ("protections", "mergers", "message"),
    [
        (["gaussian_prob"], ["linear"], "unknown protection 'gaussian_prob'; did you mean 'gaussian_probe'?"),
        (["gaussian_probe"], ["tias"], "unknown merger 'tias'; did you mean 'ties'?"),
        (["gaussian_probe"], ["ties(densty=0.4)"], "did you mean 'density'?"),
        (["gaussian_probe"], ["xyz"], "unknown merger 'xyz'; known: arcee_fusion"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(protections: list[str], mergers: list[str], message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        expand(protections, mergers)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("protections", "mergers", "message"),
    [
        (["gaussian_probe"] * 2, ["linear"], "protection gaussian_probe is given more than once"),
        (["gaussian_probe"], ["linear", "ties", "linear"], "merger linear is given more than once"),
        (["gaussian_probe"], ["ties(density=0.4)", "ties( density=0.40 )"], "merger ties(density=0.4) is given more"),
        (["gaussian_probe"], ["ties(density=1.0)", "ties"], "merger ties is given more than once"),
        (["gaussian_probe"], ["ties(density=2)"], "'density'"),
        (["gaussian probe-"], ["ties("], "cannot read 'ties('"),
    ],
)
def test_what_is_repeated_or_out_of_its_domain_is_refused(
    protections: list[str], mergers: list[str], message: str
) -> None:
    with pytest.raises(ParameterError) as caught:
        expand(protections, mergers)
    assert message in str(caught.value)


def test_cases_are_values_that_equal_their_likes() -> None:
    first = expand(["gaussian_probe"], ["ties(density=0.4)"], DEFAULT_COEFFICIENTS)
    again = expand(["gaussian_probe"], [parse_merger("ties( density=0.4 )")], DEFAULT_COEFFICIENTS)
    assert first == again
    assert len({*first, *again}) == len(first)


def test_expanding_loads_no_torch() -> None:
    code = (
        "import sys; from mergeguard.matrix.cases import expand; expand(['quantization_watermark']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Axes


def test_axes_vary_the_mergers_that_have_a_density() -> None:
    mergers = with_axes(["linear", "ties(density=0.4,lambda=0.5)"], "normalize,density")
    assert [str(merger) for merger in mergers] == [
        "linear",
        *(
            f"ties(density={density},lambda=0.5,normalize={normalize})"
            for density in (0.2, 0.4, 0.6, 0.8)
            for normalize in ("true", "false")
        ),
    ]


def test_an_axis_leaves_the_other_parameters_alone() -> None:
    mergers = with_axes(["dare_ties(density=0.4,normalize=true)"], "density")
    assert [merger.parameters["density"] for merger in mergers] == [0.2, 0.4, 0.6, 0.8]
    assert {merger.parameters["normalize"] for merger in mergers} == {True}


def test_mergers_that_axes_make_equal_are_one() -> None:
    once = with_axes(["ties"], "density")
    assert with_axes(["ties(density=0.2)", "ties(density=0.9)"], "density") == once
    assert len(expand(["gaussian_probe"], with_axes(DEFAULT_MERGERS, "density,normalize"), [0.5])) == 2 + 3 * 8


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown axis 'densities'; did you mean 'density'"):
        with_axes(DEFAULT_MERGERS, "normalize,densities")
