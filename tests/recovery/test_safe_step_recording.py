"""What is recorded for the prediction is what the safe step does."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fitune.data.packing import split
from fitune.recorder.record import RecordSettings, Step, record_loop
from fitune.recovery.protection import Protection
from fitune.recovery.step import safe_step
from fitune.step.work import micro_batch_work, train_step
from tiny_steps import make_batch, make_model, settings_for

STREAM_BYTES = torch.get_rng_state().nbytes
"""The safe step keeps the state of the CPU's random stream, always in host memory."""


def allocations(*, safe: bool, commit: bool, lora: bool) -> list[int]:
    """Bytes, negative where freed, of the second and third step."""

    def loop(model: Any, _: torch.device) -> Step:
        settings = replace(settings_for(model, "chunked"), commit=commit)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], fused=True
        )
        micro_batches = split(make_batch(), packed=True, micro_rows=3)
        protection = Protection(work=micro_batch_work(model, optimizer, settings))

        def step() -> None:
            if safe:
                safe_step(protection, micro_batches, step=1)
            else:
                train_step(model, optimizer, micro_batches, settings=settings)

        return step

    def build() -> nn.Module:
        return make_model(lora=lora).train()

    trace = record_loop(build, loop, RecordSettings(mode="real", num_steps=3))
    return [
        event.num_bytes
        for event in trace.events
        if event.step >= 2 and abs(event.num_bytes) != STREAM_BYTES
    ]


@pytest.mark.parametrize(("commit", "lora"), [(False, False), (True, True)], ids=["full", "lora"])
def test_the_safe_step_allocates_what_the_recorded_step_does(commit: bool, lora: bool) -> None:
    found = allocations(safe=True, commit=commit, lora=lora)
    assert len(found) > 200
    assert found == allocations(safe=False, commit=commit, lora=lora)
