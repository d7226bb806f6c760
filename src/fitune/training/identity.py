"""Describes what makes two runs the same, and what may differ when a run is resumed.

The identity holds everything that the result is a function of, by the configuration's keys and by
content: samples by their hash, weights by shape. It contains no path, device or version, so a run
can be resumed on another machine, with its data elsewhere. The conditions hold what changes only
the last bits of the result.
"""

import platform
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from hashlib import blake2b

import torch
from torch import Tensor, nn

from fitune.config import RunConfig
from fitune.data.examples import Examples
from fitune.errors import RunDirectoryError
from fitune.objectives.log_probs import AnswerLogProbs
from fitune.step.assemble import Setup, choose_precision

Json = dict[str, object]
#: If one of these changes, the saved tensors do not fit.
NEEDS_NEW_RUN = ("model", "model.method", "optim.name", "reference")
_SAMPLED_ELEMENTS = 4096


def run_identity(config: RunConfig, setup: Setup, *, train: Examples, held_out: Examples) -> Json:
    optim = config.optim.model_dump(mode="json") | {"lr": setup.peak_lr}
    # The hash of the model knows what is trained beside the adapters.
    without = {"modules_to_save"}
    lora = config.model.lora.model_dump(mode="json", exclude=without)
    lora = lora if config.model.has_adapters else {}
    return {
        "model": _model_hash(setup),
        "model.method": config.model.method,
        **{f"model.lora.{key}": value for key, value in lora.items()},
        "model.precision": choose_precision(
            config.model, next(setup.model.parameters()).device
        ).name,
        "data.train": _data_hash(train),
        "data.eval": _data_hash(held_out),
        **_objective_identity(config, setup),
        "batch.effective": config.batch.rows_per_step,
        **{f"optim.{key}": value for key, value in optim.items()},
        **{
            f"train.{key}": getattr(config.train, key)
            for key in ("seed", "epochs", "steps", "tokens")
        },
        # None for none, as in runs of earlier versions.
        "train.label_smoothing": config.train.label_smoothing or None,
        "eval.patience": config.eval.patience,
    }


def _objective_identity(config: RunConfig, setup: Setup) -> Json:
    if config.objective == "sft":
        return {}
    preference = config.preference.model_dump(mode="json", exclude={"reference"})
    objective = setup.settings.objective
    live = objective.reference if isinstance(objective, AnswerLogProbs) else None
    frozen = None if live is None else live.copy
    return {
        "objective": config.objective,
        **{f"preference.{key}": value for key, value in preference.items()},
        **({} if live is None else {"preference.reference": config.reference}),
        # no checkpoint has the copy: a resumed run makes it of the same weights again
        **({} if frozen is None else {"reference": _frozen_hash(frozen)}),
    }


def run_conditions(setup: Setup, *, attention: str, num_ranks: int = 1) -> Json:
    device = next(setup.model.parameters()).device
    return {
        "batch.micro": setup.layout.micro_rows,
        "batch.micro_tokens": setup.layout.micro_tokens,
        "batch.ranks": num_ranks if num_ranks > 1 else None,
        "data.packing": setup.layout.packed,
        "loss": "full" if setup.settings.objective.chunking is None else "chunked",
        "model.attention": attention,
        "model.recompute": setup.recompute,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def check_identity(
    saved: Mapping[str, object], now: Mapping[str, object], *, allowed: Collection[str]
) -> list[str]:
    """Return a message for each allowed change.

    Raises RunDirectoryError with every change that is not allowed, and for a key in `allowed` that
    has not changed.
    """
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
    saved: Mapping[str, object], now: Mapping[str, object], *, dropout: bool
) -> str | None:
    """Return a message if the resumed run differs in its last bits; None if it is bit-exact."""
    changed = _differences(saved, now)
    if not changed:
        return None
    listed = "; ".join(f"{key} {_show(saved.get(key))} -> {_show(now.get(key))}" for key in changed)
    is_split_anew = any(key.startswith(("batch.", "data.")) for key in changed)
    masks = ", and dropout draws other masks" if dropout and is_split_anew else ""
    return f"goes on to 1e-5, not bit for bit{masks}: {listed}"


def _differences(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [key for key in dict.fromkeys((*now, *saved)) if saved.get(key) != now.get(key)]


def _show(value: object) -> str:
    return "none" if value is None else str(value)


def _data_hash(examples: Examples) -> str:
    """Hash the samples' tokens and weights, and how often each sample is seen."""
    return blake2b(
        examples.data_hash.encode() + examples.repeats.tobytes(), digest_size=8
    ).hexdigest()


def _model_hash(setup: Setup) -> str:
    """Hash the names, shapes and dtypes of all parameters, and some elements of the frozen ones.

    A checkpoint does not store frozen parameters. A few thousand elements of each identify them,
    because a different model differs everywhere.
    """
    digest = blake2b(digest_size=8)
    shards = setup.settings.shards
    with nullcontext() if shards is None else shards.together():
        for name, parameter in setup.model.named_parameters():
            digest.update(
                f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}".encode()
            )
            if not parameter.requires_grad:
                whole = parameter.detach() if shards is None else shards.whole(parameter.detach())
                digest.update(_sampled(whole))
    return digest.hexdigest()


def _frozen_hash(model: nn.Module) -> str:
    digest = blake2b(digest_size=8)
    for parameter in model.parameters():
        digest.update(_sampled(parameter.detach()))
    return digest.hexdigest()


def _sampled(weight: Tensor) -> bytes:
    """Return the bytes of a few thousand elements of a weight."""
    flat = weight.reshape(-1)
    sample = flat[:: -(-flat.numel() // _SAMPLED_ELEMENTS)]
    return sample.contiguous().view(torch.uint8).cpu().numpy().tobytes()
