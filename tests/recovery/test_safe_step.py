"""Running out of memory changes nothing that a step gives and keeps nothing alive: the fault matrix."""

import functools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from faults import PLACES, failing, proving_release
from fitune.config import LoraConfig
from fitune.data.packing import split
from fitune.data.rows import Batch, MicroBatch
from fitune.data.unpacking import lay_out_as
from fitune.model.load import build_model
from fitune.model.lora import apply_lora
from fitune.model.packed_attention import attention_name
from fitune.model.recompute import set_recompute
from fitune.objectives.supervised import Supervised
from fitune.recovery.protection import Protection
from fitune.recovery.step import SafeResult, safe_step
from fitune.step.work import StepSettings, micro_batch_work
from products import combinations
from tiny_models import TINY
from tiny_steps import distance, make_batch, plain_gradient

VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": {"attention_dropout": 0.3},
    "recompute": {},
    "selective": {},
    "padded": {},
    "tied": {"tie_word_embeddings": True},
}
LR = 0.01
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""bfloat16 rounds by 2^-8 at most: the gradients of 7 pieces and 6 sums of them, independently rounded, are off by
sqrt(13) * 2^-8 = 1.4e-2; the rest is for activations, which another split rounds otherwise."""


class CallCounter(nn.Module):
    """A buffer that every forward in training changes, as a batch norm's is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden


@functools.cache
def template(
    variant: str, dtype: torch.dtype, lora: bool
) -> tuple[nn.Module, CallCounter, list[torch.Tensor]]:
    """A model, its counter, and the values that it begins with. Building one takes longer than a step."""
    changed = TINY["llama"].to_dict() | {"tie_word_embeddings": False} | VARIANTS[variant]
    config = TINY["llama"].__class__.from_dict(changed)
    model: nn.Module = build_model(config, attention=attention_name(config, "auto"), seed=1).to(
        dtype
    )
    if lora:
        model = apply_lora(model, LoraConfig(rank=4, dropout=0.2 if variant == "dropout" else 0.0))
    if variant in ("recompute", "selective"):
        set_recompute(model, "full" if variant == "recompute" else "selective")
    counter = CallCounter()
    layers = next(
        part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 2
    )
    layers[0].add_module("counter", counter)
    layers[0].register_forward_pre_hook(lambda _, inputs: (counter(inputs[0]), *inputs[1:]))
    model.train()
    return (
        model,
        counter,
        [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())],
    )


class Trained:
    """A model as it begins, its optimizer, and what the last update was given. One of a kind at a time."""

    def __init__(
        self, variant: str = "tied", *, dtype: torch.dtype = torch.float32, lora: bool = False
    ) -> None:
        self.model, self.counter, values = template(variant, dtype, lora)
        with torch.no_grad():
            for tensor, value in zip(
                (*self.model.parameters(), *self.model.buffers()), values, strict=True
            ):
                tensor.copy_(value)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=LR
        )
        self.gradient = torch.zeros(0)
        self.optimizer.register_step_pre_hook(self._keep_gradient)

    def _keep_gradient(self, *_: Any) -> None:
        grads = [
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        self.gradient = torch.cat([gradient.double().flatten() for gradient in grads])

    def protection(self, *, commit: bool, **options: Any) -> Protection[MicroBatch]:
        settings = StepSettings(Supervised(), clip=1e9, commit=commit)
        return Protection(
            work=micro_batch_work(self.model, self.optimizer, settings), seed=7, **options
        )

    def bits(self) -> list[torch.Tensor]:
        state = [value for each in self.optimizer.state.values() for value in each.values()]
        return [
            tensor.detach().clone()
            for tensor in (*self.model.parameters(), *self.model.buffers(), *state)
        ]


@functools.cache
def plain(variant: str, dtype: torch.dtype, lora: bool) -> tuple[torch.Tensor, float]:
    """The gradient and the loss of plain transformers, which know nothing of the step."""
    return plain_gradient(Trained(variant, dtype=dtype, lora=lora).model, make_batch())


def pieces_of(batch: Batch, *, packed: bool) -> list[MicroBatch]:
    return split(batch, packed=packed, micro_rows=3)


def streams() -> list[Any]:
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(part) for part in np.random.get_state()],
    ]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows_seen(result: SafeResult) -> Counter[int]:
    return Counter(row for piece in result.plan for row in piece)


@combinations(
    {
        "place": PLACES,
        "variant": VARIANTS,
        "dtype": [torch.float32, torch.bfloat16],
        "method": ["full", "lora"],
        "retry": ["restart", "commit"],
    },
    # an unprotected update is torn for good, which has its own test
    possible=lambda place, variant, dtype, method, retry: place != "update" or retry == "commit",
)
def test_a_step_that_runs_out_of_memory_is_the_step_of_its_plan(
    place: str, variant: str, dtype: torch.dtype, method: str, retry: str
) -> None:
    """Compared bit by bit with a step that is given the same plan and never fails: parameters, optimizer state with its
    counters, buffers; then with the step that was asked for: rows, learning rate, gradient, random streams."""
    lora, commit = method == "lora", retry == "commit"
    batch, packed = make_batch(), variant != "padded"
    once = place in ("clip", "update")
    calls = (
        (0,) if once else (1, 3) if packed else (1,)
    )  # with padding the second failure would be of a single row

    def trained() -> tuple[Trained, Protection[MicroBatch]]:
        fresh = Trained(variant, dtype=dtype, lora=lora)
        return fresh, fresh.protection(commit=commit)

    failed, protection = trained()
    before = streams()
    with failing(failed.model, place, *calls), proving_release(failed.model) as released:
        result = safe_step(protection, pieces_of(batch, packed=packed), step=1)
    assert len(result.failures) == len(released) >= 1
    assert streams() == before
    assert rows_seen(result) == Counter(batch.row_ids)
    assert [group["lr"] for group in failed.optimizer.param_groups] == [LR]
    assert failed.counter.calls == len(result.plan)
    bits, gradient = failed.bits(), failed.gradient

    calm, protection = trained()
    again = safe_step(protection, lay_out_as(batch, result.plan, packed=packed), step=1)
    assert again.step == result.step
    assert same_bits(bits, calm.bits())

    asked_for, protection = trained()
    whole = safe_step(protection, pieces_of(batch, packed=packed), step=1)
    assert whole.failures == ()
    assert result.step.loss_weight == whole.step.loss_weight == batch.loss_weight
    if variant != "dropout":  # whose masks belong to the split
        assert distance(gradient, asked_for.gradient) < TOLERANCE[dtype]
        expected, loss = plain(variant, dtype, lora)
        assert distance(gradient, expected) < TOLERANCE[dtype]
        assert result.step.loss == pytest.approx(loss, rel=TOLERANCE[dtype])
