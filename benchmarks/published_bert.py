"""bert-large in the Trainer of January 2022, as transformers' guide to training on one GPU measured it.

A classifier of two classes on random tokens, eager attention with dropout. The Trainer of that time set gradients to
zero and kept them, its AdamW went through the parameters one by one, and PyTorch kept a softmax's input beside its
output for the backward, of which it needed the type (derivatives.yaml up to 1.10: `_softmax_backward_data`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

Row = dict[str, Any]
Step = Callable[[], Any]


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scores, weights = ctx.saved_tensors
        return cast(
            Tensor, torch.ops.aten._softmax_backward_data(gradients[0], weights, -1, scores.dtype)
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    scores = torch.matmul(query, key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    if attention_mask is not None:
        scores = scores + attention_mask
    if torch.is_autocast_enabled(scores.device.type):
        scores = scores.float()  # autocast does, and what it made is what was kept
    weights = nn.functional.dropout(
        _Softmax.apply(scores), options.get("dropout", 0.0), module.training
    )  # type: ignore[no-untyped-call]
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def build(row: Row) -> nn.Module:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        BertConfig,
        BertForSequenceClassification,
    )
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("torch_1_10", attend)
    AttentionMaskInterface.register("torch_1_10", eager_mask)
    arch = row["arch"]
    config = BertConfig(
        vocab_size=arch["vocab"],
        hidden_size=arch["hidden"],
        num_hidden_layers=arch["n_layers"],
        num_attention_heads=arch["n_heads"],
        intermediate_size=arch["intermediate"],
        attn_implementation="torch_1_10",
    )
    model = BertForSequenceClassification(config)
    if row["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return cast(nn.Module, model)


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

    return cast(
        torch.optim.Optimizer,
        Adafactor(parameters, lr=5e-5, scale_parameter=False, relative_step=False),
    )


_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, one by one": partial(torch.optim.AdamW, foreach=False),
    "Adafactor": _adafactor,
}
