"""Mergers as values: their written form, defaults and domains, and what is known of them without torch."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import MergeguardError, ParameterError, UnknownNameError
from mergeguard.mergers import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, MERGERS, Merger, Method, Parameter, parse_merger
from mergeguard.mergers.ties import TIES

if TYPE_CHECKING:
    from mergeguard.specs import Value


def values(parameter: Parameter) -> st.SearchStrategy[Value]:
    """Values inside the parameter's domain."""
    if isinstance(parameter.default, bool):
        return st.booleans()
    if isinstance(parameter.default, str):
        return st.sampled_from(parameter.choices)
    low, high = max(parameter.above, parameter.at_least, -1e6), min(parameter.at_most, parameter.below, 1e6)
    if isinstance(parameter.default, int):
        return st.integers(int(low), int(high))
    excluded = {"exclude_min": parameter.above >= low, "exclude_max": parameter.below <= high}
    return st.floats(low, high, allow_subnormal=False, **excluded)


@st.composite
def mergers(draw: st.DrawFn) -> Merger:
    method = MERGERS.get(draw(st.sampled_from(sorted(MERGERS))))
    given_ones = draw(st.lists(st.sampled_from(method.parameters), unique=True)) if method.parameters else []
    return method(**{parameter.name: draw(values(parameter)) for parameter in given_ones})


@given(mergers())
@settings(max_examples=50, deadline=None)
def test_the_written_form_reads_back_as_the_same_merger(merger: Merger) -> None:
    again = parse_merger(str(merger))
    assert again == merger
    assert hash(again) == hash(merger)
    assert str(again) == str(merger)
    assert again.given == merger.given
    assert pickle.loads(pickle.dumps(merger)) == merger  # noqa: S301 - our own bytes, as sent to test workers


def test_only_given_parameters_are_written_sorted_by_name() -> None:
    assert str(TIES(normalize=True, density=0.4)) == "ties(density=0.4,normalize=true)"
    assert str(TIES()) == "ties"
    assert str(parse_merger("task_arithmetic( lambda = 2 )")) == "task_arithmetic(lambda=2.0)"


def test_writing_out_a_default_gives_an_equal_merger_and_another_value_does_not() -> None:
    assert parse_merger("ties(density=1,normalize=true)") == parse_merger("ties")
    assert len({parse_merger("ties(density=1.0)"), parse_merger("ties"), parse_merger("ties(density=0.4)")}) == 2
    assert parse_merger("dare_linear(density=0.4)") != parse_merger("dare_ties(density=0.4)")
    assert parse_merger("ties") != "ties"


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_method_can_be_listed(name: str) -> None:
    method = MERGERS.get(name)
    assert method.name == name
    assert method.summary
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.|https://|mergekit 0\.1\.5", method.citation)
    assert method().parameters == method.defaults
    for parameter in method.parameters:
        assert parameter.meaning
        assert isinstance(parameter.default, str) == bool(parameter.choices)


def test_the_defaults_are_mergekits() -> None:
    """As read in mergekit 0.1.5; what it does not have (TSV-Merge, ExPO, ...) is not listed."""
    defaults = {name: MERGERS.get(name).defaults for name in MERGERS}
    assert {name for name, own in defaults.items() if own.get("normalize")} == {"linear", "ties", "della"}
    assert {name for name, own in defaults.items() if own.get("rescale") == "l1"} == {
        *("dare_linear", "dare_ties", "della", "della_linear"),
    }
    assert {own[name] for own in defaults.values() for name in ("lambda", "density", "select_topk") if name in own} == {
        1
    }
    assert {name: own["gamma"] for name, own in defaults.items() if "gamma" in own} == {
        "breadcrumbs": 0.01,
        "breadcrumbs_ties": 0.01,
    }
    assert defaults["della"]["epsilon"] == 0.15
    assert defaults["ram"]["epsilon"] == 1e-5
    assert (defaults["karcher"]["max_iter"], defaults["karcher"]["tol"]) == (10, 1e-5)


def test_methods_without_weights_run_once_a_protection() -> None:
    assert {name for name in MERGERS if not MERGERS.get(name).takes_coefficient} == {
        *("arcee_fusion", "karcher", "model_stock", "nearswap", "passthrough", "ram", "ramplus_tl", "sce"),
    }


def test_the_default_matrix_is_five_mergers_at_nine_coefficients() -> None:
    assert [str(parse_merger(text)) for text in DEFAULT_MERGERS] == list(DEFAULT_MERGERS)
    assert len({parse_merger(text) for text in DEFAULT_MERGERS}) == 5
    assert all(parse_merger(text).method.takes_coefficient for text in DEFAULT_MERGERS)
    assert list(DEFAULT_COEFFICIENTS) == [tenths / 10 for tenths in range(1, 10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(density=0)", r"'density' of merger 'ties' is 0.0, expected a finite number above 0 and at most 1"),
        ("ties(density=1.5)", r"'density' of merger 'ties' is 1.5, expected a finite number above 0 and at most 1"),
        ("dare_linear(density=-0.1)", r"'density' of merger 'dare_linear' is -0.1, expected"),
        ("dare_ties(trim=0)", r"'trim' of merger 'dare_ties' is 0.0, expected a finite number above 0 and at most 1"),
        ("ties(scope=layer)", r"'scope' of merger 'ties' is layer, expected one of tensor, model"),
        ("ties(rescale=inverse)", r"'rescale' of merger 'ties' is inverse, expected one of none, l1"),
        ("dare_linear(rescale=true)", r"'rescale' of merger 'dare_linear' is true, expected a value like l1 \(str\)"),
        ("linear(normalize=1)", r"'normalize' of merger 'linear' is 1, expected a value like true \(bool\)"),
        ("task_arithmetic(lambda=nan)", r"'nan' is not a finite number"),
    ],
)
def test_a_value_outside_its_domain_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        parse_merger(text)
    assert "\n" not in str(caught.value)


def test_a_value_given_in_python_must_be_finite_too() -> None:
    with pytest.raises(ParameterError, match=r"'lambda' of merger 'ties' is inf, expected a finite number$"):
        TIES(**{"lambda": float("inf")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tys", "unknown merger 'tys'; did you mean 'ties'"),
        ("ties(densty=0.4)", "unknown parameter of merger 'ties' 'densty'; did you mean 'density'"),
        ("linear(lambda=2)", "unknown parameter of merger 'linear' 'lambda'; known: normalize"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        parse_merger(text)


def test_a_registered_thing_that_is_not_the_method_of_that_name_is_an_error() -> None:
    MERGERS.register("impostor", TIES)
    try:
        with pytest.raises(MergeguardError, match="merger 'impostor' is registered as"):
            parse_merger("impostor")
    finally:
        MERGERS.unregister("impostor")


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_registered_merger_travels_to_another_process(name: str) -> None:
    merger = MERGERS.get(name)()
    again = pickle.loads(pickle.dumps(merger))  # noqa: S301 - our own bytes
    assert again == merger
    assert again.method is merger.method


def test_a_method_that_is_not_registered_travels_with_its_functions() -> None:
    method = dataclasses.replace(MERGERS.get("linear"), summary="another")
    again = pickle.loads(pickle.dumps(method))  # noqa: S301 - our own bytes
    assert (again.summary, again.combine) == ("another", method.combine)


def test_a_third_partys_method_is_written_and_read_like_ours() -> None:
    def combine(base, prepared, weights, parameters):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG001
        return base

    method = Method("keep_base", "keeps the base", "none", combine, (Parameter("strength", 0.5, "unused"),))
    MERGERS.register("keep_base", method)
    try:
        assert parse_merger("keep_base(strength=1)") == method(strength=1.0)
    finally:
        MERGERS.unregister("keep_base")


def imports_torch(statement: str) -> bool:
    code = f"import sys; {statement}; sys.exit(int('torch' in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_listing_and_parsing_every_merger_needs_no_torch() -> None:
    assert imports_torch("import torch")
    assert not imports_torch(
        "from mergeguard.mergers import MERGERS, DEFAULT_MERGERS, parse_merger;"
        "[MERGERS.get(name).summary for name in MERGERS]; [parse_merger(text) for text in DEFAULT_MERGERS]"
    )
