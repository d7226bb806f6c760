"""Split a batch into the micro-batches that it is computed in.

The sampler has decided which samples are in the step; this module only decides their layout. Packed
samples follow one another without padding; padded samples are filled up on the right. Neither
layout has targets across the border of two samples, so every supervised token is a target exactly
once in both.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from fitune.data.rows import Answers, Batch, Labelled, MicroBatch, Row


def split(
    batch: Batch,
    *,
    packed: bool,
    micro_rows: int | None = None,
    micro_tokens: int | None = None,
    pad_id: int = 0,
) -> list[MicroBatch]:
    """Return micro-batches that contain each sample of `batch` once, grouped by `group`."""
    groups = group(batch, packed=packed, micro_rows=micro_rows, micro_tokens=micro_tokens)
    return [lay_out(rows, packed=packed, pad_id=pad_id) for rows in groups]


def group(
    batch: Batch, *, packed: bool, micro_rows: int | None = None, micro_tokens: int | None = None
) -> list[list[Row]]:
    """Divide the samples of a batch into groups, by one of the two sizes.

    micro_rows: so many consecutive samples in each group.
    micro_tokens: at most so many tokens (with padding) in each group, but never fewer than the
        longest sample has. Packed samples are assigned by first-fit decreasing over their lengths,
        the longest first. Padded groups are as many consecutive samples as fit when padded to the
        longest of them.
    """
    assert (micro_rows is None) != (micro_tokens is None), "give micro_rows or micro_tokens"
    if micro_rows is not None:
        return [
            list(batch.rows[first : first + micro_rows])
            for first in range(0, len(batch.rows), micro_rows)
        ]
    assert micro_tokens is not None
    sizes = (len(row) if packed else row.padded_tokens for row in batch.rows)
    budget_tokens = max([micro_tokens, *sizes])
    return (_first_fit if packed else _consecutive)(batch.rows, budget_tokens)


def sort_by_length(batch: Batch) -> Batch:
    """Return the batch with the longest samples first, so that padded groups need little padding.

    Samples of the same length keep their order.
    """
    return Batch(tuple(sorted(batch.rows, key=lambda row: row.padded_tokens, reverse=True)))


def lay_out(rows: Sequence[Row], *, packed: bool, pad_id: int = 0) -> MicroBatch:
    """Return one micro-batch of all these samples, which must be at least one."""
    sequences = [sequence for row in rows for sequence in row.sequences()]
    lengths = [len(ids) for ids, _ in sequences]
    width = sum(lengths) if packed else max(lengths)
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(lengths)) * width
    num_positions = width if packed else width * len(lengths)
    ids_T = np.full(num_positions, pad_id, np.int64)
    positions_T = np.zeros(num_positions, np.int64)
    index, ids, weights = [], [], []
    for (row_ids, row_weights), start in zip(sequences, starts, strict=True):
        ids_T[start : start + len(row_ids)] = row_ids
        positions_T[start : start + len(row_ids)] = np.arange(len(row_ids))
        targets = 1 + np.flatnonzero(row_weights[1:])
        index.append(start + targets - 1)
        ids.append(row_ids[targets])
        weights.append(row_weights[targets])
    shape = (1, width) if packed else (len(lengths), width)
    return MicroBatch(
        row_ids=tuple(row.row_id for row in rows),
        row_lengths=tuple(lengths),
        packed=packed,
        input_ids_BS=torch.from_numpy(ids_T.reshape(shape)),
        position_ids_BS=torch.from_numpy(positions_T.reshape(shape)),
        target_index_N=_int64(index),
        target_ids_N=_int64(ids),
        target_weights_N=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
        loss_weight=sum(row.loss_weight for row in rows),
        answers=_answers(rows, [len(part) for part in index], packed=packed, pad_id=pad_id),
    )


def _answers(
    rows: Sequence[Row], num_targets: Sequence[int], *, packed: bool, pad_id: int
) -> Answers | None:
    """Return what a micro-batch of preferences needs; None for other samples.

    num_targets: of each sequence.
    """
    judged = [row.judged for row in rows if row.judged is not None]
    if not judged:
        return None
    assert len(judged) == len(rows)
    most_targets = max(1, *num_targets)
    facts = [
        (row.loss_weight, *each.reference, not isinstance(each, Labelled) or each.is_desirable)
        for row, each in zip(rows, judged, strict=True)
    ]
    places = [number * most_targets + np.arange(count) for number, count in enumerate(num_targets)]
    others = [
        Row(row.row_id, *each.mismatched, replace(each, mismatched=None))
        for row, each in zip(rows, judged, strict=True)
        if isinstance(each, Labelled) and each.mismatched is not None
    ]
    return Answers(
        len(num_targets) // len(rows),
        most_targets,
        _int64(places),
        torch.tensor(facts, dtype=torch.float32),
        lay_out(others, packed=packed, pad_id=pad_id) if others else None,
    )


def _first_fit(rows: Sequence[Row], budget_tokens: int) -> list[list[Row]]:
    """Assign samples to bins by first-fit decreasing; bins keep the order of the batch.

    It needs at most 11/9 of the fewest possible bins, plus one (Johnson, 1973).
    """
    bins: list[list[int]] = []
    free_tokens: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
        size = len(rows[number])
        place = next((i for i, free in enumerate(free_tokens) if size <= free), len(bins))
        if place == len(bins):
            bins.append([])
            free_tokens.append(budget_tokens)
        bins[place].append(number)
        free_tokens[place] -= size
    return [[rows[number] for number in sorted(numbers)] for numbers in bins]


def _consecutive(rows: Sequence[Row], budget_tokens: int) -> list[list[Row]]:
    groups: list[list[Row]] = []
    longest = 0
    for row in rows:
        longest = max(longest, row.padded_tokens)
        if not groups or longest * (len(groups[-1]) + 1) > budget_tokens:
            groups.append([])
            longest = row.padded_tokens
        groups[-1].append(row)
    return groups


def _int64(parts: Sequence[npt.NDArray[np.integer]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
