"""Checkpoints whose weights are stored in fewer bits than they are computed in (quantization_config in config.json).

Two formats are unpacked by transformers while it reads them, and trained as numbers. Others would stay packed, in
layers that have no gradient and other sizes than a plan counts: they are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import FineGrainedFP8Config, Mxfp4Config, PretrainedConfig

from fitune.config import ModelConfig
from fitune.errors import ModelError

_UNPACKED: dict[str, Callable[..., Any]] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def weights_format(config: PretrainedConfig) -> str | None:
    """How the weights are stored where that is not as numbers, such as 'mxfp4'."""
    stored = _stored(config)
    method = stored.get("quant_method") or (
        "bitsandbytes" if stored else None
    )  # it did not always name itself
    return None if method is None else str(getattr(method, "value", method))


def unpacking(config: PretrainedConfig) -> Any:
    """What makes transformers unpack the weights; None where they are stored as numbers."""
    stored = weights_format(config)
    if stored not in _UNPACKED:
        return None
    described = {name: value for name, value in _stored(config).items() if name != "quant_method"}
    return _UNPACKED[stored](**(described | {"dequantize": True}))


def check_format(config: PretrainedConfig, model: ModelConfig) -> None:
    """Raises ModelError for weights that training could not hold; without weights the format does not matter."""
    stored = weights_format(config)
    if stored is not None and stored not in _UNPACKED and model.init != "random":
        raise ModelError(
            f"the weights of {model.source} are stored as {stored}, which fitune neither trains nor unpacks: give the "
            "model that they were made of, and model.method=qlora to hold it in 4 bits"
        )


def _stored(config: PretrainedConfig) -> dict[str, Any]:
    stored = getattr(config, "quantization_config", None) or {}
    return dict(stored if isinstance(stored, Mapping) else stored.to_dict())
