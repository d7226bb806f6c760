"""What a whole run needs, small: a model's directory with its tokenizer, a file of dialogues, a configuration."""

import json
import random
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from fitune.model.load import build_model, quiet_transformers
from tiny_models import TINY_LLAMA, save_tokenizer

Dialogue = list[dict[str, str]]


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
    lines = (json.dumps({"messages": messages}) + "\n" for messages in dialogues(num_rows, seed=seed))
    path.write_text("".join(lines))
    return path


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
