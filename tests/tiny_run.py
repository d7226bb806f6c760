"""What a whole run needs, small: a model's directory with its tokenizer, a file of dialogues, a configuration."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from fitune.model.load import build_model, quiet_transformers
from fitune.model.presets import llama_config
from tiny_models import TINY_LLAMA, save_tokenizer

Dialogue = list[dict[str, str]]
WIDE_VOCABULARY = llama_config(
    vocab_size=16384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, intermediate_size=128,
)  # fmt: skip
"""Full logits of a thousand positions take 64 MiB, several times."""


def save_tiny_model(directory: Path, config: PretrainedConfig = TINY_LLAMA) -> Path:
    """A transformers directory with random weights and a tokenizer that has a chat template."""
    with quiet_transformers():
        build_model(config, seed=3).save_pretrained(directory)
    save_tokenizer(directory, num_extra=50)
    return directory


def dialogues(num_rows: int, *, seed: int = 0) -> list[Dialogue]:
    """Questions and answers of a few words; an answer repeats its question, so that there is something to learn."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        words = " ".join(f"w{draw.randrange(50)}" for _ in range(draw.randint(1, 8)))
        rows.append([{"role": "user", "content": words}, {"role": "assistant", "content": words}])
    return rows


def write_dialogues(path: Path, num_rows: int = 60, *, seed: int = 0) -> Path:
    lines = (
        json.dumps({"messages": messages}) + "\n" for messages in dialogues(num_rows, seed=seed)
    )
    path.write_text("".join(lines))
    return path


def write_long_dialogues(path: Path, num_rows: int) -> None:
    """Answers of 20 to 60 words."""
    draw = random.Random(0)
    lines = []
    for _ in range(num_rows):
        words = " ".join(f"w{draw.randrange(50)}" for _ in range(draw.randint(20, 60)))
        lines.append(
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "w1"},
                        {"role": "assistant", "content": words},
                    ]
                }
            )
        )
    path.write_text("\n".join(lines) + "\n")


def write_config(path: Path, sections: dict[str, dict[str, Any]] | None = None) -> Path:
    """`tiny/` trained on `sft.jsonl`, eight rows a step; `sections` replace or add keys."""
    content: dict[str, dict[str, Any]] = {
        "model": {"source": "tiny"},
        "data": {"train": "sft.jsonl", "eval_fraction": 0.1, "max_length": 64},
        "batch": {"effective": 8},
        "optim": {"lr": 0.01},
        "run": {"name": "run"},
    }
    for name, keys in (sections or {}).items():
        content[name] = content.get(name, {}) | keys
    path.write_text(yaml.safe_dump(content))
    return path
