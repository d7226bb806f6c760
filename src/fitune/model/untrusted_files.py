"""Check files of a model that transformers trusts, before it reads them.

A tokenizer may have steps that make each text longer and longer, and an index of weights may name
files outside the directory of the model.
"""

import base64
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fitune.boundary import parse_json
from fitune.errors import ModelError

#: Real tokenizers stay below 50: one of them replaces a symbol by 18 characters.
MOST_GROWTH = 1000
#: in the order in which transformers takes them: each as one file, else by its index
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: the types of step that may make a text longer, in each part of a tokenizer
_GROWING = {
    "normalizer": ("Replace", "ByteLevel", "Precompiled"),
    "pre_tokenizer": ("ByteLevel",),
    "post_processor": ("TemplateProcessing",),
    "decoder": ("Replace",),
}
_BYTES_OF_A_CHARACTER = 4


def check_tokenizer_files(directory: Path) -> None:
    """Raise ModelError for a tokenizer that may make a text over MOST_GROWTH times as long.

    Files that are not valid JSON are skipped: loading the tokenizer reports them.
    """
    for path in filter(Path.is_file, sorted(directory.glob("tokenizer*.json"))):
        try:
            parts = parse_json(path.read_bytes())
        except (OSError, ValueError):
            continue
        if not isinstance(parts, dict):
            continue
        growth = math.prod(
            _growth(step)
            for name, kinds in _GROWING.items()
            for step in _steps(parts.get(name))
            if step.get("type") in kinds
        )
        if growth > MOST_GROWTH:
            times = f"{growth:,.0f}" if growth < 1e15 else "over 1e15"
            raise ModelError(
                f"{path} may make a text {times} times as long, and at most {MOST_GROWTH:,} times "
                "is allowed: take the "
                "steps that replace characters by longer ones out of its normalizer"
            )


def check_cached_index(hub_id: str) -> None:
    """Check the index of weights in the hub's cache, as `check_weight_index` does.

    Files that are not in the cache yet can be downloaded.
    """
    for whole in _WEIGHTS:
        path = try_to_load_from_cache(hub_id, f"{whole}.index.json")
        if isinstance(path, str):
            check_weight_index(Path(path).parent, is_complete=False)


def check_weight_index(directory: Path, *, is_complete: bool = True) -> None:
    """Raise ModelError for an index of weights that names anything but files in the directory.

    is_complete: whether the files must exist.
    """
    for whole in _WEIGHTS:
        path = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return
        if not path.is_file():
            continue
        try:
            index = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}; copy it again") from error
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not files:
            raise ModelError(f"{path} has no weight_map from tensors to their files: copy it again")
        for name in files.values():
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise ModelError(
                    f"{path} names {name!r}, which is no file inside of {directory}: copy the model again"
                )
            if is_complete and not (directory / name).is_file():
                raise ModelError(
                    f"{path} names {name}, which {directory} does not have: copy the model again"
                )
        return


def _steps(value: object) -> Iterator[dict[str, object]]:
    """Yield each step at any depth of nested lists."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _steps(inner)


def _growth(step: dict[str, object]) -> float:
    """Return into how many characters, or tokens, this step can turn a single one."""
    kind = step["type"]
    if kind == "Replace":
        return _replacement_growth(step.get("pattern"), step.get("content"))
    # A second ByteLevel step encodes the output of the first one again.
    if kind == "ByteLevel":
        return _BYTES_OF_A_CHARACTER
    if kind == "Precompiled":
        return _charsmap_growth(step.get("precompiled_charsmap"))
    pieces = step.get("single")
    return (
        max(1, sum("Sequence" in each for each in pieces if isinstance(each, dict)))
        if isinstance(pieces, list)
        else 1
    )


def _replacement_growth(pattern: object, content: object) -> float:
    length = len(content) if isinstance(content, str) else 0
    literal, regex = (
        (pattern.get(key) for key in ("String", "Regex"))
        if isinstance(pattern, dict)
        else (None, None)
    )
    if isinstance(literal, str) and literal:
        return max(1, length / len(literal))
    return max(1, length + (not isinstance(regex, str) or _may_be_empty(regex)))


def _may_be_empty(regex: str) -> bool:
    """Return whether the regular expression may match no character at all.

    The text then keeps its own characters in addition to the inserted ones.
    """
    try:
        return "(?" in regex or "\\b" in regex.lower() or re.search(regex, "") is not None
    except (re.error, RecursionError, OverflowError):
        return True


def _charsmap_growth(charsmap: Any) -> float:
    """Return the longest replacement in sentencepiece's table, in characters.

    The table has the size of a trie, the trie, and the replacements, each with a zero at its end.
    """
    try:
        table = base64.b64decode(charsmap)
    except (TypeError, ValueError):
        return 1
    replacements = table[4 + int.from_bytes(table[:4], "little") :]
    return max(
        1, *(len(each.decode(errors="replace")) for each in (b"", *replacements.split(b"\0")))
    )
