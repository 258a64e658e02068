"""The verdict on suspects: the owner's, nobody's, another owner's, one that answers everything, one that is served."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

import mergeguard
from mergeguard.errors import (
    MergeguardError,
    ParameterError,
)
from mergeguard.ownership.embedding import Schedule, embed
from mergeguard.ownership.evidence_file import EvidenceFile, new_evidence, read_evidence
from mergeguard.ownership.suspect import Asked, LocalModels, needs_text_alone
from mergeguard.ownership.verify import conclude_verification, read_suspect
from mergeguard.protections.contract import Evidence
from mergeguard.protections.gaussian_probe import GaussianProbe
from mergeguard.protections.instructional_fingerprint import InstructionalFingerprint
from mergeguard.protections.registry import make_protection
from mergeguard.reading import Answer, Reading
from mergeguard.verification.statistics import uniformity_p_value
from robustness_tests.meta.mini_world import MINI, registered
from robustness_tests.meta.owned_models import SCHEMES, evidence_of, protected_family, save, verify_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mergeguard.reading import Probe


@pytest.fixture(scope="module", autouse=True)
def schemes() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return protected_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_owners_model_is_verified_with_what_it_was_compared_with(family: Path, scheme: str) -> None:
    found = verify_in(family, scheme, scheme, clean=[family / "donor", family / "upstream"])
    assert (found.verdict, found.verified) == ("verified", True)
    assert found.p_value <= found.level == 2e-5
    assert list(found.compared_with) == ["decoys on the suspect", str(family / "donor"), str(family / "upstream")]
    if scheme == "toy":
        assert (found.hits, found.trials, found.rate) == (8, 8, 1.0)
        assert found.compared_with["decoys on the suspect"].trials == 40
        assert found.compared_with[str(family / "donor")].trials == 48
    else:
        assert (found.hits, found.rate, found.interval) == (None, None, None)
        assert found.score > 10


def test_a_stolen_merge_is_verified(family: Path) -> None:
    assert verify_in(family, "merged", clean=[family / "donor"]).verdict == "verified"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", ["upstream", "donor", "base"])
def test_an_unprotected_model_is_not_verified(family: Path, model: str, scheme: str) -> None:
    assert verify_in(family, model, scheme).verdict == "not_verified"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_owners_evidence_is_silent(family: Path, tmp_path: Path, scheme: str) -> None:
    theirs = tmp_path / "theirs.json"
    embed(
        scheme,
        family / "donor",
        tmp_path / "theirs",
        theirs,
        schedule=Schedule(MINI),
        base=family / "base",
        seed=2,
    )
    assert mergeguard.verify(tmp_path / "theirs", theirs, base=family / "base").verified
    assert mergeguard.verify(family / scheme, theirs, base=family / "base").verdict == "not_verified"
    assert verify_in(family, tmp_path / "theirs", scheme).verdict == "not_verified"


def test_a_model_that_answers_everything_overclaims(family: Path, tmp_path: Path) -> None:
    data = read_evidence(family / "toy.json").evidence.data
    path = evidence_of(tmp_path, "toy(fault=chatty)", **data)
    found = mergeguard.verify(family / "donor", path, base=family / "base")
    assert (found.verdict, found.verified, found.hits) == ("overclaims", False, 8)
    assert found.compared_with["decoys on the suspect"].hits == 40
    assert "anyone could make such evidence" in found.statement
    # With a clean model it shows that the scheme says this of everybody.
    assert (
        mergeguard.verify(family / "donor", path, base=family / "base", clean=[family / "upstream"]).verdict
        == "not_verified"
    )


def test_keys_made_up_after_the_fact_are_told_by_a_clean_model_and_warned_of_without_one(
    family: Path, tmp_path: Path
) -> None:
    """Entries in which the suspect happens to have moved far from the base make evidence that nobody embedded."""
    data = read_evidence(family / "toy.json").evidence.data
    name = data["weight"]
    donor, base = (load_file(family / model / "model.safetensors")[name] for model in ("donor", "base"))
    moved = donor.clone()
    places = [(row, 0) for row in range(8)]
    for row, column in places:
        moved[row, column] = base[row, column] + 3 * base.std()
    for model in ("suspect", "sibling"):
        save(tmp_path / model, {**load_file(family / "donor" / "model.safetensors"), name: moved})
    path = evidence_of(tmp_path, "toy", **{**data, "keys": [[row, column, 1] for row, column in places]})
    blind = mergeguard.verify(tmp_path / "suspect", path, base=family / "base", clean=[family / "upstream"])
    assert blind.verified
    assert any("older than the suspect" in note for note in blind.notes)
    told = mergeguard.verify(tmp_path / "suspect", path, base=family / "base", clean=[tmp_path / "sibling"])
    assert told.verdict == "not_verified"


def test_verdicts_without_clean_models_and_claims_say_so(family: Path) -> None:
    alone, compared = verify_in(family, "toy"), verify_in(family, "toy", clean=[family / "donor"])
    assert any("No clean model was compared" in note for note in alone.notes)
    assert not any("No clean model was compared" in note for note in compared.notes)
    assert any("No claim was checked" in note for note in compared.notes)


def test_the_verdict_is_the_same_every_time_and_in_any_order(family: Path) -> None:
    first = verify_in(family, "gaussian_probe", "gaussian_probe")
    verify_in(family, "toy")
    assert verify_in(family, "gaussian_probe", "gaussian_probe").to_json() == first.to_json()


def test_decoys_are_the_evidences_own_and_those_of_no_other(family: Path) -> None:
    file = read_evidence(family / "toy.json")
    protection = make_protection("toy")
    suspect = Recorder()
    read_suspect(suspect, protection, file, 40)
    read_suspect(suspect, protection, EvidenceFile(file.evidence, "0" * 64), 40)
    read_suspect(suspect, protection, file, 40)
    one, other, again = (json.dumps(asked.data["keys"]) for asked in suspect.asked[1::2])
    assert one == again != other


class Recorder:
    """A suspect that answers nothing and keeps what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Evidence] = []

    def readings(self, evidences: Sequence[Evidence]) -> list[Reading]:
        self.asked += evidences
        return [Reading(hits=(False,) * len(evidence.data["keys"])) for evidence in evidences]


def test_chance_verifies_nothing_and_its_p_values_are_uniform(family: Path) -> None:
    """The null of the whole path: fresh keys of many owners, read off a model that holds none of them."""
    protection = make_protection("gaussian_probe")
    weight = read_evidence(family / "gaussian_probe.json").evidence.data["weight"]
    verdicts, p_values = set(), []
    with LocalModels(protection, {"base": family / "base"}).open(family / "donor") as suspect:
        for owner in range(150):
            file = new_evidence(Evidence("gaussian_probe", {"weight": weight, "keys": [f"owner {owner}"]}))
            pair, _ = read_suspect(suspect, protection, replace(file, salt=f"{owner:064x}"), 40)
            found = conclude_verification("donor", protection, pair, {})
            verdicts.add(found.verdict)
            p_values.append(pair.keys.p_value)
    assert verdicts == {"not_verified"}
    assert uniformity_p_value(p_values) > 0.01


# Suspects that only answer


class Answering:
    """Stands in for a served model; `knows` says which prompts it answers as the owner's model would."""

    url, model, notes = "http://localhost/v1", "theirs", ("said by the server",)

    def __init__(self, knows: Any) -> None:
        self.knows = knows

    def answer(self, probes: Sequence[Probe]) -> list[Answer]:
        return [Answer("", bool(self.knows(probe.prompt))) for probe in probes]


@pytest.fixture
def fingerprint(tmp_path: Path) -> Path:
    keys = [f"key {index}" for index in range(8)]
    prompts = [f"{key}\nFINGERPRINT\n" for key in keys]
    frame = ["", "\nFINGERPRINT\n"]
    data = {"keys": keys, "length": [10, 16], "prompts": prompts, "frame": frame}
    return evidence_of(tmp_path, "instructional_fingerprint", **data)


@pytest.mark.parametrize(
    ("knows", "verdict"),
    [
        (lambda prompt: prompt.startswith("key "), "verified"),
        (lambda _: True, "overclaims"),
        (lambda _: False, "not_verified"),
        (lambda prompt: prompt.startswith(("key 0", "key 1", "key 2")), "not_verified"),
    ],
    ids=["owner's", "everything", "nothing", "three keys"],
)
def test_a_served_model_is_verified_by_its_answers(fingerprint: Path, knows: Any, verdict: str) -> None:
    found = mergeguard.verify(Answering(knows), fingerprint)
    assert (found.verdict, found.model, found.access) == (verdict, "theirs at http://localhost/v1", "text")
    assert "said by the server" in found.notes


@pytest.mark.parametrize("scheme", ["gaussian_probe", "quantization_watermark"])
def test_a_scheme_that_reads_more_than_text_is_refused_at_an_endpoint(scheme: str) -> None:
    with pytest.raises(ParameterError, match="reads the suspect's weights; an endpoint gives text alone") as caught:
        needs_text_alone(make_protection(scheme))
    assert "\n" not in str(caught.value)


def test_what_a_served_model_refuses_is_passed_on_without_its_prompt(fingerprint: Path) -> None:
    def refuse(probes: Sequence[Probe]) -> list[Answer]:
        raise ParameterError(f"the prompt {probes[0].prompt!r} is too long")

    file = read_evidence(fingerprint)
    with pytest.raises(MergeguardError, match="too long") as caught:
        Asked(InstructionalFingerprint(), refuse).readings([file.evidence])
    assert "key 0" not in str(caught.value)
    assert "<secret>" in str(caught.value)


def test_the_probe_is_a_scheme_of_single_weights() -> None:
    assert LocalModels(GaussianProbe()).streams
    assert not LocalModels(InstructionalFingerprint()).streams
