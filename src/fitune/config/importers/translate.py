"""Translate the arguments of another trainer into a fitune configuration with the same meaning.

Names and defaults come from the tool's table (`importers.tools`), so arguments are looked up by our
key; this module translates their values. A default of the tool is written into the configuration if
the training depends on it. No argument is lost: each is in the YAML, or in the list of those that
differ, are dropped or are not needed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fitune.config.importers.data import put_data
from fitune.config.importers.draft import Draft, check_arguments, is_off, whole
from fitune.config.importers.mask import put_mask
from fitune.config.importers.preference import put_preference
from fitune.config.importers.read import ToolArguments
from fitune.config.importers.tools import MINIMIND_SCRIPTS
from fitune.config.importers.training import put_optimizer, put_run_length, put_saving, put_schedule
from fitune.config.importers.vocabulary import put_frozen, put_vocabulary
from fitune.config.read import ResolvedConfig, read_config
from fitune.config.write import commented_yaml
from fitune.errors import ConfigError

_MINIMIND_PRESETS = {
    (768, 8, False): "minimind-3", (768, 8, True): "minimind-3-moe", (768, 16, False): "minimind2",
    (512, 8, False): "minimind2-small",
}  # fmt: skip

# An argument of LoRA's variants -> our key below model.lora, None where it is always so.
_ADAPTER_KINDS = {
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "use_dora": "dora",
    "peft_use_dora": "dora",
    "pissa_init": "init",
    "init_lora_weights": "init",
    "init_weights": "init",
    "peft_init_lora_weights": "init",
    "pissa_convert": None,
}

# Keys that have another name in other tools but the same values.
_SWITCHES = (
    "model.trust_remote_code",
    "model.compile",
    "model.offload_activations",
    "data.packing",
)
_SAME_MEANING = (
    *_SWITCHES,
    *(
        "model.tokenizer",
        "data.max_length",
        "optim.lr",
        "optim.weight_decay",
        "optim.eps",
        "optim.clip",
    ),
    *("train.seed", "eval.micro"),
)
_ALL_LINEAR = ("all", "all-linear", "ALL")
_BFLOAT16 = ("bfloat16", "bf16")
_FLOAT16 = ("float16", "fp16", "half")


@dataclass(frozen=True)
class ImportedConfig:
    """Holds the fitune configuration that another trainer's arguments were translated into."""

    tool: str
    #: YAML in which a comment names the origin of each value.
    text: str
    #: The configuration that `text` is read as.
    resolved: ResolvedConfig
    #: Messages about arguments that mean something else in fitune.
    differs: tuple[str, ...]
    #: Messages about arguments without a counterpart.
    dropped: tuple[str, ...]
    #: Name of an argument -> why it makes no difference.
    not_needed: Mapping[str, str]


def translate(
    arguments: ToolArguments,
    *,
    devices: int | None = None,
    model: str | None = None,
    data: str | None = None,
) -> ImportedConfig:
    """Translate another trainer's arguments into a fitune configuration.

    devices: how many devices trained together, if the arguments do not say; one by default.
    model, data: replace the model and the data that the arguments name.

    Raises ConfigError if the arguments are not supervised fine-tuning of a decoder model, name no
    model or no data, or have a value that the schema rejects.
    """
    draft = Draft(check_arguments(arguments), devices or arguments.devices or 1)
    if model is not None:
        draft.override("model.source", model)
    if data is not None:
        draft.override("data.train", data)
    for part in (
        _method,
        _model,
        _precision,
        _recompute,
        put_vocabulary,
        put_data,
        put_mask,
        put_preference,
        _batch,
        put_optimizer,
        put_run_length,
        put_schedule,
    ):
        part(draft)
    put_saving(draft)
    for key in _SAME_MEANING:
        draft.copy(key, bool if key in _SWITCHES else None)
    if draft.value("train.label_smoothing"):
        draft.copy("train.label_smoothing")
    draft.differs.extend(_general_differences(draft))
    dropped, not_needed = draft.unmentioned()
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
        not_needed,
    )


def _method(draft: Draft) -> None:
    script = draft.arguments.script
    if draft.tool == "minimind" and script is not None and script not in MINIMIND_SCRIPTS:
        raise ConfigError(
            [
                f"{script}: of minimind's scripts only {', '.join(MINIMIND_SCRIPTS)} can be carried over"
            ]
        )
    method = _method_name(draft)
    name = draft.name("model.method")
    draft.write("model.method", method, draft.quoted(name) if name else None)
    if method in ("full", "freeze"):
        lora = [
            name
            for name, key in draft.arguments.table.keys.items()
            if key.startswith("model.lora.")
        ]
        draft.reasons |= dict.fromkeys(
            (*lora, "lora_target_linear", *_ADAPTER_KINDS),
            "all weights are trained" if method == "full" else "no adapters are trained",
        )
        if method == "freeze":
            put_frozen(draft)
    else:
        _lora(draft)


def _method_name(draft: Draft) -> str:
    in_4_bits = _bits(draft) == 4
    if draft.tool == "minimind":
        return "lora" if draft.arguments.script == "train_lora.py" else "full"
    asked = draft.value("model.method")
    if draft.tool in ("TRL", "transformers"):
        asked = "lora" if asked or in_4_bits or draft.name("model.lora.rank") == "r" else "full"
    asked = asked or "full"
    known = ("full", "lora", "qlora", "freeze")
    if asked not in known[: 4 if draft.tool == "LLaMA-Factory" else 3]:
        name = draft.name("model.method")
        assert name is not None
        raise draft.refuse(name, "fitune trains all weights (full) or adapters (lora, qlora)")
    return "qlora" if asked == "lora" and in_4_bits else str(asked)


def _bits(draft: Draft) -> int | None:
    """Return the bits of the quantised frozen weights, or None if they are not quantised.

    Raises ConfigError for numbers other than 4 and 8.
    """
    draft.argument("load_in_4bit")
    for name in ("load_in_4bit", "load_in_8bit"):
        if draft.argument(name):
            draft.mentioned.add(name)
    named = [
        name for name in ("quantization_bit", "quant_bits") if not is_off(draft.argument(name, 0))
    ]
    bits = (
        draft.arguments.values[named[0]] if named else 8 if draft.argument("load_in_8bit") else None
    )
    if draft.argument("load_in_4bit"):
        bits = 4
    if bits == 8:
        draft.mentioned.update(named)
        draft.differs.append(
            "frozen weights in 8 bits are not offered: they stay in 16, or take model.method: qlora"
        )
    elif bits not in (None, 4):
        raise draft.refuse(
            named[0], "frozen weights are in 16 bits here, or in 4 with model.method: qlora"
        )
    elif bits == 4:
        draft.reasons |= dict.fromkeys(("load_in_4bit", *named), "4 bits are model.method: qlora")
        method = draft.argument("quant_method", "bnb")
        if method != "bnb":
            draft.differs.append(
                f"{draft.quoted('quant_method')}: 4-bit weights are NF4 with double quantization here"
            )
    return bits


def _lora(draft: Draft) -> None:
    rank, alpha = draft.value("model.lora.rank"), draft.value("model.lora.alpha")
    if draft.tool == "LLaMA-Factory" and not alpha and isinstance(rank, int | float):
        alpha = 2 * rank
        comment = f"default of {draft.arguments.table.release}, hparams/finetuning_args.py: twice the rank"
    else:
        comment = None
    for key, value, said in (("rank", rank, None), ("alpha", alpha, comment)):
        if value is not None:  # axolotl has no default
            draft.write(f"model.lora.{key}", value, said)
    draft.copy("model.lora.dropout")
    _adapter_kind(draft)
    _targets(draft)
    if draft.tool == "minimind":
        draft.differs.append(
            "LoRA: as minimind's, of the square linear layers with rank 16 and no scaling, but "
            "its first factors are "
            "drawn from another distribution"
        )


def _adapter_kind(draft: Draft) -> None:
    """Write which of the variants of LoRA that peft has is asked for."""
    # A converted PiSSA is what is always saved here.
    iterations = draft.argument("pissa_iter", 16)
    draft.argument("pissa_convert")
    for name, key in _ADAPTER_KINDS.items():
        value = draft.argument(name)
        if key is None or value is None or is_off(value):
            continue
        if name == "pissa_init":
            value = "pissa" if iterations == -1 else f"pissa_niter_{iterations}"
            if "pissa_iter" in draft.arguments.values:
                draft.origin("pissa_iter")
        if key != "init":
            draft.write(f"model.lora.{key}", value, draft.quoted(name))
        elif str(value).lower() != "true":
            draft.write("model.lora.init", value, draft.quoted(name))


def _targets(draft: Draft) -> None:
    targets = draft.value("model.lora.targets")
    name = draft.name("model.lora.targets")
    if all_linear := draft.argument("lora_target_linear"):
        targets = "all"
    if isinstance(targets, str):
        if name is not None and re.search(r"[*+?()|\\^$]", targets):
            raise draft.refuse(
                name,
                "a pattern of names: model.lora.targets takes the last names of layers, or all-linear",
            )
        targets = [part.strip() for part in targets.split(",")]
    targets = None if targets == ["DEFAULT"] else targets
    if isinstance(targets, list) and len(targets) == 1 and targets[0] in _ALL_LINEAR:
        targets = "all-linear"
    if targets:
        draft.write(
            "model.lora.targets",
            targets,
            draft.quoted("lora_target_linear") if all_linear else None,
        )
    else:
        draft.differs.append(
            "LoRA's target modules are not named, so they were chosen by the architecture (often "
            "q_proj and v_proj); "
            "here all linear layers are the default: set model.lora.targets"
        )


def _model(draft: Draft) -> None:
    source = draft.value("model.source")
    if source is None:
        raise ConfigError([f"{draft.arguments.source} names no model: give it with --model"])
    draft.write("model.source", source)
    if draft.argument("train_from_scratch"):
        draft.write("model.init", "random", draft.quoted("train_from_scratch"))
    if draft.tool == "minimind":
        _minimind_model(draft, source)


def _minimind_model(draft: Draft, weight: str) -> None:
    """Write the path of minimind's weights, which its scripts find by the size of the model.

    Examples are out/pretrain_768.pth and out/full_sft_768_moe.pth.
    """
    width, depth = draft.argument("hidden_size", 768), draft.argument("num_hidden_layers", 8)
    is_moe = bool(draft.argument("use_moe", 0))
    preset = _MINIMIND_PRESETS.get((width, depth, is_moe))
    if is_moe:
        draft.differs.append(
            "minimind adds the experts' balance loss (aux_loss), which is not added here"
        )
    if "model.source" in draft.given_elsewhere:
        return
    size = f"hidden_size {width}, num_hidden_layers {depth}, use_moe {int(is_moe)}"
    if weight == "none":
        if preset is None:
            raise ConfigError(
                [f"{size}: to start from nothing give one of the presets with --model"]
            )
        draft.write("model.source", preset, f"from_weight none, {size}")
    else:
        directory = draft.value("run.output")
        path = f"{directory}/{weight}_{width}{'_moe' if is_moe else ''}.pth"
        draft.write("model.source", path, f"save_dir, from_weight {weight}, {size}")
        shape: tuple[str, object] = (
            ("model.shape.preset", preset) if preset else ("model.shape.num_heads", 8)
        )
        draft.write(*shape, "a .pth does not tell the heads")
    draft.write("model.tokenizer", "../model", "where minimind's scripts find it")
    draft.differs.append(
        "paths are those of minimind's trainer/ directory: stand there, or change them"
    )


def _precision(draft: Draft) -> None:
    names = [
        name
        for name in ("bf16", "fp16", "pure_bf16", "bfloat16", "float16")
        if name in draft.arguments.values
    ]
    kind = next((word for word in ("torch_dtype", "dtype") if word in draft.arguments.values), None)
    names += [kind] if kind else []
    dtype = str(draft.argument(kind) if kind else "").removeprefix("torch.").lower()
    comment = ", ".join(map(draft.quoted, names)) or None
    draft.write("model.precision", _precision_name(draft, dtype), comment)


def _precision_name(draft: Draft, dtype: str) -> str:
    """Return the model.precision that corresponds to what the tool does with the weights.

    The autocast precisions hold trained weights in float32.
    """
    bf16, fp16 = draft.argument("bf16", draft.default("model.precision")), draft.argument("fp16")
    is_full = draft.method == "full"
    if draft.tool == "minimind":
        return "autocast_bfloat16" if dtype in ("", "bfloat16") else "autocast_float16"
    if draft.tool.startswith("ms-swift"):
        return _precision_of_ms_swift(draft, dtype)
    if draft.tool == "axolotl":
        return _precision_of_axolotl(draft, bf16)
    if fp16 is True:
        return "autocast_float16"
    if draft.tool.startswith("LLaMA-Factory"):
        # LLaMA-Factory always holds frozen weights in 16 bits, and trained weights in float32.
        if draft.argument("pure_bf16") or not is_full:
            return "bfloat16"
        is_mixed = bf16 and (draft.tool == "LLaMA-Factory" or draft.argument("dist_config"))
        return "autocast_bfloat16" if is_mixed else "float32"
    if bf16:
        return "bfloat16" if dtype in (*_BFLOAT16, "auto") else "autocast_bfloat16"
    return "bfloat16" if dtype in _BFLOAT16 else "float32"


def _precision_of_ms_swift(draft: Draft, dtype: str) -> str:
    # ms-swift holds all weights in torch_dtype, which also selects autocast's bf16 or fp16.
    if dtype not in (*_FLOAT16, "float32", "fp32"):
        return "bfloat16"
    if draft.argument("bf16") and dtype not in _FLOAT16:
        return "autocast_bfloat16"
    return "float32" if draft.argument("fp16") is False else "autocast_float16"


def _precision_of_axolotl(draft: Draft, bf16: object) -> str:
    # axolotl holds all weights in the 16-bit format that it computes in; `auto` is the format
    # that the card supports.
    if draft.argument("fp16") or (draft.argument("float16") and bf16 == "auto"):
        return "autocast_float16"
    if bf16 == "auto" and draft.method != "full" and not draft.argument("bfloat16"):
        return "auto"
    return "bfloat16" if bf16 or draft.argument("bfloat16") else "float32"


def _recompute(draft: Draft) -> None:
    """Write gradient checkpointing and the attention kernel.

    Without an argument they stay 'auto': they change memory and speed, never the result.
    """
    asked = draft.value("model.recompute")
    for name in draft.names("model.recompute"):
        # Mark both names as used: transformers 5 writes an older and a newer one.
        draft.argument(name)
    if draft.argument("disable_gradient_checkpointing"):
        draft.write("model.recompute", "off", draft.quoted("disable_gradient_checkpointing"))
    elif asked is not None:
        draft.write("model.recompute", "full" if asked else "off")
    if (
        (offload := draft.name("model.offload_activations"))
        and draft.argument(offload)
        and not asked
    ):
        draft.write("model.recompute", "full", f"{draft.origin(offload)} {offload} needs it here")
    for name in draft.names("model.attention"):
        value = draft.argument(name)
        if value in ("eager", "disabled") or (name == "eager_attention" and value):
            draft.write("model.attention", "eager", draft.quoted(name))
        elif value:
            draft.reasons[name] = "the fastest kernel that the card has is taken (model.attention)"


def _batch(draft: Draft) -> None:
    factors = []
    samples = draft.devices
    for key in ("batch.micro", "batch.accumulation"):
        name = draft.name(key)
        # Without an argument, ms-swift accumulates until all devices together reach 16 samples.
        is_derived = name is None and draft.default(key) is None
        value = max(1, math.ceil(16 / samples)) if is_derived else whole(draft, key)
        samples *= value
        factors.append(f"{name or key.replace('batch.', 'default ')} {value}")
        draft.mentioned.update([name] if name else [])
    if (total := draft.name("batch.effective")) is not None:
        samples = whole(draft, "batch.effective")
        factors = [f"{draft.origin(total)} {total}"]
        if draft.tool == "axolotl":  # axolotl counts the samples of each device
            samples *= draft.devices
    if draft.devices > 1 and (total is None or draft.tool == "axolotl"):
        factors.append(f"{draft.devices} devices")
    draft.write("batch.effective", samples, " x ".join(factors))
    is_packed = draft.value("data.packing") or draft.argument("neat_packing")
    if is_packed and "data.wrapped" not in draft.written:
        draft.mentioned.update(["neat_packing"] if draft.argument("neat_packing") else [])
        draft.differs.append(
            f"batch: with packing, a sequence of {draft.tool}'s batch is a block of max_length "
            "tokens that holds "
            "several samples of the data; here batch.effective counts samples of the data: "
            f"{samples} "
            "x data.max_length / the mean length that 'fitune check' tells is the same batch"
        )


def _general_differences(draft: Draft) -> Iterator[str]:
    """Yield the differences to the tool that do not depend on its arguments."""
    if draft.tool == "minimind":
        yield (
            "loss: minimind takes the mean of the micro-batches' means; here every supervised "
            "token of the batch "
            "counts the same"
        )
        if draft.arguments.script == "train_pretrain.py":
            yield (
                "minimind begins each text with its tokenizer's bos token; here a text has one "
                "where the tokenizer adds it: write it into the texts to keep it"
            )
        yield "minimind's random system prompts and removed empty think blocks are not copied"
    if draft.tool.startswith("ms-swift"):
        if "data.max_length" not in draft.written:
            yield (
                "ms-swift takes samples as long as the model allows without max_length; here set data.max_length"
            )
        source = draft.written["model.source"][0]
        is_hub = "/" in source and source[0] not in "./~" and not Path(source).exists()
        if is_hub and not draft.argument("use_hf") and "model.source" not in draft.given_elsewhere:
            yield (
                f"ms-swift loads {source} from ModelScope unless --use_hf is given; here it is "
                "loaded from Hugging "
                "Face: give a directory where the two are not the same"
            )
