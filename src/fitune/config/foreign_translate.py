"""The arguments of another trainer -> our configuration with the same meaning, and what could not be kept.

Names are looked up in `foreign_names`, so a tool's argument is asked for by our key; this module knows what the values
mean. A tool's defaults are written out where the training depends on them. Sources, as of 2026: TrainingArguments of
transformers 5.23, SFTConfig and ModelConfig of TRL 1.16; the arguments of LLaMA-Factory, axolotl and minimind.
"""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, get_args

from fitune.config.foreign_names import ANSWERS, FOREIGN_KEYS, NOT_NEEDED
from fitune.config.foreign_read import MINIMIND_SCRIPTS, ForeignArguments, Tool
from fitune.config.read import ResolvedConfig, read_config
from fitune.config.schema import Tracker
from fitune.config.wording import show
from fitune.config.write import commented_yaml
from fitune.config.yaml_lines import parse_scalar
from fitune.errors import ConfigError

_HF: dict[str, Any] = {
    "batch.micro": 8, "batch.accumulation": 1, "optim.lr": 5e-5, "optim.schedule": "linear", "optim.warmup": 0.0,
    "optim.weight_decay": 0.0, "optim.clip": 1.0, "train.epochs": 3.0, "train.seed": 42, "data.eval_fraction": 0.0,
    "model.lora.rank": 8, "model.lora.alpha": 8, "model.lora.dropout": 0.0,
}  # fmt: skip
_MINIMIND: dict[str, Any] = {
    "batch.micro": 16, "batch.accumulation": 1, "optim.lr": 1e-5, "optim.schedule": "cosine", "optim.warmup": 0.0,
    "optim.final_lr_fraction": 0.1, "optim.weight_decay": 0.01, "optim.clip": 1.0, "train.epochs": 2,
    "train.seed": 42, "data.max_length": 768,
    "data.eval_fraction": 0.0, "data.train": "../dataset/sft_t2t_mini.jsonl", "run.output": "../out",
    "run.name": "full_sft", "model.source": "pretrain",
    "model.lora.rank": 16, "model.lora.alpha": 16, "model.lora.dropout": 0.0,
    "model.lora.targets": ["q_proj", "o_proj"],
}  # fmt: skip
_DEFAULTS: dict[Tool, dict[str, Any]] = {
    "transformers": _HF,
    "TRL": _HF | {
        "optim.lr": 2e-5, "data.max_length": 1024,
        "model.lora.rank": 16, "model.lora.alpha": 32, "model.lora.dropout": 0.05,
    },
    "LLaMA-Factory": _HF | {"data.max_length": 2048, "model.lora.targets": "all", "model.method": "lora"},
    "axolotl": _HF | {
        "batch.micro": 1, "optim.schedule": "cosine", "optim.warmup": 0.03, "train.epochs": 1.0,
        "data.max_length": 512,
    },
    "minimind": _MINIMIND,
}  # fmt: skip
_SCRIPT_DEFAULTS: dict[str, dict[str, Any]] = {
    "train_lora.py": {
        "batch.micro": 32, "optim.lr": 1e-4, "train.epochs": 10, "data.max_length": 340, "model.source": "full_sft",
        "data.train": "../dataset/lora_medical.jsonl", "run.name": "lora_medical",
    },
    "train_pretrain.py": {
        "batch.micro": 32, "batch.accumulation": 8, "optim.lr": 5e-4, "data.max_length": 340, "model.source": "none",
        "data.train": "../dataset/pretrain_t2t_mini.jsonl", "run.name": "pretrain",
    },
}  # fmt: skip
_MINIMIND_PRESETS = {
    (768, 8, False): "minimind-3", (768, 8, True): "minimind-3-moe", (768, 16, False): "minimind2",
    (512, 8, False): "minimind2-small",
}  # fmt: skip

_SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "paged_adamw_32bit": "adamw",
    "adamw_torch_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit_paged", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip

# What is computed with below, and so is checked first; what is only passed on, our own schema checks.
_NUMBERS = frozenset(
    (
        *("batch.micro", "batch.accumulation", "optim.lr", "optim.warmup", "train.steps", "train.epochs"),
        *("data.eval_fraction", "model.lora.rank", "model.lora.alpha"),
        *(
            "optim.final_lr_fraction",
            "min_lr",
            "min_lr_rate",
            "warmup_steps",
            "hidden_size",
            "num_hidden_layers",
            "use_moe",
        ),
    )
)
_WORDS = frozenset(("optim.schedule", "optim.name", "model.source", "run.output"))
_MAPPINGS = frozenset(("peft_config", "lr_scheduler_kwargs"))

# What other values would change and these do not; the last two are how transformers writes an empty one.
_AS_HERE = {"truncation_mode": "keep_start", "loss_type": "nll", "eos_token": "<EOS_TOKEN>", "pad_token": "<PAD_TOKEN>"}

# Renamed, with the same values on both sides.
_SWITCHES = ("model.trust_remote_code", "model.compile", "model.offload_activations", "data.packing")
_SAME_MEANING = (
    *_SWITCHES,
    *("model.tokenizer", "data.max_length", "optim.lr", "optim.weight_decay", "optim.eps", "optim.clip"),
    *("train.seed", "eval.micro"),
)


@dataclass(frozen=True)
class ImportedConfig:
    """text: our YAML, each value with its origin. resolved: that text, read. differs: what means something else here,
    dropped: what has no counterpart, one sentence each; not_needed: names of what makes no difference."""

    tool: Tool
    text: str
    resolved: ResolvedConfig
    differs: tuple[str, ...]
    dropped: tuple[str, ...]
    not_needed: tuple[str, ...]


def translate(
    arguments: ForeignArguments, *, devices: int | None = None, model: str | None = None, data: str | None = None
) -> ImportedConfig:
    """devices: how many trained together, for tools whose files do not tell; one where left out. model, data: in place
    of what the arguments name.

    Raises ConfigError where it is no supervised fine-tuning of decoder models, names no model or data, or has a value
    that our configuration refuses.
    """
    draft = _Draft(_checked(arguments), devices or arguments.devices or 1)
    if model is not None:
        draft.override("model.source", model)
    if data is not None:
        draft.override("data.train", data)
    for part in (_method, _model, _precision, _recompute, _data, _mask, _batch, _optimizer, _run_length, _schedule):
        part(draft)
    _saving(draft)
    for key in _SAME_MEANING:
        draft.keep(key)
    dropped, not_needed = draft.rest()
    try:
        resolved = read_config(draft.tree(draft.written))
    except ConfigError as error:
        raise ConfigError([draft.located(fault) for fault in error.faults]) from error
    tree = draft.tree(key for key in resolved.origins if key in draft.written)
    return ImportedConfig(
        arguments.tool,
        commented_yaml(tree, {key: comment for key, (_, comment) in draft.written.items()}),
        resolved,
        tuple(draft.differs),
        tuple(dropped),
        tuple(not_needed),
    )


def _checked(arguments: ForeignArguments) -> ForeignArguments:
    """With mappings of arguments taken apart and numbers in quotes as numbers. Raises ConfigError for values of the
    wrong kind."""
    values: dict[str, Any] = {}
    origins, faults = {}, []
    for holder, held in arguments.values.items():
        for name, value in _taken_apart(holder, held).items():
            names = {name, FOREIGN_KEYS.get(name, ("", ""))[1]}
            is_number = bool(names & _NUMBERS)
            values[name] = parse_scalar(value) if is_number and isinstance(value, str) else value
            origins[name] = arguments.origins[holder]
            is_word = bool(names & _WORDS) or ("model.method" in names and not isinstance(value, bool))
            if is_number and not isinstance(values[name], int | float):
                faults.append(f"{origins[name]} {name}: {show(value)}: a number is needed here")
            elif is_word and not isinstance(value, str):
                faults.append(f"{origins[name]} {name}: {show(value)}: a word is needed here")
    if faults:
        raise ConfigError(faults)
    return replace(arguments, values=values, origins=origins)


def _taken_apart(name: str, value: Any) -> dict[str, Any]:
    if name not in _MAPPINGS:
        return {name: value}
    if isinstance(value, str):  # as a command gives it
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else {name: value}


@dataclass
class _Draft:
    """Our keys so far, and which of the arguments have been read."""

    arguments: ForeignArguments
    devices: int
    written: dict[str, tuple[Any, str]] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    given_elsewhere: dict[str, Any] = field(default_factory=dict)

    @property
    def tool(self) -> Tool:
        return self.arguments.tool

    def override(self, key: str, value: Any) -> None:
        self.take(key)
        self.given_elsewhere[key] = value

    def name(self, key: str) -> str | None:
        """What the arguments call our key, where they give it."""
        return next((name for name in self.arguments.values if FOREIGN_KEYS.get(name, ("", ""))[1] == key), None)

    def raw(self, name: str, default: Any = None) -> Any:
        """An argument by its own name."""
        self.used.add(name)
        return self.arguments.values.get(name, default)

    def take(self, key: str) -> Any:
        """An argument by our key: as given, else the tool's default, else None."""
        if key in self.given_elsewhere:
            return self.given_elsewhere[key]
        if (name := self.name(key)) is not None:
            return self.raw(name)
        script = _SCRIPT_DEFAULTS.get(self.arguments.script or "", {}) if self.tool == "minimind" else {}
        return (_DEFAULTS[self.tool] | script).get(key)

    def put(self, key: str, value: Any, comment: str | None = None) -> None:
        name = self.name(key)
        if key in self.given_elsewhere:
            comment = "command line"
        elif comment is None and name is None:
            comment = f"default of {self.tool}"
        elif comment is None:
            assert name is not None
            comment = self.said(name) if self.arguments.values[name] != value else f"{self.origin(name)} {name}"
        self.written[key] = (value, comment)

    def keep(self, key: str) -> None:
        if (value := self.take(key)) is not None:
            self.put(key, bool(value) if key in _SWITCHES else value)

    def origin(self, name: str) -> str:
        return self.arguments.origins[name]

    def said(self, name: str) -> str:
        return f"{self.origin(name)} {name}: {show(self.arguments.values[name])}"

    def refuse(self, name: str, sentence: str) -> ConfigError:
        return ConfigError([f"{self.said(name)}: {sentence}"])

    def located(self, fault: str) -> str:
        """A fault of our configuration, with where its key's value comes from."""
        key = fault.split()[0].rstrip(":")
        return f"{fault} ({self.written[key][1]})" if key in self.written else fault

    def rest(self) -> tuple[list[str], list[str]]:
        """What nobody read: sentences for what makes a difference, names for what makes none. What is switched off is
        absent here as there."""
        left = {name: value for name, value in self.arguments.values.items() if name not in self.used}
        left = {name: value for name, value in left.items() if _AS_HERE.get(name) != value}
        dropped = [
            f"{self.said(name)}: {ANSWERS[name]}" if name in ANSWERS else self.said(name)
            for name, value in left.items()
            if name not in NOT_NEEDED and not _is_off(value)
        ]
        return dropped, [name for name in left if name in NOT_NEEDED]

    def tree(self, keys: Iterable[str]) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key in keys:
            *sections, name = key.split(".")
            holder = tree
            for part in sections:
                holder = holder.setdefault(part, {})
            holder[name] = self.written[key][0]
        return tree


def _is_off(value: Any) -> bool:
    return value in (False, 0, "", "none", "no", "null") or value in ([], {})


def _whole(draft: _Draft, key: str) -> int:
    value = draft.take(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    name = draft.name(key)
    assert name is not None
    raise draft.refuse(name, "a number above 0 is needed here")


def _method(draft: _Draft) -> None:
    _refuse_other_stages(draft)
    method = _method_name(draft)
    draft.take("model.lora.dropout")
    name = draft.name("model.method")
    draft.put("model.method", method, draft.said(name) if name else None)
    rank, alpha, targets = (draft.take(f"model.lora.{name}") for name in ("rank", "alpha", "targets"))
    all_linear = draft.raw("lora_target_linear")
    is_rank_stabilised = draft.raw("use_rslora")
    if method == "full":
        return
    if draft.tool == "LLaMA-Factory" and draft.name("model.lora.alpha") is None:
        alpha = 2 * rank
    if is_rank_stabilised:  # Kalajdzievski 2023, arXiv 2312.03732: alpha / sqrt(rank) in place of alpha / rank
        alpha *= math.sqrt(abs(rank))
    draft.put("model.lora.rank", rank)
    draft.put("model.lora.alpha", alpha, "times the square root of rank: use_rslora" if is_rank_stabilised else None)
    draft.keep("model.lora.dropout")
    if all_linear:
        targets = "all"
    if isinstance(targets, str):
        targets = "all-linear" if targets in ("all", "all-linear") else [part.strip() for part in targets.split(",")]
    if targets:
        draft.put("model.lora.targets", targets, draft.said("lora_target_linear") if all_linear else None)
    else:
        draft.differs.append(
            "LoRA's target modules are not named, so peft chose them by the architecture (often q_proj and v_proj); "
            "here all linear layers are the default: set model.lora.targets"
        )
    if draft.tool == "minimind":
        draft.differs.append(
            "LoRA: as minimind's, of the square linear layers with rank 16 and no scaling, but its first factors are "
            "drawn from another distribution"
        )


def _refuse_other_stages(draft: _Draft) -> None:
    for name in ("stage", "rl"):
        if draft.raw(name, "sft") not in ("sft", "pt"):
            raise draft.refuse(name, "fitune is for supervised fine-tuning alone")
    script = draft.arguments.script
    if draft.tool == "minimind" and script is not None and script not in MINIMIND_SCRIPTS:
        raise ConfigError([f"{script}: of minimind's scripts only {', '.join(MINIMIND_SCRIPTS)} can be carried over"])


def _method_name(draft: _Draft) -> str:
    in_4_bits = draft.raw("load_in_4bit") or draft.raw("quantization_bit") == 4
    if draft.raw("load_in_8bit") or draft.raw("quantization_bit") == 8:
        draft.differs.append("frozen weights in 8 bits are not offered: they stay in 16, or take model.method: qlora")
    if draft.tool == "minimind":
        return "lora" if draft.arguments.script == "train_lora.py" else "full"
    asked = draft.take("model.method")
    if draft.tool in ("TRL", "transformers"):
        asked = "lora" if asked or in_4_bits or draft.name("model.lora.rank") == "r" else "full"
    asked = asked or "full"
    if asked not in ("full", "lora", "qlora"):
        name = draft.name("model.method")
        assert name is not None
        raise draft.refuse(name, "fitune trains all weights (full) or adapters (lora, qlora)")
    return "qlora" if asked == "lora" and in_4_bits else str(asked)


def _model(draft: _Draft) -> None:
    source = draft.take("model.source")
    if source is None:
        raise ConfigError([f"{draft.arguments.source} names no model: give it with --model"])
    draft.put("model.source", source)
    if draft.tool == "minimind":
        _minimind_model(draft, source)


def _minimind_model(draft: _Draft, weight: str) -> None:
    """minimind finds weights by size: out/pretrain_768.pth, out/full_sft_768_moe.pth."""
    width, depth = draft.raw("hidden_size", 768), draft.raw("num_hidden_layers", 8)
    is_moe = bool(draft.raw("use_moe", 0))
    preset = _MINIMIND_PRESETS.get((width, depth, is_moe))
    if is_moe:
        draft.differs.append("minimind adds the experts' balance loss (aux_loss), which is not added here")
    if "model.source" in draft.given_elsewhere:
        return
    size = f"hidden_size {width}, num_hidden_layers {depth}, use_moe {int(is_moe)}"
    if weight == "none":
        if preset is None:
            raise ConfigError([f"{size}: to start from nothing give one of the presets with --model"])
        draft.put("model.source", preset, f"from_weight none, {size}")
    else:
        directory = draft.take("run.output")
        path = f"{directory}/{weight}_{width}{'_moe' if is_moe else ''}.pth"
        draft.put("model.source", path, f"save_dir, from_weight {weight}, {size}")
        shape: tuple[str, Any] = ("model.shape.preset", preset) if preset else ("model.shape.num_heads", 8)
        draft.put(*shape, "a .pth does not tell the heads")
    draft.put("model.tokenizer", "../model", "where minimind's scripts find it")
    draft.differs.append("paths are those of minimind's trainer/ directory: stand there, or change them")


def _precision(draft: _Draft) -> None:
    bf16, fp16 = draft.raw("bf16"), draft.raw("fp16")
    pure = draft.raw("pure_bf16")
    kind = next((word for word in ("torch_dtype", "dtype") if word in draft.arguments.values), "dtype")
    dtype = str(draft.raw(kind, "bfloat16" if draft.tool == "minimind" else "float32")).removeprefix("torch.")
    is_full = draft.written["model.method"][0] == "full"
    names = [name for name in ("bf16", "fp16", "pure_bf16", kind) if name in draft.arguments.values]
    if draft.tool == "minimind":
        precision = "autocast_bfloat16" if dtype == "bfloat16" else "autocast_float16"
    elif fp16 is True:
        precision = "autocast_float16"
    elif bf16 == "auto" and not is_full:
        precision = "auto"
    elif bf16 or pure or (bf16 is None and draft.tool == "TRL"):
        # axolotl loads all weights in 16 bits, LLaMA-Factory those that are frozen, TRL by dtype.
        is_16_bits = draft.tool == "axolotl" or pure or dtype in ("bfloat16", "auto")
        is_16_bits = is_16_bits or (draft.tool == "LLaMA-Factory" and not is_full)
        precision = "bfloat16" if is_16_bits else "autocast_bfloat16"
    else:
        precision = "bfloat16" if dtype == "bfloat16" else "float32"
    draft.put("model.precision", precision, ", ".join(map(draft.said, names)) or f"default of {draft.tool}")


def _recompute(draft: _Draft) -> None:
    """What is not said is left to fitune: it changes memory and speed, never the result."""
    asked = draft.take("model.recompute")
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        draft.raw(name)  # transformers 5 has both names and fills in both
    if draft.raw("disable_gradient_checkpointing"):
        draft.put("model.recompute", "off", draft.said("disable_gradient_checkpointing"))
    elif asked is not None:
        draft.put("model.recompute", "full" if asked else "off")
    if draft.take("model.offload_activations") and not asked:
        draft.raw("activation_offloading")
        draft.put("model.recompute", "full", "activation_offloading needs it here")
    if draft.take("model.attention") in ("eager", "disabled"):
        draft.put("model.attention", "eager")


def _data(draft: _Draft) -> None:
    train = draft.take("data.train")
    if train is None:
        raise ConfigError([f"{draft.arguments.source} names no training data: give it with --data"])
    draft.raw("dataset_dir")
    max_rows = draft.take("data.max_rows")
    given = draft.given_elsewhere.get("data.train")
    draft.put("data.train", _sources(draft, train, max_rows) if given is None else given)
    held_out = draft.take("data.eval")
    fraction = draft.take("data.eval_fraction")
    if held_out:
        draft.put("data.eval", _sources(draft, held_out, max_rows))
    elif isinstance(fraction, int) and fraction > 1:
        name = draft.name("data.eval_fraction")
        draft.put("eval.max_rows", fraction, draft.said(str(name)))
        draft.differs.append(
            f"{draft.said(str(name))} rows held out: here a share is; eval.max_rows keeps at most as many"
        )
    else:
        draft.put("data.eval_fraction", fraction)
    if draft.raw("dataset_train_split", "train") != "train":
        draft.used.discard("dataset_train_split")
    _templates(draft)


def _sources(draft: _Draft, named: Any, max_rows: Any) -> Any:
    """A path, or a list of paths with their limits; LLaMA-Factory's names are looked up in its dataset_info.json."""
    items: Any = [part.strip() for part in named.split(",")] if isinstance(named, str) and "," in named else named
    items = items if isinstance(items, list) else [items]
    sources: list[Any] = [path for item in items for path in _paths(draft, item)]
    if max_rows is not None:
        sources = [{"path": source, "max_rows": max_rows} for source in sources]
    return sources[0] if len(sources) == 1 and isinstance(sources[0], str) else sources


def _paths(draft: _Draft, item: Any) -> list[str]:
    """One entry of a tool's list of data: a path, a name of LLaMA-Factory, or axolotl's and TRL's mapping."""
    if isinstance(item, Mapping):
        path, files = item.get("path"), item.get("data_files")
        told = {key: value for key, value in item.items() if key not in ("path", "data_files", "ds_type")}
        told = {key: value for key, value in told.items() if value is not None and not _is_off(value)}
        if isinstance(told.get("type"), str):  # a format, which the rows' keys tell here
            del told["type"]
        if told and told != {"split": "train"}:
            words = ", ".join(f"{key} {show(value)}" for key, value in told.items())
            draft.differs.append(f"data {path}: {words}: all rows are read and their format is told by their keys")
        if files and path in ("json", "csv", "parquet", None):
            return [str(file) for file in files] if isinstance(files, list) else [str(files)]
        item = path
    if not isinstance(item, str):
        raise ConfigError([f"{draft.arguments.source}: {show(item)} is no path of data: give it with --data"])
    if draft.tool != "LLaMA-Factory" or PurePath(item).suffix:
        return [item]
    return [_listed(draft, item)]


def _listed(draft: _Draft, item: str) -> str:
    """The path of a name in LLaMA-Factory's list of data sets."""
    directory = Path(draft.raw("dataset_dir", "data"))
    try:
        entry = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))[item]
        return str(directory / entry["file_name"]) if "file_name" in entry else str(entry["hf_hub_url"])
    except (OSError, ValueError, LookupError, TypeError):
        draft.differs.append(
            f"dataset {item} is a name in {directory}/dataset_info.json, which does not tell it here: replace it in "
            "data.train by the path of the file"
        )
        return item


def _templates(draft: _Draft) -> None:
    for name in ("template", "chat_template", "chat_template_path"):
        value = draft.raw(name)
        if value is None or value == "tokenizer_default":
            continue
        if str(value).endswith((".jinja", ".jinja2")):
            draft.put("data.template", value, f"{draft.origin(name)} {name}")
        else:
            draft.differs.append(
                f"{draft.said(name)} is {draft.tool}'s own; here the tokenizer's template is used, or the Jinja file "
                "data.template: look at two rows with 'fitune check FILE --show 2'"
            )


def _mask(draft: _Draft) -> None:
    name = draft.name("data.mask")
    answers, prompts = draft.raw("assistant_only_loss"), draft.raw("completion_only_loss")
    everything = draft.raw("train_on_prompt") or draft.raw("train_on_inputs")
    if draft.tool in ("TRL", "transformers"):
        mask = "assistant" if answers or prompts else "all"
        if draft.tool == "transformers":
            draft.differs.append("transformers leaves the labels to the script: data.mask: all, or assistant?")
        elif not answers and prompts is None:
            draft.differs.append(
                "TRL trains on every token of a conversation (data.mask: all), but of rows with prompt and "
                "completion on the completion alone: for those set data.mask to assistant"
            )
    else:
        is_text = draft.raw("stage") == "pt"
        mask, name = "all" if everything or is_text else "assistant", "stage" if is_text else name
        if mask == "assistant" and name is None:
            return
    draft.put("data.mask", mask, draft.said(name) if name else None)
    if draft.raw("mask_history"):
        draft.differs.append("mask_history trained on the last answer alone; here every answer of a row is trained on")


def _batch(draft: _Draft) -> None:
    factors = []
    rows = draft.devices
    for key in ("batch.micro", "batch.accumulation"):
        value, name = _whole(draft, key), draft.name(key)
        rows *= value
        factors.append(f"{name or key.replace('batch.', 'default ')} {value}")
    if draft.tool == "axolotl" and "batch_size" in draft.arguments.values:
        rows = draft.raw("batch_size")
        factors = ["batch_size"]
    elif draft.devices > 1:
        factors.append(f"{draft.devices} devices")
    draft.put("batch.effective", rows, " x ".join(factors))
    if draft.take("data.packing") or draft.raw("neat_packing"):
        draft.differs.append(
            f"batch: with packing, a row of {draft.tool}'s batch is a block of max_length tokens that holds several "
            f"rows of the data; here batch.effective counts rows of the data: {rows} x data.max_length / the mean "
            "length that 'fitune check' tells is the same batch"
        )
    if draft.tool == "minimind":
        draft.differs.append(
            "loss: minimind takes the mean of the micro-batches' means; here every supervised token of the batch "
            "counts the same"
        )
        draft.differs.append("minimind's random system prompts and removed empty think blocks are not copied")


def _optimizer(draft: _Draft) -> None:
    asked = draft.take("optim.name")
    if asked is not None:
        name = str(draft.name("optim.name"))
        if asked in _OPTIMIZERS:
            draft.put("optim.name", _OPTIMIZERS[asked])
        else:
            draft.differs.append(f"{draft.said(name)} is not offered: AdamW stands in for it, with another best rate")
        if asked == "paged_adamw_32bit":
            draft.differs.append(f"{draft.said(name)}: its state stays on the card; adamw_host keeps it in host memory")
    given = [name for name in ("adam_beta1", "adam_beta2") if name in draft.arguments.values]
    betas = [draft.raw("adam_beta1", 0.9), draft.raw("adam_beta2", 0.999)]
    if given:
        draft.put("optim.betas", betas, ", ".join(f"{draft.origin(name)} {name}" for name in given))


def _run_length(draft: _Draft) -> None:
    steps, epochs = draft.take("train.steps"), draft.take("train.epochs")
    if isinstance(steps, int) and steps > 0:
        draft.put("train.steps", steps)
    else:
        draft.put("train.epochs", epochs)


def _schedule(draft: _Draft) -> None:
    asked = draft.take("optim.schedule")
    if (ours := _SCHEDULES.get(asked)) is not None:
        draft.put("optim.schedule", ours)
    else:
        draft.differs.append(f"{draft.said(str(draft.name('optim.schedule')))} is not offered: cosine stands in for it")
    _final_rate(draft, ours)
    warmup, steps = draft.take("optim.warmup"), draft.raw("warmup_steps") or 0
    if asked == "constant" and draft.tool != "minimind":
        draft.put("optim.warmup", 0.0, f"{asked} has none")
    elif 0 < steps < 1:  # transformers 5 takes a share under this name
        draft.put("optim.warmup", steps, f"{draft.origin('warmup_steps')} warmup_steps")
    elif steps and "train.steps" in draft.written:
        draft.put("optim.warmup", steps / draft.written["train.steps"][0], f"{draft.said('warmup_steps')} / max_steps")
    elif steps:
        draft.differs.append(
            f"{draft.said('warmup_steps')}: here the warm-up is a share of the run, which its default of 0.03 stands "
            f"in for: set optim.warmup to {steps} / the steps of the run"
        )
    else:
        draft.put("optim.warmup", warmup)


def _final_rate(draft: _Draft, schedule: str | None) -> None:
    share, least = draft.raw("min_lr_rate", draft.take("optim.final_lr_fraction")), draft.raw("min_lr")
    if least is not None and (rate := draft.take("optim.lr")):
        share = least / rate
    if share and schedule != "constant":
        name = next((name for name in ("min_lr", "min_lr_rate") if name in draft.arguments.values), None)
        draft.put("optim.final_lr_fraction", share, draft.said(name) if name else None)
    if schedule == "wsd":
        draft.differs.append(f"{draft.tool}'s warmup_stable_decay falls over num_decay_steps; here over the last tenth")


def _saving(draft: _Draft) -> None:
    has_eval = "data.eval" in draft.written or draft.written.get("data.eval_fraction", (1, ""))[0] > 0
    for kind, is_useful in (("eval", has_eval), ("save", True)):
        name = "save_interval" if draft.tool == "minimind" else f"{kind}_steps"
        every = draft.raw(name) if is_useful else None
        strategy = draft.raw(f"{kind}_strategy", draft.raw("evaluation_strategy") if kind == "eval" else None)
        if strategy in (None, "steps") and isinstance(every, int) and every > 0:
            if draft.tool == "minimind":
                every = max(1, every // _whole(draft, "batch.accumulation"))
            draft.put(f"train.{kind}_every", every, draft.said(name))
    output, own_name = draft.take("run.output"), draft.take("run.name")
    if draft.tool == "minimind":
        draft.put("run.output", output)
        draft.put("run.name", draft.raw("lora_name") or own_name)
    elif output is not None:  # their directory is the run's own
        comment = draft.said(str(draft.name("run.output")))
        draft.put("run.name", PurePath(output).name, comment)
        draft.put("run.output", str(PurePath(output).parent), comment)
    _trackers(draft)


def _trackers(draft: _Draft) -> None:
    asked = draft.take("run.trackers")
    told = list(asked) if isinstance(asked, list) else [asked]
    if draft.raw("wandb_project") and draft.tool == "axolotl":
        told.append("wandb")
    if draft.raw("use_swanlab") or draft.raw("use_wandb"):
        told.append("swanlab")  # which minimind imports under the other's name
    if trackers := [name for name in told if name in get_args(Tracker)]:
        draft.put("run.trackers", trackers, "as there")
