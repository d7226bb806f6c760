"""bert-large in the Trainer of January 2022, as transformers' guide to training on one GPU measured it.

A classifier of two classes on random tokens, eager attention with dropout. The Trainer of that time set gradients to
zero and kept them, and its AdamW went through the parameters one by one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

Row = dict[str, Any]
Step = Callable[[], Any]


def build(row: Row) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    arch = row["arch"]
    config = BertConfig(
        vocab_size=arch["vocab"],
        hidden_size=arch["hidden"],
        num_hidden_layers=arch["n_layers"],
        num_attention_heads=arch["n_heads"],
        intermediate_size=arch["intermediate"],
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config)
    if row["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


def loop(row: Row, model: nn.Module, device: torch.device) -> Step:
    model.train()
    batch, length, accumulation = row["batch"], row["seq"], row["accumulation"]
    half = row["precision"] == "fp16"
    optimizer = _OPTIMIZERS[row["optimizer"]](model.parameters())
    scaler = torch.amp.GradScaler("cuda", enabled=half)

    def step() -> None:
        for _ in range(accumulation):
            ids = torch.ones((batch, length), dtype=torch.int64).to(device)
            labels = torch.zeros(batch, dtype=torch.int64).to(device)
            with torch.autocast("cuda", dtype=torch.float16, enabled=half):
                loss = model(input_ids=ids, labels=labels).loss
            scaler.scale(loss / accumulation).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=False)

    return step


def _adafactor(parameters: Any) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=5e-5, scale_parameter=False, relative_step=False)


_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, one by one": partial(torch.optim.AdamW, foreach=False),
    "Adafactor": _adafactor,
}
