"""Records loops, and checks how their storages are named, counted and placed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_loops import AMPERE, births
from torch import nn

from fitune.errors import UsageError
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import MemoryEvent, MemoryTrace
from fitune.recorder.record import Loop, RecordSettings, record_loop

WIDTH = 8


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def record(
    loop: Loop, *, num_steps: int = 2, target: CudaTarget | None = AMPERE, **settings: Any
) -> MemoryTrace:
    return record_loop(build, loop, RecordSettings(target=target, num_steps=num_steps, **settings))


def train(
    model: nn.Module, device: torch.device, *, num_micro_batches: int = 1
) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        for _ in range(num_micro_batches):
            x = torch.ones(4, WIDTH, device=device)
            model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def at_end(trace: MemoryTrace) -> dict[str, int]:
    """Return the bytes that are allocated after the last event, by category."""
    alive: dict[str, int] = {}
    for event in trace.events:
        alive[event.category] = alive.get(event.category, 0) + event.num_bytes
    return {category: num_bytes for category, num_bytes in alive.items() if num_bytes}


NUM_PARAMETERS = 2 * (WIDTH * WIDTH + WIDTH)


def test_every_free_has_the_bytes_of_its_allocation() -> None:
    alive: dict[int, int] = {}
    for event in record(train).events:
        alive[event.storage] = alive.get(event.storage, 0) + event.num_bytes
    assert set(alive.values()) <= {num_bytes for num_bytes in alive.values() if num_bytes >= 0}


def test_parameters_and_their_adam_state_stay() -> None:
    alive = at_end(record(train))
    assert alive["parameter"] == NUM_PARAMETERS * 4
    assert alive["optimizer_state"] == 2 * NUM_PARAMETERS * 4
    assert "gradient" not in alive


def test_gradients_are_allocated_in_the_backward() -> None:
    gradients = [
        event
        for event in record(train).events
        if event.category == "gradient" and event.num_bytes > 0
    ]
    assert {event.phase for event in gradients} == {"backward"}
    assert sum(event.num_bytes for event in gradients) == 2 * NUM_PARAMETERS * 4  # two steps


def test_a_tied_weight_counts_once() -> None:
    def tied() -> nn.Module:
        model = build()
        assert isinstance(model, nn.Sequential)
        model[2].weight = model[0].weight
        return model

    trace = record_loop(tied, train, RecordSettings(target=AMPERE, num_steps=1))
    assert at_end(trace)["parameter"] == (WIDTH * WIDTH + 2 * WIDTH) * 4


def test_activations_are_what_the_backward_needs() -> None:
    activations = [
        event
        for event in record(train).events
        if event.category == "activation" and event.num_bytes > 4
    ]
    assert {(event.op, event.module) for event in activations} == {("aten.relu.default", "1")}
    assert {event.phase for event in activations} == {"forward"}


def test_micro_batches_are_counted_by_their_backwards() -> None:
    trace = record(lambda model, device: train(model, device, num_micro_batches=3), num_steps=1)
    assert {event.micro_batch for event in trace.events if event.op == "aten.relu.default"} == {
        0,
        1,
        2,
    }


def test_modules_are_named_in_forward_and_backward() -> None:
    events = [event for event in record(train).events if event.num_bytes > 0]
    assert {
        event.module for event in events if event.phase == "forward" and "addmm" in event.op
    } == {"0", "2"}
    assert {
        event.module for event in events if event.phase == "backward" and "threshold" in event.op
    } == {"1"}


def test_an_evaluation_keeps_no_activation() -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        def step() -> None:
            with torch.no_grad():
                model(torch.ones(4, WIDTH, device=device)).sum().item()

        return step

    assert not [event for event in record(loop).events if event.category == "activation"]


def test_host_tensors_are_not_counted_and_their_copies_are_inputs() -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        host = torch.ones(5, WIDTH)

        def step() -> None:
            model(host.to(device)).sum().backward()

        return step

    inputs = [
        event.num_bytes
        for event in record(loop).events
        if event.category == "input" and event.num_bytes > 0
    ]
    assert inputs == [5 * WIDTH * 4] * 2


def test_adams_step_counters_stay_on_the_host() -> None:
    assert not [
        event
        for event in record(train).events
        if event.num_bytes == 4 and event.category == "optimizer_state"
    ]


def test_a_loop_that_names_cuda_is_recorded_as_one_that_does_not() -> None:
    def named(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        return _with_scaler(model.to("cuda"), torch.device("cuda:0"), "cuda")

    def handed(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        return _with_scaler(model, device, device.type)

    def events(loop: Loop) -> tuple[MemoryEvent, ...]:
        return record(loop).events

    assert events(named) == events(handed)


def _with_scaler(model: nn.Module, device: torch.device, kind: str) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler(kind)
    x = torch.ones(4, WIDTH, device=device)

    def step() -> None:
        with torch.autocast(kind):
            loss = model(x).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.cuda.synchronize()

    return step


def test_a_scaled_step_updates_although_nothing_is_known_of_overflows() -> None:
    trace = record(lambda model, device: _with_scaler(model, device, device.type))
    assert "optimizer_state" in at_end(trace)


def test_emptying_the_cache_is_an_event() -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        return torch.cuda.empty_cache

    assert [event.step for event in record(loop).events if event.num_bytes == 0] == [1, 2]


def test_a_storage_resized_in_place_dies_and_is_born_again() -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        def step() -> None:
            x = torch.ones(4, device=device)
            x.resize_(16)

        return step

    sizes = [event.num_bytes for event in record(loop, num_steps=1).events if event.step == 1]
    assert sizes == [16, -16, 64, -64]


def test_an_operator_with_an_output_of_its_own_allocates_nothing() -> None:
    """Also when it is called again, and its result is remembered."""

    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        x = torch.ones(WIDTH, WIDTH, device=device)
        tile = torch.empty(WIDTH, WIDTH, device=device)

        def step() -> None:
            for _ in range(3):
                torch.mm(x, x, out=tile)

        return step

    of_products = [event for event in record(loop).events if event.op == "aten.mm.out"]
    assert {event.category for event in of_products} == {"workspace"}


def test_a_model_converted_by_the_loop_keeps_its_parameters() -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        optimizer = torch.optim.SGD(model.parameters())
        model.to(device, torch.bfloat16)
        x = torch.ones(4, WIDTH, device=device, dtype=torch.bfloat16)

        def step() -> None:
            model(x).sum().backward()
            optimizer.step()

        return step

    assert at_end(record(loop))["parameter"] == NUM_PARAMETERS * 2


def test_buffers_and_plain_tensors_of_a_module_come_along() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(WIDTH))
            self.plain = torch.ones(WIDTH)
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.table * self.plain * self.weight

    trace = record_loop(Rotary, train_one, RecordSettings(target=AMPERE, num_steps=1))
    assert at_end(trace)["parameter"] == 2 * WIDTH * 4


def train_one(model: nn.Module, device: torch.device) -> Callable[[], Any]:
    return lambda: model(torch.ones(4, WIDTH, device=device)).sum().backward()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (lambda x: bool((x == 0).any()), False),
        (lambda x: bool((x != 0).any()), True),
        (lambda x: bool(torch.isfinite(x).all()), True),
        (lambda x: bool(torch.isnan(x).any()), False),
        (lambda x: int((x != -100).sum()), 4),
        (lambda x: x.sum().item() > 0, True),
        (lambda x: x[x > 0].shape[0], 4),
        (lambda x: x.nonzero().shape[0], 4),
        (lambda x: torch.unique(x).shape[0], 4),
    ],
)
def test_questions_about_data_have_a_stated_answer(
    question: Callable[[torch.Tensor], Any], answer: Any
) -> None:
    answers = []

    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        return lambda: answers.append(question(torch.ones(4, device=device)))

    trace = record(loop, num_steps=1)
    assert answers == [answer]
    assert any("assumed" in sentence for sentence in trace.source)


def test_a_data_loader_runs() -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        data = torch.utils.data.TensorDataset(torch.ones(6, WIDTH))
        loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)

        def step() -> None:
            for (x,) in loader:
                model(x.to(device)).sum().backward()

        return step

    assert births(record(loop, num_steps=1).events, "relu") == [3 * WIDTH * 4] * 2


def test_a_real_recording_cannot_behave_as_cuda() -> None:
    with pytest.raises(UsageError, match="mode='fake'"):
        record(train, mode="real")
