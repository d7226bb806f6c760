"""A file or a command line of another trainer -> its arguments by name, and whose they are.

Read are LLaMA-Factory's, axolotl's and TRL's YAML, a JSON or YAML of transformers' TrainingArguments, and the command
line that starts any of them or minimind's scripts, as text of a file (a shell script too) or as words.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal

from fitune.config.read import DATA_WAY, check_is_configuration
from fitune.config.schema import RunConfig
from fitune.config.wording import show
from fitune.config.yaml_lines import parse_scalar, parse_yaml
from fitune.errors import ConfigError

Tool = Literal["LLaMA-Factory", "axolotl", "TRL", "transformers", "minimind"]

# Names that one tool alone has.
_OWN_NAMES: dict[Tool, str] = {
    "LLaMA-Factory": "finetuning_type cutoff_len template dataset_dir lora_rank lora_target val_size max_samples stage "
    "train_on_prompt mask_history flash_attn quantization_bit overwrite_cache preprocessing_num_workers neat_packing "
    "pure_bf16 plot_loss dataset eval_dataset",
    "axolotl": "base_model micro_batch_size sequence_len num_epochs adapter sample_packing val_set_size test_datasets "
    "train_on_inputs lora_target_linear flash_attention dataset_prepared_path special_tokens optimizer lr_scheduler "
    "pad_to_sequence_len",
    "TRL": "dataset_name dataset_config dataset_train_split dataset_test_split max_length max_seq_length use_peft "
    "completion_only_loss assistant_only_loss dataset_text_field packing_strategy padding_free eos_token peft_config "
    "chat_template_path dataset_num_proc attn_implementation activation_offloading",
    "minimind": "accumulation_steps from_weight save_weight max_seq_len data_path use_moe num_hidden_layers grad_clip "
    "lora_name from_resume use_wandb save_interval log_interval",
    "transformers": "per_device_train_batch_size gradient_accumulation_steps num_train_epochs lr_scheduler_type optim "
    "warmup_ratio per_device_eval_batch_size max_grad_norm adam_beta1 adam_beta2 adam_epsilon logging_steps "
    "save_strategy eval_strategy report_to",
}
MINIMIND_SCRIPTS = ("train_full_sft.py", "train_lora.py", "train_pretrain.py")
_DEVICE_FLAGS = ("nproc_per_node", "num_processes", "num_gpus")


@dataclass(frozen=True)
class ForeignArguments:
    """values: by name, nulls left out. origins: 'sft.yaml:12' or 'command', by name. script: the program of a command,
    such as train_full_sft.py. devices: how many the launcher of a command starts; None where nothing tells."""

    tool: Tool
    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    script: str | None = None
    devices: int | None = None


def read_foreign(path: Path) -> ForeignArguments:
    """Raises ConfigError for what cannot be read and for a file that is of none of the known tools."""
    check_is_configuration(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not a text file: byte {error.start} is not UTF-8"]) from error
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from error
    if path.suffix not in (".yaml", ".yml", ".json") and re.search(r"(^|\s)--\w", text):
        return read_command(_words(text, path), source=str(path))
    marked = parse_yaml(text, str(path))
    if marked.faults:
        raise ConfigError(marked.faults)
    if isinstance(marked.tree, list) and path.suffix == ".json":
        raise ConfigError([f"{path} holds {show(marked.tree)}, not the keys of a configuration: {DATA_WAY}"])
    if not isinstance(marked.tree, dict):
        raise ConfigError([_unknown(str(path))])
    if "data" in marked.tree and set(marked.tree) <= {*RunConfig.model_fields, "sweep"}:
        raise ConfigError([f"{path} is fitune's own already: fitune train {path}"])
    values = {name: value for name, value in marked.tree.items() if value is not None}
    origins = {name: marked.marks[(name,)].origin for name in values}
    return ForeignArguments(_tool(set(marked.tree), None, str(path)), str(path), values, origins)


def read_command(words: Sequence[str], *, source: str = "command") -> ForeignArguments:
    """['python', 'train_full_sft.py', '--batch_size', '16'] -> the arguments; what stands before the script belongs to
    its launcher. Raises ConfigError like `read_foreign`."""
    start = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    launcher = () if start is None else words[:start]
    script = Path(words[start]).name if start is not None else None
    if unset := next((word for word in words if "$" in word), None):
        raise ConfigError([f"{source}: '{unset}' is a variable of the shell: write its value in its place"])
    values = _flags(words if start is None else words[start + 1 :])
    told = [value for name, value in _flags(launcher).items() if name in _DEVICE_FLAGS and isinstance(value, int)]
    tool = _tool(set(values), script, source)
    return ForeignArguments(tool, source, values, dict.fromkeys(values, source), script, told[0] if told else None)


def _words(text: str, path: Path) -> list[str]:
    """The command of a shell script: lines that set variables are put in, continued lines joined."""
    text = text.replace("\\\n", " ")
    try:
        lines = [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    except ValueError as error:
        raise ConfigError([f"{path}: this is no command of a shell: {error}"]) from error
    variables = {}
    for words in lines:
        if len(words) == 1 and (match := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[match[1]] = match[2]
    commands = [words for words in lines if any(word.startswith("--") for word in words)]
    if len(commands) > 1:
        raise ConfigError([f"{path} starts {len(commands)} programs: keep one of them"])
    return [Template(word).safe_substitute(variables) for word in commands[0]] if commands else []


def _flags(words: Sequence[str]) -> dict[str, Any]:
    """--name value, --name=value, or --name alone, which is true; several values become a list."""
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if match := re.fullmatch(r"--?([A-Za-z]\w*(?:-\w+)*)(?:=(.*))?", word, re.DOTALL):
            name = match[1].replace("-", "_")
            found[name] = [] if match[2] is None else [match[2]]
        elif name is not None:
            found[name].append(word)
    plain = {name: [parse_scalar(text) for text in texts] for name, texts in found.items()}
    return {name: texts if len(texts) > 1 else texts[0] if texts else True for name, texts in plain.items()}


def _tool(names: set[str], script: str | None, source: str) -> Tool:
    """The tool with the most names of its own; transformers' are also those of the tools that stand on it."""
    counts = {tool: len(names & set(own.split())) for tool, own in _OWN_NAMES.items() if tool != "transformers"}
    best = max(counts, key=lambda tool: counts[tool])
    if counts[best]:
        return best
    if script in MINIMIND_SCRIPTS:
        return "minimind"
    if names & set(_OWN_NAMES["transformers"].split()):
        return "transformers"
    raise ConfigError([_unknown(source)])


def _unknown(source: str) -> str:
    return (
        f"{source} is of no tool that is known here: it has none of the keys of LLaMA-Factory, axolotl, TRL, "
        "transformers' TrainingArguments or minimind"
    )
