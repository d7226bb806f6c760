"""Trainers of transformers and TRL on a model of a few thousand parameters and rows of very unequal length."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from byte_tokenizer import byte_tokenizer
from tiny_models import TINY_LLAMA

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would send a ping
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed"
)
LENGTHS = (5, 30, 11, 17, 8, 23, 14, 9, 26, 12, 7, 19)


def tiny_model(config: Any = TINY_LLAMA, **changes: Any) -> Any:
    torch.manual_seed(0)
    changed = config.__class__.from_dict(config.to_dict() | {"vocab_size": 300, **changes})
    return AutoModelForCausalLM.from_config(changed)


def rows(lengths: tuple[int, ...] = LENGTHS, *, masked: bool = True) -> datasets.Dataset:
    """masked: the first third of each row is no target."""
    ids = [
        [(7 * row + 3 * place) % 290 + 5 for place in range(length)]
        for row, length in enumerate(lengths)
    ]
    labels = [
        [-100 if masked and place < length // 3 else token for place, token in enumerate(row)]
        for row, length in zip(ids, lengths, strict=True)
    ]
    return datasets.Dataset.from_dict(
        {"input_ids": ids, "labels": labels, "attention_mask": [[1] * n for n in lengths]}
    )


def settings(directory: Path) -> dict[str, Any]:
    return {
        "output_dir": str(directory), "report_to": [], "use_cpu": True, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "bf16": False,
        "disable_tqdm": True, "dataloader_pin_memory": False, "learning_rate": 1e-3,
    }  # fmt: skip


def hf_trainer(
    directory: Path, *, kind: type[Trainer] = Trainer, model: Any = None, data: Any = None, callbacks: Any = None,
    optimizers: Any = (None, None), eval_data: Any = None, **changes: Any,
) -> Trainer:  # fmt: skip
    tokenizer = byte_tokenizer()
    return kind(
        model=model or tiny_model(),
        args=TrainingArguments(**settings(directory) | changes),
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def sft_trainer(
    directory: Path, *, kind: Any = None, model: Any = None, data: Any = None, callbacks: Any = None,
    peft_config: Any = None, eval_data: Any = None, **changes: Any,
) -> Trainer:  # fmt: skip
    from trl import SFTConfig, SFTTrainer

    made: Trainer = (kind or SFTTrainer)(
        model=model or tiny_model(),
        args=SFTConfig(**settings(directory) | changes),
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        processing_class=byte_tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )
    return made
