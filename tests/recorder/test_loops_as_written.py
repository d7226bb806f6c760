"""What people write in a loop beside its step (printing, copying, saving, workers) neither ends nor changes its
prediction, but for what it really allocates."""

import copy
import io
import json
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import fitune
from fitune.allocator.prediction import Prediction
from fitune.errors import UnexpectedError, UsageError

WIDTH = 64
MODEL_BYTES = 2 * (WIDTH * WIDTH + WIDTH) * 4
Hook = Callable[[torch.Tensor, nn.Module, torch.device], Any]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def loop(
    model: nn.Module, device: torch.device, *, hook: Hook = lambda *_: None
) -> Callable[[], Any]:
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(8, WIDTH, device=device)
    kept: list[Any] = []

    def step() -> None:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept[:] = [hook(loss, model, device)]

    return step


def predict(hook: Hook | None = None, gpu: str = "RTX 4090", **options: Any) -> Prediction:
    return fitune.predict_loop(
        build, loop if hook is None else partial(loop, hook=hook), gpu=gpu, **options
    )


def print_it(loss: torch.Tensor, *_: Any) -> None:
    assert f"{loss:.4f}" == f"{loss.item():.4f}"
    assert "%.3f" % loss.detach()  # noqa: UP031 (as people write it)
    assert f"{loss} {loss!r} {loss.detach():>10.2e}"


def save_it(_: torch.Tensor, model: nn.Module, __: torch.device) -> None:
    torch.save(model.state_dict(), io.BytesIO())


def draw_it(_: torch.Tensor, __: nn.Module, device: torch.device) -> None:
    generator = torch.Generator(device=device)
    assert isinstance(generator, torch.Generator)
    assert not isinstance(device, torch.Generator)
    torch.randperm(5, generator=torch.Generator().manual_seed(1))


def log_it(loss: torch.Tensor, model: nn.Module, _: torch.device) -> None:
    bar = tqdm(range(1), file=io.StringIO())
    bar.set_postfix(loss=loss.item(), weights=model[0].bias.detach().tolist()[:2])  # type: ignore[index]
    json.dumps({"loss": float(loss.detach()), "array": loss.detach().cpu().numpy().tolist()})
    assert loss.detach().numpy(force=True).shape == ()


def check_it(loss: torch.Tensor, model: nn.Module, _: torch.device) -> None:
    """As people look for what is not finite; a prediction is of a step that goes well."""
    gradient = model[0].weight.grad  # type: ignore[index]
    assert not torch.isnan(loss)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient if gradient is not None else loss).all()
    assert loss == loss
    assert not loss != loss  # noqa: SIM202
    assert not math.isnan(loss.item())


def save_elsewhere(_: torch.Tensor, model: nn.Module, __: torch.device) -> None:
    assert save(model.state_dict()) == b""


def limit_it(_: torch.Tensor, model: nn.Module, device: torch.device) -> None:
    model(torch.zeros(1, WIDTH, device=device)).sum().backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.5)
    model.zero_grad()


def watch_it(_: torch.Tensor, model: nn.Module, __: torch.device) -> None:
    handles = [
        parameter.register_hook(lambda gradient: gradient) for parameter in model.parameters()
    ]
    for handle in handles:
        handle.remove()
    with torch.profiler.profile(profile_memory=True) as profile:
        pass
    assert profile.key_averages() is not None
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())


def time_it(_: torch.Tensor, __: nn.Module, device: torch.device) -> None:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    end.record()
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) >= 0
    with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().synchronize()
    torch.cuda.manual_seed(1)
    torch.cuda.manual_seed_all(1)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark
    assert torch.cuda.utilization() == torch.cuda.temperature() == torch.cuda.power_draw() == 0
    assert torch.cuda.amp.GradScaler is not None
    torch.zeros(2).pin_memory()


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
@pytest.mark.parametrize(
    "hook", [print_it, save_it, draw_it, log_it, check_it, save_elsewhere, limit_it, watch_it]
)
def test_what_allocates_nothing_changes_nothing(hook: Hook, gpu: str) -> None:
    assert predict(hook, gpu).peak_allocated_bytes == predict(gpu=gpu).peak_allocated_bytes


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
def test_a_copy_of_the_model_that_is_kept_takes_its_parameters_bytes(gpu: str) -> None:
    """The step after it has both; its gradients and workspaces are what they were."""
    more = predict(lambda _, model, __: copy.deepcopy(model), gpu).peak_allocated_bytes
    assert MODEL_BYTES <= more - predict(gpu=gpu).peak_allocated_bytes <= MODEL_BYTES + 4 * 512


def test_the_cards_clocks_streams_and_sensors_answer_without_one() -> None:
    assert predict(time_it).peak_allocated_bytes == predict().peak_allocated_bytes


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
def test_an_average_of_the_weights_that_is_kept_takes_their_bytes(gpu: str) -> None:
    def average(_: torch.Tensor, model: nn.Module, __: torch.device) -> Any:
        kept = AveragedModel(model)
        kept.update_parameters(model)
        return kept

    assert (
        predict(average, gpu).peak_allocated_bytes - predict(gpu=gpu).peak_allocated_bytes
        >= MODEL_BYTES
    )


def test_a_tensor_says_where_it_is() -> None:
    """To the loop; what it says means that place wherever it is given back."""
    seen: list[Any] = []

    def ask(loss: torch.Tensor, _: nn.Module, __: torch.device) -> Any:
        host = torch.zeros(3)
        seen[:] = [
            loss.device.type,
            loss.is_cuda,
            loss.get_device(),
            host.device.type,
            host.is_cuda,
            host.get_device(),
        ]
        assert host.device == torch.device("cpu")
        assert torch.zeros(1, device=host.device).device.type == "cpu"
        return torch.zeros(1024, 1024, device=host.device)

    kept_on_host = predict(ask).peak_allocated_bytes
    assert seen == ["cuda", True, 0, "cpu", False, -1]
    on_card = predict(
        lambda loss, *_: torch.zeros(1024, 1024, device=loss.device)
    ).peak_allocated_bytes
    assert kept_on_host == predict().peak_allocated_bytes
    assert on_card - kept_on_host >= 4 * 1024 * 1024


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (
            lambda *_: torch.cuda.CUDAGraph(),
            "captures a CUDA graph, .* predict the loop without it",
        ),
        (lambda *_: next(iter(())), "the step ran out of batches at test_loops_as_written"),
        (
            lambda _, model, device: nn.parallel.DistributedDataParallel(model, device_ids=[0]),
            "sets up several processes .* a prediction is of one: leave out",
        ),
        (
            lambda _, model, __: pickle.dumps(model.state_dict()),
            "reads the memory of a tensor .*: leave that out",
        ),
    ],
)
def test_what_is_not_predicted_is_said(hook: Hook, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        predict(hook)


def test_a_copy_is_a_copy_of_values_gradients_and_ties() -> None:
    def check(loss: torch.Tensor, model: nn.Module, _: torch.device) -> None:
        tied = copy.deepcopy([model[0].weight, model[0].weight])  # type: ignore[index]
        assert tied[0] is tied[1]
        assert tied[0] is not model[0].weight  # type: ignore[index]
        assert isinstance(tied[0], nn.Parameter)
        assert tied[0].requires_grad
        with pytest.raises(RuntimeError, match="graph leaves"):
            copy.deepcopy(loss)

    predict(check)


@pytest.fixture
def default_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


def kept_on_default(
    model: nn.Module, device: torch.device, *, name: str | None
) -> Callable[[], Any]:
    torch.set_default_device(name)
    ballast = torch.zeros(1024, 1024)
    assert torch.get_default_device().type == (name or "cpu")
    step = loop(model, device)
    return lambda: (step(), ballast)


@pytest.mark.usefixtures("default_device")
def test_what_is_made_without_a_device_is_on_the_default_one() -> None:
    on_host, on_card = (
        fitune.predict_loop(build, partial(kept_on_default, name=name), gpu="RTX 4090")
        for name in (None, "cuda")
    )
    assert on_card.peak_allocated_bytes - on_host.peak_allocated_bytes == 4 * 1024 * 1024
    assert torch.get_default_device().type == "cpu"


@pytest.mark.usefixtures("default_device")
def test_a_default_device_that_was_set_before_counts_and_stays() -> None:
    def keeps(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        ballast, step = torch.zeros(1024, 1024), loop(model, device)
        return lambda: (step(), ballast)

    on_host = fitune.predict_loop(build, keeps, gpu="RTX 4090")
    torch.set_default_device("cuda")
    on_card = fitune.predict_loop(build, keeps, gpu="RTX 4090")
    assert torch._GLOBAL_DEVICE_CONTEXT.device_context.device.type == "cuda"
    assert on_card.peak_allocated_bytes - on_host.peak_allocated_bytes == 4 * 1024 * 1024


@pytest.mark.parametrize(
    "workers",
    [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True, "pin_memory": True}],
)
def test_rows_that_worker_processes_read_are_read(workers: dict[str, Any]) -> None:
    def reading(model: nn.Module, device: torch.device, **options: Any) -> Callable[[], Any]:
        loader = DataLoader(
            TensorDataset(torch.randn(64, WIDTH)), batch_size=8, shuffle=True, **options
        )
        optimizer, rows = torch.optim.AdamW(model.to(device).parameters()), iter(loader)

        def step() -> None:
            model(next(rows)[0].to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    alone, beside = (
        fitune.predict_loop(build, partial(reading, **options), gpu="RTX 4090")
        for options in ({}, workers)
    )
    assert beside.peak_allocated_bytes == alone.peak_allocated_bytes


def test_an_interrupt_in_a_callback_of_a_weak_reference_is_heard() -> None:
    class Thing:
        pass

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    def drop(*_: Any) -> None:
        thing = Thing()
        reference = weakref.ref(thing, interrupt)
        del thing
        assert reference() is None

    with pytest.raises(KeyboardInterrupt):
        predict(drop)


def test_a_loop_that_names_cuda_while_a_cpu_is_predicted_is_told_so() -> None:
    with pytest.raises(UsageError, match="the loop names CUDA and is predicted for a CPU"):
        predict(lambda loss, *_: loss + torch.zeros(1, device="cuda"), gpu="cpu")


def test_an_error_in_the_loop_is_said_with_its_class_and_place() -> None:
    def divide(*_: Any) -> float:
        return 1 / 0

    with pytest.raises(
        UnexpectedError,
        match=r"ZeroDivisionError at .*test_loops_as_written\.py:\d+: division by zero",
    ):
        predict(divide)
