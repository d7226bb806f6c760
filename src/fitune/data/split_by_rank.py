"""Shard the samples of a batch over several processes."""

from fitune.data.rows import Batch


def split_by_rank(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into `size` shards of nearly equal numbers of tokens, one for each rank.

    The result is a function of the samples' lengths and order alone. Each shard keeps the order of
    the batch. If the samples are too few, some shards are empty.

    The longest samples are assigned first, each to the shard with the fewest tokens so far; the
    largest shard then has at most 4/3 of the tokens that it has in the best split (Graham, 1969).
    """
    if size == 1:
        return [batch]
    members: list[list[int]] = [[] for _ in range(size)]
    shard_tokens = [0] * size
    for number in sorted(range(len(batch.rows)), key=lambda number: -len(batch.rows[number])):
        shard = shard_tokens.index(min(shard_tokens))
        members[shard].append(number)
        shard_tokens[shard] += len(batch.rows[number])
    return [Batch(tuple(batch.rows[number] for number in sorted(shard))) for shard in members]
