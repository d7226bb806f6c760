"""What makes a run this run, and what may change when it goes on.

identity: what the result is a function of, named by the configuration's keys and held by content: rows by their hash,
weights by shape. No path, device or version is in it, so a run goes on on another machine with its data elsewhere.
conditions: what changes the last bits only.
"""

import platform
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from hashlib import blake2b
from typing import Any

import torch

from fitune.config import RunConfig
from fitune.data.examples import Examples
from fitune.errors import RunDirectoryError
from fitune.step.assemble import Setup, choose_precision

Json = dict[str, Any]
NEEDS_NEW_RUN = ("model", "model.method", "optim.name")
"""A change of these has no place for the saved tensors."""
_SAMPLED_ELEMENTS = 4096


def run_identity(config: RunConfig, setup: Setup, *, train: Examples, held_out: Examples) -> Json:
    optim = config.optim.model_dump(mode="json") | {"lr": setup.peak_lr}
    lora = config.model.lora.model_dump(mode="json") if config.model.method != "full" else {}
    return {
        "model": _model_hash(setup),
        "model.method": config.model.method,
        **{f"model.lora.{key}": value for key, value in lora.items()},
        "model.precision": choose_precision(config, next(setup.model.parameters()).device).name,
        "data.train": _rows_hash(train),
        "data.eval": _rows_hash(held_out),
        "batch.effective": config.batch.rows_per_step,
        **{f"optim.{key}": value for key, value in optim.items()},
        **{
            f"train.{key}": getattr(config.train, key)
            for key in ("seed", "epochs", "steps", "tokens")
        },
    }


def run_conditions(config: RunConfig, setup: Setup, *, num_ranks: int = 1) -> Json:
    device = next(setup.model.parameters()).device
    return {
        "batch.micro": setup.layout.micro_rows,
        "batch.micro_tokens": setup.layout.micro_tokens,
        "batch.ranks": num_ranks if num_ranks > 1 else None,
        "data.packing": setup.layout.packed,
        "loss": "full" if setup.settings.loss.head is None else "chunked",
        "model.attention": config.model.attention,
        "model.recompute": setup.recompute,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def check_identity(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, allowed: Collection[str]
) -> list[str]:
    """The allowed changes, one sentence each. Raises RunDirectoryError with every change that is not allowed, and for a
    name in `allowed` that has not changed."""
    changed = {
        key: f"{key} {_show(saved.get(key))} -> {_show(now.get(key))}"
        for key in _differences(saved, now)
    }
    if idle := sorted(set(allowed) - set(changed)):
        raise RunDirectoryError(f"--allow-change {idle[0]}: it has not changed, drop it")
    if stuck := [changed[key] for key in changed if key in NEEDS_NEW_RUN]:
        raise RunDirectoryError(
            f"the saved tensors do not fit ({'; '.join(stuck)}): start a new run with model.source=RUN/last"
        )
    if refused := [key for key in changed if key not in allowed]:
        listed = "\n".join(f"  {changed[key]}" for key in refused)
        flags = " ".join(f"--allow-change {key}" for key in refused)
        raise RunDirectoryError(
            f"this is not the run that was saved: take the changes back, or declare them with {flags}\n{listed}"
        )
    return [f"declared change: {changed[key]}" for key in changed]


def condition_note(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, dropout: bool
) -> str | None:
    """One sentence where the run goes on with other last bits; None where it goes on bit for bit."""
    changed = _differences(saved, now)
    if not changed:
        return None
    listed = "; ".join(f"{key} {_show(saved.get(key))} -> {_show(now.get(key))}" for key in changed)
    is_split_anew = any(key.startswith(("batch.", "data.")) for key in changed)
    masks = ", and dropout draws other masks" if dropout and is_split_anew else ""
    return f"goes on to 1e-5, not bit for bit{masks}: {listed}"


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys((*now, *saved)) if saved.get(key) != now.get(key)]


def _show(value: object) -> str:
    return "none" if value is None else str(value)


def _rows_hash(examples: Examples) -> str:
    """Of the rows' tokens and weights, and of how often each is seen."""
    return blake2b(
        examples.data_hash.encode() + examples.repeats.tobytes(), digest_size=8
    ).hexdigest()


def _model_hash(setup: Setup) -> str:
    """Of the names, shapes and types of all parameters and, of the frozen ones, which a checkpoint does not hold, of a
    few thousand elements each: a different model differs everywhere."""
    digest = blake2b(digest_size=8)
    shards = setup.settings.shards
    with nullcontext() if shards is None else shards.together():
        for name, parameter in setup.model.named_parameters():
            digest.update(
                f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}".encode()
            )
            if not parameter.requires_grad:
                whole = parameter.detach() if shards is None else shards.whole(parameter.detach())
                flat = whole.reshape(-1)
                sample = flat[:: -(-flat.numel() // _SAMPLED_ELEMENTS)]
                digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
