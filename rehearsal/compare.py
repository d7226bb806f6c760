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
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

os.environ.setdefault("FAKE_COPY_MAX", str(1 << 16))  # of contents only what the host looks at: masks, counters

import torch
import transformers

import fitune
import fitune.plan.predict
from fitune.memory import prediction as prediction_module
from fitune.memory.devices import this_machine
from fitune.memory.prediction import Prediction, PredictSettings
from fitune.trace.events import MemoryTrace
from rehearsal import loops, steps
from rehearsal.cases import BY_NAME, CARDS, CASES, Case, LoopCase, StepCase, TrainerCase
from rehearsal.explain import explain
from rehearsal.history import History
from rehearsal.rows import KEPT, ComparedRow, append_row, fingerprint, read_rows

LIMIT_SECONDS = 300
NUM_STEPS = 3
"""Of a loop: the optimizer's state is born in the first."""
Routing = Literal["balanced", "worst"]
_Predicted = tuple[Prediction, MemoryTrace]


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
    device = this_machine()[0]

    def predicted(routing: Routing) -> _Predicted:
        config = steps.config_of(case, directory, routing=routing)
        recorded = fitune.plan.predict.predict_run(config, device, passes=steps.passes_of(case)).recorded
        settings = PredictSettings(device=device, allocator=config.memory.allocator)
        return prediction_module.predict(recorded.trace, settings), recorded.trace

    config = steps.config_of(case, directory)
    os.environ["PYTORCH_ALLOC_CONF"] = config.memory.allocator
    row, expected = _predicted_row(case, card, predicted)
    return _with_measured(row, *expected, steps.measure(case, config))


def _compare_loop(case: LoopCase, card: str) -> ComparedRow:
    def predicted(routing: Routing) -> _Predicted:
        with _traces_kept() as traces:
            prediction = fitune.predict_loop(
                lambda: loops.build(case),
                lambda model, device: loops.loop(case, model, device),
                num_steps=NUM_STEPS,
                routing=routing,
            )
        return prediction, traces[0]

    row, expected = _predicted_row(case, card, predicted)
    device = torch.device("cuda", 0)
    step = loops.loop(case, loops.build(case).to(device), device)
    history = History(num_steps=NUM_STEPS)
    with _truth(0 if case.padded else 1):  # a mask that is padded is not all ones
        history.watch(lambda _: step())
    return _with_measured(row, *expected, history)


def _compare_trainer(case: TrainerCase, card: str, directory: str) -> ComparedRow:
    from fitune.integrations.transformers import predict_trainer
    from rehearsal import trainers

    trainer = trainers.trainer_of(case, directory, num_steps=NUM_STEPS)
    with _traces_kept() as traces:
        prediction = predict_trainer(trainer, num_steps=NUM_STEPS)
    history = History(num_steps=NUM_STEPS)
    trainer.add_callback(trainers.StepEnds(history))
    trainer.train()
    return _with_measured(_row(case, card), prediction, traces[0], history)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _row(case: Case, card: str) -> ComparedRow:
    return ComparedRow(
        name=case.name, card=card, setting=describe(case), depends_on_data=case.depends_on_data, versions=versions()
    )


def _predicted_row(
    case: Case, card: str, predicted: Callable[[Routing], _Predicted]
) -> tuple[ComparedRow, _Predicted]:
    """With the bounds of what depends on data; and what is predicted with the tokens spread evenly."""
    row, balanced = _row(case, card), predicted("balanced")
    if not case.depends_on_data:
        return row, balanced
    peaks = [expected[0].peak_allocated_bytes for expected in (balanced, predicted("worst"))]
    return replace(row, low_allocated_bytes=min(peaks), high_allocated_bytes=max(peaks)), balanced


def _with_measured(row: ComparedRow, prediction: Prediction, trace: MemoryTrace, history: History) -> ComparedRow:
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
        words += [kind for kind in case.kinds if kind == "eval"]
        return ", ".join([*words, *case.options])
    words = [case.model, f"{case.batch} x {case.length}"]
    if isinstance(case, TrainerCase):
        words += ["SFTTrainer" if case.trl else "Trainer", case.dtype]
        return ", ".join([*words, *(["LoRA"] if case.lora else []), *(f"{k}={v}" for k, v in case.arguments)])
    words += [f"autocast {case.autocast}" if case.autocast else case.dtype]
    plain = LoopCase(name=case.name, model=case.model)
    told = ("name", "model", "batch", "length", "dtype", "autocast", "cards", "depends_on_data")
    for name in (field for field in LoopCase.__dataclass_fields__ if field not in told):
        value = getattr(case, name)
        if value != getattr(plain, name):
            words.append(name.replace("_", " ") if value is True else f"{name} {value}")
    return ", ".join(words)


def versions() -> str:
    return f"torch {torch.__version__}, transformers {version('transformers')}, TRL {version('trl')}"


# ---- the prediction's own trace, and what the card answers -----------------------------------------------------------


@contextmanager
def _traces_kept() -> Iterator[list[MemoryTrace]]:
    """The traces that predictions inside were made from."""
    kept: list[MemoryTrace] = []
    predict = prediction_module.predict

    def keeping(trace: MemoryTrace, settings: PredictSettings) -> Prediction:
        kept.append(trace)
        return predict(trace, settings)

    with patch.object(prediction_module, "predict", keeping):
        yield kept


@contextmanager
def _truth(value: int) -> Iterator[None]:
    """What the card answers where code asks whether all or any of its values are so."""
    import ctypes

    stand_in = ctypes.CDLL(None)
    before = stand_in.rehearsal_set_truth(value)
    try:
        yield
    finally:
        stand_in.rehearsal_set_truth(before)


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
        if os.environ.get("REHEARSAL_TRACEBACK"):
            traceback.print_exc()
    signal.alarm(0)
    append_row(replace(row, source=source, seconds=round(time.monotonic() - begin, 1)), path)


def compare_apart(case: Case, card: str, *, path: Path, source: str) -> ComparedRow:
    """In a forked child: what is imported here need not be imported again, and the card is used by nobody yet."""
    child = os.fork()
    if child == 0:
        os.environ["FAKE_CARD"] = card
        os.environ["FAKE_SHARED"] = f"{os.environ['FAKE_SHARED']}.{os.getpid()}"
        try:
            _in_child(case, card, path, source)
        finally:
            Path(os.environ["FAKE_SHARED"]).unlink(missing_ok=True)
            sys.stdout.flush()
            os._exit(0)
    _, status = os.waitpid(child, 0)
    row = next((row for row in read_rows(path) if row.key == (case.name, card) and row.source == source), None)
    if row is None:
        row = replace(_row(case, card), failure=f"the process ended with status {status}", source=source)
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
        parts.append(f"{metric} {error:+,} ({fraction:+.3%}) of {getattr(row, f'measured_{metric}_bytes'):,}")
    equal = "every allocation is equal" if not row.explained else "allocations differ"
    return f"{row.name} on {row.card}: {'; '.join(parts)}; {equal}; {row.seconds:.0f} s"


def chosen(names: Sequence[str], cards: Sequence[str]) -> list[tuple[Case, str]]:
    """cards: all that the case names where left out."""
    cases = [BY_NAME[name] for name in names] or list(CASES)
    return [(case, card) for case in cases for card in (cards or case.cards) if card in (*case.cards, *cards)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="only these, separated by commas")
    parser.add_argument("--cards", default="", help="on these, separated by commas; else those that each case names")
    parser.add_argument("--again", action="store_true", help="also rows that this code has made before")
    parser.add_argument("--explain", action="store_true", help="print what differs")
    parser.add_argument("--to", type=Path, default=KEPT, help="where rows are appended")
    options = parser.parse_args()
    names, cards = ([word for word in text.split(",") if word] for text in (options.cases, options.cards))
    if unknown := sorted({*names} - {*BY_NAME}):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    if unknown := sorted({*cards} - {*CARDS}):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(CARDS)}")
    if "FAKE_SHARED" not in os.environ:
        sys.exit("the stand-in is not loaded: python -m rehearsal.run python -m rehearsal.compare")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    source = fingerprint()
    done = {row.key: row for row in read_rows(options.to) if row.source == source and row.failure is None}
    for case, card in chosen(names, cards):
        row = None if options.again else done.get((case.name, card))
        row = row or compare_apart(case, card, path=options.to, source=source)
        print(show(row), flush=True)
        if options.explain:
            print("\n".join(f"    {line}" for line in row.explained), flush=True)


if __name__ == "__main__":
    main()
