"""The rows of a batch -> the rows that each of several processes computes."""

from fitune.data.rows import Batch


def deal(batch: Batch, size: int) -> list[Batch]:
    """Every row in one of `size` parts of nearly equal tokens, a function of the rows' lengths and order alone. A part
    keeps the batch's order; some are empty where rows are too few.

    The longest row first, each to the part with the fewest tokens so far: the fullest part has at most 4/3 of the
    tokens of the best deal (Graham, 1969).
    """
    if size == 1:
        return [batch]
    numbers: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for number in sorted(range(len(batch.rows)), key=lambda number: -len(batch.rows[number])):
        part = tokens.index(min(tokens))
        numbers[part].append(number)
        tokens[part] += len(batch.rows[number])
    return [Batch(tuple(batch.rows[number] for number in sorted(part))) for part in numbers]
