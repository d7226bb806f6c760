"""Configurations of a few thousand parameters, one of each family that the tests compare, and a word tokenizer."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DbrxConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    JetMoeConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from fitune.model.presets import llama_config, qwen3_config, qwen3_moe_config

_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # wide enough for attention to prefer some positions
}
_WIDE: dict[str, Any] = _SHAPE | {
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 4,
}

TINY_LLAMA = llama_config(**_SHAPE, intermediate_size=48)
TINY_QWEN3 = qwen3_config(**_SHAPE, intermediate_size=48)
TINY_MOE = qwen3_moe_config(**_SHAPE, moe_intermediate_size=48, num_experts=4)
TINY_GPT2 = GPT2Config(
    vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TINY_DROPOUT = GPT2Config(
    **(TINY_GPT2.to_dict() | {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1})
)
TINY_DBRX = DbrxConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ffn_config={"hidden_size": 32, "ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
)  # fmt: skip
"""A mixture that computes its experts one by one, with the tokens that each of them gets."""
TINY_JETMOE = JetMoeConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=64,
    max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
"""A mixture that reads how many tokens each of its experts gets."""
TINY: dict[str, PretrainedConfig] = {
    "llama": TINY_LLAMA,
    "qwen2": Qwen2Config(**_WIDE),
    "qwen3": TINY_QWEN3,
    "qwen3_moe": TINY_MOE,
    "mistral_window": MistralConfig(**_WIDE, sliding_window=4),
    "mixtral": MixtralConfig(**_WIDE, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": TINY_GPT2,
    "gemma2": Gemma2Config(
        **_WIDE, **_SLIDING, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**_WIDE, **_SLIDING),
    "gpt_oss": GptOssConfig(**_WIDE, **_SLIDING, num_local_experts=4, num_experts_per_tok=2),
}


def save_tokenizer(directory: Path, *, num_extra: int = 10) -> None:
    """A tokenizer of three special tokens and `num_extra` words, with a chat template, in `directory`."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"w{number}" for number in range(num_extra))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    fast.save_pretrained(directory)


TINY_QWEN3_NEXT: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
"""What Qwen3NextConfig takes beside the sizes of every model: two layers, one of each kind."""
