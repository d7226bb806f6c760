"""Records several loops on one model, and compares each recording with that of a new model."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fitune.config import RunConfig, read_config
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.record import RecordedModel, RecordSettings, record_columns
from fitune.recorder.recording import Recording, to_trace
from fitune.trace.own_step import (
    ColumnsOfStep,
    Pass,
    longest_rows,
    model_for,
    record_columns_of_step,
    steady_passes,
)
from products import some_of
from tiny_models import TINY

VARIANTS = (
    ("model.recompute=off",),
    ("model.recompute=full", "batch.micro=3"),
    ("model.recompute=every_2", "loss=full"),
    ("optim.name=adamw_8bit",),
    ("optim.name=sgd", "batch.micro=1"),
    ("model.recompute=off",),
)
ON_HOST = (
    ("model.recompute=full", "model.offload_activations=true"),
    ("model.recompute=off", "optim.name=adamw_host"),
    ("model.recompute=full",),
)


def configured(directory: Path, *overrides: str) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"source": str(directory), "init": "random"},
        "data": {"train": "rows.jsonl", "max_length": 24},
        "batch": {"micro": 2, "accumulation": 2},
    }
    return read_config(tree, overrides).config


def passes(config: RunConfig) -> list[Pass]:
    rows = longest_rows(config.data.max_length, num_rows=config.batch.rows_per_step)
    evaluation = Pass("eval", rows[: config.batch.micro], most_micro_batches=1)
    return steady_passes(config.optim, Pass("train", rows), evaluation=evaluation)


def are_same(one: Recording, other: Recording) -> bool:
    return to_trace(one) == to_trace(other) and (one.work, one.empty_rules) == (
        other.work,
        other.empty_rules,
    )


CARD = CudaTarget((8, 0))
QUICK = {("llama", "lora", CARD), ("gpt2", "full", None)}


@pytest.mark.parametrize(
    ("kind", "method", "target"),
    some_of(product(("llama", "gpt2"), ("full", "lora"), (CARD, None)), QUICK),
)
def test_one_configuration_after_the_other(
    kind: str, method: str, target: CudaTarget | None, tmp_path: Path
) -> None:
    TINY[kind].save_pretrained(tmp_path)
    models: set[int] = set()
    model = model_for(configured(tmp_path, f"model.method={method}"), target=target)

    def record(config: RunConfig, model: RecordedModel | None) -> ColumnsOfStep:
        return record_columns_of_step(config, passes(config), target=target, on=model)

    for overrides in (*VARIANTS, *(() if target is None else ON_HOST)):
        config = configured(tmp_path, f"model.method={method}", *overrides)
        again, new = record(config, model), record(config, None)
        assert are_same(again.recording, new.recording)
        assert replace(again, recording=new.recording) == new
        assert model._parts is not None
        models.add(id(model._parts.model))
    assert len(models) == 1


class Place:
    """Records loops over one small model; the tensors in `left` outlive their loop."""

    def __init__(self) -> None:
        self.num_built = 0
        self.left: list[torch.Tensor] = []
        self.model = RecordedModel(self.build, RecordSettings())

    def build(self) -> nn.Module:
        self.num_built += 1
        return nn.Linear(4, 4)

    def loop(
        self, model: nn.Module, _: torch.device, *, leaves: bool = False, fails: bool = False
    ) -> Any:
        def step() -> None:
            model(torch.ones(2, 4)).sum().backward()
            if leaves:
                self.left.append(torch.ones(8))
            if fails:
                raise ArithmeticError("a loop's own")

        return step

    def record(self, **options: bool) -> Recording:
        return self.model.record(
            lambda model, device: self.loop(model, device, **options), num_steps=2
        )


def test_gradients_that_a_loop_leaves_are_of_no_next_one() -> None:
    place = Place()
    assert are_same(place.record(), place.record())
    assert place.num_built == 1


def test_what_a_loop_leaves_otherwise_makes_a_new_model() -> None:
    place = Place()
    place.record(leaves=True)
    found = place.record()
    assert place.num_built == 2
    assert are_same(found, record_columns(place.build, place.loop, RecordSettings(num_steps=2)))


def test_a_loop_that_fails_makes_a_new_model() -> None:
    place = Place()
    with pytest.raises(ArithmeticError):
        place.record(fails=True)
    assert are_same(
        place.record(), record_columns(place.build, place.loop, RecordSettings(num_steps=2))
    )


def test_what_a_loop_replaces_makes_a_new_model() -> None:
    place = Place()

    def replacing(model: Any, device: torch.device) -> Any:
        model.weight.data = torch.ones(4, 4)
        return place.loop(model, device)

    place.model.record(replacing, num_steps=1)
    place.record()
    assert place.num_built == 2


def test_what_a_loop_makes_of_a_tensor_that_was_there_is_of_no_next_one() -> None:
    """A tensor of the setup becomes a gradient in one loop, and is none in the next."""
    kept: list[torch.Tensor] = []

    def new() -> RecordedModel:
        return RecordedModel(
            Place().build, RecordSettings(), prepare=lambda _: kept.append(torch.zeros(4, 4))
        )

    def as_gradient(model: Any, _: torch.device) -> Any:
        def step() -> None:
            model.weight.grad = kept[-1]

        return step

    def plain(model: Any, _: torch.device) -> Any:
        return lambda: model(torch.ones(2, 4)).sum()

    recorded = new()
    taken = recorded.record(as_gradient, num_steps=1)
    assert "gradient" in {event.category for event in to_trace(taken).events}
    assert are_same(recorded.record(plain, num_steps=1), new().record(plain, num_steps=1))
    assert len(kept) == 2
