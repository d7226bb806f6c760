"""Record which model adapters belong to.

Adapters are useless on another model, and merging them into one would not fail. The file
`adapted_model.json`, next to adapter_model.safetensors, has the place of the model (an absolute
path, a hub id or a preset) and a hash of its weights.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fitune.boundary import parse_json
from fitune.config import ModelConfig
from fitune.errors import ModelError
from fitune.model.new_tokens import NewTokens
from fitune.plain_files import read_plain

FILE = "adapted_model.json"
#: no vocabulary has as many tokens
MOST_WORDS = 10**7
_SAMPLED_ELEMENTS = 1024
_ATTRIBUTE = "_fitune_adapted_model"


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """Identifies the model that adapters were trained on."""

    #: an absolute path, a hub id or a preset
    source: str
    #: that of the weights when the hash was taken
    dtype: str
    weights_hash: str
    #: the seed of random weights
    seed: int
    #: that its vocabulary got before
    new_tokens: NewTokens | None = None


def note_adapted(adapted: nn.Module, noted: AdaptedModel) -> None:
    """Attach the record to a model with adapters, where `adapted_json` finds it."""
    setattr(adapted, _ATTRIBUTE, noted)


def describe(
    model: ModelConfig, built: nn.Module, *, seed: int, new: NewTokens | None = None
) -> AdaptedModel:
    """Return the record of a model without adapters.

    built: before adapters are added, and before its weights are quantised.
    new: the tokens that its vocabulary got.
    """
    path = Path(model.source).expanduser()
    source = str(path.resolve()) if path.exists() else model.source
    dtype = next(parameter.dtype for parameter in built.parameters())
    return AdaptedModel(
        source, str(dtype).removeprefix("torch."), _weights_hash(built, dtype), seed, new
    )


def adapted_json(adapted: nn.Module) -> bytes | None:
    """Return the content of `adapted_model.json`; None if fitune did not make the adapters."""
    noted = getattr(adapted, _ATTRIBUTE, None)
    return (
        None if noted is None else json.dumps(asdict(cast(AdaptedModel, noted)), indent=2).encode()
    )


def read_adapted(adapters: Path) -> AdaptedModel:
    """Read the record of saved adapters; raises ModelError if it cannot be read."""
    path = adapters / FILE
    try:
        content: dict[str, Any] = parse_json(read_plain(path, follow=True))
        new = content.get("new_tokens")
        found = AdaptedModel(
            **{key: content[key] for key in ("source", "dtype", "weights_hash", "seed")},
            new_tokens=None if new is None else _new_tokens(new["ids"], new["vocab_size"]),
        )
        if not isinstance(getattr(torch, found.dtype), torch.dtype) or not isinstance(
            found.seed, int
        ):
            raise TypeError("it names no number format")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} cannot be read ({error}), so it is not known which model these adapters belong to"
        ) from error


def _new_tokens(ids: Sequence[int], vocab_size: int) -> NewTokens:
    ids = tuple(map(int, ids))
    if not ids or not 0 < min(ids) <= max(ids) < vocab_size <= MOST_WORDS:
        raise ValueError(f"the ids {ids} do not fit {vocab_size:,} tokens")
    return NewTokens(ids, vocab_size)


def check_adapted(found: AdaptedModel, built: nn.Module, *, adapters: Path) -> None:
    """Raise ModelError if `built` is another model than the adapters were trained on."""
    if _weights_hash(built, getattr(torch, found.dtype)) != found.weights_hash:
        raise ModelError(
            f"{found.source} has other weights than the model that {adapters} was trained on: put "
            "that model back, or "
            "use the adapters as they are, with peft"
        )


def _weights_hash(model: nn.Module, dtype: torch.dtype) -> str:
    """Return a hash of the names and shapes of all parameters and a sample of their elements.

    About a thousand elements of each are hashed, in `dtype`.
    """
    digest = blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLED_ELEMENTS))].to(dtype).float()
        digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
