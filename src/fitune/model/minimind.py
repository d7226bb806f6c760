"""Read minimind's weights files: a bare dictionary of tensors (`.pth`) without an architecture.

Reading returns the tensors with the names of a transformers checkpoint and a configuration;
`model/save.py` writes such files. Both use the same names. If transformers fuses the experts of a
layer into one tensor, its checkpoints still contain them one by one, as minimind's do, and
transformers converts both ways.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig

from fitune.boundary import raised_as
from fitune.config import ShapeConfig
from fitune.errors import ModelError
from fitune.model.presets import llama_config, preset_config, qwen3_config, qwen3_moe_config
from fitune.model.source import PRESETS

Tensors = dict[str, torch.Tensor]

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_LAYER = "model.layers.0."
#: what DistributedDataParallel and torch.compile put before each name
_WRAPPERS = ("module.", "_orig_mod.")
#: tensors in older files that the model computes from its configuration
_ROTARY_TABLES = {"freqs_cos", "freqs_sin", "pos_cis"}


def read_pth(path: Path) -> Tensors:
    """Return the tensors of a `.pth` file, memory-mapped if its format allows that.

    The tensors are on the CPU and have data even under another default device, such as meta while a
    step is recorded. Raises ModelError if the file cannot be read, contains more than tensors and
    plain values, or is no dictionary of tensors.
    """
    try:
        with warnings.catch_warnings(), torch._C.DisableTorchFunction():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is refused: it is not a plain dictionary of tensors but holds pickled code or "
            "is damaged; "
            f"save it again with torch.save(model.state_dict(), path)"
        ) from error
    # Bytes that are no pickle may raise anything in its interpreter.
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as a weights file ({_first_line(error)}); copy it again"
        ) from error
    # A training checkpoint contains the weights and the optimizer.
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise ModelError(
            f"{path} holds no dictionary of tensors; save it with torch.save(model.state_dict(), path)"
        )
    if odd := [name for name in content if not isinstance(name, str)]:
        raise ModelError(
            f"{path} names a tensor {odd[0]!r}, which is no text: it is no model's state dictionary"
        )
    tensors = {_bare_name(name): tensor for name, tensor in content.items()}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".")[-1] not in _ROTARY_TABLES
    }


def pth_config(tensors: Tensors, shape: ShapeConfig, *, path: Path) -> PretrainedConfig:
    """Return the configuration that the tensors belong to.

    It is Qwen3 if queries are normed, Qwen3-MoE with experts, else Llama. Sizes are taken from the
    shapes of the tensors. What the shapes do not determine (Llama's number of heads) is taken from
    `shape`, else from the preset with the same shapes. Raises ModelError if that is ambiguous or
    contradictory.
    """
    missing = [
        name for name in (_EMBEDDING, f"{_LAYER}self_attn.q_proj.weight") if name not in tensors
    ]
    if missing:
        first = ", ".join(list(tensors)[:3]) or "nothing"
        raise ModelError(
            f"{path} is no minimind weights file: it lacks {missing[0]} and starts with {first}"
        )
    if shape.preset is not None and shape.preset not in PRESETS:
        raise ModelError(
            f"model.shape.preset is '{shape.preset}'; the presets are {', '.join(PRESETS)}"
        )

    for name, tensor in tensors.items():
        if name.startswith((_EMBEDDING, _LAYER)) and name.endswith("weight"):
            wanted = 1 if "norm" in name else 2
            if tensor.ndim != wanted or not tensor.numel():
                raise ModelError(
                    f"{path} is no minimind weights file: {name} has the shape {list(tensor.shape)}"
                )
    numbers = {
        int(m[1]) for m in map(re.compile(r"model\.layers\.(\d{1,9})\.").match, tensors) if m
    }
    if numbers != set(range(len(numbers))):
        gap = min(set(range(len(numbers))) - numbers)
        raise ModelError(
            f"{path} lacks layer {gap} of {max(numbers) + 1:,}: copy it again, or save the whole model"
        )
    with raised_as(
        ModelError,
        f"{path} holds tensors that no minimind model has",
        "give the file that minimind saved",
    ):
        return _config_of(tensors, shape, path=path)


def _config_of(tensors: Tensors, shape: ShapeConfig, *, path: Path) -> PretrainedConfig:
    vocab_size, hidden_size = tensors[_EMBEDDING].shape
    queries = tensors[f"{_LAYER}self_attn.q_proj.weight"].shape[0]
    keys = tensors[f"{_LAYER}self_attn.k_proj.weight"].shape[0]
    head_dim = _head_dim(tensors, shape, path=path)
    found: dict[str, int] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1
        + max(int(m[1]) for m in map(re.compile(r"model\.layers\.(\d+)\.").match, tensors) if m),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "tie_word_embeddings": _HEAD not in tensors
        or torch.equal(tensors[_HEAD], tensors[_EMBEDDING]),
    }
    _check_shape(shape, found, path=path)
    if f"{_LAYER}mlp.experts.0.gate_proj.weight" in tensors:
        width = tensors[f"{_LAYER}mlp.experts.0.gate_proj.weight"].shape[0]
        router = tensors.get(f"{_LAYER}mlp.gate.weight")
        if router is None:
            raise ModelError(f"{path} has experts but lacks their router, {_LAYER}mlp.gate.weight")
        return qwen3_moe_config(**found, moe_intermediate_size=width, num_experts=router.shape[0])
    gate = tensors.get(f"{_LAYER}mlp.gate_proj.weight")
    if gate is None:
        raise ModelError(
            f"{path} lacks {_LAYER}mlp.gate_proj.weight, the first layer's feed-forward weights"
        )
    build = qwen3_config if f"{_LAYER}self_attn.q_norm.weight" in tensors else llama_config
    return build(**found, intermediate_size=gate.shape[0])


def _head_dim(tensors: Tensors, shape: ShapeConfig, *, path: Path) -> int:
    norm = tensors.get(f"{_LAYER}self_attn.q_norm.weight")
    if norm is not None:
        return int(norm.shape[0])
    hidden_size = tensors[_EMBEDDING].shape[1]
    queries = tensors[f"{_LAYER}self_attn.q_proj.weight"].shape[0]
    keys = tensors[f"{_LAYER}self_attn.k_proj.weight"].shape[0]
    candidates = [preset_config(name) for name in ((shape.preset,) if shape.preset else PRESETS)]
    heads = {
        config.num_attention_heads
        for config in candidates
        if (config.hidden_size, config.num_key_value_heads * config.head_dim) == (hidden_size, keys)
    }
    if shape.num_heads is not None:
        heads = {shape.num_heads}
    elif shape.num_kv_heads is not None:
        heads = {queries * shape.num_kv_heads // keys}
    if len(heads) != 1:
        raise ModelError(
            f"{path} does not tell its number of attention heads ({queries} query columns, {keys} "
            "key columns); "
            f"set model.shape.num_heads or model.shape.preset ({', '.join(PRESETS)})"
        )
    (num_heads,) = heads
    if queries % num_heads or keys % (queries // num_heads):
        raise ModelError(
            f"{path} has {queries} query and {keys} key columns, which {num_heads} heads do not divide"
        )
    return int(queries // num_heads)


def _check_shape(shape: ShapeConfig, found: Mapping[str, int], *, path: Path) -> None:
    flags = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    preset = preset_config(shape.preset) if shape.preset else None
    for flag, key in flags.items():
        for origin, wanted in (
            (f"model.shape.{flag}", getattr(shape, flag)),
            (f"preset {shape.preset}", getattr(preset, key, None)),
        ):
            if wanted is not None and wanted != found[key]:
                raise ModelError(
                    f"{origin} says {flag} {wanted}, but the tensors of {path} have {found[key]}"
                )


def _bare_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
