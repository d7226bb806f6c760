"""Load the model of a finished run, or of a directory that was exported, for use after training."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.boundary import parse_json
from fitune.config import ModelConfig, read_config
from fitune.data.hub import is_hub_id
from fitune.errors import ModelError, RunDirectoryError, UsageError
from fitune.model.adapted_model import check_adapted, note_adapted, read_adapted
from fitune.model.gguf import gguf_value
from fitune.model.load import ignored_code, load_model, load_tokenizer
from fitune.model.lora import load_adapters
from fitune.plain_files import read_plain
from fitune.run.directory import RunDirectory

if TYPE_CHECKING:
    from peft import PeftModel


def saved_weights(run: RunDirectory, weights: str | None = None) -> Path:
    """Return best/ or last/ of a run, whichever `weights` names; by default best/ if it exists.

    Raises RunDirectoryError if the run has not saved it.
    """
    path = run.path / (weights or ("best" if run.best.is_dir() else "last"))
    if not path.is_dir():
        raise RunDirectoryError(f"{run.path} has no {path.name}/ yet: let the run save once")
    return path


def load_run(
    run: RunDirectory, weights: Path, *, trust_remote_code: bool
) -> tuple["PreTrainedModel | PeftModel", Tokenizer]:
    """Load a run's saved weights on the CPU; adapters are loaded onto the run's base model.

    Raises UsageError or ModelError if that cannot be done.
    """
    base = run_base(run, trust_remote_code=trust_remote_code)
    return load_directory(weights, base=base)


def load_directory(
    weights: Path, *, base: ModelConfig
) -> tuple["PreTrainedModel | PeftModel", Tokenizer]:
    """Load a saved model, or saved adapters onto their base model, on the CPU.

    base: how the base model was loaded; its source is used only for adapters that do not name it.

    Raises ModelError or RunDirectoryError if that cannot be done.
    """
    cpu = torch.device("cpu")
    if not (weights / "adapter_config.json").is_file():
        saved = ModelConfig(source=_model_file(weights), trust_remote_code=base.trust_remote_code)
        return load_model(saved, cpu), load_tokenizer(saved)
    adapted = read_adapted(weights)
    if Path(adapted.source).is_absolute() and not Path(adapted.source).exists():
        raise RunDirectoryError(
            f"{adapted.source}, which {weights} adapts, is no longer there: put it back"
        )
    plain = base.model_copy(update={"source": adapted.source, "method": "full", "new_tokens": ()})
    model = load_model(plain, cpu, seed=adapted.seed, new=adapted.new_tokens)
    check_adapted(adapted, model, adapters=weights)
    tokenizer = load_tokenizer(
        plain.model_copy(update={"tokenizer": str(weights)}), new=adapted.new_tokens
    )
    with_adapters = load_adapters(model, weights)
    note_adapted(with_adapters, adapted)
    return with_adapters, tokenizer


def run_base(run: RunDirectory, *, trust_remote_code: bool) -> ModelConfig:
    """Return how the run loaded its model.

    Somebody else may have made the directory, so its configuration alone must not allow Python
    code of the model to run: the user has to allow it too. Raises UsageError if the two differ.
    """
    base = read_config(run.config).config.model
    if base.trust_remote_code and not trust_remote_code:
        without = base.model_copy(update={"trust_remote_code": False})
        # Configurations of other tools often set the switch for models that need none.
        base = base if ignored_code(without) else without
    if base.trust_remote_code != trust_remote_code:
        raise UsageError(
            f"{run.path} asks to run the Python code that comes with {base.source}: read that "
            "code, then add --trust-remote-code"
            if base.trust_remote_code
            else f"{run.path} was trained without its model's own code: drop --trust-remote-code"
        )
    return base


def learned_ends(run: RunDirectory) -> list[str]:
    """Return the tokens that end the run's answers; runs of earlier versions do not record them."""
    try:
        return [str(end) for end in parse_json(read_plain(run.data))["ends"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def source_license(source: str) -> str | None:
    """Return the licence that a model's card or GGUF file names; None if that is not known.

    Only files on this machine are read; the model may be gone.
    """
    card: Path | None = None
    path = Path(source).expanduser()
    if path.is_dir():
        card = path / "README.md"
    elif path.suffix == ".gguf":
        with suppress(ImportError, OSError, ModelError):
            named = gguf_value(path, "general.license")
            return named if isinstance(named, str) else None
    elif is_hub_id(source):
        try:
            cached = try_to_load_from_cache(source, "README.md")
        except HFValidationError:
            cached = None
        card = Path(cached) if isinstance(cached, str) else None
    if card is None:
        return None
    try:
        text = read_plain(card, follow=True).decode(errors="replace")
        head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = yaml.safe_load(head[1]) if head else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    named = found.get("license") if isinstance(found, dict) else None
    return named if isinstance(named, str) else None


def _model_file(directory: Path) -> str:
    """Return a file as it is; of a directory itself, or the GGUF file in it if it holds no more."""
    if directory.is_file():
        return str(directory)
    files: Sequence[Path] = sorted(directory.glob("*.gguf"))
    if (directory / "config.json").is_file() or not files:
        return str(directory)
    if len(files) > 1:
        raise ModelError(
            f"{directory} holds {len(files)} GGUF files: give one of them, such as {files[0]}"
        )
    return str(files[0])
