"""Every token and every target is in one micro-batch, whatever the layout."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitune.data.packing import lay_out, sort_by_length, split
from fitune.data.rows import TENSORS, Batch, MicroBatch, Row

PAD = 999


def row(row_id: int, weights: list[float]) -> Row:
    """A row whose ids tell its number and place."""
    ids = np.array([row_id * 20 + place for place in range(len(weights))], np.int32)
    return Row(row_id, ids, np.array([0.0, *weights[1:]], np.float32))


WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 0.25]), min_size=1, max_size=20)
BATCHES = st.lists(WEIGHTS, max_size=10).map(
    lambda rows: Batch(tuple(row(i, weights) for i, weights in enumerate(rows)))
)
LAYOUTS = st.fixed_dictionaries(
    {"packed": st.booleans()}, optional={"micro_rows": st.integers(1, 4)}
).flatmap(
    lambda keys: (
        st.just(keys)
        if "micro_rows" in keys
        else st.integers(1, 60).map(lambda n: {**keys, "micro_tokens": n})
    )
)


def lengths(*sizes: int) -> Batch:
    return Batch(tuple(row(i, [1.0] * size) for i, size in enumerate(sizes)))


def targets(micro: MicroBatch) -> list[tuple[int, int, float]]:
    """(id at the position, id of its target, weight)."""
    flat = micro.input_ids_BS.flatten()
    return [
        (int(flat[index]), int(target), float(weight))
        for index, target, weight in zip(
            micro.target_index_N, micro.target_ids_N, micro.target_weights_N, strict=True
        )
    ]


@given(batch=BATCHES, layout=LAYOUTS)
def test_every_row_and_token_is_in_one_micro_batch(batch: Batch, layout: dict[str, Any]) -> None:
    micro_batches = split(batch, **layout, pad_id=PAD)
    assert Counter(i for micro in micro_batches for i in micro.row_ids) == Counter(batch.row_ids)
    seen = Counter(
        int(i) for micro in micro_batches for i in micro.input_ids_BS.flatten() if i != PAD
    )
    assert seen == Counter(int(i) for row in batch.rows for i in row.input_ids)
    assert sum(micro.num_tokens for micro in micro_batches) == batch.num_tokens


@given(batch=BATCHES, layout=LAYOUTS)
def test_every_supervised_token_is_once_the_target_of_the_token_before_it(
    batch: Batch, layout: dict[str, Any]
) -> None:
    seen = Counter(
        target for micro in split(batch, **layout, pad_id=PAD) for target in targets(micro)
    )
    wanted = [
        (int(row.input_ids[i - 1]), int(row.input_ids[i]), float(row.loss_weights[i]))
        for row in batch.rows
        for i in range(1, len(row))
        if row.loss_weights[i]
    ]
    assert seen == Counter(wanted)


@given(batch=BATCHES, layout=LAYOUTS)
def test_the_loss_weight_is_kept(batch: Batch, layout: dict[str, Any]) -> None:
    micro_batches = split(batch, **layout)
    assert sum(micro.loss_weight for micro in micro_batches) == pytest.approx(batch.loss_weight)
    assert (
        sum(micro.num_supervised_tokens for micro in micro_batches) == batch.num_supervised_tokens
    )


@given(batch=BATCHES, layout=LAYOUTS)
def test_positions_restart_in_each_row(batch: Batch, layout: dict[str, Any]) -> None:
    for micro in split(batch, **layout, pad_id=PAD):
        real = micro.input_ids_BS != PAD
        assert (micro.position_ids_BS[real] == micro.input_ids_BS[real] % 20).all()


@given(batch=BATCHES, layout=LAYOUTS)
def test_a_packed_micro_batch_is_one_line_without_padding(
    batch: Batch, layout: dict[str, Any]
) -> None:
    for micro in split(batch, **{**layout, "packed": True}, pad_id=PAD):
        assert (
            micro.input_ids_BS.shape == micro.position_ids_BS.shape == (1, sum(micro.row_lengths))
        )


@given(batch=BATCHES, layout=LAYOUTS)
def test_a_padded_micro_batch_is_as_wide_as_its_longest_row(
    batch: Batch, layout: dict[str, Any]
) -> None:
    for micro in split(batch, **{**layout, "packed": False}, pad_id=PAD):
        assert micro.input_ids_BS.shape == (len(micro.row_ids), max(micro.row_lengths))


@given(batch=BATCHES, layout=LAYOUTS)
def test_in_one_piece_a_micro_batch_is_the_same(batch: Batch, layout: dict[str, Any]) -> None:
    for micro in split(batch, **layout, pad_id=PAD):
        again = micro.views_of(micro.joined())
        for name in TENSORS:
            assert torch.equal(getattr(again, name), getattr(micro, name))


@given(batch=BATCHES, micro_tokens=st.integers(1, 60), packed=st.booleans())
def test_no_micro_batch_is_over_its_tokens_or_the_longest_row(
    batch: Batch, micro_tokens: int, packed: bool
) -> None:
    limit = max([micro_tokens, *map(len, batch.rows)])
    assert all(
        micro.input_ids_BS.numel() <= limit
        for micro in split(batch, micro_tokens=micro_tokens, packed=packed)
    )


@given(batch=BATCHES, micro_tokens=st.integers(1, 60))
def test_no_two_packed_micro_batches_would_fit_into_one(batch: Batch, micro_tokens: int) -> None:
    limit = max([micro_tokens, *map(len, batch.rows)])
    filled = sorted(
        micro.num_tokens for micro in split(batch, micro_tokens=micro_tokens, packed=True)
    )
    assert all(left + right > limit for left, right in pairwise(filled))


def test_the_largest_rows_are_placed_first_and_small_ones_fill_up() -> None:
    micro_batches = split(lengths(3, 9, 4, 6, 7, 1), micro_tokens=10, packed=True)
    assert [micro.row_ids for micro in micro_batches] == [(1, 5), (0, 4), (2, 3)]


def test_micro_rows_are_consecutive() -> None:
    micro_batches = split(lengths(3, 9, 4, 6, 7), micro_rows=2, packed=True)
    assert [micro.row_ids for micro in micro_batches] == [(0, 1), (2, 3), (4,)]


def test_padded_rows_under_a_token_budget_are_consecutive() -> None:
    micro_batches = split(lengths(3, 5, 4, 9, 2), micro_tokens=10, packed=False)
    assert [micro.row_ids for micro in micro_batches] == [(0, 1), (2,), (3,), (4,)]


def test_sorting_is_by_length_and_only_on_request() -> None:
    assert sort_by_length(lengths(3, 9, 3, 4)).row_ids == (1, 3, 0, 2)


def test_a_row_without_targets_gives_none() -> None:
    micro = lay_out([row(0, [0.0] * 4)], packed=True)
    assert (micro.num_supervised_tokens, micro.loss_weight) == (0, 0.0)
