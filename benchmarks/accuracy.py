"""Predicts every published measurement that can be expressed, and writes the table that compares the two.

python benchmarks/accuracy.py                      all rows: docs/accuracy.md and benchmarks/results/accuracy.json
python benchmarks/accuracy.py --group nanogpt      only rows whose source contains this; the others stay as they are
python benchmarks/accuracy.py --rows minimind795-L2,fms-main-8
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cpu_accuracy
import fits
import fitune
import gpu_accuracy
import trainer_accuracy
from published_loops import NotExpressed, express

HERE = Path(__file__).parent
PUBLISHED = (HERE / "data" / "published.json", HERE / "data" / "published_more.json")
RESULTS = HERE / "results" / "accuracy.json"
TABLE = HERE.parent / "docs" / "accuracy.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A row of the table. reason: why there is no prediction. predicted_reserved_bytes: what PyTorch would reserve."""

    id: str
    group: str
    model: str
    setting: str
    metric: str
    measured_bytes: int | None
    predicted_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    known: bool | None = None
    peak_phase: str | None = None
    assumed: tuple[str, ...] = ()
    reason: str | None = None
    seconds: float | None = None

    @property
    def error_fraction(self) -> float | None:
        if self.predicted_bytes is None or self.measured_bytes is None:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


def read_rows(paths: Sequence[Path] = PUBLISHED) -> list[dict[str, Any]]:
    return [row for path in paths for row in json.loads(path.read_text())]


def compare_row(row: dict[str, Any]) -> Compared:
    """Predicts the figure that the row's source measured."""
    described = _describe(row)
    expressed = express(row)
    if isinstance(expressed, NotExpressed):
        return Compared(**described, reason=expressed.reason)
    started = time.perf_counter()
    prediction = fitune.predict_loop(
        expressed.build,
        expressed.loop,
        gpu=expressed.gpu,
        num_steps=expressed.num_steps,
        attention=expressed.attention,
    )
    predicted = {
        "allocated": prediction.peak_allocated_bytes,
        "reserved": prediction.peak_reserved_bytes,
        "device": prediction.device_bytes,
    }
    return Compared(
        **described,
        predicted_bytes=predicted[described["metric"]],
        predicted_reserved_bytes=prediction.peak_reserved_bytes,
        known=expressed.known,
        peak_phase=prediction.peak_phase,
        assumed=expressed.assumed,
        seconds=round(time.perf_counter() - started, 1),
    )


def compare_apart(row: dict[str, Any], limit_seconds: float) -> Compared:
    """`compare_row` in a process of its own, so that a row that fails or hangs costs only itself."""
    if isinstance(express(row), NotExpressed):
        return compare_row(row)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(row, sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer = (
            receiver.recv()
            if receiver.poll(limit_seconds)
            else f"no answer within {limit_seconds:.0f} s"
        )
    except EOFError:
        answer = "the process ended without an answer"
    process.kill()
    process.join()
    return (
        answer
        if isinstance(answer, Compared)
        else Compared(**_describe(row), reason=f"failed: {answer}")
    )


def _send(row: dict[str, Any], sender: Any) -> None:
    try:
        sender.send(compare_row(row))
    except Exception as error:  # the table names it
        sender.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _describe(row: dict[str, Any]) -> dict[str, Any]:
    recompute = "recompute" if row["checkpointing"] else ""
    parts = (
        row["method"],
        recompute,
        f"{row['batch']} x {row['seq']}",
        f"attention {row['attention']}",
    )
    return {
        "id": row["id"],
        "group": _group(row["source"]),
        "model": row["model"],
        "setting": ", ".join(part for part in parts if part),
        "metric": _metric(row["metric"]),
        "measured_bytes": row.get("measured_bytes"),
    }


def _group(source: str) -> str:
    return source.split(" (HEAD")[0].split(" (commit")[0].split(" + ")[0].split(" (erees1")[0]


def _metric(metric: str) -> str:
    if "nvidia-smi" in metric:
        return "device"
    return "reserved" if "reserved" in metric else "allocated"


# ---- the table ------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Compared]) -> list[str]:
    """One line for each source and kind of loop."""
    lines = [
        "| source | loop | metric | rows | median error | worst error | not predicted |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        missing = sum(row.error_fraction is None for row in of_group)
        kinds = sorted(
            {(row.known, row.metric) for row in of_group if row.error_fraction is not None},
            reverse=True,
        )
        for known, metric in kinds:
            errors = [
                row.error_fraction
                for row in of_group
                if row.error_fraction is not None and (row.known, row.metric) == (known, metric)
            ]
            lines.append(
                f"| {group} | {'known' if known else 'partly known'} | {metric} | {len(errors)} | "
                f"{statistics.median(map(abs, errors)):.3%} | {max(errors, key=abs):+.3%} | {missing} |"
            )
        if not kinds:
            lines.append(f"| {group} | | | 0 | n/a | n/a | {missing} |")
    return lines


def render(rows: Sequence[Compared]) -> str:
    """docs/accuracy.md."""
    lines = [
        "# Predicted and measured memory",
        "",
        "Generated by `python benchmarks/accuracy.py`. Every row of `benchmarks/data/published*.json` is here:",
        "measurements made by others on real cards. Each loop is written down in `benchmarks/published_loops.py`,",
        "recorded on tensors without data and replayed through the caching allocator; no card was used and no constant",
        "is fitted. An error is predicted / measured - 1; median error is that of the absolute errors. A loop is",
        "*partly known* where a fact of it had to be inferred; the assumptions name it.",
        "",
        *summarise(rows),
        "",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        of_group = [row for row in rows if row.group == group]
        lines += [
            f"## {group}",
            "",
            *_predicted_lines(row for row in of_group if row.error_fraction is not None),
        ]
        lines += _assumption_lines(row for row in of_group if row.error_fraction is not None)
        lines += _missing_lines(row for row in of_group if row.error_fraction is None)
    lines += [
        *trainer_accuracy.section(),
        *cpu_accuracy.section(),
        *gpu_accuracy.section(),
        *fits.section(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _predicted_lines(rows: Iterable[Compared]) -> list[str]:
    body = [
        f"| {row.id} | {row.model} | {row.setting} | {row.metric} | {row.measured_bytes:,} | {row.predicted_bytes:,} | "
        f"{row.error_fraction:+.3%} | {row.predicted_reserved_bytes:,} | {row.peak_phase} |"
        for row in rows
    ]
    heading = [
        "| row | model | setting | metric | measured bytes | predicted bytes | error | predicted reserved | peak in |",
        "|---|---|---|---|---:|---:|---:|---:|---|",
    ]
    return [*heading, *body, ""] if body else []


def _assumption_lines(rows: Iterable[Compared]) -> list[str]:
    by_assumption: dict[str, list[str]] = {}
    for row in rows:
        for assumption in row.assumed:
            by_assumption.setdefault(assumption, []).append(row.id)
    lines = [f"- {assumption}: {', '.join(ids)}" for assumption, ids in by_assumption.items()]
    return ["Assumed:", "", *lines, ""] if lines else []


def _missing_lines(rows: Iterable[Compared]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row.reason or "", []).append(row.id)
    lines = [f"- {reason}: {', '.join(ids)}" for reason, ids in by_reason.items()]
    return ["Not predicted:", "", *lines, ""] if lines else []


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", default="", help="only rows whose source contains this")
    parser.add_argument("--rows", default="", help="only these row ids, separated by commas")
    parser.add_argument(
        "--limit-seconds", type=float, default=120.0, help="time limit of a row (default: 120)"
    )
    options = parser.parse_args(arguments)
    wanted = {name for name in options.rows.split(",") if name}
    published = read_rows()
    compared = {row.id: row for row in read_results()}
    for row in published:
        if wanted and row["id"] not in wanted:
            continue
        if options.group in row["source"] or options.group in row["id"]:
            outcome = compared[row["id"]] = compare_apart(row, options.limit_seconds)
            error = outcome.error_fraction
            said = outcome.reason if error is None else f"{error:+.3%} in {outcome.seconds} s"
            print(f"{outcome.id}: {said}", file=sys.stderr, flush=True)
            write([compared[row["id"]] for row in published if row["id"] in compared])
    print("\n".join(summarise(tuple(compared.values()))))


def read_results(path: Path = RESULTS) -> list[Compared]:
    return [Compared(**row) for row in json.loads(path.read_text())] if path.exists() else []


def write(rows: Sequence[Compared]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(render(rows))


if __name__ == "__main__":
    main()
