"""Plans of well-known models from their configuration alone: no weights, no data, no card."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from fitune.config import read_config
from fitune.planning.search import choose_plan
from products import some_of

_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
MODELS: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936, hidden_size=1024, num_hidden_layers=28, intermediate_size=3072,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(
        **_LLAMA, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, head_dim=64, tie_word_embeddings=True
    ),
    "Llama-3.1-8B": LlamaConfig(**_LLAMA, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "method", "precision", "num_parameters"),
    [
        ("Llama-3.1-8B", "lora", "bfloat16", 8_030_261_248),
        *some_of(
            (
                ("Qwen3-0.6B", "full", "auto", 596_049_920),
                ("Llama-3.2-1B", "full", "bfloat16", 1_235_814_400),
                ("Llama-3.1-8B", "qlora", "auto", 8_030_261_248),
            ),
            quick=(),
        ),
    ],
)
def test_a_configuration_alone_is_planned_for_a_24_gb_card(
    model: str,
    method: str,
    precision: str,
    num_parameters: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    MODELS[model].save_pretrained(tmp_path)
    config = read_config(
        {
            "model": {"source": str(tmp_path), "method": method, "precision": precision},
            "data": {"train": "none", "max_length": 1024},
            "batch": {"effective": 8},
        }
    ).config
    plan = choose_plan(config, gpu="RTX 4090", search="fastest")
    assert plan.chosen is not None
    chosen = plan.candidates[plan.chosen]
    assert chosen.predicted_device_bytes <= plan.budget_bytes
    assert sum(chosen.categories.values()) == chosen.predicted_allocated_bytes
    assert plan.model.num_parameters - plan.model.num_trainable_parameters in (0, num_parameters)
