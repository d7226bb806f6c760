"""A micro-batch -> its rows again, so that they can be laid out in another way."""

from collections.abc import Collection, Sequence

import numpy as np

from fitune.data.packing import lay_out, split
from fitune.data.rows import Batch, MicroBatch, Row


def rows_of(micro_batch: MicroBatch) -> tuple[Row, ...]:
    """The rows that it was laid out from, equal in every token and weight."""
    ids_T = micro_batch.input_ids_BS.flatten().cpu().numpy()
    weights_T = np.zeros(len(ids_T) + 1, np.float32)  # the last one for the target of the last position, which has none
    weights_T[micro_batch.target_index_N.cpu().numpy() + 1] = micro_batch.target_weights_N.cpu().numpy()
    width = micro_batch.input_ids_BS.shape[1]
    starts = np.cumsum([0, *micro_batch.row_lengths[:-1]])
    if not micro_batch.packed:
        starts = np.arange(len(micro_batch.row_lengths)) * width
    return tuple(
        Row(row_id, ids_T[start : start + length].astype(np.int32), weights_T[start : start + length])
        for row_id, start, length in zip(micro_batch.row_ids, starts, micro_batch.row_lengths, strict=True)
    )


def split_again(micro_batch: MicroBatch, most_positions: int) -> list[MicroBatch]:
    """Its rows in micro-batches of at most so many positions, or of one row; at least two, where it has two rows and
    more positions than that."""
    return split(Batch(rows_of(micro_batch)), packed=micro_batch.packed, micro_tokens=most_positions)


def without_rows(micro_batch: MicroBatch, row_ids: Collection[int]) -> MicroBatch | None:
    """The micro-batch without these rows; None where no row is left."""
    kept = [row for row in rows_of(micro_batch) if row.row_id not in row_ids]
    return lay_out(kept, packed=micro_batch.packed) if kept else None


def lay_out_as(batch: Batch, plan: Sequence[Sequence[int]], *, packed: bool) -> list[MicroBatch]:
    """The rows of `batch` in the micro-batches of `plan`, a row id each; what a journal tells of a step is done again
    so. Rows that the plan lacks (left out for want of memory) are left out. Raises KeyError for a row that the batch
    lacks."""
    rows = {row.row_id: row for row in batch.rows}
    return [lay_out([rows[row_id] for row_id in row_ids], packed=packed) for row_ids in plan if row_ids]
