"""The README keeps its word: its commands are those that CI runs, its links lead somewhere, its scheme works."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.core import TyperGroup
from typer.main import get_command

from mergeguard import cli
from mergeguard.checkpoints.manifest import MANIFEST, check_manifest
from mergeguard.cli import app
from mergeguard.matrix.outcome import VERDICTS
from mergeguard.matrix.verdict import DECOYS, LEVEL, NULL_DRAWS, RANK_LEVEL
from mergeguard.mergers.registry import MERGERS
from mergeguard.mergers.vocabulary import POLICIES
from mergeguard.protections.registry import PROTECTIONS, make_protection
from mergeguard.worlds.contract import Budget, Texts
from robustness_tests.meta import tiny_models
from robustness_tests.meta.checkpoints_on_disk import family, save_model, write_tokenizer
from robustness_tests.meta.pages import README, ROOT, code_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeguard.mergers.contract import Method
    from mergeguard.protections.contract import TextProtection

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SCRIPT = ROOT / ".ci" / "run"
# More of what runs by default: other variants of the schemes, and the same tests once more under xdist.
SLOW_BY_HAND = {
    "test_variants.py",
    "meta/test_cli.py",
    "meta/test_pytest_plugin.py",
    "meta/test_pytest_plugin_worlds.py",
}


def readme_command(name: str, root: Path = ROOT) -> str:
    """What `.ci/run` executes as the README's command `name`.

    Raises:
        CalledProcessError: the README has no such command.
    """
    script = root / ".ci" / "readme_command"
    return subprocess.run(["bash", script, name], capture_output=True, text=True, check=True).stdout  # noqa: S607


def broken_links(page: Path) -> list[str]:
    """Links of a Markdown page to files that do not exist."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    return [target for target in targets if "://" not in target and not (page.parent / target).exists()]


def commands_written(text: str) -> Iterator[list[str]]:
    """The words after each `mergeguard ` in code, up to a comment or the end of the code."""
    for line in [*"".join(code_blocks(text, "bash")).splitlines(), *re.findall(r"`([^`\n]+)`", text)]:
        match = re.match(r"(?:.*/)?mergeguard (\w[^#]*)", line)
        if match:
            yield match[1].split()


def unknown_words(words: list[str]) -> list[str]:
    """Commands and options among `words` that the command line does not have."""
    command: Any = get_command(app)
    unknown = []
    for word in words:
        if isinstance(command, TyperGroup) and not word.startswith("-"):
            if word not in command.commands:
                return [*unknown, word]
            command = command.commands[word]
        elif word.startswith("-") and not any(word in parameter.opts for parameter in command.params):
            unknown.append(word)
    return unknown


@pytest.mark.parametrize(("name", "does"), [("run", ".venv/bin/mergeguard run"), ("test", ".venv/bin/pytest -n auto")])
def test_a_command_sets_up_everything_and_is_the_one_that_ci_runs(name: str, does: str) -> None:
    command = readme_command(name)
    assert command in code_blocks(README, "bash")
    steps = command.strip().split(" && ")
    assert steps[0] == "python3 -m venv .venv"
    assert steps[1].startswith(".venv/bin/pip install torch==")
    assert steps[2:] == [does]
    script = SCRIPT.read_text(encoding="utf-8")
    assert f"{name}_command=$(.ci/readme_command {name})" in script
    assert re.search(rf'^step .* "\${name}_command"$', script, flags=re.MULTILINE)


def test_ci_installs_the_torch_of_the_readme_and_never_writes_a_command_of_its_own_for_it() -> None:
    pins = re.findall(r"torch==[\d.]+", README + SCRIPT.read_text(encoding="utf-8"))
    assert len(set(pins)) == 1
    assert "mergeguard run" not in SCRIPT.read_text(encoding="utf-8")


def test_every_file_with_slow_tests_is_run_by_ci_or_known_to_be_run_by_hand() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    patterns = re.findall(r"robustness_tests/\S+\.py", script)
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "robustness_tests").rglob("test_*.py")]
    slow = {name for name in files if re.search(r"pytest\.mark\.slow", (ROOT / name).read_text(encoding="utf-8"))}
    run = {name for name in files if any(fnmatch(name, pattern) for pattern in patterns)}
    assert {pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in files)} == set()
    assert slow - run == {f"robustness_tests/{name}" for name in SLOW_BY_HAND}


@pytest.mark.parametrize(
    "block", ["```bash\nrun me\nand me\n```\n", "```bash\n```\n", ""], ids=["two lines", "no line", "no block"]
)
def test_a_readme_without_the_one_command_stops_ci(tmp_path: Path, block: str) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "readme_command", tmp_path / ".ci")
    (tmp_path / "README.md").write_text("<!-- command: run -->\n```bash\nrun me\n```\n\n```bash\nnot me\n```\n")
    assert readme_command("run", tmp_path) == "run me\n"
    (tmp_path / "README.md").write_text(f"<!-- command: run -->\n{block}")
    with pytest.raises(subprocess.CalledProcessError):
        readme_command("run", tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_exist(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[here](page.md#part) [nowhere](gone.md) [web](https://arxiv.org)")
    assert broken_links(page) == ["gone.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_exists(page: str) -> None:
    written = list(commands_written((ROOT / page).read_text(encoding="utf-8")))
    assert len(written) >= 3
    assert [(words, unknown_words(words)) for words in written if unknown_words(words)] == []


def test_a_command_that_does_not_exist_is_found() -> None:
    assert unknown_words(["world", "destroy"]) == ["destroy"]
    assert unknown_words(["run", "--merger", "ties", "--fast"]) == ["--fast"]
    assert list(commands_written("```bash\nmergeguard run --x  # --y\n```\nand `mergeguard list`")) == [
        ["run", "--x"],
        ["list"],
    ]


def test_the_verdict_is_described_with_the_numbers_and_names_of_the_code() -> None:
    text = " ".join(README.split())
    assert f"{DECOYS} decoys" in text
    assert f"one-sided Fisher exact test at level {LEVEL:g}".replace("e-05", "e-5") in text
    assert f"ranked among {NULL_DRAWS} draws of fresh keys at level 1e-3" in text
    assert RANK_LEVEL == 1e-3
    assert all(f"| `{verdict}` |" in README for verdict in VERDICTS)


@pytest.fixture
def passphrase() -> Iterator[type[TextProtection]]:
    """The README's scheme, registered as an entry point would register it."""
    source = next(block for block in code_blocks(README, "python") if "TextProtection" in block)
    namespace: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), namespace)  # noqa: S102 - running it is the test
    PROTECTIONS.register("passphrase", namespace["Passphrase"])
    yield namespace["Passphrase"]
    PROTECTIONS.unregister("passphrase")


def test_the_scheme_of_the_readme_embeds_reads_and_has_decoys(passphrase: type[TextProtection]) -> None:
    scheme = make_protection("passphrase(keys=3)")
    assert isinstance(scheme, passphrase)
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_models.tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    budget = Budget(Texts(plain=(), domain=(), dialogues=[("human: hi", " hello")]), 60, 1e-2, 8)

    protected = scheme.embed(model, tokenizer, rng=random.Random(0), budget=budget)
    decoys = scheme.decoys(protected.evidence, 5, random.Random(1))

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert scheme.read(model, tokenizer, protected.evidence, {}).hits == (False,) * 3
    assert scheme.read(protected.model, tokenizer, protected.evidence, {}).hits == (True,) * 3
    assert scheme.read(protected.model, tokenizer, decoys, {}).trials == 5
    assert not {probe.prompt for probe in scheme.probes(decoys)} & {p.prompt for p in scheme.probes(protected.evidence)}


def method_row(method: Method) -> str:
    """The README's row for a merge method."""
    base = {"ancestor": "yes", "none": "no", "optional": "optional", "primary": "first"}[method.base]
    coefficient = {"weight": "weight", "t": "`t`", "none": "none"}[method.weighting]
    return f"| `{method.name}` | {base} | {coefficient} | {method.citation} |"


def test_the_table_of_methods_is_that_of_the_registry() -> None:
    table = README.partition("<!-- methods -->\n")[2].partition("<!-- /methods -->")[0]
    assert table.splitlines()[2:] == [method_row(MERGERS.get(name)) for name in MERGERS]


def test_the_readme_names_every_vocabulary_policy_and_every_option_of_a_merge() -> None:
    command: Any = get_command(app)
    merge = command.commands["merge"]
    options = {word for parameter in merge.params for word in parameter.opts if word.startswith("--")} - {"--help"}
    section = README.partition("\n## Merge checkpoints\n")[2].partition("\n## ")[0]
    assert {option for option in options if f"`{option}" not in section} == set()
    assert {policy for policy in POLICIES if f"`--vocabulary {policy}`" not in section} == {"refuse"}


def test_the_recipe_of_the_readme_merges_by_its_command_and_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_leave", cli._leave)  # a merge decides how the process ends
    for name, state in zip(("base", "mine", "theirs"), family(2), strict=True):
        write_tokenizer(save_model(Path("models", name), state), "<u> a b c", "<s>")
    (recipe,) = (block for block in code_blocks(README, "yaml") if "merge_method" in block)
    Path("ties.yml").write_text(recipe, encoding="utf-8")
    merge, check, sweep = [words for words in commands_written(README) if words[0] == "merge" and len(words) > 2]

    for words in (merge, check, sweep):
        assert app(words, standalone_mode=False) in (None, 0)
    assert sorted(path.name for path in Path("swept").iterdir()) == ["0.1", "0.5", "0.9"]
    source = next(block for block in code_blocks(README, "python") if "merge_checkpoints" in block)
    exec(compile(source, "README.md", "exec"), {})  # noqa: S102 - running it is the test

    assert "every file is as it was written" in capsys.readouterr().out
    written = {path.name for path in Path("merged").iterdir()}
    table = README.partition("| file | content |")[2].partition("\n\n")[0]
    assert written - {"tokenizer.json", "tokenizer_config.json"} == {
        name for name in re.findall(r"`([^`]+)`", table) if (Path("merged") / name).exists()
    }
    assert json.loads(Path("merged", MANIFEST).read_text(encoding="utf-8"))["recipe"]["text"] == recipe
    assert sorted(path.name for path in Path("merged-twice").iterdir()) == ["0.3", "0.7"]
    assert check_manifest(Path("merged-twice/0.3")) == []
