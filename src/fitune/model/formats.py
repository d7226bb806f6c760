"""Handle checkpoints with weights in fewer bits than they are computed in.

`quantization_config` in config.json describes them. transformers unpacks two formats while it reads
them, and their weights are trained as ordinary numbers. Weights in other formats would stay packed,
in layers without gradients and with other sizes than a plan assumes, so they are refused.
"""

from collections.abc import Callable, Mapping

from transformers import FineGrainedFP8Config, Mxfp4Config, PretrainedConfig

from fitune.config import ModelConfig
from fitune.errors import ModelError

_UNPACKED: dict[str, Callable[..., object]] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def weights_format(config: PretrainedConfig) -> str | None:
    """Return the packed format of the weights, such as 'mxfp4'; None for ordinary numbers."""
    stored = _stored(config)
    # Early files of bitsandbytes do not name the method.
    method = stored.get("quant_method") or ("bitsandbytes" if stored else None)
    return None if method is None else str(getattr(method, "value", method))


def unpacking(config: PretrainedConfig) -> object:
    """Return the configuration that makes transformers unpack the weights; None if not needed."""
    stored = weights_format(config)
    if stored not in _UNPACKED:
        return None
    described = {name: value for name, value in _stored(config).items() if name != "quant_method"}
    return _UNPACKED[stored](**(described | {"dequantize": True}))


def check_format(config: PretrainedConfig, model: ModelConfig) -> None:
    """Raise ModelError for weights in a format that fitune can neither train nor unpack.

    With random weights the format is irrelevant.
    """
    stored = weights_format(config)
    if stored is not None and stored not in _UNPACKED and model.init != "random":
        raise ModelError(
            f"the weights of {model.source} are stored as {stored}, which fitune neither trains "
            "nor unpacks: give the "
            "model that they were made of, and model.method=qlora to hold it in 4 bits"
        )


def _stored(config: PretrainedConfig) -> dict[str, object]:
    stored = getattr(config, "quantization_config", None) or {}
    return dict(stored if isinstance(stored, Mapping) else stored.to_dict())
