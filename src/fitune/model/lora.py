"""Add low-rank adapters to a frozen model, with peft."""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fitune.boundary import parse_json
from fitune.config import LoraConfig
from fitune.errors import ModelError
from fitune.model.adapter_start import note_start
from fitune.model.quantise import num_weights
from fitune.model.trained_whole import beside_adapters, is_embedding, is_tied, train_in_float32
from fitune.plain_files import read_plain

if TYPE_CHECKING:
    # The import takes half a second and is needed for adapters only.
    from peft import PeftModel


def apply_lora(
    model: PreTrainedModel, lora: LoraConfig, *, seed: int = 0, new_ids: Sequence[int] = ()
) -> "PeftModel":
    """Freeze `model` and add trainable adapters to the layers that `lora.targets` names.

    Adapters are float32 whatever the model's dtype is, on the device of the model. The model
    computes the same as before. By default the second factor starts at zero and the first is drawn
    from `seed`; PiSSA and OLoRA move a part of the frozen weights into the adapters.
    Raises ModelError for targets that the model does not have, and for an initialisation that its
    layers do not allow.

    new_ids: tokens whose rows of embedding and head are trained too, where these are not in
        `lora.modules_to_save`.
    """
    targets = [lora.targets] if isinstance(lora.targets, str) else list(lora.targets)
    names = adaptable_names(model)
    unknown = sorted(set(targets) - set(names) - {"all-linear"})
    if unknown:
        raise ModelError(
            "model.lora.targets names "
            f"{'; '.join(f'{name}, {_why_not(model, name)}' for name in unknown)}: "
            f"choose from {', '.join(names)}, or all-linear"
        )
    chosen = names if "all-linear" in targets else targets
    if lora.changes_base:
        _check_decomposable(model, lora, chosen)
    whole, rows = beside_adapters(model, lora.modules_to_save, new_ids)
    chosen = [name for name in chosen if name not in whole]
    with bitsandbytes_unseen():
        adapted = _apply(model, lora, names=chosen, whole=whole, rows=rows, seed=seed)
    train_in_float32(adapted)
    return adapted


def _check_decomposable(model: PreTrainedModel, lora: LoraConfig, names: list[str]) -> None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in names:
            continue
        if isinstance(module, Conv1D) and lora.init == "olora":
            raise ModelError(
                "model.lora.init olora does not work with this model's layers: use pissa"
            )
        weight = getattr(module, "weight", None)
        if weight is not None and lora.rank > min(weight.shape):
            raise ModelError(
                f"model.lora.init {lora.init} takes model.lora.rank {lora.rank} directions of each "
                f"weight, and {name} has {min(weight.shape)}: lower model.lora.rank"
            )


def _why_not(model: PreTrainedModel, target: str) -> str:
    """Return why `target` gets no adapter: it is the head, no linear layer, or does not exist."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] == target]
    if head is not None and any(module is head for module in found):
        is_tied = getattr(head, "weight", None) is getattr(embedding, "weight", None)
        return (
            "the head, whose weight is also the embedding's"
            if is_tied
            else "the head, which gets no adapter here"
        )
    return (
        f"of the kind {type(found[0]).__name__} and no linear layer"
        if found
        else "which this model does not have"
    )


def _apply(
    model: PreTrainedModel,
    lora: LoraConfig,
    *,
    names: list[str],
    whole: list[str],
    rows: dict[str, list[int]],
    seed: int,
) -> "PeftModel":
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        # peft divides it by the rank, so a float is as good as an integer.
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=names,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights=True if lora.init == "default" else lora.init,
        modules_to_save=whole or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=any(is_embedding(model, name) for name in whole) and is_tied(model),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft uses names that this version of transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        # This concerns patterns that peft itself adds for the experts of some models.
        warnings.filterwarnings(
            "ignore", r"The following \w+_pattern keys did not match", RuntimeWarning
        )
        # The weights are drawn on the CPU; the random state of a GPU does not change.
        torch.default_generator.manual_seed(seed)
        adapted = cast("PeftModel", get_peft_model(model, config))
    if lora.changes_base and not next(model.parameters()).is_meta:
        note_start(adapted)
    return adapted


def load_adapters(model: PreTrainedModel, directory: Path) -> "PeftModel":
    """Return `model` with the saved adapters of `directory`, trainable.

    Raises ModelError if they cannot be read or do not fit.
    """
    _check_adapters(directory)
    try:
        with bitsandbytes_unseen(), warnings.catch_warnings():
            from peft import PeftModel

            warnings.simplefilter("ignore", FutureWarning)
            return cast(
                PeftModel, PeftModel.from_pretrained(model, str(directory), is_trainable=True)
            )
    except (OSError, ValueError, RuntimeError, LookupError, SafetensorError) as error:
        first = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapters in {directory} cannot be loaded into this model: {first}"
        ) from error


_KERNELS_READ_WEIGHTS = {"out_proj", "conv1d"}
#: Layers whose weights these models give to a kernel without the adapter, so peft refuses them.
_NOT_BY_PEFT = dict.fromkeys(
    ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), _KERNELS_READ_WEIGHTS
)
#: Initial values that leave the frozen weights as they are, so that loading is not affected.
_HARMLESS_INITS = ("gaussian", "orthogonal")
#: The settings in which adapters of fitune differ from one another, or from peft's defaults.
_OWN_KEYS = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_alpha",
    "lora_dropout", "peft_type", "peft_version", "r", "revision", "target_modules", "task_type",
    "megatron_core", "use_dora", "use_rslora", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying",
}  # fmt: skip


def _check_adapters(directory: Path) -> None:
    """Raise ModelError if the adapters in a directory are not ones that fitune makes.

    Somebody else may have made the directory, and peft trusts it. It imports any module that
    `megatron_core` names. It queries the hub if the directory lacks the weights, and for methods
    other than LoRA for more. It creates adapters of any rank before it reads the weights. It
    matches a text in target_modules or modules_to_save as a regular expression, which can take
    forever.
    """
    path = directory / "adapter_config.json"
    try:
        content = parse_json(read_plain(path, follow=True))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): copy the adapters again") from error
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{directory} has no adapter_model.safetensors: copy the adapters again")
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        raise ModelError(
            f"{path} is not of LoRA adapters, which are the ones that fitune makes: give those"
        )
    unusual = sorted(
        key
        for key, value in content.items()
        if key not in _OWN_KEYS and not _is_default(key, value)
    )
    targets, rank = content.get("target_modules"), content.get("r")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        unusual.append("target_modules")
    if not all(re.fullmatch(r"[\w.]+", str(name)) for name in content.get("modules_to_save") or ()):
        unusual.append("modules_to_save")
    if unusual:
        raise ModelError(
            f"{path} sets {', '.join(unusual[:5])} as fitune's own adapters do not: merge them by peft"
        )
    if rank not in _ranks(weights):
        raise ModelError(
            f"{path} says r: {rank}, and the adapters beside it have another rank: copy them again"
        )


def _is_default(key: str, value: object) -> bool:
    from peft import LoraConfig as PeftLoraConfig

    if key == "init_lora_weights" and value in _HARMLESS_INITS:
        return True
    return not value or getattr(PeftLoraConfig(), key, None) == value


def _ranks(weights: Path) -> set[int]:
    try:
        with safe_open(weights, "pt") as file:
            names = [name for name in file.keys() if ".lora_A." in name]  # noqa: SIM118
            return {file.get_slice(name).get_shape()[0] for name in names}
    except (OSError, SafetensorError, IndexError) as error:
        raise ModelError(f"{weights} cannot be read ({error}): copy the adapters again") from error


@contextmanager
def bitsandbytes_unseen() -> Iterator[None]:
    """Hide an installed bitsandbytes from peft inside this block.

    peft imports it to look for its layers, which a fitune model never has: its 4-bit layers are
    `NF4Linear`. That import loads all of torch._inductor and takes five times as long as the rest
    of peft. Nothing is hidden if it is already imported. Afterwards everyone, peft too, finds it as
    before.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    _clear_import_checks()
    # None makes Python raise ImportError on import.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        _clear_import_checks()


def _clear_import_checks() -> None:
    """Make peft check again whether bitsandbytes is installed; it caches the result."""
    if (asked := sys.modules.get("peft.import_utils")) is not None:
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            getattr(asked, name).cache_clear()


def adaptable_names(model: PreTrainedModel) -> list[str]:
    """Return the last names of the linear layers without the head: q_proj, gate_proj, ...

    Names that peft refuses are not among them: it adapts every module of a name, of any kind.
    """
    head = model.get_output_embeddings()
    linear: set[str] = set()
    refused = set(_NOT_BY_PEFT.get(model.config.model_type, ()))
    for name, module in model.named_modules():
        if module is not head:
            names = linear if isinstance(module, nn.Linear | Conv1D) else refused
            names.add(name.rpartition(".")[2])
    return sorted(linear - refused)


def not_adapted(model: PreTrainedModel) -> str | None:
    """Return what stays frozen although all linear layers are adapted, as one clause for the log.

    Returns None if nothing does. Fused experts and their router are parameters of three and two
    dimensions, not linear layers.
    """
    # peft holds the trained rows of new tokens in a dictionary.
    linear = (nn.Linear, Conv1D, nn.Embedding, nn.ParameterDict)
    bare = [
        (f"{name.rpartition('.')[2] or type(module).__name__}.{key}", num_weights(parameter))
        for name, module in model.named_modules()
        if not isinstance(module, linear)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    ]
    if not bare:
        return None
    names = ", ".join(sorted({name for name, _ in bare}))
    share = sum(size for _, size in bare) / sum(map(num_weights, model.parameters()))
    return f"{names} hold {share:.0%} of the parameters and get no adapter"
