"""Checks that a Trainer is one that the integration was written for and is tested with."""

import inspect
from importlib.metadata import PackageNotFoundError, version

import transformers
from packaging.version import Version

from fitune.errors import UsageError

#: (first supported version, first unsupported version); the last release in between is tested
SUPPORTED = {"transformers": ("5.23", "5.24"), "trl": ("1.16", "1.17")}
_STEP_PARAMETERS = {
    "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
    "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch",
}  # fmt: skip


def check_trainer(trainer: object) -> None:
    """Raise UsageError for an object that is no Trainer, or a Trainer of an unsupported version."""
    if not isinstance(trainer, transformers.Trainer):
        raise UsageError(
            f"{type(trainer).__name__} is not a transformers.Trainer: give a Trainer or an SFTTrainer"
        )
    packages = ["transformers"]
    if any(kind.__module__.split(".")[0] == "trl" for kind in type(trainer).__mro__):
        packages.append("trl")
    for package in packages:
        check_version(package)
    found = set(inspect.signature(trainer._run_epoch).parameters)
    if found != _STEP_PARAMETERS:
        raise UsageError(
            f"{type(trainer).__name__} has its own _run_epoch, which fitune does not know: remove it"
        )


def check_version(package: str) -> None:
    first, after = SUPPORTED[package]
    try:
        found = version(package)
    except PackageNotFoundError:
        raise UsageError(
            f"{package} is not installed: pip install '{package}~={first}.0'"
        ) from None
    if not Version(first) <= Version(found) < Version(after):
        raise UsageError(
            f"{package} {found} is not supported: its Trainer is known from {first} up to {after}"
        )


def check_alone(trainer: transformers.Trainer) -> None:
    """Raise UsageError if the Trainer uses several devices."""
    args = trainer.args
    if (
        args.world_size > 1
        or args.n_gpu > 1
        or trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
    ):
        raise UsageError(
            f"a Trainer on {max(args.world_size, args.n_gpu)} devices, or with DeepSpeed or FSDP, is not supported: "
            "start it on one device"
        )
