"""Translate another tool's optimizer, learning rate schedule, run length, saving and trackers."""

from pathlib import PurePath
from typing import get_args

from fitune.config.importers.draft import Draft, whole
from fitune.config.values import Tracker

_SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "paged_adamw_32bit": "adamw",
    "adamw_torch_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip


def put_optimizer(draft: Draft) -> None:
    asked = draft.take("optim.name")
    name = draft.name("optim.name")
    if asked in _OPTIMIZERS:
        draft.put("optim.name", _OPTIMIZERS[asked])
    elif name is not None:
        draft.differs.append(
            f"{draft.said(name)} is not offered: AdamW stands in for it, with another best rate"
        )
    if name is not None and asked == "paged_adamw_32bit":
        draft.differs.append(
            f"{draft.said(name)}: its state stays on the card; adamw_host keeps it in host memory"
        )
    usual = draft.default("optim.betas")
    given = [name for name in ("adam_beta1", "adam_beta2") if name in draft.arguments.values]
    first, second = usual or (0.9, 0.999)
    betas = [draft.raw("adam_beta1", first), draft.raw("adam_beta2", second)]
    if given or usual:
        draft.put(
            "optim.betas",
            betas,
            ", ".join(f"{draft.origin(name)} {name}" for name in given) or None,
        )


def put_run_length(draft: Draft) -> None:
    steps, epochs = draft.take("train.steps"), draft.take("train.epochs")
    if isinstance(steps, int) and steps > 0:
        draft.put("train.steps", steps)
        draft.reasons |= dict.fromkeys(draft.names("train.epochs"), "the number of steps is given")
    else:
        draft.put("train.epochs", epochs)


def put_schedule(draft: Draft) -> None:
    asked = draft.take("optim.schedule")
    if (ours := _SCHEDULES.get(asked)) is not None:
        draft.put("optim.schedule", ours)
    else:
        draft.differs.append(
            f"{draft.said(str(draft.name('optim.schedule')))} is not offered: cosine stands in for it"
        )
    _final_rate(draft, ours)
    warmup, steps = draft.take("optim.warmup"), draft.raw("warmup_steps") or 0
    if asked == "constant" and draft.tool != "minimind":
        draft.put("optim.warmup", 0.0, f"{asked} has none")
        draft.reasons |= dict.fromkeys(
            (*draft.names("optim.warmup"), "warmup_steps"), "a constant rate has no warm-up"
        )
    elif 0 < steps < 1:  # transformers 5 also accepts a fraction of the run under this name
        draft.put("optim.warmup", steps, f"{draft.origin('warmup_steps')} warmup_steps")
    elif steps and "train.steps" in draft.written:
        draft.put(
            "optim.warmup",
            steps / draft.written["train.steps"][0],
            f"{draft.said('warmup_steps')} / max_steps",
        )
    elif steps:
        draft.differs.append(
            f"{draft.said('warmup_steps')}: here the warm-up is a share of the run, which its default of 0.03 stands "
            f"in for: set optim.warmup to {steps} / the steps of the run"
        )
    else:
        draft.put("optim.warmup", warmup)


def _final_rate(draft: Draft, schedule: str | None) -> None:
    share, least = (
        draft.raw("min_lr_rate", draft.take("optim.final_lr_fraction")),
        draft.raw("min_lr"),
    )
    if least is not None and (rate := draft.take("optim.lr")):
        share = least / rate
    if share and schedule != "constant":
        name = next(
            (name for name in ("min_lr", "min_lr_rate") if name in draft.arguments.values), None
        )
        draft.put("optim.final_lr_fraction", share, draft.said(name) if name else None)
        draft.shown.add("lr_scheduler_kwargs")
    if schedule == "wsd":
        draft.differs.append(
            f"{draft.tool}'s warmup_stable_decay falls over num_decay_steps; here over the last tenth"
        )


def put_saving(draft: Draft) -> None:
    has_eval = (
        "data.eval" in draft.written
        or (draft.written.get("data.eval_fraction", (1, ""))[0] or 0) > 0
    )
    for kind, is_useful in (("eval", has_eval), ("save", True)):
        name = "save_interval" if draft.tool == "minimind" else f"{kind}_steps"
        every = draft.raw(name) if is_useful else None
        strategy = draft.raw(
            f"{kind}_strategy", draft.raw("evaluation_strategy") if kind == "eval" else None
        )
        if strategy in (None, "steps") and isinstance(every, int) and every > 0:
            if draft.tool == "minimind":
                every = max(1, every // whole(draft, "batch.accumulation"))
            draft.put(f"train.{kind}_every", every, draft.said(name))
    output, own_name = draft.take("run.output"), draft.take("run.name")
    if draft.tool == "minimind":
        draft.put("run.output", output)
        draft.put("run.name", draft.raw("lora_name") or own_name)
    # The other tools' output directory belongs to one run, ours holds all runs.
    elif output is not None:
        comment = draft.said(str(draft.name("run.output")))
        draft.put("run.name", PurePath(output).name, comment)
        draft.put("run.output", str(PurePath(output).parent), comment)
    _trackers(draft)


def _trackers(draft: Draft) -> None:
    asked = draft.take("run.trackers")
    told = list(asked) if isinstance(asked, list) else [asked]
    if draft.tool == "axolotl":
        told += [
            name
            for name in get_args(Tracker)
            if draft.raw(f"use_{name}") or draft.raw(f"{name}_project")
        ]
    elif draft.raw("use_swanlab") or draft.raw("use_wandb"):
        told.append("swanlab")  # minimind's use_wandb flag imports swanlab under the name wandb
    if trackers := [name for name in told if name in get_args(Tracker)]:
        draft.put("run.trackers", trackers, "as there")
