"""The merge benchmark's own parts: it counts, compares and writes what it says. Nothing here looks at a speed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from robustness_tests.benchmarks import bench_merge
from robustness_tests.benchmarks.bench_merge import COEFFICIENTS, Bench, parse_options
from robustness_tests.benchmarks.merge_inputs import INPUTS, MODELS, RECIPES, Model, build, compare, shard_files
from robustness_tests.benchmarks.merge_tables import (
    COPY,
    METHOD_HEAD,
    OURS,
    SYNCED_COPY,
    THEIRS,
    check_row,
    method_row,
    report,
    sweep_row,
)
from robustness_tests.benchmarks.processes import RunFailed, Usage, anonymous_kib, measured, medians, usage_of
from robustness_tests.meta.pages import ROOT

if TYPE_CHECKING:
    import resource
    from pathlib import Path

TINY = Model(16, 2, 24, 4, 2, 40, tied=True, dtype="float32", deviation=0.001)
TINY_SHARDED = Model(16, 2, 24, 4, 2, 40, tied=False, dtype="bfloat16", deviation=0.003, shards=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build(TINY, folder / "small-float32")
    build(TINY_SHARDED, folder / "large-bfloat16")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def runs(*seconds: float, peak: float = 100) -> list[dict[str, float]]:
    return [asdict(Usage(value, 2 * value, peak, peak / 2)) for value in seconds]


def found(**sides: list[dict[str, float]]) -> dict[str, Any]:
    return {"model": "m", "method": "ties", "runs": sides, "errors": {}, "load": [1.5], "busy_cores": [0.1]}


def test_each_figure_has_its_own_median() -> None:
    assert medians([Usage(3, 10, 5, 1), Usage(1, 30, 6, 1), Usage(2, 20, 9, 4)]) == Usage(2, 20, 6, 1)
    assert medians([]) is None


def test_usage_adds_user_and_system_time_and_reads_kib_as_megabytes() -> None:
    reported = cast("resource.struct_rusage", SimpleNamespace(ru_utime=1.5, ru_stime=0.25, ru_maxrss=1_000_000))
    assert usage_of(2.0, reported, 500_000) == Usage(2.0, 1.75, 1024.0, 512.0)


def test_anonymous_memory_leaves_mapped_files_out() -> None:
    status = (
        "Name:\tpython\nVmRSS:\t     900 kB\nRssAnon:\t     300 kB\nRssFile:\t     590 kB\nRssShmem:\t      10 kB\n"
    )
    assert anonymous_kib(status) == 310
    assert anonymous_kib("Name:\tpython\nState:\tZ (zombie)\n") == 0


def test_a_measured_process_has_its_memory_and_processor_time_counted() -> None:
    program = "import time; held = b'1' * 200_000_000; time.sleep(0.5)"
    small, large = measured([sys.executable, "-c", "pass"]), measured([sys.executable, "-c", program])
    assert large.peak_megabytes > 200
    assert large.anonymous_megabytes > 200 > small.anonymous_megabytes
    assert large.seconds > 0.5
    assert large.cpu_seconds > 0


def test_a_measured_process_that_fails_says_why() -> None:
    with pytest.raises(RunFailed, match=r"^the last line$"):
        measured([sys.executable, "-c", "import sys; sys.exit('a line\\nthe last line')"])
    with pytest.raises(RunFailed, match="exit code -9"):
        measured([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


def test_the_process_that_measures_stays_light() -> None:
    program = "import robustness_tests.benchmarks.bench_merge, sys; print({'torch', 'numpy'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "set()\n"


def test_the_ties_recipe_is_what_it_should_be(tmp_path: Path) -> None:
    folder = tmp_path / 'a "name": #1'
    assert yaml.safe_load(RECIPES["ties"].text("ties", folder, "float32")) == {
        "merge_method": "ties",
        "dtype": "float32",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "first"), "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": str(folder / "second"), "parameters": {"weight": 0.4, "density": 0.4}},
        ],
    }


@pytest.mark.parametrize("method", RECIPES)
def test_a_recipe_names_its_inputs_and_a_weight_per_model(method: str, tmp_path: Path) -> None:
    recipe = RECIPES[method]
    written = yaml.safe_load(recipe.text(method, tmp_path, "bfloat16"))
    models = [entry["model"] for entry in written["models"]]
    assert written["merge_method"] == method
    assert {*models, written.get("base_model", models[0])} == {str(tmp_path / name) for name in recipe.inputs}
    assert len(recipe.weights) in {0, len(models)}
    assert written.get("parameters", {}) == recipe.shared
    assert ("weight" in written["models"][-1].get("parameters", {})) == bool(recipe.weights)


def test_the_models_have_the_published_sizes() -> None:
    sizes = {
        name: sum(torch.Size(shape).numel() for shape in model.shapes().values()) for name, model in MODELS.items()
    }
    assert sizes == {"small-float32": 134_515_008, "small-bfloat16": 134_515_008, "large-bfloat16": 1_100_048_384}


@pytest.mark.parametrize(("name", "model"), [("small-float32", TINY), ("large-bfloat16", TINY_SHARDED)])
def test_transformers_loads_a_built_model_in_full(name: str, model: Model, tiny: Path) -> None:
    load: Any = AutoModelForCausalLM.from_pretrained  # gives a pair when asked for what it found
    loaded, info = load(tiny / name / "first", output_loading_info=True)
    assert not any(info.values()), info
    stored = tensors(tiny / name / "first")
    assert {key: tuple(value.shape) for key, value in loaded.named_parameters()} == model.shapes()
    assert all(torch.equal(value, stored[key]) for key, value in loaded.named_parameters())
    assert {value.dtype for value in stored.values()} == {getattr(torch, model.dtype)}


def test_fine_tunes_differ_from_the_base_by_what_is_written_and_from_each_other(tiny: Path) -> None:
    base, first, second = (tensors(tiny / "small-float32" / name) for name in INPUTS)
    name = "model.embed_tokens.weight"
    assert float(base[name].std()) == pytest.approx(0.02, rel=0.2)
    for one, other, deviation in ((first, base, 0.001), (second, base, 0.001), (first, second, 0.001 * 2**0.5)):
        assert float((one[name] - other[name]).std()) == pytest.approx(deviation, rel=0.2)
    assert torch.equal(base["model.norm.weight"], torch.ones(16))


def test_a_model_is_built_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    build(TINY, tmp_path / "again")
    assert compare(tmp_path / "again" / "second", tiny / "small-float32" / "second")["differing"] == 0


def test_shards_are_of_about_the_same_size_and_consecutive() -> None:
    shapes = {str(index): (10, 10) for index in range(9)}
    assert [int(file[6:11]) for file in shard_files(shapes, 3).values()] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert {*shard_files(shapes, 3).values()} == {f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)}
    assert {*shard_files(shapes, 1).values()} == {"model.safetensors"}


def save(folder: Path, **values: torch.Tensor) -> Path:
    folder.mkdir()
    for name, value in values.items():
        save_file({name: value}, folder / f"{name}.safetensors")
    return folder


def test_compare_counts_the_elements_that_differ(tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", a=torch.zeros(3, 4), b=torch.ones(5, dtype=torch.bfloat16))
    changed = torch.ones(5, dtype=torch.bfloat16)
    changed[1], changed[3] = 1.5, float("nan")
    ours = save(tmp_path / "ours", a=torch.zeros(3, 4), b=changed)
    found = compare(ours, theirs)
    assert (found["elements"], found["differing"], found["problem"]) == (17, 2, "")
    changed[3] = 0.75
    assert compare(save(tmp_path / "other", a=torch.zeros(3, 4), b=changed), theirs)["largest"] == 0.5


@pytest.mark.parametrize(
    "ours",
    [
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)},
        {"a": torch.zeros(2), "b": torch.zeros(3)},
        {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)},
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_compare_finds_what_cannot_be_compared(ours: dict[str, torch.Tensor], tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", a=torch.zeros(2), b=torch.zeros(2))
    assert compare(save(tmp_path / "ours", **ours), theirs)["problem"].startswith("ours has ")


def test_a_row_has_medians_ratios_and_shares() -> None:
    sides = {THEIRS: runs(8, 10, 12, peak=2000), OURS: runs(2, 2, 4, peak=250), COPY: runs(1), SYNCED_COPY: runs(4)}
    assert dict(zip(METHOD_HEAD, method_row(found(**sides)), strict=True)) == {
        "model": "m", "method": "ties", "mergekit s": "10.00", "ours s": "2.00",
        "times faster (each round)": "5.0 (3.0-5.0)", "mergekit CPU s": "20.0", "ours CPU s": "4.0",
        "mergekit peak MB": "2000", "ours peak MB": "250", "ours of mergekit's": "12%",
        "mergekit anonymous MB": "1000", "ours anonymous MB": "125", "ours / copy": "2.00",
        "ours / copy with fsync": "0.50",
    }  # fmt: skip


def test_a_row_without_one_side_has_no_ratio_and_tells_failure_from_absence() -> None:
    alone = found(**{THEIRS: runs(8)})
    row = dict(zip(METHOD_HEAD, method_row(alone), strict=True))
    assert (row["mergekit s"], row["ours s"], row["times faster (each round)"]) == ("8.00", "-", "-")
    assert row["ours of mergekit's"] == row["ours / copy"] == "-"
    assert "failed" in method_row(alone | {"errors": {OURS: "why"}})


def test_a_sweep_is_compared_with_nine_times_the_measured_single_run() -> None:
    sweep = found(one=runs(2), nine=runs(5, 3, 4))
    assert sweep_row(sweep, [found(**{THEIRS: runs(8)})]) == ["m", "ties", "2.00", "4.00", "2.00", "18.0"]
    assert sweep_row(sweep, [found(**{THEIRS: runs(8)}) | {"model": "another"}])[-1] == "-"


def test_a_check_that_found_a_problem_shows_no_counts() -> None:
    counts = {"model": "m", "method": "ties", "elements": 10, "differing": 3, "largest": 0.5, "problem": ""}
    assert check_row(counts) == ["m", "ties", "10", "3", "5.0e-01", "none"]
    assert check_row(counts | {"problem": "ours failed: a|b"})[2:] == ["-", "-", "-", "ours failed: a/b"]


def test_the_report_has_every_row_how_it_was_taken_and_every_failure() -> None:
    failed = found(**{THEIRS: runs(8)}) | {"method": "slerp", "errors": {OURS: "no such command"}}
    text = report({"how": {"date": "today"}, "methods": [found(), failed], "sweeps": [], "checks": []})
    lines = text.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| m |")] == ["ties", "slerp"]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "- date: today" in lines
    assert "- m slerp, mergeguard failed: no such command" in lines
    assert any("at most 0.10 cores" in line and "1.50" in line for line in lines)


def test_the_processes_of_a_round_read_the_same_inputs_and_write_to_the_same_place(tiny: Path, tmp_path: Path) -> None:
    bench = Bench(tiny, "mergekit-yaml", (OURS, THEIRS), 1)
    commands = bench.commands("large-bfloat16", "slerp", tmp_path / "out")
    assert list(commands) == [COPY, SYNCED_COPY, OURS, THEIRS]
    recipe = str(tiny / "large-bfloat16-slerp.yml")
    assert commands[OURS][1:] == ["-m", "mergeguard", "merge", recipe, str(tmp_path / "out")]
    assert commands[THEIRS][:3] == ["mergekit-yaml", recipe, str(tmp_path / "out")]
    shards = [path for name in ("first", "second") for path in sorted((tiny / "large-bfloat16" / name).glob("*.s*rs"))]
    assert [file for file in commands[COPY] if file.endswith(".safetensors")] == list(map(str, shards))
    for side in (COPY, SYNCED_COPY):
        measured(commands[side])
        assert (tmp_path / "out").stat().st_size == sum(path.stat().st_size for path in shards[:3])
        (tmp_path / "out").unlink()
    sweep = bench.sweep_commands("large-bfloat16", "ties", tmp_path / "out")
    assert sweep["nine"][-1] == COEFFICIENTS
    assert len(COEFFICIENTS.split(",")) == 9


def test_rounds_take_turns_in_fresh_folders_and_skip_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_merge, "busy_cores", lambda: 0.0)
    monkeypatch.setattr("os.sync", lambda: None)
    log = tmp_path / "log"
    write = "import os, sys; out, log, name = sys.argv[1:]; os.makedirs(out); open(log, 'a').write(name)"
    write += "; sys.exit(name == 'c')"

    def make(_model: str, _method: str, output: Path) -> dict[str, list[str]]:
        return {name: [sys.executable, "-S", "-c", write, str(output), str(log), name] for name in "abc"}

    found = Bench(tmp_path, "", (), 3).rounds("m", "ties", make)
    assert log.read_text() == "abcabab"
    assert {name: len(usages) for name, usages in found["runs"].items()} == {"a": 3, "b": 3}
    assert list(found["errors"]) == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_options_refuse_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--mergekit", "m", "--methods", "tis"], "unknown: tis"),
        ([], "--mergekit is needed"),
        (["--mergekit", "m", "--check", "--only", OURS], "--check needs both sides"),
    ):
        with pytest.raises(SystemExit):
            parse_options(arguments)
        assert said in capsys.readouterr().err
    assert parse_options(["--mergekit", "m", "--methods", "ties,linear", "--sweep", ""]).methods == ["ties", "linear"]
    assert parse_options(["--only", OURS, "--sweep", ""]).sweep == []
