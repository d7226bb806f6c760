"""Recover the samples of a micro-batch, so that they can be laid out in another way."""

from collections.abc import Collection, Sequence

import numpy as np

from fitune.data.packing import lay_out, split
from fitune.data.rows import Batch, Judged, Labelled, MicroBatch, Row


def rows_of(micro_batch: MicroBatch) -> tuple[Row, ...]:
    """Return the samples of a micro-batch, equal to the original ones in every token and weight."""
    ids_T = micro_batch.input_ids_BS.flatten().cpu().numpy()
    # One more element than tokens: the last token has no next token that could be its target.
    weights_T = np.zeros(len(ids_T) + 1, np.float32)
    weights_T[micro_batch.target_index_N.cpu().numpy() + 1] = (
        micro_batch.target_weights_N.cpu().numpy()
    )
    width = micro_batch.input_ids_BS.shape[1]
    starts = np.cumsum([0, *micro_batch.row_lengths[:-1]])
    if not micro_batch.packed:
        starts = np.arange(len(micro_batch.row_lengths)) * width
    sequences = [
        (ids_T[start : start + length].astype(np.int32), weights_T[start : start + length])
        for start, length in zip(starts, micro_batch.row_lengths, strict=True)
    ]
    answers = micro_batch.answers
    if answers is None:
        return tuple(
            Row(row_id, *sequence)
            for row_id, sequence in zip(micro_batch.row_ids, sequences, strict=True)
        )
    facts = answers.facts_R4.tolist()
    if answers.per_sample == 1:
        others = None if answers.mismatched is None else rows_of(answers.mismatched)
        mismatched = [(row.input_ids, row.loss_weights) for row in others or ()]
        return tuple(
            Row(
                row_id,
                *sequence,
                Labelled(
                    desirable == 1, mismatched[place] if mismatched else None, (first, second)
                ),
            )
            for place, (row_id, sequence, (_, first, second, desirable)) in enumerate(
                zip(micro_batch.row_ids, sequences, facts, strict=True)
            )
        )
    return tuple(
        Row(
            row_id,
            np.concatenate((chosen[0], rejected[0])),
            np.concatenate((chosen[1], rejected[1])),
            Judged(len(chosen[0]), (first, second)),
        )
        for row_id, chosen, rejected, (_, first, second, _) in zip(
            micro_batch.row_ids, sequences[::2], sequences[1::2], facts, strict=True
        )
    )


def split_again(micro_batch: MicroBatch, most_positions: int) -> list[MicroBatch]:
    """Split a micro-batch into ones of at most so many tokens (with padding), or of one sample.

    If the micro-batch has at least two samples and more tokens than that, the result has at least
    two micro-batches.
    """
    return split(
        Batch(rows_of(micro_batch)), packed=micro_batch.packed, micro_tokens=most_positions
    )


def without_rows(micro_batch: MicroBatch, row_ids: Collection[int]) -> MicroBatch | None:
    """Return the micro-batch without these samples, or None if no sample remains."""
    remaining = [row for row in rows_of(micro_batch) if row.row_id not in row_ids]
    return lay_out(remaining, packed=micro_batch.packed) if remaining else None


def lay_out_as(batch: Batch, plan: Sequence[Sequence[int]], *, packed: bool) -> list[MicroBatch]:
    """Lay out the samples of `batch` in the micro-batches that `plan` lists by row ids.

    This repeats the layout that a journal recorded for a step. Samples that the plan lacks, because
    they did not fit into memory, are left out. Raises KeyError for a row id that the batch lacks.
    """
    rows = {row.row_id: row for row in batch.rows}
    return [
        lay_out([rows[row_id] for row_id in row_ids], packed=packed) for row_ids in plan if row_ids
    ]
