"""Refuse sizes in a config.json with which a model cannot be built, or not in any useful time."""

from transformers import PretrainedConfig

from fitune.errors import ModelError

_MOST_LAYERS = 10_000
#: no model has nearly as many columns or tokens; a recording of one would not end
_MOST_WIDTH = 10**7
#: size in a configuration -> the smallest one that can be built
_LEAST = {
    "num_hidden_layers": 1,
    "vocab_size": 1,
    "hidden_size": 1,
    "head_dim": 1,
    "intermediate_size": 0,
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
}


def check_sizes(config: PretrainedConfig, source: str) -> None:
    """Raise ModelError for a number in a model's configuration that no model has."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelError(
            f"{source} says that it has {layers:,} layers, and at most {_MOST_LAYERS:,} are "
            "built: mend its "
            "config.json"
        )
    for name, least in _LEAST.items():
        size = getattr(text, name, None)
        if isinstance(size, int) and not least <= size <= _MOST_WIDTH:
            raise ModelError(
                f"{source} says {name}: {size:,}, and from {least} to {_MOST_WIDTH:,} is "
                "possible: mend its config.json"
            )
    _check_dropouts(text, source)
    padding, vocab_size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if (
        isinstance(padding, int)
        and isinstance(vocab_size, int)
        and not -vocab_size <= padding < vocab_size
    ):
        raise ModelError(
            f"{source} has the pad_token_id {padding:,}, beyond its vocabulary of "
            f"{vocab_size:,}: set it to null "
            "or to a token's id in its config.json"
        )


def _check_dropouts(text: PretrainedConfig, source: str) -> None:
    for name, share in text.to_dict().items():
        if "drop" in name and isinstance(share, float) and not 0 <= share < 1:
            raise ModelError(
                f"{source} says {name}: {share:g}, and a dropout is at least 0 and below 1: "
                "mend its config.json"
            )
