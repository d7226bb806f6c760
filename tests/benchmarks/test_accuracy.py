"""The benchmark against published measurements, on its smallest rows."""

from types import SimpleNamespace

import pytest
import torch

import accuracy
import published_loops

ROWS = {row["id"]: row for row in accuracy.read_rows()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "bound"),
    # minimind's source names neither card nor version, on which the scratch of sums over rows depends
    [
        ("nanogpt-gpt2-small", 0.0005),
        ("fms-liger-116", 1e-5),
        pytest.param("minimind795-L2", 0.0075, marks=pytest.mark.thorough),
        pytest.param("fms-main-104", 1e-6, marks=pytest.mark.thorough),
    ],
)
def test_a_published_run_is_predicted_within(name: str, bound: float) -> None:
    error = accuracy.compare_row(ROWS[name]).error_fraction
    assert error is not None
    assert abs(error) < bound


def test_fused_adapters_have_the_gradients_of_separate_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, requires_grad=True)
    weights = [torch.randn(width, 8) for width in (8, 4)]
    adapters = [
        torch.randn(shape, requires_grad=True) for width in (8, 4) for shape in ((3, 8), (width, 3))
    ]
    layers = [
        SimpleNamespace(
            base_layer=SimpleNamespace(unpacked=lambda _, weight=weight: weight, bias=None),
            lora_dropout={"default": torch.nn.Identity()},
            scaling={"default": 0.5},
        )
        for weight in weights
    ]
    separate = [
        x @ weight.t() + 0.5 * (x @ first.t() @ second.t())
        for weight, first, second in zip(weights, adapters[0::2], adapters[1::2], strict=True)
    ]
    fused = published_loops.FusedAdapters.apply(x, layers, *adapters)
    wanted, got = (
        torch.autograd.grad(sum(out.square().sum() for out in outs), (x, *adapters))
        for outs in (separate, fused)
    )
    torch.testing.assert_close(fused, tuple(separate))
    torch.testing.assert_close(got, wanted)


def test_a_row_that_cannot_be_recorded_says_why() -> None:
    mixture = next(name for name, row in ROWS.items() if "Mixtral" in row["model"])
    compared = accuracy.compare_row(ROWS[mixture])
    assert compared.error_fraction is None
    assert compared.reason is not None
    assert "its experts were quantised" in compared.reason


def test_a_bound_is_no_measurement() -> None:
    assert isinstance(
        published_loops.express(ROWS["minimind795-L128-OOM"]), published_loops.NotExpressed
    )


def test_the_page_names_every_row() -> None:
    compared = [
        accuracy.Compared(**accuracy._describe(row), reason="not run") for row in ROWS.values()
    ]
    page = accuracy.render(compared)
    assert all(name in page for name in ROWS)
