"""What operators compute, by their shapes."""

from typing import Any

import pytest
import torch

from fitune.recorder.operator_cost import count_flops, moved_bytes

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
def test_a_product_counts_the_same_wherever_its_result_goes(
    func: Any, args: list[torch.Tensor], flops: int
) -> None:
    assert count_flops(func, args, {}, (func(*args),)) == flops


@pytest.mark.parametrize(
    ("asked", "products"), [([True, True, False], 2), ([False, True, False], 1)]
)
def test_a_convolution_need_not_have_a_gradient_for_its_input(
    asked: list[bool], products: int
) -> None:
    source, weight, gradient = (
        torch.ones(2, 3, 16, 16),
        torch.ones(8, 3, 5, 5),
        torch.ones(2, 8, 12, 12),
    )
    args = [gradient, source, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, asked]
    outputs = tuple(each for each in ATEN.convolution_backward.default(*args) if each is not None)
    assert count_flops(ATEN.convolution_backward.default, args, {}, outputs) == products * 2 * (
        2 * 8 * 144
    ) * (3 * 25)


TABLE_VD, ROWS_ND, PLACES_N = torch.ones(1000, 8), torch.ones(4, 8), torch.arange(4)
TABLE, ROWS, PLACES = 1000 * 8 * 4, 4 * 8 * 4, 4 * 8  # bytes


@pytest.mark.parametrize(
    ("func", "args", "num_bytes"),
    [
        (ATEN.embedding.default, [TABLE_VD, PLACES_N], 2 * ROWS + PLACES),
        (ATEN.index_select.default, [TABLE_VD, 0, PLACES_N], 2 * ROWS + PLACES),
        (ATEN.index.Tensor, [TABLE_VD, [PLACES_N]], 2 * ROWS + PLACES),
        (
            ATEN.embedding_dense_backward.default,
            [ROWS_ND, PLACES_N, 1000, -1, False],
            TABLE + 3 * (ROWS + PLACES),
        ),
        (ATEN.index_add_.default, [TABLE_VD.clone(), 0, PLACES_N, ROWS_ND], 3 * ROWS + PLACES),
        (ATEN.index_add.default, [TABLE_VD, 0, PLACES_N, ROWS_ND], 2 * TABLE + 3 * ROWS + PLACES),
        (ATEN.zeros_like.default, [TABLE_VD], TABLE),
        (ATEN.empty_like.default, [TABLE_VD], 0),
        (ATEN.add.Tensor, [TABLE_VD, TABLE_VD.clone()], 3 * TABLE),
    ],
    ids=str,
)
def test_of_a_table_only_the_places_that_are_looked_up_are_moved(
    func: Any, args: list[Any], num_bytes: int
) -> None:
    assert moved_bytes(func, args, (func(*args),)) == num_bytes
