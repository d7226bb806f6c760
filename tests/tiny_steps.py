"""A batch of very unequal rows, models to compute it with, and an optimizer that keeps what it is given."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from fitune.config import LoraConfig
from fitune.data.rows import Batch, Row
from fitune.model.head import decoder_and_head
from fitune.model.load import build_model
from fitune.model.lora import apply_lora
from fitune.model.packed_attention import attention_name
from fitune.objectives.supervised import Supervised
from fitune.step.work import StepSettings
from tiny_models import TINY

LENGTHS = (3, 40, 7, 19, 2, 33, 11)
MASKED_ROW = 3


class Capture(torch.optim.Optimizer):
    """Keeps the gradients that it is given and changes nothing."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__([p for p in parameters if p.requires_grad], {})
        self.gradients: list[torch.Tensor] = []

    def step(self, closure: Callable[[], float] | None = None) -> None:
        # a parameter without a gradient (an expert that saw no token) has none to compare
        present = (
            p.grad if p.grad is not None else torch.zeros_like(p)
            for p in self.param_groups[0]["params"]
        )
        self.gradients = [gradient.double().flatten().clone() for gradient in present]

    def vector(self) -> torch.Tensor:
        return torch.cat(self.gradients)


def make_batch(seed: int = 0) -> Batch:
    """Rows of very unequal length and supervised share; one has no target at all."""
    random = np.random.default_rng(seed)
    rows = []
    for row_id, length in enumerate(LENGTHS):
        weights = (random.random(length) < (0.9 if row_id % 2 else 0.3)).astype(np.float32)
        weights[0] = 0
        weights[-1] = 1
        if row_id == MASKED_ROW:
            weights[:] = 0
        rows.append(Row(row_id, random.integers(0, 64, length, dtype=np.int32), weights))
    return Batch(tuple(rows))


def make_model(
    family: str = "llama",
    *,
    tied: bool = True,
    lora: bool | LoraConfig = False,
    new_ids: tuple[int, ...] = (),
) -> nn.Module:
    config = TINY[family].__class__.from_dict(
        TINY[family].to_dict() | {"tie_word_embeddings": tied}
    )
    model = build_model(config, attention=attention_name(config, "auto"), seed=1)
    if lora:
        settings = lora if isinstance(lora, LoraConfig) else LoraConfig(rank=4)
        adapted = apply_lora(model, settings, new_ids=new_ids)
        for name, parameter in adapted.named_parameters():
            if (
                "lora_B" in name
            ):  # zero at the start, which would leave the other factor without gradient
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        return adapted
    return model


def plain_gradient(
    model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Return gradient and loss of plain transformers: the whole batch padded, its labels masked, its own loss."""
    width = max(len(row) for row in batch.rows)
    ids = torch.zeros((len(batch.rows), width), dtype=torch.int64)
    labels = torch.full((len(batch.rows), width), -100)
    for place, row in enumerate(batch.rows):
        row_ids = torch.from_numpy(row.input_ids.astype(np.int64))
        ids[place, : len(row)] = row_ids
        labels[place, : len(row)] = torch.where(
            torch.from_numpy(row.loss_weights > 0), row_ids, -100
        )
    mask = torch.arange(width) < torch.tensor([len(row) for row in batch.rows]).unsqueeze(1)
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask.long(), labels=labels)
    smoother = LabelSmoother(epsilon=label_smoothing)
    loss = smoother(output, labels, shift_labels=True) if label_smoothing else output.loss
    loss.backward()
    capture = Capture(model.parameters())
    capture.step()
    model.zero_grad()
    return capture.vector(), loss.item()


def settings_for(model: nn.Module, loss: str, clip: float = 0.0) -> StepSettings:
    head = decoder_and_head(model) if loss == "chunked" else None
    assert not isinstance(head, str), head
    return StepSettings(Supervised(head, chunk_tokens=8), clip)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def labelled(*rows: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Padded rows of (tokens, targets), as transformers takes them."""
    width = max(length for length, _ in rows)
    ids, labels = (
        torch.zeros((len(rows), width), dtype=torch.int64),
        torch.full((len(rows), width), -100),
    )
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for place, (length, num_targets) in enumerate(rows):
        ids[place, :length] = torch.arange(1, length + 1)
        mask[place, :length] = 1
        labels[place, length - num_targets : length] = ids[place, length - num_targets : length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
