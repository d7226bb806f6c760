"""What operators compute, by their shapes."""

from typing import Any

import pytest
import torch

from fitune.trace.work import count_flops

ATEN = torch.ops.aten
A_MK, B_KN, C_MN = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
BATCH = [tensor.expand(2, *tensor.shape).clone() for tensor in (C_MN, A_MK, B_KN)]


@pytest.mark.parametrize(
    ("func", "args", "flops"),
    [
        (ATEN.mm.default, [A_MK, B_KN], 210),
        (ATEN.addmm.default, [C_MN, A_MK, B_KN], 210),
        (ATEN.addmm_.default, [C_MN, A_MK, B_KN], 210),
        (ATEN.baddbmm.default, BATCH, 420),
        (ATEN.baddbmm_.default, BATCH, 420),
        (ATEN.add_.Tensor, [C_MN, C_MN], 0),
    ],
)
def test_a_product_counts_the_same_wherever_its_result_goes(func: Any, args: list[torch.Tensor], flops: int) -> None:
    assert count_flops(func, args, {}, (func(*args),)) == flops


@pytest.mark.parametrize(("asked", "products"), [([True, True, False], 2), ([False, True, False], 1)])
def test_a_convolution_need_not_have_a_gradient_for_its_input(asked: list[bool], products: int) -> None:
    source, weight, gradient = torch.ones(2, 3, 16, 16), torch.ones(8, 3, 5, 5), torch.ones(2, 8, 12, 12)
    args = [gradient, source, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, asked]
    outputs = tuple(each for each in ATEN.convolution_backward.default(*args) if each is not None)
    assert count_flops(ATEN.convolution_backward.default, args, {}, outputs) == products * 2 * (2 * 8 * 144) * (3 * 25)
