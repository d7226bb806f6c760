"""Collects the notes that accompany the prediction of a configured run, one message each."""

from collections.abc import Iterator
from functools import lru_cache

import torch

from fitune.config import ModelConfig
from fitune.model.formats import weights_format
from fitune.model.load import ignored_code, load_config, load_model
from fitune.model.quantise import not_quantised
from fitune.planning.plan import CODE_IGNORED, NOT_PACKED, UNPACKED
from fitune.recorder.events import COMPILED


def stated(model: ModelConfig) -> Iterator[str]:
    """Yield the notes on a run of this configuration."""
    yield from model_notes(model)
    if model.compile:
        yield COMPILED


def model_notes(model: ModelConfig) -> Iterator[str]:
    """Yield what is special about a run of this model, though its configuration does not say it."""
    yield from _notes(model.model_dump_json(include={"source", "tokenizer", "method", "precision", "shape", "lora", "freeze"} | {
        "trust_remote_code"}))  # fmt: skip


@lru_cache(maxsize=8)
def _notes(model_json: str) -> tuple[str, ...]:
    # cached, since all predicted settings of a model have the same notes
    model = ModelConfig.model_validate_json(model_json)
    notes = [code_note(model)]
    if (stored := weights_format(load_config(model))) is not None:
        notes.append(
            f"{UNPACKED} {stored} are held as numbers, in the precision of the run: they cannot be trained on else"
        )
    if (
        model.method == "qlora"
        and (clause := not_quantised(load_model(model, torch.device("meta")))) is not None
    ):
        notes.append(f"{NOT_PACKED} {clause}")
    return tuple(note for note in notes if note is not None)


def code_note(model: ModelConfig) -> str | None:
    """Return a note if the model brings code that does not run, else None."""
    names = ignored_code(model)
    if not names:
        return None
    return (
        f"{CODE_IGNORED} {model.source} ({', '.join(names[:3])}) does not run: transformers' own classes are used, "
        "and model.trust_remote_code=true runs it"
    )
