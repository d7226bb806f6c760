"""Models that are no plain transformers are predicted too: recurrent ones, hybrids, and those that ask a tensor for
its device."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers

import fitune
from products import some_of
from tiny_models import TINY_QWEN3_NEXT

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
STATE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
HYBRID = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_chunk_size": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", SIZES | TINY_QWEN3_NEXT),
    "jamba": (
        "JambaConfig",
        SIZES | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    ),
    "mamba": ("MambaConfig", STATE),
    "mamba2": (
        "Mamba2Config",
        STATE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "falcon_mamba": ("FalconMambaConfig", STATE),
    "rwkv": (
        "RwkvConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
    "falcon_h1": ("FalconH1Config", SIZES | HYBRID | {"mamba_d_ssm": 64}),
    "bamba": ("BambaConfig", SIZES | HYBRID | {"attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        SIZES
        | HYBRID
        | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gptj": (
        "GPTJConfig",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "falcon": (
        "FalconConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        SIZES | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", SIZES | {"lru_width": 32, "num_hidden_layers": 3}),
    "zamba2": (
        "Zamba2Config",
        SIZES
        | {
            "mamba_d_state": 4,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "chunk_size": 16,
            "layer_types": ["linear_attention", "hybrid"],
            "hybrid_layer_ids": [1],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        SIZES
        | {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 4,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "attention"],
        },
    ),
    "xlstm": (
        "xLSTMConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4},
    ),
}


#: One of each kind of layers: linear attention, state spaces of both versions, recurrences, hybrids.
QUICK = {
    ("qwen3_next", "full"),
    ("mamba", "lora"),
    ("mamba2", "full"),
    ("rwkv", "full"),
    ("recurrent_gemma", "lora"),
    ("nemotron_h", "lora"),
    ("xlstm", "full"),
}


@pytest.mark.parametrize(("name", "method"), some_of(product(MODELS, ("full", "lora")), QUICK))
def test_a_model_of_another_kind_is_predicted(name: str, method: str, tmp_path: Path) -> None:
    config_class, sizes = MODELS[name]
    getattr(transformers, config_class)(**sizes).save_pretrained(tmp_path)
    tree = {
        "model": {"source": str(tmp_path), "init": "random", "method": method},
        "data": {"train": "rows.jsonl", "max_length": 32},
    }
    prediction = fitune.predict(tree, gpu="H100")
    assert prediction.peak_allocated_bytes > 0
