"""Configure architectures that are built from scratch by name: those of minimind.

The numbers are those of minimind's published models (github.com/jingyaogong/minimind). Its layers
compute the same as transformers' Qwen3, Qwen3-MoE and Llama, with the same parameter names.
"""

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

_MINIMIND: dict[str, object] = {
    "vocab_size": 6400,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "num_attention_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3: dict[str, object] = _MINIMIND | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}
_LLAMA: dict[str, object] = _MINIMIND | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}
_MOE: dict[str, object] = _QWEN3 | {
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 5e-4,
}


def preset_config(name: str) -> PretrainedConfig:
    """Return the configuration of a preset, one of `source.PRESETS`."""
    if name == "minimind-3":
        return qwen3_config(
            hidden_size=768, num_hidden_layers=8, head_dim=96, intermediate_size=2432
        )
    if name == "minimind-3-moe":
        return qwen3_moe_config(
            hidden_size=768,
            num_hidden_layers=8,
            head_dim=96,
            moe_intermediate_size=2432,
            num_experts=4,
        )
    if name == "minimind2":
        return llama_config(
            hidden_size=768, num_hidden_layers=16, head_dim=96, intermediate_size=2048
        )
    assert name == "minimind2-small", name
    return llama_config(hidden_size=512, num_hidden_layers=8, head_dim=64, intermediate_size=1408)


def qwen3_config(**shape: object) -> Qwen3Config:
    """Return the configuration of minimind-3 with another shape."""
    return Qwen3Config(**(_QWEN3 | shape))


def qwen3_moe_config(**shape: object) -> Qwen3MoeConfig:
    """Return the configuration of minimind-3-moe with another shape.

    Every layer is sparse, so the dense width is set to that of an expert.
    """
    shape.setdefault("intermediate_size", shape["moe_intermediate_size"])
    return Qwen3MoeConfig(**(_MOE | shape))


def llama_config(**shape: object) -> LlamaConfig:
    """Return the configuration of minimind2 with another shape."""
    return LlamaConfig(**(_LLAMA | shape))
