"""A data configuration and a tokenizer -> the examples to train on or to evaluate with.

Every row is tokenised once, into the cache (data/table.py); what is held out is decided when the table is opened, from
the hash of each row's content alone: the same rows in every run, on every machine and in every order, and copies of one
row on the same side.
"""

import datetime
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fitune.config import DataConfig, DataSource
from fitune.data.files import fingerprint, read_rows, split_sample
from fitune.data.formats import Conversation, Format, RowError, normalise
from fitune.data.marked import NOT_SHOWN, writes_reasoning
from fitune.data.raw_rows import RawRow
from fitune.data.report import (
    BadRow,
    DataReport,
    SourceReport,
    SplitReport,
    grouped,
    length_histogram,
    length_quantiles,
    padding_report,
)
from fitune.data.rows import Row
from fitune.data.splits import Split, other_splits
from fitune.data.table import Table, TableRow, TableWriter, cached_table
from fitune.data.tokenise import Encoded, Encoder, encode, read_encoder
from fitune.errors import DataError
from fitune.units import MIB

_DATA_VERSION = 3  # counted up whenever the same files would be tokenised or masked in another way
_NUM_LISTED = 10
_CHUNK_ROWS = 1024
_CHUNK_CHARS = 4 * MIB
_HOPELESS_ROWS = (
    1000  # bad ones, when they are at least a third of what was read: no use in reading on
)


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Tokenised rows, mapped from the cache: examples[i] reads one.

    lengths: int32 [rows], tokens of each row. repeats: float32 [rows], how many times it is seen in an epoch.
    data_hash: of these rows' tokens and loss weights, the same on every machine.
    """

    lengths: npt.NDArray[np.int32]
    repeats: npt.NDArray[np.float32]
    num_tokens: int
    num_supervised_tokens: int
    data_hash: str
    report: DataReport
    table: Table
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row_id = range(len(self))[index]
        input_ids, loss_weights = self.table.row(int(self.rows[row_id]))
        return Row(row_id, input_ids, loss_weights)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def data_json(train: Examples, held_out: Examples) -> dict[str, Any]:
    """What a run keeps of its data, as `write_json` takes it: the report, the lengths and the hashes of both sides."""
    return {
        "schema": 1,
        **asdict(train.report),
        "supervised_fraction": train.report.supervised_fraction,
        "data_hash": train.data_hash,
        "held_out_hash": held_out.data_hash,
        "lengths": length_histogram(train.lengths, train.report.max_length),
    }


def load_examples(
    data: DataConfig,
    tokenizer: Any,
    *,
    split: Literal["train", "eval"] = "train",
    eval_max_rows: int = 2000,
    on_progress: Callable[[int], None] | None = None,
) -> Examples:
    """The examples of one side of the held-out split.

    eval_max_rows: at most so many are held out or, of data.eval, used: those with the smallest hashes.
    on_progress: called with the number of rows tokenised so far, while they are.
    Raises DataError for what cannot be read or trained on; the first bad rows are in its message.
    """
    encoder = read_encoder(
        tokenizer,
        template=data.template,
        mask=data.mask,
        merges_system=data.system == "merge",
        date=None if data.date is None else datetime.date.fromisoformat(data.date),
    )
    train_table = _table(data.train_sources, data.max_rows, data, encoder, on_progress)
    if data.eval_sources is None:
        eval_table = train_table
        is_eval = _held_out(train_table, data.eval_fraction, eval_max_rows)
        train_rows, eval_rows = np.flatnonzero(~is_eval), np.flatnonzero(is_eval)
    else:
        eval_table = _table(data.eval_sources, None, data, encoder, on_progress, split="eval")
        train_rows = np.arange(len(train_table.lengths))
        eval_rows = np.flatnonzero(_smallest(eval_table, eval_max_rows))
    report = _data_report(data, (train_table, train_rows), (eval_table, eval_rows))
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
    """bool [rows]: the hash lies below `fraction` of its range; at least the smallest one, at most max_rows."""
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
    """Rows with the smallest hashes, at most max_rows of them that can be trained on; copies all or none."""
    usable = table.lengths > 0 if among is None else among & (table.lengths > 0)
    digests = np.sort(table.digests[usable])
    if len(digests) <= max_rows:
        return np.ones(len(table.digests), bool)
    smallest: npt.NDArray[np.bool_] = table.digests < digests[max_rows]
    return smallest


def _table(
    sources: tuple[DataSource, ...],
    max_rows: int | None,
    data: DataConfig,
    encoder: Encoder,
    on_progress: Callable[[int], None] | None,
    *,
    split: Split = "train",
) -> Table:
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
        "max_rows": max_rows,
        "max_bad_fraction": data.max_bad_fraction,
    }

    def write(writer: TableWriter) -> dict[str, Any]:
        rows = (
            (i, raw) for i, source in enumerate(sources) for raw in read_rows(source, split=split)
        )
        facts = _tokenise(writer, sources, islice(rows, max_rows), data, encoder, on_progress)
        if [fingerprint(source, split=split) for source in sources] != prints:
            raise DataError(
                f"{sources[0].path} changed while it was read: start again when it is complete"
            )
        return facts

    return cached_table(key, write)


@dataclass
class _Tally:
    """What has been seen so far while a table is written; becomes its facts."""

    max_bad_fraction: float
    num_rows: Counter[int]
    num_bad_rows: Counter[int]
    formats: dict[int, list[str]]
    bad_rows: list[BadRow]
    dropped_rows: list[BadRow]
    noticed: Counter[str]
    ends: set[str]

    def bad(self, source: int, row: BadRow) -> None:
        self.num_bad_rows[source] += 1
        if len(self.bad_rows) < _NUM_LISTED:
            self.bad_rows.append(row)
        if (
            self.num_bad_rows.total() == _HOPELESS_ROWS
            and self.num_rows.total() <= 3 * _HOPELESS_ROWS
        ):
            self.check()

    def check(self) -> None:
        num_rows, num_bad = self.num_rows.total(), self.num_bad_rows.total()
        if num_bad <= self.max_bad_fraction * num_rows:
            return
        listed = "\n".join(f"  {sentence}" for sentence in grouped(self.bad_rows))
        raise DataError(
            f"{num_bad:,} of {num_rows:,} samples cannot be used, more than "
            f"data.max_bad_fraction={self.max_bad_fraction:g} allows: mend them or raise it. The first ones:\n{listed}"
        )


def _tokenise(
    writer: TableWriter,
    sources: tuple[DataSource, ...],
    raw_rows: Iterator[tuple[int, RawRow]],
    data: DataConfig,
    encoder: Encoder,
    on_progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    tally = _Tally(data.max_bad_fraction, Counter(), Counter(), {}, [], [], Counter(), set())
    num_kept = 0
    for chunk in _chunks(_conversations(raw_rows, data, tally)):
        rows = []
        for (source, place, conversation), encoded in zip(
            chunk, encode(encoder, [row for *_, row in chunk]), strict=True
        ):
            if isinstance(encoded, str):
                tally.bad(source, BadRow(place.path, place.line, encoded))
                continue
            row, reason = _cut(encoded, conversation.digest, source, data)
            if reason is not None and len(tally.dropped_rows) < _NUM_LISTED:
                tally.dropped_rows.append(BadRow(place.path, place.line, reason))
            num_kept += reason is None
            rows.append(row)
            tally.noticed.update(_notices(conversation, encoder, data) | encoded.notices)
            tally.ends |= encoded.ends
        if rows:
            writer.append(rows)
        if on_progress:
            on_progress(tally.num_rows.total())
    tally.check()
    if not num_kept:
        first = (
            f"; the first one, {grouped(tally.dropped_rows[:1])[0]}" if tally.dropped_rows else ""
        )
        raise DataError(
            f"{sources[0].path}: training on it would learn from nothing, since none of its {tally.num_rows.total():,} "
            f"samples has a supervised token (mask by {encoder.kind}){first}. Try a larger data.max_length, another "
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
        "ends": sorted(tally.ends),
    }


def _cut(
    encoded: Encoded, digest: int, source: int, data: DataConfig
) -> tuple[TableRow, str | None]:
    """The row as it is kept, and why nothing of it is."""
    full_length = len(encoded.input_ids)
    is_long = full_length > data.max_length
    spans = tuple(
        (a, min(b, data.max_length), weight)
        for a, b, weight in encoded.spans
        if a < data.max_length
    )
    reason = None
    if is_long and data.too_long == "drop":
        reason = "too long"
    elif not spans:
        reason = (
            "no supervised token left after the cut" if encoded.spans else "no supervised token"
        )
    if reason is None:
        return TableRow(
            encoded.input_ids[: data.max_length], spans, full_length, digest, source
        ), None
    return (
        TableRow([], (), full_length, digest, source),
        f"{reason} ({full_length:,} tokens, data.max_length {data.max_length:,})",
    )


def _conversations(
    rows: Iterator[tuple[int, RawRow]], data: DataConfig, tally: _Tally
) -> Iterator[tuple[int, RawRow, Conversation]]:
    """The usable rows of all sources with the number of their source; bad ones go to the tally.

    Raises DataError when one file holds rows of two formats.
    """
    columns = data.columns.named
    formats: dict[str, tuple[Format, int]] = {}  # of each file, with the line that showed it
    for source, raw in rows:
        tally.num_rows[source] += 1
        try:
            if raw.fault is not None:
                raise RowError(raw.fault)
            found, conversation = normalise(raw.value, columns=columns, ignored=data.ignore_keys)
            expected, line = formats.setdefault(raw.path, (found, raw.line))
            if found != expected:
                raise DataError(
                    f"{raw.path} mixes two formats: line {line} is '{expected}', line {raw.line} is '{found}'; "
                    "split it into two files and give both"
                )
            if found not in (known := tally.formats.setdefault(source, [])):
                known.append(found)
            if (
                data.mask != "all"
                and not conversation.assistant_weights
                and conversation.text is None
            ):
                raise RowError("it has no assistant message, so nothing to learn from")
        except RowError as error:
            tally.bad(source, BadRow(raw.path, raw.line, str(error)))
        else:
            yield source, raw, conversation


def _chunks(
    rows: Iterator[tuple[int, RawRow, Conversation]],
) -> Iterator[list[tuple[int, RawRow, Conversation]]]:
    """Rows together as many as are worth one call of the tokenizer, bounded in number and in characters."""
    chunk: list[tuple[int, RawRow, Conversation]] = []
    num_chars = 0
    for row in rows:
        chunk.append(row)
        num_chars += len(row[2].text or "") + sum(
            len(message["content"]) for message in row[2].messages
        )
        if len(chunk) == _CHUNK_ROWS or num_chars > _CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def _notices(conversation: Conversation, encoder: Encoder, data: DataConfig) -> frozenset[str]:
    """What a row holds that has no effect, or an unexpected one; each kind becomes a warning with its count."""
    noticed = {_IGNORED.format(key=key) for key in conversation.ignored}
    if conversation.text is not None and _WRITTEN_CHAT.search(conversation.text, 0, 4096):
        noticed.add(
            "are texts in which a conversation is written out already: every token of them is learned, the questions "
            "too; samples in the messages format teach the answers alone"
        )
    if conversation.text is None:
        template = encoder.finder_of(conversation).template.text
        keys = {key for message in conversation.messages for key in message}
        if "reasoning_content" in keys and not writes_reasoning(template):
            noticed.add(NOT_SHOWN.format(what="reasoning_content"))
        if "tool_calls" in keys and "tool_calls" not in template:
            noticed.add(NOT_SHOWN.format(what="tool_calls"))
        if conversation.tools and "tools" not in template:
            noticed.add(NOT_SHOWN.format(what="tools"))
        for key in keys - _KNOWN_IN_A_MESSAGE:
            if key not in template:
                noticed.add(f"hold the key '{key}' in a message, which is ignored")
        for key in conversation.template_arguments or ():
            if key not in template:
                noticed.add(NOT_SHOWN.format(what=f"the template argument '{key}'"))
    pairs = zip(conversation.messages, conversation.weights, strict=True)
    if data.mask == "all":
        if any(weight is not None for weight in conversation.weights):
            noticed.add("hold loss weights, which data.mask=all leaves out")
    elif any(weight and message["role"] != "assistant" for message, weight in pairs):
        noticed.add(
            f"weigh messages that are not the assistant's, which data.mask={data.mask} never supervises"
        )
    return frozenset(noticed)


_IGNORED = "hold the key '{key}', which is ignored"
_IGNORED_PATTERN = re.compile(_IGNORED.format(key="(.*)"), re.DOTALL)
_WRITTEN_CHAT = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>|\[INST\]|"
    r"#{2,3} ?(?:Human|User|Assistant|Instruction|Response)\b|^(?:USER|ASSISTANT|Human|Assistant): ",
    re.MULTILINE,
)


def _grouped_notices(noticed: Mapping[str, int]) -> Iterator[str]:
    """A sentence for each kind; three keys or more that as many rows hold stand in one."""
    ignored: dict[int, list[str]] = {}
    for notice, count in sorted(noticed.items()):
        if match := _IGNORED_PATTERN.fullmatch(notice):
            ignored.setdefault(count, []).append(match[1])
        else:
            yield f"{count:,} samples {notice}"
    for count, keys in ignored.items():
        if len(keys) < 3:
            yield from (f"{count:,} samples {_IGNORED.format(key=key)}" for key in keys)
        else:
            yield f"{count:,} samples hold the keys {', '.join(keys)}, which are ignored"


_KNOWN_IN_A_MESSAGE = {
    "role",
    "content",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "name",
    "id",
}


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that decides which ids a text becomes; not of the padding that earlier calls have left in it."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str()) | {
            "padding": None,
            "truncation": None,
        }
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content = [content, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _data_report(
    data: DataConfig,
    train: tuple[Table, npt.NDArray[np.int64]],
    eval: tuple[Table, npt.NDArray[np.int64]],
) -> DataReport:
    tables = [train[0]] if eval[0] is train[0] else [train[0], eval[0]]
    facts = [table.facts for table in tables]
    sources = tuple(
        SourceReport(**source | {"formats": tuple(source["formats"])})
        for f in facts
        for source in f["sources"]
    )
    noticed = sum((Counter(f["noticed"]) for f in facts), Counter[str]())
    train_report, eval_report = (
        _split_report(*train, data.max_length),
        _split_report(*eval, data.max_length),
    )
    return DataReport(
        sources=sources,
        template=facts[0]["template"],
        mask=facts[0]["mask"],
        date=facts[0]["date"],
        ends=tuple(sorted({end for f in facts for end in f["ends"]})),
        max_length=data.max_length,
        num_rows=sum(source.num_rows for source in sources),
        num_bad_rows=sum(source.num_bad_rows for source in sources),
        bad_rows=tuple(BadRow(**row) for f in facts for row in f["bad_rows"]),
        dropped_rows=tuple(BadRow(**row) for f in facts for row in f["dropped_rows"]),
        train=train_report,
        eval=eval_report,
        warnings=(
            *_grouped_notices(noticed),
            *_split_warnings(data, train, eval),
            *_other_split_warnings(data),
            *(
                f"{source.path} gives no sample: data.max_rows is reached before it"
                for source in sources
                if not source.num_rows
            ),
        ),
    )


def _split_report(table: Table, rows: npt.NDArray[np.int64], max_length: int) -> SplitReport:
    lengths, full_lengths = table.lengths[rows], table.full_lengths[rows]
    kept = lengths > 0
    return SplitReport(
        num_rows=int(kept.sum()),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        num_supervised_tokens=int(table.num_supervised[rows].sum(dtype=np.int64)),
        quantiles=length_quantiles(full_lengths),
        num_long_rows=int((full_lengths > max_length).sum()),
        num_untrainable_rows=int((~kept).sum()),
        num_duplicate_rows=int(kept.sum()) - len(np.unique(table.digests[rows][kept])),
        padding=padding_report(lengths[kept], max_length),
    )


def _other_split_warnings(data: DataConfig) -> Iterator[str]:
    """What lies in a source's directory and is not used for what the source is for."""
    for source in data.train_sources:
        for name, count in other_splits(split_sample(source.path)[0]).items():
            what = (
                f"{count:,} files of the split {name}"
                if name
                else f"{count:,} files whose names tell no split"
            )
            hint = (
                f": data.eval={source.path} evaluates with them"
                if name and data.eval is None
                else ""
            )
            yield f"{source.path} holds {what}, not used for training{hint}"
    for source in data.eval_sources or ():
        for name, count in other_splits(split_sample(source.path)[0], split="eval").items():
            if name in ("validation", "test"):
                yield f"{source.path} holds {count:,} files of the split {name}, not used for evaluation"


def _split_warnings(
    data: DataConfig,
    train: tuple[Table, npt.NDArray[np.int64]],
    eval: tuple[Table, npt.NDArray[np.int64]],
) -> Iterator[str]:
    (train_table, train_rows), (eval_table, eval_rows) = train, eval
    num_eval = int((eval_table.lengths[eval_rows] > 0).sum())
    if data.eval_sources is None and data.eval_fraction and not num_eval:
        yield "no sample is held out: the samples are too few or all alike, so there is no evaluation"
    if data.eval_sources is not None:
        both = np.isin(train_table.digests[train_rows], eval_table.digests[eval_rows])
        if both.any():
            yield f"{int(both.sum()):,} samples of data.train are in data.eval too, which makes the evaluation too good"
