"""A file or a command line of another trainer -> its arguments by name, and whose they are.

Read are the YAML and JSON of LLaMA-Factory (also of its v1 and its LLaMA Board), ms-swift, axolotl, TRL and
transformers' TrainingArguments, and the command line that starts one of them or minimind's scripts, as text of a file
(a shell script too) or as words. torchtune and litgpt are recognised and named.
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
from fitune.config.read import DATA_WAY, check_is_configuration, decode, read_bounded
from fitune.config.schema import RunConfig
from fitune.config.wording import shown
from fitune.config.yaml_lines import parse_scalar, parse_yaml
from fitune.errors import ConfigError

# Tools without a name of their own in every file: told by elimination where no own name decides.
_TOLD_BY_ELIMINATION = ("LLaMA-Factory", "LLaMA-Factory v1", "ms-swift", "TRL")
FROM_NAMES = {name.lower().replace(" ", "-"): name for name in TOOLS}
"""What `--from` takes -> the name of the table."""
PROGRAMS = {
    **{program: tool for tool, table in TOOLS.items() for program in table.programs},
    **dict.fromkeys(MINIMIND_SCRIPTS, "minimind"),
}
_TRAINS = {
    "ms-swift": ("sft", "pt"),
    "LLaMA-Factory": ("train",),
    "axolotl": ("train",),
    "TRL": ("sft",),
}
_NAMED_PROGRAMS = {
    "tune": "torchtune", "litgpt": "litgpt", "megatron": "Megatron-SWIFT", "unsloth-cli.py": "Unsloth",
}  # fmt: skip
_OTHER_SCRIPT = re.compile(r"(^|_)(dpo|ppo|grpo|kto|orpo|rlhf|rm|reward|distill\w*)(_|\.py$)")
_DEVICE_FLAGS = ("nproc_per_node", "num_processes", "num_gpus")
_SUFFIXES = (".yaml", ".yml", ".json")

# LLaMA Board writes the fields of its page; what its runner makes of them, where it is not the same name.
_BOARD = {
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
    """tool: a name of `importers.tools.TOOLS`. values: by name, nulls left out. origins: 'sft.yaml:12' or 'command', by
    name. script: the program of a command, such as train_full_sft.py. devices: how many the launcher of a command
    starts; None where nothing tells. is_text: it trains on plain text, as `swift pt`."""

    tool: str
    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    script: str | None = None
    devices: int | None = None
    is_text: bool = False

    @property
    def table(self) -> Tool:
        return (
            MINIMIND_SCRIPTS.get(self.script or "", MINIMIND)
            if self.tool == "minimind"
            else TOOLS[self.tool]
        )


def read_tool_file(path: Path, *, tool: str | None = None) -> ToolArguments:
    """tool: whose it is, as `--from` says it. Raises ConfigError for what cannot be read, for a file that is of none
    of the known tools and for one that could be of several."""
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
                f"{path} is a program, whose arguments only running it tells: let it save them with "
                "json.dump(args.to_dict(), file) and import that file"
            ]
        )
    is_command = re.search(
        r"(^|\s)--\w|^\s*(swift|llamafactory-cli|axolotl|trl) ", text, re.MULTILINE
    )
    if path.suffix in (".sh", ".bash") or (path.suffix not in _SUFFIXES and is_command):
        return read_command(_words(text, path), source=str(path), tool=tool)
    values, origins = _read_values(text, path)
    if any(name.startswith("top.") for name in values):
        return _read_board(values, origins, str(path))
    return ToolArguments(_tool(set(values), str(path), tool), str(path), values, origins)


def _read_values(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    marked = parse_yaml(text, str(path))
    if marked.faults:
        raise ConfigError(marked.faults)
    if isinstance(marked.tree, list) and path.suffix == ".json":
        raise ConfigError(
            [f"{path} holds {shown(marked.tree)}, not the keys of a configuration: {DATA_WAY}"]
        )
    if not isinstance(marked.tree, dict):
        raise ConfigError([_unknown(str(path))])
    if "data" in marked.tree and set(marked.tree) <= {*RunConfig.model_fields, "sweep"}:
        raise ConfigError([f"{path} is fitune's own already: fitune train {path}"])
    for tool, word in _OTHER_RECIPES.items():
        if any(isinstance(value, dict) and word in value for value in marked.tree.values()):
            raise ConfigError([_named_only(str(path), tool)])
    values = {name: value for name, value in marked.tree.items() if value is not None}
    return values, {name: marked.marks[(name,)].origin for name in values}


def _named_only(source: str, tool: str) -> str:
    return (
        f"{source} is of {tool}, whose recipes are not read: write model.source, data.train, batch.effective "
        "and optim.lr into a file of your own; 'fitune config schema' lists the other keys with their defaults"
    )


def read_command(
    words: Sequence[str], *, source: str = "command", tool: str | None = None
) -> ToolArguments:
    """['python', 'train_full_sft.py', '--batch_size', '16'] -> the arguments; what stands before the script belongs to
    its launcher, and variables of the environment before all. Raises ConfigError like `read_tool_file`."""
    if unset := next((word for word in words if "$" in word), None):
        raise ConfigError(
            [f"{source}: '{unset}' is a variable of the shell: write its value in its place"]
        )
    environment = {}
    while words and (match := re.fullmatch(r"([A-Z]\w*)=(.*)", words[0])):
        environment[match[1]] = match[2]
        words = words[1:]
    start, program, told = _program(words, source)
    rest = list(words[start + 1 :])
    script = program if program.endswith(".py") else None
    sub = ""
    is_sub = bool(rest) and rest[0] in _TRAINS.get(told or "", ())
    if told in _TRAINS and script is None and ("." not in program or is_sub):
        sub = rest.pop(0) if rest else ""
        if sub not in _TRAINS[told]:
            raise ConfigError(
                [
                    f"{source}: '{program} {sub}' is no supervised fine-tuning, which fitune is for alone"
                ]
            )
    flags = _flags(rest)
    if script is not None and _OTHER_SCRIPT.search(script) and not MINIMIND.own & flags.keys():
        raise ConfigError(
            [f"{source}: '{script}' is no supervised fine-tuning, which fitune is for alone"]
        )
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if told != "minimind" and (file := _configuration(rest, flags)) is not None:
        flags.pop("config", None)
        values, origins = _configuration_values(Path(file), source)
    found = _tool({*values, *flags}, source, tool or told)
    return ToolArguments(
        found,
        source,
        values | flags,
        origins | dict.fromkeys(flags, source),
        script,
        _devices(_flags(words[:start]), environment, found),
        is_text=sub == "pt",
    )


def _program(words: Sequence[str], source: str) -> tuple[int, str, str | None]:
    """Where the program stands that is started, its name and whose it is, where that tells; without one the words are
    flags alone."""
    for index, word in enumerate(words):
        name = PurePath(word).name
        if name in _NAMED_PROGRAMS:
            raise ConfigError([_named_only(source, _NAMED_PROGRAMS[name])])
        if name in PROGRAMS or name.endswith(".py"):
            return index, name, "ms-swift" if "swift/cli/" in word else PROGRAMS.get(name)
    return -1, "", None


def _configuration(rest: Sequence[str], flags: Mapping[str, Any]) -> str | None:
    """The file that a command takes its arguments from: its first word, or what --config names."""
    named = flags.get("config", rest[0] if rest else None)
    return (
        named
        if isinstance(named, str) and named.endswith(_SUFFIXES) and not named.startswith("-")
        else None
    )


def _configuration_values(path: Path, source: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        return _read_values(decode(read_bounded(path)), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [
                f"{source} names the configuration {path}, which cannot be read from here: stand where it was started"
            ]
        ) from error


def _devices(launcher: Mapping[str, Any], environment: Mapping[str, str], tool: str) -> int | None:
    """How many processes train together: by the launcher's flags, or the variables that a tool's own launcher reads."""
    told = [
        value
        for name, value in launcher.items()
        if name in _DEVICE_FLAGS and isinstance(value, int)
    ]
    nodes = launcher.get("nnodes", environment.get("NNODES", 1))
    if not told and (processes := environment.get("NPROC_PER_NODE", "")).isdigit():
        told = [int(processes)]
    if (
        not told
        and tool == "LLaMA-Factory"
        and (visible := environment.get("CUDA_VISIBLE_DEVICES"))
    ):
        told = [len(visible.split(","))]  # its launcher starts a process for each
    if not told:
        return None
    is_total = "num_processes" in launcher
    return told[0] * (int(nodes) if str(nodes).isdigit() and not is_total else 1)


def _words(text: str, path: Path) -> list[str]:
    """The command of a shell script that trains: continued lines joined, variables that lines set put in."""
    variables: dict[str, str] = {}
    exported: list[str] = []
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = _split(_with_values(line, variables), path)
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
        commands = [words for words in commands if _trains(words)] or commands
    if len(commands) > 1:
        raise ConfigError([f"{path} starts {len(commands)} programs: keep one of them"])
    return [*exported, *commands[0]] if commands else []


def _split(line: str, path: Path) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise ConfigError([f"{path}: this is no command of a shell: {error}"]) from error


def _with_values(line: str, variables: Mapping[str, str]) -> str:
    """With variables as their values, and what the shell would compute of two whole numbers."""
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


def _trains(words: Sequence[str]) -> bool:
    with suppress(ConfigError):
        start, program, told = _program(words, "")
        return (
            program.endswith(".py")
            or "." in program
            or words[start + 1] in _TRAINS.get(told or "", ())
        )
    return False


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """--name value, --name=value, or --name alone, which is true; several values become a list. Before the first of
    them name=value is one too."""
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
    """What LLaMA Board saves -> the arguments of LLaMA-Factory that its page would start the training with."""
    found: dict[str, Any] = {}
    places: dict[str, str] = {}
    for field, value in values.items():
        name = _BOARD.get(field, field.partition(".")[2] or field)
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


def _tool(names: set[str], source: str, told: str | None) -> str:
    """The one with names of its own among these, or the only one that has them all. Raises ConfigError where none has
    any and where several could be meant."""
    if told is not None:
        is_older = (
            told == "ms-swift"
            and names & TOOLS["ms-swift 2"].own
            and not names & TOOLS["ms-swift"].own
        )
        return "ms-swift 2" if is_older else told
    own = {tool: sorted(names & table.own) for tool, table in TOOLS.items()}
    found = [tool for tool in own if own[tool]]
    if "ms-swift 2" in found and "ms-swift" in found:
        found.remove("ms-swift")
    if not found:
        telling = {name for tool in _TOLD_BY_ELIMINATION for name in TOOLS[tool].keys} & names
        shared = telling & set(TOOLS["transformers"].keys)
        if telling == shared:
            found = ["transformers"] if telling else []
        else:
            found = [tool for tool in _TOLD_BY_ELIMINATION if telling <= set(TOOLS[tool].keys)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError([_unknown(source)])
    words = " or ".join(
        f"{tool} ({', '.join(own[tool][:2])})" if own[tool] else tool for tool in found
    )
    flags = " or ".join(f"--from {name}" for name, tool in FROM_NAMES.items() if tool in found)
    raise ConfigError([f"{source} could be of {words}: say which with {flags}"])


def _unknown(source: str) -> str:
    return (
        f"{source} is of no tool that is known here: it has none of the keys of LLaMA-Factory, ms-swift, axolotl, TRL, "
        "transformers' TrainingArguments or minimind"
    )
