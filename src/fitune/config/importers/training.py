"""Translate another tool's optimizer, learning rate schedule, run length, saving and trackers."""

from pathlib import PurePath
from typing import get_args

from fitune.config.importers.draft import Draft, is_off, whole
from fitune.config.values import Tracker

_SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "paged_adamw_32bit": "adamw",
    "adamw_torch_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged", "adafactor": "adafactor", "sgd": "sgd", "muon": "muon",
    "apollo_adamw": "apollo",
}  # fmt: skip
#: An argument that switches an optimizer on, whatever the optimizer's own argument says.
_SWITCHES = {"use_muon": "muon", "use_apollo": "apollo"}


def put_optimizer(draft: Draft) -> None:
    asked = draft.value("optim.name")
    name = draft.name("optim.name")
    switch = next(
        (switch for switch in _SWITCHES if not is_off(draft.argument(switch, False))), None
    )
    if switch is not None:
        draft.write("optim.name", _SWITCHES[switch], draft.quoted(switch))
        draft.reasons |= dict.fromkeys(
            draft.names("optim.name"), "another optimizer is switched on"
        )
        name = None
    elif asked in _OPTIMIZERS:
        draft.write("optim.name", _OPTIMIZERS[asked])
    elif name is not None:
        draft.differs.append(
            f"{draft.quoted(name)} is not offered: AdamW stands in for it, with another best rate"
        )
    if name is not None and asked == "paged_adamw_32bit":
        draft.differs.append(
            f"{draft.quoted(name)}: its state stays on the card; adamw_host keeps it in host memory"
        )
    if draft.written.get("optim.name", ("",))[0] == "apollo":
        draft.differs.append(
            "APOLLO keeps a quarter of each matrix's smaller dimension here, and no other rank"
        )
    usual = draft.default("optim.betas")
    given = [name for name in ("adam_beta1", "adam_beta2") if name in draft.arguments.values]
    first, second = usual or (0.9, 0.999)
    betas = [draft.argument("adam_beta1", first), draft.argument("adam_beta2", second)]
    if given or usual:
        draft.write(
            "optim.betas",
            betas,
            ", ".join(f"{draft.origin(name)} {name}" for name in given) or None,
        )


def put_run_length(draft: Draft) -> None:
    steps, epochs = draft.value("train.steps"), draft.value("train.epochs")
    if isinstance(steps, int) and steps > 0:
        draft.write("train.steps", steps)
        draft.reasons |= dict.fromkeys(draft.names("train.epochs"), "the number of steps is given")
    else:
        draft.write("train.epochs", epochs)
    patience = ("early_stopping_patience", "early_stopping_steps")
    name = next((name for name in patience if draft.arguments.values.get(name)), None)
    fraction, _ = draft.written.get("data.eval_fraction", (None, ""))
    is_evaluated = "data.eval" in draft.written or fraction != 0
    if name is not None and is_evaluated:
        draft.write("eval.patience", draft.argument(name), f"{draft.origin(name)} {name}")


def put_schedule(draft: Draft) -> None:
    asked = draft.value("optim.schedule")
    if (ours := _SCHEDULES.get(asked)) is not None:
        draft.write("optim.schedule", ours)
    else:
        draft.differs.append(
            f"{draft.quoted(str(draft.name('optim.schedule')))} is not offered: cosine stands in for it"
        )
    _final_rate(draft, ours)
    warmup, steps = draft.value("optim.warmup"), draft.argument("warmup_steps") or 0
    if asked == "constant" and draft.tool != "minimind":
        draft.write("optim.warmup", 0.0, f"{asked} has none")
        draft.reasons |= dict.fromkeys(
            (*draft.names("optim.warmup"), "warmup_steps"), "a constant rate has no warm-up"
        )
    elif 0 < steps < 1:  # transformers 5 also accepts a fraction of the run under this name
        draft.write("optim.warmup", steps, f"{draft.origin('warmup_steps')} warmup_steps")
    elif steps and "train.steps" in draft.written:
        draft.write(
            "optim.warmup",
            steps / draft.written["train.steps"][0],
            f"{draft.quoted('warmup_steps')} / max_steps",
        )
    elif steps:
        draft.differs.append(
            f"{draft.quoted('warmup_steps')}: here the warm-up is a share of the run, which its "
            "default of 0.03 stands "
            f"in for: set optim.warmup to {steps} / the steps of the run"
        )
    else:
        draft.write("optim.warmup", warmup)


def _final_rate(draft: Draft, schedule: str | None) -> None:
    share, least = (
        draft.argument("min_lr_rate", draft.value("optim.final_lr_fraction")),
        draft.argument("min_lr"),
    )
    if least is not None and (rate := draft.value("optim.lr")):
        share = least / rate
    if share and schedule != "constant":
        name = next(
            (name for name in ("min_lr", "min_lr_rate") if name in draft.arguments.values), None
        )
        draft.write("optim.final_lr_fraction", share, draft.quoted(name) if name else None)
        draft.mentioned.add("lr_scheduler_kwargs")
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
        every = draft.argument(name) if is_useful else None
        strategy = draft.argument(
            f"{kind}_strategy", draft.argument("evaluation_strategy") if kind == "eval" else None
        )
        if strategy in (None, "steps") and isinstance(every, int) and every > 0:
            if draft.tool == "minimind":
                every = max(1, every // whole(draft, "batch.accumulation"))
            draft.write(f"train.{kind}_every", every, draft.quoted(name))
    output, own_name = draft.value("run.output"), draft.value("run.name")
    if draft.tool == "minimind":
        draft.write("run.output", output)
        draft.write("run.name", draft.argument("lora_name") or own_name)
    # The other tools' output directory belongs to one run, ours holds all runs.
    elif output is not None:
        comment = draft.quoted(str(draft.name("run.output")))
        draft.write("run.name", PurePath(output).name, comment)
        draft.write("run.output", str(PurePath(output).parent), comment)
    _trackers(draft)


def _trackers(draft: Draft) -> None:
    asked = draft.value("run.trackers")
    trackers = list(asked) if isinstance(asked, list) else [asked]
    if draft.tool == "axolotl":
        trackers += [
            name
            for name in get_args(Tracker)
            if draft.argument(f"use_{name}") or draft.argument(f"{name}_project")
        ]
    elif draft.argument("use_swanlab") or draft.argument("use_wandb"):
        trackers.append("swanlab")  # minimind's use_wandb flag imports swanlab under the name wandb
    if known := [name for name in trackers if name in get_args(Tracker)]:
        draft.write("run.trackers", known, "as there")
