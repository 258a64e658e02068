"""Parameters of recipes: gradients over layers, filters of tensors, and values of the right type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.errors import MergeguardError
from mergeguard.mergers.contract import Parameter
from mergeguard.mergers.settings import Choice, Setting, first_value, read_value

NUMBER = Parameter("weight", 1.0, "")
NUMBERS = st.floats(-1e6, 1e6)


def gradient(*values: bool | float | str, pattern: str | None = None) -> Choice:
    return Choice(pattern, values, 1)


def number(raw: bool | float | str) -> bool | float | str:
    return read_value(NUMBER, "merger 'ties'", raw)


@given(values=st.lists(NUMBERS, min_size=1, max_size=6), t=st.floats(0, 1))
def test_a_gradient_stays_within_its_neighbours_and_starts_and_ends_at_its_ends(values: list[float], t: float) -> None:
    found = gradient(*values).at(t, number)
    lower = int(t * (len(values) - 1))
    near = values[lower : lower + 2]
    slack = 1e-9 * max(map(abs, near))
    assert min(near) - slack <= float(found) <= max(near) + slack
    assert gradient(*values).at(0, number) == values[0]
    assert gradient(*values).at(1, number) == values[-1]


@given(start=NUMBERS, stop=NUMBERS, t=st.floats(0, 1))
def test_a_gradient_of_two_values_is_linear(start: float, stop: float, t: float) -> None:
    assert gradient(start, stop).at(t, number) == pytest.approx(start + t * (stop - start), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize(("t", "expected"), [(0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.75), (1, 0.5)])
def test_a_gradient_bends_at_its_values(t: float, expected: float) -> None:
    assert gradient(0, "1e0", 0.5).at(t, number) == expected


@pytest.mark.parametrize(("t", "expected"), [(0, True), (0.49, True), (0.5, False), (1, True)])
def test_a_gradient_of_switches_steps(t: float, expected: bool) -> None:
    assert gradient(True, False, True).at(t, lambda raw: raw) is expected


@given(
    patterns=st.lists(st.none() | st.sampled_from(["*", "", "mlp", "attn", "layers.1", "q"]), max_size=5),
    tensor=st.sampled_from(["model.layers.1.mlp.weight", "model.layers.10.attn.q.weight", "lm_head.weight"]),
)
def test_the_first_filter_that_a_name_contains_holds(patterns: list[str | None], tensor: str) -> None:
    setting = Setting(tuple(gradient(index, pattern=pattern) for index, pattern in enumerate(patterns)), 1)
    matching = [
        index for index, pattern in enumerate(patterns) if pattern is None or pattern == "*" or pattern in tensor
    ]
    assert setting.at(tensor, 0, number) == (matching[0] if matching else None)


def test_a_scope_whose_filters_do_not_match_leaves_it_to_the_next() -> None:
    special = {"weight": Setting((gradient(1, pattern="mlp"),), 1)}
    general = {"weight": Setting((gradient(2),), 1)}
    assert first_value([special, general], "weight", "x.mlp.y", 0, number) == 1
    assert first_value([special, general], "weight", "x.attn.y", 0, number) == 2
    assert first_value([special, {}], "weight", "x.attn.y", 0, number) is None


@pytest.mark.parametrize(
    ("default", "raw", "expected"),
    [
        (1.0, "1e-5", 1e-5),
        (1.0, 3, 3.0),
        (1, "12", 12),
        (1, 12.0, 12),
        (True, 0, False),
        (True, "False", False),
        ("none", True, "l1"),
        ("none", False, "none"),
        ("none", "l1", "l1"),
    ],
)
def test_values_get_the_parameters_type(default: float | str, raw: float | str, expected: float | str) -> None:
    value = read_value(Parameter("rescale", default, "", ("none", "l1")), "merger 'x'", raw)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("default", "raw"),
    [
        (1.0, True), (1.0, "much"), (1.0, "nan"), (1.0, "inf"), (1.0, 10**400), (1.0, "0.0"), (1.0, 1.5), (1, 1.5),
        (1, True), (True, 2), (True, "perhaps"), ("none", "l2"), ("none", 1), ("none", ""),
    ],
)  # fmt: skip
def test_values_of_another_type_or_domain_are_refused(default: float | str, raw: float | str) -> None:
    parameter = Parameter("rescale", default, "", ("none", "l1"), above=0.0, at_most=1.0)
    with pytest.raises(MergeguardError, match=r"parameter 'rescale' of merger 'x' is .*, expected .*"):
        read_value(parameter, "merger 'x'", raw)
