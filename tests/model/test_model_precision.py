"""model/precision.py: what `auto` means on each device."""

import pytest
import torch

from fitune.config import ModelConfig
from fitune.model.precision import resolve_precision


@pytest.mark.parametrize(
    ("method", "device_type", "bfloat16", "expected"),
    [
        ("full", "cuda", True, "autocast_bfloat16"),
        ("lora", "cuda", True, "bfloat16"),
        ("full", "cuda", False, "autocast_float16"),
        ("lora", "cuda", False, "autocast_float16"),
        ("full", "cpu", False, "float32"),
        ("full", "cpu", True, "float32"),
    ],
)
def test_auto_follows_the_device_and_the_method(
    method: str, device_type: str, bfloat16: bool, expected: str
) -> None:
    model = ModelConfig.model_validate({"source": "minimind2", "method": method})
    assert resolve_precision(model, device_type, bfloat16).name == expected


def test_trained_parameters_are_float32_wherever_auto_decides() -> None:
    for bfloat16 in (True, False):
        assert (
            resolve_precision(ModelConfig(source="m"), "cuda", bfloat16).parameter_dtype
            == torch.float32
        )


def test_only_float16_needs_a_scaler() -> None:
    names = ("float32", "bfloat16", "autocast_bfloat16", "autocast_float16")
    scaled = [
        n
        for n in names
        if resolve_precision(ModelConfig(source="m", precision=n), "cuda", True).needs_scaler
    ]
    assert scaled == ["autocast_float16"]


def test_what_is_configured_is_taken_on_any_device() -> None:
    assert (
        resolve_precision(ModelConfig(source="m", precision="bfloat16"), "cpu", False).name
        == "bfloat16"
    )


def test_a_cpu_says_why_it_stays_in_float32() -> None:
    assert "20 times slower" in resolve_precision(ModelConfig(source="m"), "cpu", False).reason


@pytest.mark.parametrize(
    ("name", "expected"), [("float32", torch.float32), ("autocast_bfloat16", torch.bfloat16)]
)
def test_matrix_products_run_in_the_format_that_it_says(name: str, expected: torch.dtype) -> None:
    precision = resolve_precision(
        ModelConfig.model_validate({"source": "m", "precision": name}), "cpu", True
    )
    weights = torch.ones(2, 2, dtype=precision.parameter_dtype)
    with precision.autocast("cpu"):
        assert (weights @ weights).dtype == expected == precision.matmul_dtype
