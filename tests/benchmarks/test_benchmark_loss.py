"""The benchmark of the loss, small: every way has the gradient of full logits, and ours holds the least."""

import pytest
import torch

import loss

SHAPE = loss.Shape(positions=600, vocab_size=5_000, hidden_size=16)


@pytest.fixture(scope="module")
def measured() -> dict[str, loss.Measured]:
    return {each.way: each for each in loss.compare(SHAPE, repeats=1)}


def test_every_way_has_the_gradient_of_full_logits(measured: dict[str, loss.Measured]) -> None:
    assert len(measured) > 1
    for way in set(measured) - {"full"}:
        assert measured[way].relative_error is not None
        assert measured[way].relative_error < 1e-5


def test_logits_of_one_chunk_exist_at_a_time(measured: dict[str, loss.Measured]) -> None:
    chunk_bytes, gradient_bytes = 256 * 5_000 * 4, 5_000 * 16 * 4
    assert measured["fitune"].peak_bytes < 1.1 * chunk_bytes + 2 * gradient_bytes
    assert measured["full"].peak_bytes > 2 * 600 * 5_000 * 4


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13"
)
def test_torch_gives_a_16_bit_loss_for_16_bit_input_and_ours_does_not() -> None:
    case = loss.make_case(SHAPE, torch.bfloat16)
    assert loss.fitune(case).dtype == torch.float32
    assert loss.in_torch(case).dtype == torch.bfloat16
