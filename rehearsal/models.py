"""The small models that cases name."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from rehearsal.cases import ARCHITECTURES

LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def architecture(name: str, **more: Any) -> Any:
    """The configuration of transformers."""
    class_name, arguments = ARCHITECTURES[name]
    return getattr(transformers, class_name)(**arguments, **more)


def source(name: str, directory: Path) -> str:
    """As `model.source` takes it: a preset, or a directory with the configuration, which is written to `directory`."""
    if name not in ARCHITECTURES:
        return name
    path = directory / name
    path.mkdir(exist_ok=True)
    config = architecture(name)
    config.save_pretrained(path)
    _tokenizer(config.vocab_size).save_pretrained(path)
    return str(path)


def _tokenizer(num_words: int) -> Any:
    """One that knows as many words as the model has rows."""
    words = {f"w{number}": number for number in range(num_words)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="w0"
    )


def causal_model(name: str, *, dtype: str, lora: bool = False, attention: str = "sdpa") -> Any:
    """With weights that are drawn without moving the streams of random numbers."""
    with torch.random.fork_rng(devices=[]):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            architecture(name, attn_implementation=attention), dtype=getattr(torch, dtype)
        )
        model.config.use_cache = False
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(**LORA))
    model.train()
    return model
