"""`mergeguard merge` from the command line: what it prints, its exit codes, one line per mistake, nothing left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeguard.checkpoints.manifest import MANIFEST, check_manifest
from robustness_tests.meta.checkpoints_on_disk import CONFIG, SHAPES, State, family, save_model, write_recipe
from robustness_tests.meta.merge_command import NO_TOKENIZER, Door, door

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
TIES = {"weight": 0.5, "density": 0.4}


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    return door(tmp_path, monkeypatch, capsys)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Folders of a base and two models, of 1, 2 and 3 files."""
    return [save_model(tmp_path / n, s, shards=k) for n, s, k in zip("bxy", family(2), (1, 2, 3), strict=True)]


@pytest.fixture
def recipe(tmp_path: Path, models: list[Path]) -> Path:
    return ties(tmp_path, models)


def ties(folder: Path, models: list[Path], **more: Any) -> Path:
    return write_recipe(folder / "recipe.yml", "ties", models[1:], base=models[0], each=TIES, **more)


def loaded(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What works


def test_a_merge_of_models_of_1_2_and_3_files_says_what_it_wrote(merge: Door, tmp_path: Path, recipe: Path) -> None:
    said = merge(recipe, "out")
    assert (said.code, said.err) == (0, NO_TOKENIZER)
    first, last = said.out.splitlines()
    assert first == "merged: out"
    assert last.startswith(f"{len(SHAPES)} tensors, 0.00 GB in ")
    assert names(tmp_path / "out") == sorted(["README.md", "config.json", MANIFEST, "model.safetensors"])
    assert loaded(tmp_path / "out").keys() == SHAPES.keys()
    assert names(tmp_path) == ["b", "out", "recipe.yml", "x", "y"]
    assert check_manifest(tmp_path / "out", inputs=True) == []
    (tmp_path / "y/config.json").write_text("{}")
    assert len(check_manifest(tmp_path / "out", inputs=True)) == 1


def test_a_merged_model_is_checked_against_its_manifest(merge: Door, tmp_path: Path, recipe: Path) -> None:
    merge(recipe, "out")
    assert merge("--check", "out") == (0, "out: every file is as it was written\n", "")
    data = bytearray((tmp_path / "out/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out/model.safetensors").write_bytes(data)
    (tmp_path / "out/config.json").unlink()
    said = merge("--check", "out")
    assert (said.code, said.err) == (1, "")
    assert said.out.splitlines() == [
        "config.json: is missing",
        "model.safetensors: was changed; its SHA-256 is not the recorded one",
        "out: 2 problems",
    ]


def test_a_sweep_names_a_folder_for_each_coefficient(merge: Door, tmp_path: Path, recipe: Path) -> None:
    said = merge(recipe, "out", "--coefficients", "0.9,0.25")
    assert said.out.splitlines()[:2] == ["merged: out/0.25", "merged: out/0.9"]
    assert names(tmp_path / "out") == ["0.25", "0.9"]
    assert all(check_manifest(tmp_path / "out" / name) == [] for name in ("0.25", "0.9"))
    for alpha in (0.9, 0.25):  # each with its own weights, and neither with the other's
        own = write_recipe(tmp_path / "own.yml", "ties", [tmp_path / "x", tmp_path / "y"], base=tmp_path / "b")
        document = json.loads(own.read_text())
        for model, weight in zip(document["models"], (alpha, 1 - alpha), strict=True):
            model["parameters"] = {"weight": weight, "density": 0.4}
        own.write_text(json.dumps(document))
        assert merge(own, f"own-{alpha}").code == 0
        assert weights(tmp_path / f"own-{alpha}") == weights(tmp_path / "out" / str(alpha))


@pytest.mark.parametrize("options", [("--threads", "1"), ("--threads", "5"), ("--shard-size", "1KB", "--threads", "3")])
def test_threads_and_the_size_of_files_change_no_tensor(
    merge: Door, tmp_path: Path, models: list[Path], options: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", "dare_ties", models[1:], base=models[0], each=TIES)
    assert merge(recipe, "plain").code == merge(recipe, "other", *options).code == 0
    plain, other = loaded(tmp_path / "plain"), loaded(tmp_path / "other")
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert ("model.safetensors.index.json" in names(tmp_path / "other")) == ("--shard-size" in options)


def test_the_seed_chooses_the_masks_and_is_recorded(merge: Door, tmp_path: Path, models: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", "dare_linear", models[1:], base=models[0], each=TIES)
    for out, seed in (("one", 7), ("same", 7), ("two", 8), ("large", 10**30)):
        assert merge(recipe, out, "--seed", str(seed)).code == 0
        assert json.loads((tmp_path / out / MANIFEST).read_text())["seed"] == seed
    one, same, two, large = (weights(tmp_path / out) for out in ("one", "same", "two", "large"))
    assert one == same
    assert len({str(one), str(two), str(large)}) == 3


def test_a_larger_vocabulary_is_refused_and_then_truncated(merge: Door, tmp_path: Path, models: list[Path]) -> None:
    state = family(2)[2]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], torch.ones(3, 8)])
    larger = save_model(tmp_path / "larger", state, vocab_size=19)
    recipe = ties(tmp_path, [*models[:2], larger])
    assert "larger" in merge(recipe, "out").only_error
    assert merge(recipe, "out", "--vocabulary", "truncate").code == 0
    assert loaded(tmp_path / "out")["lm_head.weight"].shape == (16, 8)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 16
    assert merge(recipe, "large", "--vocabulary", "largest").code == 0
    assert loaded(tmp_path / "large")["lm_head.weight"].shape == (19, 8)


def test_pickles_are_refused_and_taken_on_request(merge: Door, tmp_path: Path, models: list[Path]) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(CONFIG))
    torch.save(family(2)[1], pickled / "pytorch_model.bin")
    recipe = ties(tmp_path, [models[0], pickled, models[2]])
    assert "--allow-pickle" in merge(recipe, "out").only_error
    assert merge(recipe, "out", "--allow-pickle").code == 0
    merge(ties(tmp_path, models), "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_an_adapter_is_merged_into_its_base(merge: Door, tmp_path: Path, models: list[Path]) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    first, second = torch.full((2, 8), 0.01), torch.full((8, 2), 0.03)
    factors = {f"{prefix}.lora_A.weight": first, f"{prefix}.lora_B.weight": second}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    recipe = write_recipe(tmp_path / "recipe.yml", "passthrough", [Path(f"{models[0]}+{adapter}")], each={})
    assert merge(recipe, "out").code == 0
    expected = family(2)[0]
    expected["model.layers.1.self_attn.q_proj.weight"] += 2 * second @ first
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = [entry["file"] for model in json.loads((tmp_path / "out" / MANIFEST).read_text())["inputs"]
             for entry in model["files"]]  # fmt: skip
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} <= {*files}


def test_keys_that_are_given_twice_are_refused_and_taken_on_request(merge: Door, tmp_path: Path, recipe: Path) -> None:
    twice = tmp_path / "twice.yml"
    twice.write_text(
        recipe.read_text().replace('"merge_method": "ties"', '"merge_method": "slerp", "merge_method": "ties"')
    )
    error = merge(twice, "out").only_error
    assert error.startswith(f"{twice}:2: 'merge_method' is given twice")
    assert merge(twice, "out", "--allow-duplicate-keys").code == 0
    merge(recipe, "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_the_tokenizer_of_the_base_is_copied(merge: Door, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = len(tokenizer)
    states = family(2)
    for folder, state in zip("klm", states, strict=True):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            state[name] = state[name].repeat(-(-rows // 16), 1)[:rows].clone()
        save_model(tmp_path / folder, state, vocab_size=rows)
        tokenizer.save_pretrained(tmp_path / folder)
    recipe = ties(tmp_path, [tmp_path / folder for folder in "klm"])
    said = merge(recipe, "out")
    assert (said.code, said.err) == (0, "")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "k/tokenizer.json").read_bytes()
    assert check_manifest(tmp_path / "out") == []


def test_unrelated_models_are_refused_and_taken_on_request(merge: Door, tmp_path: Path) -> None:
    models = [save_model(tmp_path / str(seed), family(0, seed=seed)[0]) for seed in range(3)]
    recipe = ties(tmp_path, models)
    assert "--allow-unrelated" in merge(recipe, "out").only_error
    said = merge(recipe, "out", "--allow-unrelated")
    assert said.code == 0
    assert said.err.startswith("warning: ")


def test_a_merge_into_a_folder_of_an_input_is_a_folder_of_its_own(
    merge: Door, models: list[Path], recipe: Path
) -> None:
    before = weights(models[1])
    assert merge(recipe, models[1] / "merged").code == 0
    assert check_manifest(models[1] / "merged") == []
    assert weights(models[1]) == before


def test_a_parent_of_the_output_that_does_not_exist_is_made(merge: Door, tmp_path: Path, recipe: Path) -> None:
    assert merge(recipe, "deep/er/out").code == 0
    assert check_manifest(tmp_path / "deep/er/out") == []


# What is wrong

BAD_OPTIONS = {
    "check and recipe": (("{recipe}", "--check", "out"), "--check takes one folder and no recipe"),
    "check of nothing": (("--check", "nowhere"), "nowhere has no mergeguard-manifest.json"),
    "nothing": ((), "expected RECIPE and OUT, e.g. mergeguard merge ties.yml merged; or --check FOLDER"),
    "no out": (("{recipe}",), "expected RECIPE and OUT"),
    "no recipe": (("nowhere.yml", "out"), "nowhere.yml: does not exist; expected a recipe in YAML"),
    "a folder": (("{folder}", "out"), "{folder}: is not a file; expected a recipe in YAML"),
    "vocabulary": (("{recipe}", "out", "--vocabulary", "trunkate"), "unknown vocabulary policy 'trunkate'"),
    "size": (("{recipe}", "out", "--shard-size", "huge"), "cannot read the size 'huge'; expected a number with a unit"),
    "threads": (("{recipe}", "out", "--threads", "0"), "Invalid value for '--threads'"),
    "seed": (("{recipe}", "out", "--seed", "-1"), "Invalid value for '--seed'"),
    "coefficient": (("{recipe}", "out", "--coefficients", "1.5"), "the coefficient 1.5 is outside [0, 1]"),
    "coefficients": (("{recipe}", "out", "--coefficients", "0.5,0.50"), "the coefficient 0.5 is given more than once"),
    "close": (("{recipe}", "out", "--coefficients", "0.12345671,0.12345672"), "the coefficient 0.123457 is given more"),
    "no device": (("{recipe}", "out", "--device", "gpu"), "cannot use device 'gpu' here: "),
    "meta": (("{recipe}", "out", "--device", "meta"), "cannot use device 'meta' here: "),
    "out below a file": (("{recipe}", "{recipe}/out"), "cannot write {recipe}/out: File exists"),
    "out is too long": (("{recipe}", "n" * 300), "cannot write " + "n" * 300 + ": File name too long"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    merge: Door, tmp_path: Path, recipe: Path, options: tuple[str, ...], message: str
) -> None:
    before = names(tmp_path)
    places = {"recipe": str(recipe), "folder": str(tmp_path)}
    said = merge(*[option.format(**places) for option in options])
    assert said.only_error.startswith(message.format(**places))
    assert names(tmp_path) == before


BAD_RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"merge_method": "tise"}, "recipe.yml:2: unknown merger 'tise'; did you mean 'ties'?"),
    "key": ({"base": "b"}, "unknown key of the recipe 'base'; did you mean 'base_model'?"),
    "parameter": ({"parameters": {"densty": 1}}, "of merger 'ties' 'densty'; did you mean 'density'?"),
    "value": ({"parameters": {"lambda": "big"}}, "'lambda' of merger 'ties' is 'big', expected a finite number"),
    "model": ({"base_model": "./nowhere"}, "there is no folder or file './nowhere'"),
    "dtype": ({"dtype": "float23"}, "unknown dtype 'float23'; did you mean 'float32'?"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_wrong_recipe_is_one_line_and_exit_code_2(
    merge: Door, tmp_path: Path, models: list[Path], change: dict[str, Any], message: str
) -> None:
    recipe = ties(tmp_path, models)
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | change, indent=1))
    before = names(tmp_path)
    assert message in merge(recipe, "out").only_error
    assert names(tmp_path) == before


def test_a_weightless_method_has_no_coefficients(merge: Door, tmp_path: Path, models: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "r.yml", "model_stock", models[1:], base=models[0], each={})
    error = merge(recipe, "out", "--coefficients", "0.5").only_error
    assert error == "merge method 'model_stock' has no weights, so there is nothing for coefficients to set"
    assert "out" not in names(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal of a GPU that is not there")
def test_a_gpu_that_is_not_there_is_refused_before_the_recipe_is_read(merge: Door) -> None:
    error = merge("nowhere.yml", "out", "--device", "cuda").only_error
    assert error.startswith("cannot use device 'cuda' here: ")
    assert error.endswith("choose cpu")


def test_a_folder_that_exists_is_left_as_it_is(merge: Door, tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("out", "link", "recipe.yml"):
        assert merge(recipe, out).only_error == f"{out} exists already; remove it or choose another folder"
    assert (list((tmp_path / "out").iterdir()), (tmp_path / "link").readlink()) == ([], Path("nowhere"))


@pytest.mark.parametrize("out", ["x", ".", "x/../x", "x/"])
def test_an_input_is_never_the_output(merge: Door, models: list[Path], recipe: Path, out: str) -> None:
    before = weights(models[1])
    assert "exists already" in merge(recipe, out).only_error
    assert weights(models[1]) == before


def test_a_hub_model_that_cannot_be_reached_is_one_line(
    merge: Door, tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = ties(tmp_path, [*models, Path("no-such-organisation/model")])
    error = merge(recipe, "out").only_error
    assert error.startswith("there is no folder 'no-such-organisation/model' here, and the hub did not give that model")
    assert "out" not in names(tmp_path)


def test_a_refused_merge_loads_no_torch(tmp_path: Path, models: list[Path]) -> None:
    """Also one that is refused after every header and the whole recipe were checked."""
    other = save_model(tmp_path / "other", family(1)[1] | {"model.norm.weight": torch.ones(9)})
    recipe = ties(tmp_path, [*models, other])
    code = (
        "import sys\nfrom mergeguard.cli import main\n"
        f"sys.argv = ['mergeguard', 'merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.stdout == "2 False\n"
    assert "has shape [9]" in run.stderr


def test_the_command_ends_with_all_of_its_words_said(tmp_path: Path, recipe: Path) -> None:
    """It leaves without tearing torch down."""
    command = [sys.executable, "-m", "mergeguard", "merge", str(recipe), "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, NO_TOKENIZER)
    assert run.stdout.startswith("merged: out\n")
    assert run.stdout.endswith(" s\n")
    assert check_manifest(tmp_path / "out") == []
