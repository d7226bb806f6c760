"""Take `torchrun` and `accelerate launch` off a command, and keep what they hand to the script."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fitune.config.yaml_lines import parse_yaml
from fitune.errors import UsageError

#: Launchers whose own options stand before the script -> those of them that take no value
LAUNCHERS = {
    "torchrun": {
        "--standalone",
        "--no-python",
        "--no_python",
        "--run-path",
        "--run_path",
        "-m",
        "--module",
    },
    "accelerate": {
        *("--cpu", "--multi_gpu", "--tpu", "--quiet", "-q", "-m", "--module", "--no_python"),
        *("--use_deepspeed", "--use_fsdp", "--use_megatron_lm", "--use_parallelism_config"),
        *("--dynamo_use_fullgraph", "--dynamo_use_dynamic", "--dynamo_use_regional_compilation"),
        *("--enable_cpu_affinity", "--same_network", "--tpu_cluster", "--no_tpu_cluster"),
        *("--tpu_use_sudo", "--downcast_bf16", "--fp8_use_autocast_during_eval", "--debug"),
    },
}
LAUNCHER_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate launch",
}
_ONE_PROCESS = ("nproc_per_node", "num_processes", "nnodes", "num_machines")
#: Values of these options that mean one process on a machine with one card
_ONE = ("1", "1:1", "gpu", "auto")
#: Options of accelerate that share one model among processes
_SHARDED = ("use_deepspeed", "use_fsdp", "use_megatron_lm")
#: Options of accelerate, and keys of its configuration file -> variables by which it hands them on
_HANDED_ON = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
}


def after_launcher(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the command behind a launcher, and the variables that it sets for the script.

    Raises UsageError for several processes.
    """
    program, rest = Path(words[0]).name, words[1:]
    if program == "accelerate":
        if rest[:1] != ["launch"]:
            raise UsageError(
                f"accelerate {' '.join(rest[:1])} trains nothing: write accelerate launch SCRIPT.py"
            )
        rest = rest[1:]
    given: dict[str, str] = {}
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "--module"):
        option, equals, value = rest.pop(0).partition("=")
        if not equals:
            takes_value = option not in LAUNCHERS[program]
            value = (rest.pop(0) if rest else "") if takes_value else "true"
        given[option.lstrip("-").replace("-", "_")] = value
    if program == "accelerate":
        given = _accelerate_settings(given.get("config_file")) | given
    for option in _ONE_PROCESS:
        value = given.get(option, "1")
        if value not in _ONE:
            raise UsageError(
                f"this command starts {value} processes (--{option}), and a prediction is of one: "
                f"give --{option}=1; each card of a data-parallel run needs as much, and a little "
                "more for the buffers that gradients are summed in"
            )
    if sharded := [option for option in _SHARDED if given.get(option) == "true"]:
        raise UsageError(
            f"accelerate launch with {sharded[0]} shares the model among processes, and a "
            "prediction is of one that holds all of it: leave the option out"
        )
    return rest, [
        (variable, given[option]) for option, variable in _HANDED_ON.items() if option in given
    ]


def _accelerate_settings(named: str | None) -> dict[str, str]:
    """Return the settings of accelerate's configuration file: the named one, or the user's own."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "accelerate"
    defaults = (cache / f"default_config.{suffix}" for suffix in ("yaml", "yml", "json"))
    path = Path(named) if named is not None else next(filter(Path.is_file, defaults), None)
    if path is None:
        return {}
    try:
        tree: Any = parse_yaml(path.read_text(encoding="utf-8"), str(path)).tree
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}, the configuration of accelerate launch, cannot be read ({error}): give "
            "--config_file the right path"
        ) from error
    settings = tree if isinstance(tree, Mapping) else {}
    kind = str(settings.get("distributed_type", "NO")).lower()
    found = {
        key: str(settings[key])
        for key in (*_ONE_PROCESS, "mixed_precision")
        if settings.get(key) is not None
    }
    return found | {option: "true" for option in _SHARDED if option.removeprefix("use_") == kind}
