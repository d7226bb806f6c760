"""Load the examples to train on or to evaluate with, from a data configuration and a tokenizer.

Every row is tokenised once, into the cache (data/table.py). Which samples are held out is decided
when the table is opened, from the hash of each row's content alone. The same samples are therefore
held out in every run, on every machine and in every order, and copies of a row are on the same
side.
"""

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fitune.config import DataConfig, DataSource, SampleKind
from fitune.data.cut import Cutter
from fitune.data.files import fingerprint, read_rows
from fitune.data.formats import Conversation, Format, RowError, normalise
from fitune.data.labelled import mismatched, normalise_labelled
from fitune.data.notices import is_pretraining, notices_of
from fitune.data.preferences import after_common_prefix, normalise_pair
from fitune.data.raw_rows import RawRow
from fitune.data.report import (
    BadRow,
    DataReport,
    SourceReport,
    grouped,
    length_histogram,
)
from fitune.data.rows import Judged, Labelled, Row
from fitune.data.splits import Split
from fitune.data.summary import data_report
from fitune.data.table import Table, TableWriter, cached_table
from fitune.data.tokenise import Encoder, encode, read_encoder
from fitune.errors import DataError
from fitune.units import MIB

#: increased whenever the same files would be tokenised or masked in another way
_DATA_VERSION = 4
#: the bad rows, and the dropped rows, that the report lists
_NUM_LISTED = 10
_CHUNK_ROWS = 1024
_CHUNK_CHARS = 4 * MIB
#: Reading stops at so many bad rows if they are at least a third of the rows read so far.
_HOPELESS_ROWS = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Tokenised samples, memory-mapped from the cache; examples[i] reads one of them."""

    #: int32 [samples]: the tokens of each sample
    lengths: npt.NDArray[np.int32]
    #: float32 [samples]: how many times each sample is seen in an epoch
    repeats: npt.NDArray[np.float32]
    num_tokens: int
    num_supervised_tokens: int
    #: a hash of the samples' tokens and loss weights, the same on every machine
    data_hash: str
    report: DataReport
    table: Table
    #: int64 [samples]: where each sample is in the table
    rows: npt.NDArray[np.int64]
    #: float32 [samples, 2]: of pairs, the log-probabilities of both answers under the reference
    reference: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row_id = range(len(self))[index]
        input_ids, loss_weights = self.table.row(int(self.rows[row_id]))
        chosen_tokens = int(self.table.chosen_tokens[self.rows[row_id]])
        label = int(self.table.labels[self.rows[row_id]])
        if not chosen_tokens and label < 0:
            return Row(row_id, input_ids, loss_weights)
        reference = (0.0, 0.0) if self.reference is None else self.reference[row_id].tolist()
        if label < 0:
            return Row(row_id, input_ids, loss_weights, Judged(chosen_tokens, tuple(reference)))
        before = self.table.row(int(self.rows[row_id - 1]))
        other = mismatched((input_ids, loss_weights), before, self.report.max_length)
        return Row(row_id, input_ids, loss_weights, Labelled(label == 1, other, tuple(reference)))

    @property
    def are_pairs(self) -> bool:
        return bool(self.table.chosen_tokens.any())

    @property
    def are_preferences(self) -> bool:
        return self.are_pairs or bool((self.table.labels >= 0).any())

    @property
    def weight_per_token(self) -> float:
        """Return the loss weight of the training samples for each of their tokens."""
        if self.are_preferences:
            return len(self) / self.num_tokens
        return self.report.supervised_fraction

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def data_json(train: Examples, held_out: Examples) -> dict[str, object]:
    """Return what a run stores about its data, as `write_json` takes it.

    It contains the report, the histogram of lengths and the hashes of both sides.
    """
    return {
        "schema": 1,
        **asdict(train.report),
        "supervised_fraction": train.report.supervised_fraction,
        "data_hash": train.data_hash,
        "held_out_hash": held_out.data_hash,
        "lengths": length_histogram(
            train.lengths, train.report.max_length * (2 if train.are_pairs else 1)
        ),
    }


def load_examples(
    data: DataConfig,
    tokenizer: object,
    *,
    split: Literal["train", "eval"] = "train",
    eval_max_rows: int = 2000,
    kind: SampleKind = "answer",
    on_progress: Callable[[int], None] | None = None,
) -> Examples:
    """Return the examples of one side of the held-out split.

    kind: what a sample is.
    eval_max_rows: the most samples that are held out or taken of data.eval: those with the smallest
        hashes.
    on_progress: called with the number of rows tokenised so far.

    Raises DataError for data that cannot be read or trained on; the message includes the first bad
    rows.
    """
    encoder = read_encoder(
        tokenizer,
        template=data.template,
        mask=data.mask,
        merges_system=data.system == "merge",
        date=None if data.date is None else datetime.date.fromisoformat(data.date),
    )
    train_table = _table(data, encoder, on_progress, kind=kind)
    if data.eval_sources is None:
        eval_table = train_table
        is_eval = _held_out(train_table, data.eval_fraction, eval_max_rows)
        train_rows, eval_rows = np.flatnonzero(~is_eval), np.flatnonzero(is_eval)
    else:
        eval_table = _table(data, encoder, on_progress, kind=kind, split="eval")
        train_rows = np.arange(len(train_table.lengths))
        eval_rows = np.flatnonzero(_smallest(eval_table, eval_max_rows))
    report = data_report(data, (train_table, train_rows), (eval_table, eval_rows))
    table, rows = (train_table, train_rows) if split == "train" else (eval_table, eval_rows)
    rows = rows[table.lengths[rows] > 0]
    sources = (
        data.train_sources if split == "train" or data.eval_sources is None else data.eval_sources
    )
    repeats = np.array([source.weight for source in sources], np.float32)[table.sources[rows]]
    return Examples(
        lengths=table.lengths[rows],
        repeats=repeats if split == "train" else np.ones(len(rows), np.float32),
        num_tokens=int(table.lengths[rows].sum(dtype=np.int64)),
        num_supervised_tokens=int(table.num_supervised[rows].sum(dtype=np.int64)),
        data_hash=blake2b(
            table.digest.encode() + rows.astype("<i8").tobytes(), digest_size=16
        ).hexdigest(),
        report=report,
        table=table,
        rows=rows,
    )


def _held_out(table: Table, fraction: float, max_rows: int) -> npt.NDArray[np.bool_]:
    """Return which samples are held out, bool [samples]: those with a hash in the first `fraction`.

    At least the sample with the smallest hash is held out, at most max_rows samples, and none if
    that would leave nothing to train on.
    """
    if not fraction:
        return np.zeros(len(table.digests), bool)
    below = table.digests < np.uint64(fraction * 2.0**64)
    if not below[table.lengths > 0].any():
        below = table.digests == table.digests[table.lengths > 0].min(initial=np.uint64(2**64 - 1))
    held_out = below & _smallest(table, max_rows, among=below)
    keeps_some = bool((table.lengths[~held_out] > 0).any())
    return held_out if keeps_some else np.zeros(len(table.digests), bool)


def _smallest(
    table: Table, max_rows: int, among: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.bool_]:
    """Return which samples have the smallest hashes, bool [samples]: at most max_rows.

    Dropped samples do not count. Copies of one row are all taken, or none of them.
    """
    usable = table.lengths > 0 if among is None else among & (table.lengths > 0)
    digests = np.sort(table.digests[usable])
    if len(digests) <= max_rows:
        return np.ones(len(table.digests), bool)
    smallest: npt.NDArray[np.bool_] = table.digests < digests[max_rows]
    return smallest


def _table(
    data: DataConfig,
    encoder: Encoder,
    on_progress: Callable[[int], None] | None,
    *,
    kind: SampleKind,
    split: Split = "train",
) -> Table:
    sources = _sources(data, split)
    max_rows = data.max_rows if split == "train" else None
    prints = [fingerprint(source, split=split) for source in sources]
    key = {
        "version": _DATA_VERSION,
        "sources": prints,
        "tokenizer": _tokenizer_hash(encoder.tokenizer),
        "templates": [
            None
            if finder is None
            else (finder.template.name, finder.template.text, str(finder.template.date))
            for finder in (encoder.finder, encoder.tool_finder)
        ],
        "mask": data.mask,
        "system": data.system,
        "columns": data.columns.named,
        "ignore_keys": data.ignore_keys,
        "max_length": data.max_length,
        "too_long": data.too_long,
        "wrapped": data.wrapped,
        "max_rows": max_rows,
        "max_bad_fraction": data.max_bad_fraction,
        "kind": kind,
    }

    def write(writer: TableWriter) -> dict[str, Any]:
        tally = _Tally(
            data.max_bad_fraction, Counter(), Counter(), {}, [], [], Counter(), set(), set()
        )
        rows = (
            (i, raw) for i, source in enumerate(sources) for raw in read_rows(source, split=split)
        )
        samples = _conversations(islice(rows, max_rows), data, tally, kind=kind)
        num_trainable = _tokenise(writer, samples, data, encoder, tally, on_progress)
        facts = _facts(sources, encoder, tally, num_trainable=num_trainable)
        if [fingerprint(source, split=split) for source in sources] != prints:
            raise DataError(
                f"{sources[0].path} changed while it was read: start again when it is complete"
            )
        return facts

    return cached_table(key, write)


@dataclass
class _Tally:
    """Counts and lists what was seen while a table is written."""

    max_bad_fraction: float
    #: for each source by number, as in num_bad_rows and formats
    num_rows: Counter[int]
    num_bad_rows: Counter[int]
    formats: dict[int, list[str]]
    bad_rows: list[BadRow]
    dropped_rows: list[BadRow]
    noticed: Counter[str]
    begins: set[str]
    ends: set[str]

    def bad(self, source: int, row: BadRow) -> None:
        """Record a row that cannot be used.

        Raises DataError early if the data is hopeless.
        """
        self.num_bad_rows[source] += 1
        if len(self.bad_rows) < _NUM_LISTED:
            self.bad_rows.append(row)
        if (
            self.num_bad_rows.total() == _HOPELESS_ROWS
            and self.num_rows.total() <= 3 * _HOPELESS_ROWS
        ):
            self.check()

    def check(self) -> None:
        """Raise DataError if more rows are bad than data.max_bad_fraction allows."""
        num_rows, num_bad = self.num_rows.total(), self.num_bad_rows.total()
        if num_bad <= self.max_bad_fraction * num_rows:
            return
        listed = "\n".join(f"  {message}" for message in grouped(self.bad_rows))
        raise DataError(
            f"{num_bad:,} of {num_rows:,} samples cannot be used, more than "
            f"data.max_bad_fraction={self.max_bad_fraction:g} allows: mend them or raise it. The "
            f"first ones:\n{listed}"
        )


def _sources(data: DataConfig, split: Split) -> tuple[DataSource, ...]:
    return data.train_sources if split == "train" else data.eval_sources or ()


def _tokenise(
    writer: TableWriter,
    samples: Iterator[tuple[int, RawRow, tuple[Conversation, ...]]],
    data: DataConfig,
    encoder: Encoder,
    tally: _Tally,
    on_progress: Callable[[int], None] | None,
) -> int:
    """Write the samples into the table, and return how many can be trained on.

    Raises DataError if too many rows are bad.
    """
    cutter = Cutter(data)
    num_trainable = 0
    for chunk in _chunks(samples):
        rows = []
        every = iter(encode(encoder, [each for *_, sample in chunk for each in sample]))
        for source, place, sample in chunk:
            encoded = [next(every) for _ in sample]
            if fault := next((each for each in encoded if isinstance(each, str)), None):
                tally.bad(source, BadRow(place.path, place.line, fault))
                continue
            parts = after_common_prefix(
                [each for each in encoded if not isinstance(each, str)], sample
            )
            label = sample[0].label
            for row, reason in cutter.cut(parts, _digest(sample), source):
                if label is not None:
                    row = replace(row, label=int(label))
                if reason is not None and len(tally.dropped_rows) < _NUM_LISTED:
                    tally.dropped_rows.append(BadRow(place.path, place.line, reason))
                num_trainable += reason is None
                rows.append(row)
            tally.noticed.update(
                frozenset().union(
                    *(notices_of(each, encoder, data) for each in sample),
                    *(each.notices for each in parts),
                )
            )
            tally.begins |= frozenset().union(*(each.begins for each in parts))
            tally.ends |= frozenset().union(*(each.ends for each in parts))
        if rows:
            writer.append(rows)
        if on_progress:
            on_progress(tally.num_rows.total())
    rest = list(cutter.remaining())
    if rest:
        writer.append(rest)
    tally.check()
    return num_trainable + len(rest)


def _facts(
    sources: tuple[DataSource, ...], encoder: Encoder, tally: _Tally, *, num_trainable: int
) -> dict[str, object]:
    """Return the facts of a table. Raises DataError if no sample has a supervised token."""
    if not num_trainable:
        first = (
            f"; the first one, {grouped(tally.dropped_rows[:1])[0]}" if tally.dropped_rows else ""
        )
        raise DataError(
            f"{sources[0].path}: training on it would learn from nothing, since none of its "
            f"{tally.num_rows.total():,} "
            f"samples has a supervised token (mask by {encoder.kind}){first}. Try a larger "
            "data.max_length, another "
            "data.template, or data.mask=all"
        )
    return {
        "sources": [
            asdict(
                SourceReport(
                    source.path,
                    tuple(tally.formats.get(i, ())),
                    tally.num_rows[i],
                    tally.num_bad_rows[i],
                )
            )
            for i, source in enumerate(sources)
        ],
        "bad_rows": [asdict(row) for row in tally.bad_rows],
        "dropped_rows": [asdict(row) for row in tally.dropped_rows],
        "noticed": dict(tally.noticed),
        "template": "none" if encoder.template is None else encoder.template.name,
        "date": None
        if encoder.template is None or encoder.template.date is None
        else str(encoder.template.date),
        "mask": encoder.kind,
        "begins": sorted(tally.begins),
        "ends": sorted(tally.ends),
    }


def _digest(sample: tuple[Conversation, ...]) -> int:
    """Return the digest of a sample's content; see `Conversation.digest`."""
    if len(sample) == 1:
        return sample[0].digest
    content = b"".join(each.digest.to_bytes(8, "big") for each in sample)
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def _conversations(
    rows: Iterator[tuple[int, RawRow]], data: DataConfig, tally: _Tally, *, kind: SampleKind
) -> Iterator[tuple[int, RawRow, tuple[Conversation, ...]]]:
    """Yield the conversations of all usable rows, two of a pair, with the number of their source.

    Bad rows are added to the tally. Raises DataError if one file contains rows of two formats.
    """
    columns = data.columns.named
    read = _READERS[kind]
    # The format of each file, and the line that it was detected in.
    formats: dict[str, tuple[Format, int]] = {}
    for source, raw in rows:
        tally.num_rows[source] += 1
        try:
            if raw.fault is not None:
                raise RowError(raw.fault)
            found, sample = read(raw.value, columns=columns, ignored=data.ignore_keys)
            expected, line = formats.setdefault(raw.path, (found, raw.line))
            if found != expected:
                raise DataError(
                    f"{raw.path} mixes two formats: line {line} is '{expected}', line {raw.line} "
                    f"is '{found}'; "
                    "split it into two files and give both"
                )
            if found != "text" and is_pretraining(data):
                key = "data.wrapped" if data.wrapped else "data.too_long=split"
                raise DataError(
                    f"{raw.path}, line {raw.line}: {key} is for plain texts, and this sample is a "
                    f"conversation ('{found}'): drop it, or give {{\"text\": ...}}"
                )
            if found not in (known := tally.formats.setdefault(source, [])):
                known.append(found)
            if data.mask != "all" and not sample[0].assistant_weights and sample[0].text is None:
                raise RowError("it has no assistant message, so nothing to learn from")
        except RowError as error:
            tally.bad(source, BadRow(raw.path, raw.line, str(error)))
        else:
            yield source, raw, sample


def _normalise_one(
    row: object, *, columns: Mapping[str, str] | None, ignored: Sequence[str]
) -> tuple[Format, tuple[Conversation, ...]]:
    found, conversation = normalise(row, columns=columns, ignored=ignored)
    return found, (conversation,)


#: what reads a row, by the kind of the samples
_READERS: Mapping[SampleKind, Callable[..., tuple[Format, tuple[Conversation, ...]]]] = {
    "answer": _normalise_one,
    "pair": normalise_pair,
    "labelled": normalise_labelled,
}


def _chunks(
    rows: Iterator[tuple[int, RawRow, tuple[Conversation, ...]]],
) -> Iterator[list[tuple[int, RawRow, tuple[Conversation, ...]]]]:
    """Group rows into chunks for one call of the tokenizer, limited in number and in characters."""
    chunk: list[tuple[int, RawRow, tuple[Conversation, ...]]] = []
    num_chars = 0
    for row in rows:
        chunk.append(row)
        num_chars += sum(
            len(each.text or "") + sum(len(message["content"]) for message in each.messages)
            for each in row[2]
        )
        if len(chunk) == _CHUNK_ROWS or num_chars > _CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything that decides which ids a text becomes.

    The padding and truncation that earlier calls have set in the tokenizer are not part of it.
    """
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {
            "padding": None,
            "truncation": None,
        }
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = [content, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
