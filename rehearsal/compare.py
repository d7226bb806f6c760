"""Compares: for each case and card, what fitune predicts beside what the genuine allocator counts when the same steps
run on the rehearsed card. Each runs in a forked child, so that none sees what another has left in the allocator.

    python -m rehearsal.run python -m rehearsal.compare                          all, beginning where it was stopped
    python -m rehearsal.run python -m rehearsal.compare --cases full,lora --cards T4,A100
    python -m rehearsal.run python -m rehearsal.compare --cases full --explain   and what differs

Rows are appended to build/rehearsal/rows.jsonl; `python -m rehearsal.table` writes docs/rehearsal.md from them. A row
that the same code has made before is not made again (--again does).
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "FAKE_COPY_MAX", str(1 << 16)
)  # of contents only what the host looks at: masks, counters

import torch
import transformers

from fitune.allocator.prediction import Prediction
from fitune.recorder.events import MemoryTrace
from rehearsal import loops, steps
from rehearsal.answers import answers
from rehearsal.cases import BY_NAME, CARDS, CASES, Case, LoopCase, StepCase, TrainerCase
from rehearsal.explain import explain
from rehearsal.history import History
from rehearsal.predicted import (
    NUM_STEPS,
    Predicted,
    Routing,
    config_of,
    predicted_loop,
    predicted_step,
    traces_kept,
)
from rehearsal.rows import KEPT, ComparedRow, append_row, fingerprint, read_rows

LIMIT_SECONDS = 300


def compare(case: Case, card: str) -> ComparedRow:
    """In a process that has not used the card before."""
    torch.cuda.init()  # a training process has done so when it predicts, and the steps below need it
    with tempfile.TemporaryDirectory() as directory:
        if isinstance(case, StepCase):
            return _compare_step(case, card, Path(directory))
        if isinstance(case, LoopCase):
            return _compare_loop(case, card)
        return _compare_trainer(case, card, directory)


def _compare_step(case: StepCase, card: str, directory: Path) -> ComparedRow:
    config = config_of(case, directory)
    row, expected = _bounded_row(
        case, card, lambda routing: predicted_step(case, directory, routing=routing)
    )
    return _with_measured(row, *expected, steps.measure(case, config))


def _compare_loop(case: LoopCase, card: str) -> ComparedRow:
    row, expected = _bounded_row(case, card, lambda routing: predicted_loop(case, routing=routing))
    return _with_measured(row, *expected, measure_loop(case, num_steps=NUM_STEPS))


def measure_loop(case: LoopCase, *, num_steps: int, keep: int = 1) -> History:
    device = torch.device("cuda", 0)
    step = loops.loop(case, loops.build(case).to(device), device)
    history = History(num_steps=num_steps, keep=keep)
    with answers(truth=0 if case.padded else 1):  # a mask that is padded is not all ones
        history.watch(lambda _: step())
    return history


def _compare_trainer(case: TrainerCase, card: str, directory: str) -> ComparedRow:
    from fitune.integrations.transformers import predict_trainer
    from rehearsal import trainers

    trainer = trainers.trainer_of(case, directory, num_steps=NUM_STEPS)
    with traces_kept() as traces:
        prediction = predict_trainer(trainer, num_steps=NUM_STEPS)
    history = History(num_steps=NUM_STEPS)
    trainer.add_callback(trainers.StepEnds(history))
    selected = (
        case.batch * (case.length - 1) if case.trl else -1
    )  # the targets that TRL's loss takes
    with answers(truth=0 if case.packed else 1, selected=selected):
        trainer.train()
    return _with_measured(_row(case, card), prediction, traces[0], history)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _row(case: Case, card: str) -> ComparedRow:
    return ComparedRow(
        name=case.name,
        card=card,
        setting=describe(case),
        depends_on_data=case.depends_on_data,
        versions=versions(),
    )


def _bounded_row(
    case: Case, card: str, predicted: Callable[[Routing], Predicted]
) -> tuple[ComparedRow, Predicted]:
    """With the bounds of what depends on data; and what is predicted with the tokens spread evenly."""
    row, balanced = _row(case, card), predicted("balanced")
    if not case.depends_on_data:
        return row, balanced
    peaks = [expected[0].peak_allocated_bytes for expected in (balanced, predicted("worst"))]
    return replace(row, low_allocated_bytes=min(peaks), high_allocated_bytes=max(peaks)), balanced


def _with_measured(
    row: ComparedRow, prediction: Prediction, trace: MemoryTrace, history: History
) -> ComparedRow:
    last = history.peaks[-1]
    return replace(
        row,
        predicted_allocated_bytes=prediction.peak_allocated_bytes,
        predicted_reserved_bytes=prediction.peak_reserved_bytes,
        measured_allocated_bytes=last.allocated_bytes,
        measured_reserved_bytes=last.reserved_bytes,
        num_allocations=sum(event.step == 1 and event.num_bytes > 0 for event in history.events),
        explained=tuple(explain(tuple(trace.events), history.events)),
    )


def describe(case: Case) -> str:
    """A clause for the table."""
    if isinstance(case, StepCase):
        lengths = {length for length, _ in case.rows}
        rows = f"{len(case.rows) // case.accumulation} x {max(lengths)}"
        words = [case.model, f"{case.accumulation} x {rows}" if case.accumulation > 1 else rows]
        words += ["rows of different lengths"] if len(lengths) > 1 else []
        words += [kind for kind in case.kinds if kind != "train"]
        return ", ".join([*words, *case.options])
    words = [case.model, f"{case.batch} x {case.length}"]
    if isinstance(case, TrainerCase):
        words += ["SFTTrainer" if case.trl else "Trainer", case.dtype]
        return ", ".join(
            [*words, *(["LoRA"] if case.lora else []), *(f"{k}={v}" for k, v in case.arguments)]
        )
    words += [f"autocast {case.autocast}" if case.autocast else case.dtype]
    plain = LoopCase(name=case.name, model=case.model)
    told = ("name", "model", "batch", "length", "dtype", "autocast", "cards", "depends_on_data")
    for name in (field for field in LoopCase.__dataclass_fields__ if field not in told):
        value = getattr(case, name)
        if value != getattr(plain, name):
            words.append(name.replace("_", " ") if value is True else f"{name} {value}")
    return ", ".join(words)


def versions() -> str:
    return (
        f"torch {torch.__version__}, transformers {version('transformers')}, TRL {version('trl')}"
    )


# ---- children --------------------------------------------------------------------------------------------------------


class _TooLongError(Exception):
    pass


def _in_child(case: Case, card: str, path: Path, source: str) -> None:
    """Appends the case's row, or one that says why there is none."""

    def too_long(*_: Any) -> None:
        raise _TooLongError(f"not done after {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_SECONDS)
    begin = time.monotonic()
    try:
        row = compare(case, card)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        row = replace(_row(case, card), failure=f"{type(error).__name__} at {place}: {error}"[:600])
    signal.alarm(0)
    append_row(replace(row, source=source, seconds=round(time.monotonic() - begin, 1)), path)


def compare_apart(case: Case, card: str, *, path: Path, source: str) -> ComparedRow:
    """In a forked child: what is imported here need not be imported again, and the card is used by nobody yet."""
    child = os.fork()
    if child == 0:
        os.environ["FAKE_SHARED"] = f"{os.environ['FAKE_SHARED']}.{os.getpid()}"
        # an import of the parent has counted the cards; a real driver would not work in its children, this one does
        torch.cuda._is_in_bad_fork = lambda: False
        try:
            _in_child(case, card, path, source)
        finally:
            Path(os.environ["FAKE_SHARED"]).unlink(missing_ok=True)
            sys.stdout.flush()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    row = next(
        (row for row in read_rows(path) if row.key == (case.name, card) and row.source == source),
        None,
    )
    if row is None:
        row = replace(
            _row(case, card), failure=f"the process ended with status {status}", source=source
        )
        append_row(row, path)
    return row


def show(row: ComparedRow) -> str:
    if row.failure is not None:
        return f"{row.name} on {row.card}: failed: {row.failure}"
    parts = []
    for metric in ("allocated", "reserved"):
        error, fraction = row.error_bytes(metric), row.error_fraction(metric)
        assert error is not None
        assert fraction is not None
        parts.append(
            f"{metric} {error:+,} ({fraction:+.3%}) of {getattr(row, f'measured_{metric}_bytes'):,}"
        )
    equal = "every allocation is equal" if not row.explained else "allocations differ"
    return f"{row.name} on {row.card}: {'; '.join(parts)}; {equal}; {row.seconds:.0f} s"


def chosen(names: Sequence[str], cards: Sequence[str]) -> list[tuple[str, list[Case]]]:
    """The cases of each card. cards: all that the cases name where left out."""
    cases = [BY_NAME[name] for name in names] or list(CASES)
    return [
        (card, [case for case in cases if card in case.cards or (names and cards)])
        for card in CARDS
        if not cards or card in cards
    ]


def compare_all(cases: Sequence[Case], *, path: Path, again: bool, explained: bool) -> None:
    """On the card of this process."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if any(isinstance(case, TrainerCase) for case in cases):
        import trl  # noqa: F401 (once for all children)

        import rehearsal.trainers  # noqa: F401
    card, source = os.environ["FAKE_CARD"], fingerprint()
    done = {row.key: row for row in read_rows(path) if row.source == source and row.failure is None}
    for case in cases:
        row = None if again else done.get((case.name, card))
        row = row or compare_apart(case, card, path=path, source=source)
        print(show(row), flush=True)
        if explained:
            print("\n".join(f"    {line}" for line in row.explained), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="only these, separated by commas")
    parser.add_argument(
        "--cards", default="", help="on these, separated by commas; else those that each case names"
    )
    parser.add_argument(
        "--again", action="store_true", help="also rows that this code has made before"
    )
    parser.add_argument("--explain", action="store_true", help="print what differs")
    parser.add_argument("--to", type=Path, default=KEPT, help="where rows are appended")
    options = parser.parse_args()
    names, cards = (
        [word for word in text.split(",") if word] for text in (options.cases, options.cards)
    )
    for words, known in ((names, [*BY_NAME]), (cards, [*CARDS])):
        if unknown := sorted({*words} - {*known}):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    if "FAKE_CARD" not in os.environ:
        sys.exit("the stand-in is not loaded: python -m rehearsal.run python -m rehearsal.compare")
    wanted = chosen(names, cards)
    if [card for card, _ in wanted] == [os.environ["FAKE_CARD"]]:
        compare_all(wanted[0][1], path=options.to, again=options.again, explained=options.explain)
        return
    for (
        card,
        cases,
    ) in wanted:  # PyTorch remembers the properties of the first card that a process asks for
        more = [
            flag
            for flag, given in (("--again", options.again), ("--explain", options.explain))
            if given
        ]
        each = [
            "--cases",
            ",".join(case.name for case in cases),
            "--cards",
            card,
            "--to",
            str(options.to),
            *more,
        ]
        if cases:
            variables = os.environ | {"FAKE_CARD": card}
            subprocess.run(
                [sys.executable, "-m", "rehearsal.compare", *each], env=variables, check=True
            )


if __name__ == "__main__":
    main()
