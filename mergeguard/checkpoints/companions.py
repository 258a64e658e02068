"""The files beside the weights: config, tokenizer, chat template, custom code and model card.

`plan_companions` reads and checks everything before a merge begins, `write_companions` writes it afterwards. Whatever
the recipe does not change is copied byte for byte. Nothing is executed: the Python files that a config's `auto_map`
names are copied as any other file, so that those who trust them can load the merged model as they load its parents.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.files import write_bytes
from mergeguard.checkpoints.inputs import check_inside, file_stamp, quoted, read_json, reason, refuse
from mergeguard.checkpoints.special_tokens import with_moved_ids, without_tokens
from mergeguard.errors import CheckpointError, ParameterError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"
FAST, SETTINGS, JINJA, LEGACY_TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARIES = (
    *("vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "tekken.json", "tokenizer.model*"),
    *("spiece.model", "sentencepiece.bpe.model", "added_tokens.json"),
)
"""Older formats of a tokenizer's vocabulary; with a tokenizer.json that was made anew they would contradict it."""
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATES = (JINJA, LEGACY_TEMPLATE, "additional_chat_templates/*.jinja")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
DTYPE_KEYS = ("dtype", "torch_dtype")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
PER_LAYER = (
    *("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attn_type_list"),
    *("intermediate_size", "activation_sparsity_pattern"),
)
"""Settings that are a list with one entry per layer, in the models that have them as such a list."""
QUANTIZED = ("quantization_config", "compression_config")
SHORTEST_TEMPLATE = 20
"""Characters of a text that can be a template; shorter ones are names."""
_RELATIVE_IMPORT = re.compile(
    r"^\s*(?:from\s+\.(\w+)(?:\.\w+)*\s+import|from\s+\.\s+import\s+(\w[\w, ]*))", re.MULTILINE
)


@dataclass(frozen=True)
class ConfigChanges:
    """What differs between the merged model's config and the one that it is made from; None leaves it.

    Attributes:
        dtype: torch's name of the dtype of all tensors, e.g. "bfloat16".
        vocab_size: rows of the embeddings.
        layers: for each layer of the merged model, which layer of its own model it was made from.
        tie_word_embeddings: whether the output embedding is the input embedding.
        moved_ids: token ids that mean another token in the merged model -> the new id of the token that they meant,
            None if it has no row.
    """

    dtype: str | None = None
    vocab_size: int | None = None
    layers: tuple[int, ...] | None = None
    tie_word_embeddings: bool | None = None
    moved_ids: Mapping[int, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Companions:
    """Files to write beside the weights.

    Attributes:
        texts: file -> its bytes.
        copies: file -> what is copied to it.
        warnings: one line each.
    """

    texts: Mapping[str, bytes]
    copies: Mapping[str, Path]
    warnings: tuple[str, ...] = ()


def plan_companions(
    source: Path | None,
    config: Mapping[str, Any] | None,
    changes: ConfigChanges,
    *,
    tokenizer_from: Path | None,
    tokenizer_json: str | None = None,
    dropped_tokens: Collection[str] = (),
    chat_template: str | None = None,
    models: Sequence[Path] = (),
) -> Companions:
    """Read and check all that will stand beside the weights; nothing is written.

    Args:
        source: the folder of the base, or of the first model: generation config and custom code come from it.
        config: its config.json; None if it has none.
        changes: to the config.
        tokenizer_from: the folder whose tokenizer the merged model gets; None for none.
        tokenizer_json: what to write as tokenizer.json instead of the folder's.
        dropped_tokens: tokens of the folder's that `tokenizer_json` lacks; where a file names them as special tokens,
            they would be added again as ids without a row.
        chat_template: "auto" for the most common one of `models`, or the text of a Jinja template; None or "" leaves
            that of the tokenizer.
        models: the folders of all models, in the recipe's order, the base included.

    Raises:
        CheckpointError: a model is quantised, or a file cannot be read or lies outside its model's folder.
        ParameterError: `chat_template` is neither "auto" nor a template.
    """
    texts: dict[str, bytes] = {}
    copies: dict[str, Path] = {}
    warnings: list[str] = []
    if config is None:
        warnings.append("the base (or first model) has no config.json, so the merged model has none")
    else:
        where = str(source / CONFIG) if source is not None else CONFIG
        texts[CONFIG] = _json(_with_moved_ids(merged_config(config, changes, where), changes, where, warnings))
    if source is not None:
        copies |= _find(source, [GENERATION])
        if GENERATION in copies and (changes.moved_ids or changes.vocab_size is not None):
            generation = _settings(source, GENERATION)
            moved = _with_moved_ids(generation, changes, str(source / GENERATION), warnings)
            if moved != generation:
                texts[GENERATION] = _json(moved)
                del copies[GENERATION]
        copies |= _custom_code(source, config or {}, warnings)
    template = choose_chat_template(chat_template, models)
    tokenizer = {} if tokenizer_from is None else _find(tokenizer_from, [FAST, *VOCABULARIES])
    if tokenizer_from is None or not (tokenizer or tokenizer_json):
        found = "no model has one" if tokenizer_from is None else f"{tokenizer_from} has none"
        warnings.append(f"the merged model has no tokenizer{' and no chat template' if template else ''}: {found}")
        return Companions(texts, copies, tuple(warnings))
    settings = _settings(tokenizer_from)
    copies |= tokenizer | _find(tokenizer_from, [SETTINGS, SPECIAL_MAP, *TEMPLATES, *PROCESSORS])
    copies |= _custom_code(tokenizer_from, settings, warnings)
    replaced: set[str] = set()
    changed = dict(settings)
    if tokenizer_json is not None:
        texts[FAST] = tokenizer_json.encode()
        replaced |= {FAST} | (tokenizer.keys() - {FAST})
        if changed.pop("added_tokens_decoder", None) is not None:  # its ids are those of the tokenizer before
            replaced.add(SPECIAL_MAP)  # without the decoder it would count
        changed = without_tokens(changed, dropped_tokens, f"{tokenizer_from / SETTINGS}", warnings)
        if SPECIAL_MAP in copies and SPECIAL_MAP not in replaced:
            special = _settings(tokenizer_from, SPECIAL_MAP)
            kept = without_tokens(special, dropped_tokens, f"{tokenizer_from / SPECIAL_MAP}", warnings)
            if kept != special:
                texts[SPECIAL_MAP] = _json(kept)
                replaced.add(SPECIAL_MAP)
    if template is not None and template.strip() != (read_chat_template(tokenizer_from) or "").strip():
        texts[JINJA] = template.encode()
        replaced |= _find(tokenizer_from, TEMPLATES).keys()
        if "chat_template" in changed:  # older versions of transformers read it here
            changed["chat_template"] = template
    if changed != settings:
        texts[SETTINGS] = _json(changed)
        replaced.add(SETTINGS)
    copies = {name: path for name, path in copies.items() if name not in replaced}
    return Companions(texts, copies, tuple(warnings))


def _with_moved_ids(
    config: Mapping[str, Any], changes: ConfigChanges, where: str, warnings: list[str]
) -> dict[str, Any]:
    moved = with_moved_ids(config, changes.moved_ids, changes.vocab_size, where, warnings)
    if isinstance(text := moved.get("text_config"), dict):
        moved["text_config"] = with_moved_ids(text, changes.moved_ids, changes.vocab_size, where, warnings)
    return moved


def write_companions(out: Path, companions: Companions) -> None:
    """Write the planned files into `out`.

    Raises:
        CheckpointError: a file cannot be read any more, or not be written.
    """
    for name, path in companions.copies.items():
        try:
            content = path.read_bytes()
            (out / name).parent.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot copy {path}: {reason(error)}") from error
        write_bytes(out / name, content)
    for name, text in companions.texts.items():
        write_bytes(out / name, text)


def merged_config(config: Mapping[str, Any], changes: ConfigChanges, where: str = CONFIG) -> dict[str, Any]:
    """The merged model's config: the given one with `changes`, and without the name of the model that it was.

    A setting is changed wherever it stands, at the top or in `text_config`; one that stands nowhere is added to
    `text_config` if there is one. The dtype is changed in every part that has one, else set at the top.

    Raises:
        CheckpointError: the model is quantised, or `changes.layers` names a layer that it does not have.
    """
    merged: dict[str, Any] = json.loads(json.dumps(config))
    text = merged.get("text_config")
    parts = [merged, text] if isinstance(text, dict) else [merged]
    for part in parts:
        part.pop("_name_or_path", None)
        if key := next((key for key in QUANTIZED if part.get(key)), None):
            raise CheckpointError(f"{where} has a {key}; merge the model in full precision that it was made from")
    if changes.dtype is not None:
        holders = [part for part in (merged, *merged.values()) if isinstance(part, dict)]
        stands = [(part, key) for part in holders for key in DTYPE_KEYS if key in part] or [(merged, DTYPE_KEYS[0])]
        for part, key in stands:
            part[key] = changes.dtype
    if changes.vocab_size is not None:
        _set(parts, "vocab_size", changes.vocab_size)
    if changes.tie_word_embeddings is not None:
        _set(parts, "tie_word_embeddings", changes.tie_word_embeddings)
    if changes.layers is not None:
        _set_layers(parts, changes.layers, where)
    return merged


def _set(parts: Sequence[dict[str, Any]], key: str, value: object) -> None:
    for part in [part for part in parts if key in part] or [parts[-1]]:
        part[key] = value


def _set_layers(parts: Sequence[dict[str, Any]], layers: tuple[int, ...], where: str) -> None:
    key = next((key for key in LAYER_KEYS for part in parts if isinstance(part.get(key), int)), None)
    if key is None:
        raise CheckpointError(f"{where} does not say how many layers it has; expected {LAYER_KEYS[0]} for slices")
    count = next(part[key] for part in parts if isinstance(part.get(key), int))
    if layers and max(layers) >= count:
        raise CheckpointError(f"{where} has {count} layers; a slice takes layer {max(layers)}, counted from 0")
    _set(parts, key, len(layers))
    for part in parts:
        for name in PER_LAYER:
            if isinstance(part.get(name), list) and len(part[name]) == count:
                part[name] = [part[name][layer] for layer in layers]


def choose_chat_template(option: str | None, models: Sequence[Path]) -> str | None:
    """The template that a recipe's `chat_template` asks for.

    Args:
        option: "auto" for the most common one of `models` (of equally common ones the first), the text of a Jinja
            template, or None or "" for none.
        models: folders.

    Raises:
        CheckpointError: a model's template cannot be read.
        ParameterError: `option` is neither.
    """
    if not option:
        return None
    if option == "auto":
        found = [template.strip() for folder in models if (template := read_chat_template(folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if len(option) < SHORTEST_TEMPLATE or "{" not in option:
        raise ParameterError(
            f"chat_template: {quoted(option)} is neither auto nor a Jinja template; templates have no names here, "
            "give the text of one"
        )
    return option


def read_chat_template(folder: Path) -> str | None:
    """The default chat template of the tokenizer in a folder, from wherever transformers has kept it; None without.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if path := _find(folder, [JINJA]).get(JINJA):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            refuse(path, f"cannot be read: {reason(error)}")
        return text if text.strip() else None
    templates: Any = _settings(folder, LEGACY_TEMPLATE).get("chat_template") or _settings(folder).get("chat_template")
    if isinstance(templates, list):  # named templates, as older versions of transformers write them
        named = [item for item in templates if isinstance(item, dict)]
        templates = {item.get("name"): item.get("template") for item in named}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates if isinstance(templates, str) and templates.strip() else None


def model_card(
    name: str,
    recipe: str,
    *,
    method: str,
    citation: str,
    models: Sequence[str],
    base: str | None = None,
    hub_models: Sequence[str] = (),
) -> str:
    """README.md of a merged model, with the metadata that the Hugging Face hub reads.

    Args:
        name: of the merged model.
        recipe: the text of the recipe.
        method: the merge method's name.
        citation: its paper; "" for none.
        models: the merged models as the recipe writes them, the base excluded.
        base: the base as the recipe writes it.
        hub_models: those of them that are models of the hub.
    """
    from mergeguard import __version__

    metadata = ["library_name: transformers", "tags:", "- mergeguard", "- merge"]
    if hub_models:
        metadata += ["base_model:", *(f"- {json.dumps(model)}" for model in hub_models)]
    lines = [
        *("---", *metadata, "---", "", f"# {' '.join(name.split())}", ""),
        f"A merge of language models made with mergeguard {__version__}. It was not evaluated: what is known about the",
        "merged models need not hold for it. Their licences apply.",
        *("", f"Method: {_code(method)}{f' ({citation})' if citation else ''}", ""),
        *(("Base: " + _code(base), "") if base is not None else ()),
        *("Models:", "", *(f"- {_code(model)}" for model in models), "", "Recipe:", ""),
        *(_fence(recipe) + "yaml", recipe.rstrip("\n"), _fence(recipe), ""),
        "`mergeguard-manifest.json` lists the SHA-256 of every file that was read and written.",
    ]
    return "\n".join(lines) + "\n"


def _fence(text: str) -> str:
    return "`" * max(3, _longest_ticks(text) + 1)


def _code(text: str) -> str:
    ticks = "`" * (_longest_ticks(text) + 1)
    return f"{ticks}{' '.join(text.split())}{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _settings(folder: Path, name: str = SETTINGS) -> dict[str, Any]:
    path = _find(folder, [name]).get(name)
    return {} if path is None else read_json(path)


def _find(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files of a folder with these names, each a regular file that is not elsewhere (but see the hub's cache)."""
    paths = {str(path.relative_to(folder)): path for pattern in patterns for path in sorted(folder.glob(pattern))}
    for path in paths.values():
        file_stamp(path)
        check_inside(folder, path)
    return paths


def _custom_code(folder: Path, settings: Mapping[str, Any], warnings: list[str]) -> dict[str, Path]:
    """The Python files that `auto_map` names and those that they import from beside them."""
    found: dict[str, Path] = {}
    todo = list(_modules(settings.get("auto_map")))
    while todo:
        name = f"{todo.pop()}.py"
        if name in found:
            continue
        if path := _find(folder, [name]).get(name):
            found[name] = path
            imports = _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
            todo += [module for pair in imports for module in re.findall(r"\w+", " ".join(pair))]
        else:
            warnings.append(f"{folder} lacks {name}, which its custom code needs; add it to the merged model")
    return found


def _modules(auto_map: Any) -> Iterator[str]:
    """Modules of "module.Class"; "org/name--module.Class" is another repository's."""
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and re.fullmatch(r"\w+\.\w+", reference):
                yield reference.partition(".")[0]
