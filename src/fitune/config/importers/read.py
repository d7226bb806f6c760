"""Read the configuration file or the command line of another trainer into its named arguments.

Supported are the YAML and JSON files of LLaMA-Factory (also of its v1 and its LLaMA Board),
ms-swift, axolotl, TRL and transformers' TrainingArguments, and the commands that start one of them
or a script of minimind, in a shell script or as a list of words. torchtune and litgpt are
recognised and refused by name.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from string import Template
from typing import Any

from fitune.config.importers.tools import MINIMIND, MINIMIND_SCRIPTS, TOOLS, Tool
from fitune.config.schema import RunConfig
from fitune.config.text_files import DATA_WAY, check_is_configuration, decode, read_bounded
from fitune.config.wording import format_value
from fitune.config.yaml_lines import parse_scalar, parse_yaml
from fitune.errors import ConfigError

# A file of these tools may hold no name that is unique to the tool. The tool is then the only one
# that has all names of the file.
_TOOLS_WITHOUT_UNIQUE_NAMES = ("LLaMA-Factory", "LLaMA-Factory v1", "ms-swift", "TRL")
#: A value of `--from` -> the name of the tool's table.
FROM_NAMES = {name.lower().replace(" ", "-"): name for name in TOOLS}
PROGRAMS = {
    **{program: tool for tool, table in TOOLS.items() for program in table.programs},
    **dict.fromkeys(MINIMIND_SCRIPTS, "minimind"),
}
_TRAINING_SUBCOMMANDS = {
    "ms-swift": ("sft", "pt", "rlhf"),
    "LLaMA-Factory": ("train",),
    "axolotl": ("train",),
    "TRL": ("sft", "dpo", "kto", "orpo"),
}
_NAMED_PROGRAMS = {
    "tune": "torchtune", "litgpt": "litgpt", "megatron": "Megatron-SWIFT", "unsloth-cli.py": "Unsloth",
}  # fmt: skip
_OTHER_SCRIPT = re.compile(r"(^|_)(dpo|ppo|grpo|kto|orpo|rlhf|rm|reward|distill\w*)(_|\.py$)")
#: scripts of training on preferences that are imported -> (the tool, the training)
_PREFERENCE_SCRIPTS = {
    **{f"{name}.py": ("TRL", name) for name in ("dpo", "kto", "orpo")},
    **{f"trl.scripts.{name}": ("TRL", name) for name in ("dpo", "kto")},
    "swift.cli.rlhf": ("ms-swift", "rlhf"),
    "rlhf.py": ("ms-swift", "rlhf"),
}
_DEVICE_FLAGS = ("nproc_per_node", "num_processes", "num_gpus")
_SUFFIXES = (".yaml", ".yml", ".json")

# LLaMA Board saves the fields of its web page. Its runner passes these under another name.
_BOARD_FIELDS = {
    "top.model_path": "model_name_or_path",
    "train.batch_size": "per_device_train_batch_size",
    "train.neftune_alpha": "neftune_noise_alpha",
    "train.use_pissa": "pissa_init",
    "train.train_seed": "seed",
    "top.checkpoint_path": "adapter_name_or_path",
}
_BOARD_STAGES = {
    "Supervised Fine-Tuning": "sft", "Reward Modeling": "rm", "PPO": "ppo", "DPO": "dpo", "KTO": "kto",
    "Pre-Training": "pt",
}  # fmt: skip
_OTHER_RECIPES = {"torchtune": "_component_", "litgpt": "class_path"}


@dataclass(frozen=True)
class ToolArguments:
    """Holds the arguments of another trainer as they were given."""

    #: The tool's name in `importers.tools.TOOLS`.
    tool: str
    #: The file that the arguments come from, or 'command'.
    source: str
    #: Name -> value, without nulls.
    values: Mapping[str, Any]
    #: Name -> where the value stands, such as 'sft.yaml:12' or 'command'.
    origins: Mapping[str, str]
    #: The program of a command, such as train_full_sft.py.
    script: str | None = None
    #: Number of processes that the command's launcher starts; None if unknown.
    devices: int | None = None
    #: Whether the command trains on plain text, as `swift pt` does.
    is_text: bool = False
    #: The training that the command names where it is one on preferences: dpo, kto, orpo, rlhf.
    training: str = ""

    @property
    def table(self) -> Tool:
        return (
            MINIMIND_SCRIPTS.get(self.script or "", MINIMIND)
            if self.tool == "minimind"
            else TOOLS[self.tool]
        )


def read_tool_file(path: Path, *, tool: str | None = None) -> ToolArguments:
    """Read a configuration file or a shell script of another trainer.

    tool: the tool that `--from` names; detected from the names of the arguments if None.

    Raises ConfigError if the file cannot be read, belongs to no known tool or could belong to
    several.
    """
    check_is_configuration(path)
    try:
        text = decode(read_bounded(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            [
                f"{path} is not a text file: byte {error.start} is not UTF-8; save it in that encoding"
            ]
        ) from error
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error
    if path.suffix in (".py", ".ipynb"):
        raise ConfigError(
            [
                f"{path} is a program, whose arguments only running it tells: let it save them "
                "with "
                "json.dump(args.to_dict(), file) and import that file"
            ]
        )
    is_command = re.search(
        r"(^|\s)--\w|^\s*(swift|llamafactory-cli|axolotl|trl) ", text, re.MULTILINE
    )
    if path.suffix in (".sh", ".bash") or (path.suffix not in _SUFFIXES and is_command):
        return read_command(_command_of_script(text, path), source=str(path), tool=tool)
    values, origins = _read_values(text, path)
    if any(name.startswith("top.") for name in values):
        return _read_board(values, origins, str(path))
    return ToolArguments(_detect_tool(set(values), str(path), tool), str(path), values, origins)


def _read_values(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    marked = parse_yaml(text, str(path))
    if marked.faults:
        raise ConfigError(marked.faults)
    if isinstance(marked.tree, list) and path.suffix == ".json":
        raise ConfigError(
            [
                f"{path} holds {format_value(marked.tree)}, not the keys of a configuration: {DATA_WAY}"
            ]
        )
    if not isinstance(marked.tree, dict):
        raise ConfigError([_unknown_tool_message(str(path))])
    if "data" in marked.tree and set(marked.tree) <= {*RunConfig.model_fields, "sweep"}:
        raise ConfigError([f"{path} is fitune's own already: fitune train {path}"])
    for tool, word in _OTHER_RECIPES.items():
        if any(isinstance(value, dict) and word in value for value in marked.tree.values()):
            raise ConfigError([_unsupported_message(str(path), tool)])
    values = {name: value for name, value in marked.tree.items() if value is not None}
    return values, {name: marked.marks[(name,)].origin for name in values}


def _unsupported_message(source: str, tool: str) -> str:
    return (
        f"{source} is of {tool}, whose recipes are not read: write model.source, data.train, "
        "batch.effective "
        "and optim.lr into a file of your own; 'fitune config schema' lists the other keys with "
        "their defaults"
    )


def read_command(
    words: Sequence[str], *, source: str = "command", tool: str | None = None
) -> ToolArguments:
    """Read a command that starts a training: ['python', 'train_full_sft.py', '--batch_size', '16'].

    Words before the script belong to its launcher; environment variables may precede all words.
    Raises ConfigError in the same cases as `read_tool_file`.
    """
    if unset := next((word for word in words if "$" in word), None):
        raise ConfigError(
            [f"{source}: '{unset}' is a variable of the shell: write its value in its place"]
        )
    environment = {}
    while words and (match := re.fullmatch(r"([A-Z]\w*)=(.*)", words[0])):
        environment[match[1]] = match[2]
        words = words[1:]
    start, program, tool_hint = _find_program(words, source)
    rest = list(words[start + 1 :])
    script = program if program.endswith(".py") else None
    sub = ""
    is_sub = bool(rest) and rest[0] in _TRAINING_SUBCOMMANDS.get(tool_hint or "", ())
    if tool_hint in _TRAINING_SUBCOMMANDS and script is None and ("." not in program or is_sub):
        sub = rest.pop(0) if rest else ""
        if sub not in _TRAINING_SUBCOMMANDS[tool_hint]:
            raise ConfigError(
                [
                    f"{source}: '{program} {sub}' is neither supervised fine-tuning nor DPO, SimPO, ORPO or KTO"
                ]
            )
    flags = _flags(rest)
    known, training = _PREFERENCE_SCRIPTS.get(program, (None, ""))
    if known is not None and tool_hint in (None, known):
        tool_hint = known
    elif sub not in ("dpo", "kto", "orpo", "rlhf"):
        training = ""
    else:
        training = sub
    if (
        script is not None
        and not training
        and _OTHER_SCRIPT.search(script)
        and not MINIMIND.unique_names & flags.keys()
    ):
        raise ConfigError(
            [f"{source}: '{script}' is neither supervised fine-tuning nor DPO, SimPO, ORPO or KTO"]
        )
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    if tool_hint != "minimind" and (file := _configuration(rest, flags)) is not None:
        flags.pop("config", None)
        values, origins = _configuration_values(Path(file), source)
    found = _detect_tool({*values, *flags}, source, tool or tool_hint)
    return ToolArguments(
        found,
        source,
        values | flags,
        origins | dict.fromkeys(flags, source),
        script,
        _devices(_flags(words[:start]), environment, found),
        is_text=sub == "pt",
        training=training,
    )


def _find_program(words: Sequence[str], source: str) -> tuple[int, str, str | None]:
    """Return (index, name, tool) of the program that a command starts.

    The tool is None if the name of the program does not identify it. Without a program, when all
    words are flags, returns (-1, "", None).
    """
    for index, word in enumerate(words):
        name = PurePath(word).name
        if name in _NAMED_PROGRAMS:
            raise ConfigError([_unsupported_message(source, _NAMED_PROGRAMS[name])])
        if name in PROGRAMS or name.endswith(".py"):
            return index, name, "ms-swift" if "swift/cli/" in word else PROGRAMS.get(name)
    return -1, "", None


def _configuration(rest: Sequence[str], flags: Mapping[str, object]) -> str | None:
    """Return the file that a command takes its arguments from: its first word, or --config."""
    named = flags.get("config", rest[0] if rest else None)
    return (
        named
        if isinstance(named, str) and named.endswith(_SUFFIXES) and not named.startswith("-")
        else None
    )


def _configuration_values(path: Path, source: str) -> tuple[dict[str, object], dict[str, str]]:
    try:
        return _read_values(decode(read_bounded(path)), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [
                f"{source} names the configuration {path}, which cannot be read from here: stand where it was started"
            ]
        ) from error


def _devices(launcher: Mapping[str, Any], environment: Mapping[str, str], tool: str) -> int | None:
    """Return how many processes train together, or None if unknown.

    The number is taken from the launcher's flags, else from the environment variables that the
    tool's own launcher reads.
    """
    counts = [
        value
        for name, value in launcher.items()
        if name in _DEVICE_FLAGS and isinstance(value, int)
    ]
    nodes = launcher.get("nnodes", environment.get("NNODES", 1))
    if not counts and (processes := environment.get("NPROC_PER_NODE", "")).isdigit():
        counts = [int(processes)]
    if (
        not counts
        and tool == "LLaMA-Factory"
        and (visible := environment.get("CUDA_VISIBLE_DEVICES"))
    ):
        # LLaMA-Factory's launcher starts a process for each visible device.
        counts = [len(visible.split(","))]
    if not counts:
        return None
    is_total = "num_processes" in launcher
    return counts[0] * (int(nodes) if str(nodes).isdigit() and not is_total else 1)


def _command_of_script(text: str, path: Path) -> list[str]:
    """Return the words of the training command in a shell script.

    Joins continued lines and substitutes the variables that earlier lines set. Raises ConfigError
    if the script starts several trainings.
    """
    variables: dict[str, str] = {}
    exported: list[str] = []
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = _split_line(_substitute_variables(line, variables), path)
        assigned = words[1:] if words[:1] == ["export"] else words
        pairs = [re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL) for word in assigned]
        if pairs and all(pairs):
            variables |= {pair[1]: pair[2] for pair in pairs if pair}
            exported += [
                word for word in assigned if words[0] == "export" and re.match(r"[A-Z]", word)
            ]
        elif any(word.startswith("--") for word in words) or any(
            PurePath(word).name in PROGRAMS for word in words
        ):
            commands.append(words)
    if len(commands) > 1:
        commands = [words for words in commands if _starts_training(words)] or commands
    if len(commands) > 1:
        raise ConfigError([f"{path} starts {len(commands)} programs: keep one of them"])
    return [*exported, *commands[0]] if commands else []


def _split_line(line: str, path: Path) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError([f"{path}: this is no command of a shell: {error}"]) from error


def _substitute_variables(line: str, variables: Mapping[str, str]) -> str:
    """Substitute shell variables, and evaluate shell arithmetic of two whole numbers."""
    line = Template(line).safe_substitute(variables)
    return re.sub(
        r"\$\(\(\s*(\d+)\s*([-+*/])\s*(\d+)\s*\)\)|\$\(expr (\d+) \\?([-+*/]) (\d+)\)",
        lambda match: _computed(*(group for group in match.groups() if group is not None)),
        line,
    )


def _computed(left: str, operator: str, right: str) -> str:
    one, other = int(left), int(right)
    if operator == "/":
        return str(one // other) if other else "0"
    return str(one * other if operator == "*" else one + other if operator == "+" else one - other)


def _starts_training(words: Sequence[str]) -> bool:
    with suppress(ConfigError):
        start, program, tool_hint = _find_program(words, "")
        return (
            program.endswith(".py")
            or "." in program
            or words[start + 1] in _TRAINING_SUBCOMMANDS.get(tool_hint or "", ())
        )
    return False


def _flags(words: Sequence[str]) -> dict[str, object]:
    """Return the flags of a command as {name: value}.

    Accepts --name value, --name=value, --name alone (true) and --name with several values (a
    list), and name=value before the first flag.
    """
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if match := re.fullmatch(r"--?([A-Za-z]\w*(?:-\w+)*)(?:=(.*))?", word, re.DOTALL):
            name = match[1].replace("-", "_")
            found[name] = [] if match[2] is None else [match[2]]
        elif name is not None:
            found[name].append(word)
        elif match := re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL):
            found[match[1]] = [match[2]]
    plain = {name: [parse_scalar(text) for text in texts] for name, texts in found.items()}
    return {
        name: texts if len(texts) > 1 else texts[0] if texts else True
        for name, texts in plain.items()
    }


def _read_board(
    values: Mapping[str, Any], origins: Mapping[str, str], source: str
) -> ToolArguments:
    """Convert a file that LLaMA Board saved into the LLaMA-Factory arguments that it stands for."""
    found: dict[str, object] = {}
    places: dict[str, str] = {}
    for field, value in values.items():
        name = _BOARD_FIELDS.get(field, field.partition(".")[2] or field)
        if field == "train.training_stage":
            name, value = "stage", _BOARD_STAGES.get(value, value)
        elif field == "train.compute_type":
            name, value = (str(value), True) if value != "fp32" else ("bf16", False)
        elif field == "top.quantization_bit" and str(value).isdigit():
            value = int(value)
        elif field == "top.booster":
            name, value = "flash_attn", "fa2" if value == "flashattn2" else "auto"
        elif field == "train.ds_stage":
            name = "deepspeed"
        elif field == "train.extra_args":
            extra = parse_yaml(str(value), source).tree
            found |= extra if isinstance(extra, dict) else {}
            places |= dict.fromkeys(extra, origins[field]) if isinstance(extra, dict) else {}
            continue
        elif field in ("top.lang", "top.model_name") or not field.startswith(("top.", "train.")):
            name = field
        found[name], places[name] = value, origins[field]
    return ToolArguments("LLaMA-Factory", source, found, places)


def _detect_tool(names: set[str], source: str, tool_hint: str | None) -> str:
    """Return the tool with a unique name among these, else the only tool that has all of them.

    tool_hint: the tool that the command or the user names.

    Raises ConfigError if no tool has any of the names, or if several tools are possible.
    """
    if tool_hint is not None:
        is_older = (
            tool_hint == "ms-swift"
            and names & TOOLS["ms-swift 2"].unique_names
            and not names & TOOLS["ms-swift"].unique_names
        )
        return "ms-swift 2" if is_older else tool_hint
    unique = {tool: sorted(names & table.unique_names) for tool, table in TOOLS.items()}
    found = [tool for tool in unique if unique[tool]]
    if "ms-swift 2" in found and "ms-swift" in found:
        found.remove("ms-swift")
    if not found:
        telling = {
            name for tool in _TOOLS_WITHOUT_UNIQUE_NAMES for name in TOOLS[tool].keys
        } & names
        shared = telling & set(TOOLS["transformers"].keys)
        if telling == shared:
            found = ["transformers"] if telling else []
        else:
            found = [
                tool for tool in _TOOLS_WITHOUT_UNIQUE_NAMES if telling <= set(TOOLS[tool].keys)
            ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError([_unknown_tool_message(source)])
    words = " or ".join(
        f"{tool} ({', '.join(unique[tool][:2])})" if unique[tool] else tool for tool in found
    )
    flags = " or ".join(f"--from {name}" for name, tool in FROM_NAMES.items() if tool in found)
    raise ConfigError([f"{source} could be of {words}: say which with {flags}"])


def _unknown_tool_message(source: str) -> str:
    return (
        f"{source} is of no tool that is known here: it has none of the keys of LLaMA-Factory, "
        "ms-swift, axolotl, TRL, "
        "transformers' TrainingArguments or minimind"
    )
