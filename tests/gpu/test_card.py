"""On a real card: `make test-gpu`. Skipped without one."""

import pytest
import torch

from fitune.machine.devices import this_machine
from fitune.training.self_check import run_device
from gpu_accuracy import BY_NAME, Compared, compare, measure_apart

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card: none is here"),
]

QUICK = ("float32", "foreach", "selective", "lora")


@pytest.fixture(scope="module", params=QUICK)
def compared(request: pytest.FixtureRequest) -> Compared:
    return compare(BY_NAME[request.param], this_machine()[0], measure=measure_apart)


def test_a_setting_runs(compared: Compared) -> None:
    assert compared.failure is None


@pytest.mark.parametrize(("metric", "bound"), [("allocated", 0.005), ("reserved", 0.02)])
def test_the_peak_is_the_predicted_one(compared: Compared, metric: str, bound: float) -> None:
    error = compared.error(metric)
    assert error is not None
    assert abs(error) < bound, compared.difference


def test_every_allocation_is_the_predicted_one(compared: Compared) -> None:
    assert compared.difference is None, compared.difference


def test_torch_and_nvml_mean_the_same_card() -> None:
    device = run_device(torch.device("cuda", torch.cuda.current_device()))
    assert device.total_bytes == pytest.approx(torch.cuda.mem_get_info()[1], rel=0.01)
