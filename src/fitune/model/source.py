"""Find out what `model.source` names, without importing torch and transformers.

Their import takes seconds, and a user who has mistyped a path gets the error at once.
"""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from fitune.config import ModelConfig
from fitune.data.hub import hub_is_known
from fitune.errors import ModelError

Kind = Literal["preset", "directory", "gguf", "pth", "hub"]
PRESETS = ("minimind-3", "minimind-3-moe", "minimind2", "minimind2-small")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def directory_of(source: str) -> str:
    """Return the directory of a config.json, which stands for its model; else the source itself."""
    path = Path(source)
    return str(path.parent) if path.name == "config.json" else source


def source_kind(source: str) -> Kind:
    """Return what kind of source it is.

    Raises ModelError for a path that does not exist and for what is neither a path nor an id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return "directory"
    if path.suffix in (".gguf", ".pth", ".pt"):
        if not path.is_file():
            raise ModelError(f"model.source '{source}' does not exist")
        return "gguf" if path.suffix == ".gguf" else "pth"
    if path.is_file():
        raise ModelError(
            f"model.source '{source}' is a file of unknown kind; give a directory, a .gguf or a .pth"
        )
    if source in PRESETS:
        return "preset"
    if source.startswith((".", "~", os.sep)) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise ModelError(
            f"model.source '{source}' does not exist; presets are {', '.join(PRESETS)}"
        )
    if "/" not in source and (near := get_close_matches(source, PRESETS, n=1, cutoff=0.8)):
        raise ModelError(
            f"model.source '{source}' is neither a path nor a preset: did you mean {near[0]}?"
        )
    return "hub"


def check_source(source: str) -> Kind:
    """Return the kind of `source`; raise ModelError if its configuration cannot be read."""
    kind = source_kind(source)
    if kind == "directory" and not (Path(source).expanduser() / "config.json").is_file():
        raise ModelError(f"{source} has no config.json: it is no transformers directory")
    if kind == "hub":
        _check_hub(source)
    return kind


def check_tokenizer(model: ModelConfig) -> None:
    """Raise ModelError if the model has no tokenizer, or the one that is named does not exist."""
    source = model.tokenizer or model.source
    kind = source_kind(source)
    path = Path(source).expanduser()
    if kind == "preset" or (kind == "pth" and not has_tokenizer(path.parent)):
        raise ModelError(
            f"{source} carries no tokenizer: set model.tokenizer to a directory or hub id that has one"
        )
    if kind == "directory" and not has_tokenizer(path):
        raise ModelError(
            f"{source} has no tokenizer.json: set model.tokenizer to a directory or hub id that has one"
        )
    if kind == "hub" and source != model.source:
        _check_hub(source, "tokenizer_config.json")


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def out_of_reach(source: str) -> ModelError:
    return ModelError(
        f"{source} is not cached and the hub cannot be reached: download it once with a connection "
        f"(HF_ENDPOINT names a mirror), or give a local directory"
    )


def _check_hub(source: str, file: str = "config.json") -> None:
    """Raise ModelError for a hub id that is not cached and cannot be downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        is_cached = isinstance(try_to_load_from_cache(source, file), str)
    except HFValidationError as error:
        raise ModelError(
            f"model.source '{source}' is neither a path nor a hub id: {error}"
        ) from error
    if not is_cached and not hub_is_known():
        raise out_of_reach(source)
