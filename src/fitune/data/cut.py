"""Cut tokenised conversations and texts to samples of at most data.max_length tokens.

A text that is cut into several samples loses no target: each sample begins with the last token of
the one before it, as in Megatron-LM and nanoGPT. Every token but the first of a text is therefore
a target exactly once. The same holds for texts that are joined and cut (data.wrapped).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from fitune.config import DataConfig
from fitune.data.table import TableRow
from fitune.data.tokenise import Encoded, Span

#: a sample as it is stored, and the reason if it is dropped
Cut = tuple[TableRow, str | None]


def split_ids(ids: Sequence[int], max_length: int) -> list[Sequence[int]]:
    """Return the ids in parts of at most max_length, each beginning with the last id before it."""
    last = max(len(ids) - 1, 1)
    return [ids[first : first + max_length] for first in range(0, last, max_length - 1)]


@dataclass
class Cutter:
    """Cuts the rows of a table in their order, and holds what is left of joined texts."""

    data: DataConfig
    #: of the texts joined so far, the tokens that do not fill a sample
    _rest: list[int] = field(default_factory=list)
    #: the source that they are from
    _source: int = 0

    def cut(self, sequences: Sequence[Encoded], digest: int, source: int) -> Iterator[Cut]:
        """Yield the samples of one row; none if its tokens wait for those of the next text.

        sequences: the one of the row, or the chosen and the rejected one of a pair.
        """
        first_ids = sequences[0].input_ids
        if self.data.wrapped:
            if source != self._source:
                yield from ((row, None) for row in self.remaining())
            self._source = source
            self._rest += first_ids
            yield from self._full_samples()
        elif self.data.too_long == "split" and len(first_ids) > self.data.max_length:
            yield from self._parts(first_ids, digest, source)
        else:
            yield _cut(sequences, digest, source, self.data)

    def remaining(self) -> Iterator[TableRow]:
        """Yield the last sample of joined texts, which may be shorter than the others."""
        if len(self._rest) > 1:
            yield _joined(self._rest, self._source)
        self._rest = []

    def _full_samples(self) -> Iterator[Cut]:
        length = self.data.max_length
        while len(self._rest) > length:
            parts = split_ids(self._rest, length)
            yield from ((_joined(part, self._source), None) for part in parts[:-1])
            self._rest = list(parts[-1])

    def _parts(self, ids: Sequence[int], digest: int, source: int) -> Iterator[Cut]:
        """Yield the samples of a long text, all with its digest: they are held out together."""
        for number, part in enumerate(split_ids(ids, self.data.max_length)):
            full_length = 0 if number else len(ids)
            yield TableRow(part, ((1, len(part), 1.0),), full_length, digest, source), None


def _joined(ids: Sequence[int], source: int) -> TableRow:
    digest = blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).digest()
    return TableRow(ids, ((1, len(ids), 1.0),), len(ids), int.from_bytes(digest, "little"), source)


def _cut(sequences: Sequence[Encoded], digest: int, source: int, data: DataConfig) -> Cut:
    """Return a row as one sample, each sequence cut at its end, or dropped if one is too long."""
    full_length = max(len(each.input_ids) for each in sequences)
    ids: list[int] = []
    spans: list[Span] = []
    reason = "too long" if full_length > data.max_length and data.too_long == "drop" else None
    for each in sequences:
        own = [
            (len(ids) + first, len(ids) + min(end, data.max_length), weight)
            for first, end, weight in each.spans
            if first < data.max_length
        ]
        if not own and reason is None:
            reason = (
                "no supervised token left after the cut" if each.spans else "no supervised token"
            )
        spans += own
        ids += each.input_ids[: data.max_length]
    if reason is None:
        first_tokens = min(len(sequences[0].input_ids), data.max_length)
        chosen_tokens = first_tokens if len(sequences) > 1 else 0
        return TableRow(ids, spans, full_length, digest, source, chosen_tokens), None
    return (
        TableRow([], (), full_length, digest, source),
        f"{reason} ({full_length:,} tokens, data.max_length {data.max_length:,})",
    )
