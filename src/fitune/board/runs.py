"""Answers what the Runs view asks: the list of runs, and the page of those that are chosen.

The page of runs that go on is sent again and again as server-sent events, each time what changed of
it (a JSON merge patch). Every file is read through `RunReader`, which reads what was appended.
Nothing is read while nobody looks, and between two readings the server waits so long that it takes
at most WORK_FRACTION of one core, since a run may train on the same processor.
"""

import stat
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from fitune.board.offline import offline_page
from fitune.board.requests import event
from fitune.errors import FituneError, RunDirectoryError
from fitune.language import choose_language, say, translated
from fitune.language.printable import printable_line
from fitune.report.charts import RunSeries, run_series
from fitune.report.compare import Comparison, compare
from fitune.report.document import Json, WrittenArrays, page_charts, page_text
from fitune.report.embedded import thinned
from fitune.report.listing import ListedRun, list_run
from fitune.report.run_on_disk import RecordedRun, RunReader
from fitune.run.directory import BEGIN_ONE, RunDirectory, list_runs, read_run
from fitune.run.sweep import SWEEP_FILE
from fitune.units import format_bytes, format_count, format_seconds

#: the most of one core that following takes
WORK_FRACTION = 0.005
LEAST_WAIT_SECONDS = 1.0
#: steps and samples of memory of all runs that are held; a row has about 150 bytes
MAX_ROWS = 600_000
#: the verdict on several runs is computed again after this many times what it took
_VERDICT_PATIENCE = 200
_Signature = tuple[object, ...]


class HeldRun:
    """A run as it was read last."""

    def __init__(self, path: Path) -> None:
        self._run = RunDirectory(path)
        self._reader: RunReader | None = None
        self._signature: _Signature = ()
        self._max_rows = 0
        self._series: tuple[int, RunSeries] = (0, {})
        self.recorded: RecordedRun | None = None

    def read(self, max_rows: int) -> RecordedRun:
        """Return the run as it is now, the same object if nothing has changed.

        max_rows: a run that is over and has more steps is thinned to as many.

        Raises RunDirectoryError if it cannot be read.
        """
        signature = self._present()
        if self.recorded is None or (signature, max_rows) != (self._signature, self._max_rows):
            self._reader = self._reader or RunReader(self._run.path)
            run = self._reader.read()
            if run.state != "running":
                self._reader = None
                run = thinned(run, max_rows) if run.num_steps > max_rows else run
            self.recorded, self._series = run, (0, {})
            self._signature, self._max_rows = self._present(), max_rows
        return self.recorded

    @property
    def num_rows(self) -> int:
        run = self.recorded
        return 0 if run is None else run.num_steps + len(run.memory["seconds"])

    def series(self, num_runs: int) -> RunSeries:
        """Return what the run draws in charts of `num_runs` runs."""
        assert self.recorded is not None
        if self._series[0] != num_runs:
            self._series = (num_runs, run_series(self.recorded, num_runs))
        return self._series[1]

    def _present(self) -> _Signature:
        run = self._run
        files = (run.config, run.plan, run.data, run.peak, run.env, run.summary, run.metrics,
                 run.events, run.memory, run.eval_rows, run.answers, run.lock)  # fmt: skip
        # a run ends without a sign where its process is killed
        is_on = self.recorded is not None and self.recorded.state == "running"
        return (is_on and read_run(run.path).state, *map(_stamp, files))


def _is_directory(path: Path) -> bool:
    """Return whether this is a directory, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class RunsBoard:
    """The runs of a directory, as the board shows them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, HeldRun] = {}
        #: readers are not made for several threads
        self._lock = threading.Lock()
        self._comparison: tuple[object, float, Comparison, Json] | None = None
        self._written: WrittenArrays = {}
        self._listing: tuple[str, float, Json] | None = None

    def listing(self) -> Json:
        """Return the runs of the directory, the latest first."""
        language, start = choose_language(), time.monotonic()
        if self._listing is not None:
            old_language, due, listing = self._listing
            if old_language == language and start < due:
                return listing
        runs = [
            _listed_json(name, list_run(read_run(path))) for name, path in self._paths().items()
        ]
        none = say(
            "there are no runs in {place}: {begin}",
            place=self._directory,
            begin=translated(BEGIN_ONE),
        )
        listing = {"runs": runs, "none": none}
        end = time.monotonic()
        due = end + max(LEAST_WAIT_SECONDS, (end - start) / WORK_FRACTION)
        self._listing = (language, due, listing)
        return listing

    def page(self, names: Sequence[str]) -> Json:
        """Return the page of these runs. Raises RunDirectoryError if one of them is no run."""
        with self._lock:
            held = self._read(names)
            runs = [each.recorded for each in held.values() if each.recorded is not None]
            comparison, text = self._compare(runs)
            drawn = self._drawn(comparison, held)
            return {**text, "charts": page_charts(comparison, drawn, self._written)}

    def report(self, names: Sequence[str]) -> Json:
        """Return a report of these runs as a file: its name, and its HTML."""
        with self._lock:
            held = self._read(names)
            comparison = compare([each.recorded for each in held.values() if each.recorded])
            title = names[0].replace("/", "-") if len(names) == 1 else "report"
            return {"name": f"{title}.html", "html": offline_page(comparison)}

    def _paths(self) -> dict[str, Path]:
        """Return the paths of the runs by their names, with those of sweeps, the latest first."""
        if not self._directory.is_dir():
            return {}
        sweeps = (each for each in self._directory.iterdir() if (each / SWEEP_FILE).is_file())
        # a link may lead out of the directory
        places = [self._directory, *(each for each in sweeps if not each.is_symlink())]
        records = [record for place in places for record in list_runs(place)]
        records.sort(key=lambda record: (-record.updated, record.run.name))
        return {
            record.run.path.relative_to(self._directory).as_posix(): record.run.path
            for record in records
            if not record.run.path.is_symlink()
        }

    def _path(self, name: str) -> Path:
        """Return the path of a run of the list. Raises RunDirectoryError if there is none."""
        place, parts = self._directory, name.split("/")
        for part in parts:
            place = place / part
            if part in ("", ".", "..") or "\0" in part or not _is_directory(place):
                break
        else:
            is_listed = len(parts) == 1 or (
                len(parts) == 2 and (place.parent / SWEEP_FILE).is_file()
            )
            if is_listed and _is_directory(RunDirectory(place).checkpoints):
                return place
        raise RunDirectoryError(
            f"{printable_line(name)[:200]} is no run in {self._directory}: choose one of the list"
        )

    def _read(self, names: Sequence[str]) -> Mapping[str, HeldRun]:
        if not names:
            raise RunDirectoryError("no run is chosen: choose one of the list")
        chosen = {name: self._held.get(name) or HeldRun(self._path(name)) for name in names}
        # what is looked at least is forgotten first
        self._held = {
            **{name: held for name, held in self._held.items() if name not in chosen},
            **chosen,
        }
        for held in chosen.values():
            held.read(max(MAX_ROWS // len(chosen), 2))
        for name in list(self._held):
            if name not in chosen and sum(h.num_rows for h in self._held.values()) > MAX_ROWS:
                del self._held[name]
        return chosen

    def _compare(self, runs: Sequence[RecordedRun]) -> tuple[Comparison, Json]:
        """Compare the runs, and return the comparison with the page's words.

        A new step alone changes little, so that several are compared again now and then.
        """
        key = [
            choose_language(),
            *((run.path, run.state, len(run.evals["step"]), len(run.events)) for run in runs),
        ]
        now = time.monotonic()
        if len(runs) > 1 and self._comparison is not None:
            old_key, due, comparison, text = self._comparison
            if old_key == key and now < due:
                # with the names that `compare` gave them
                rows = (
                    replace(row, run=replace(run, name=row.name))
                    for row, run in zip(comparison.rows, runs, strict=True)
                )
                return replace(comparison, rows=tuple(rows)), text
        comparison = compare(runs)
        text = page_text(comparison)
        due = now + _VERDICT_PATIENCE * (time.monotonic() - now)
        self._comparison = (key, due, comparison, text)
        return comparison, text

    def _drawn(
        self, comparison: Comparison, held: Mapping[str, HeldRun]
    ) -> Mapping[str, RunSeries]:
        by_path = {each.recorded.path: each for each in held.values() if each.recorded}
        num_runs = len(comparison.rows)
        return {row.run.path: by_path[row.run.path].series(num_runs) for row in comparison.rows}


def _listed_json(name: str, run: ListedRun) -> Json:
    record = run.record
    loss = run.eval_loss if run.eval_loss is not None else run.train_loss
    facts = [
        "" if run.steps is None else say("{steps} steps", steps=f"{run.steps:,}"),
        "" if loss is None else say("loss {loss}", loss=f"{loss:.3f}"),
        "" if run.peak_bytes is None else format_bytes(run.peak_bytes),
        ""
        if run.tokens_per_second is None
        else say("{speed} tokens/s", speed=format_count(run.tokens_per_second)),
        ""
        if run.seconds_left is None
        else say("{time} left", time=format_seconds(run.seconds_left)),
    ]
    found: Json = {
        "id": name,
        "name": printable_line(name),
        "state": record.state,
        "state_text": say(record.state),
        "facts": " · ".join(filter(None, facts)),
    }
    if run.progress_fraction is not None:
        found["done"] = run.progress_fraction
    return found


def merge_patch(old: Mapping[str, object], new: Mapping[str, object]) -> Json:
    """Return what changes `old` into `new`, as a JSON merge patch (RFC 7386)."""
    patch: Json = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if before is value or before == value:
            continue
        is_both = isinstance(before, Mapping) and isinstance(value, Mapping)
        patch[key] = merge_patch(before, value) if is_both else value  # type: ignore[arg-type]
    return patch


def routes(directory: Path) -> list[BaseRoute]:
    """Return the routes of the Runs view. directory: where the runs are."""
    board = RunsBoard(directory)

    async def answer_list(request: Request) -> Response:
        return JSONResponse(await anyio.to_thread.run_sync(board.listing))

    async def answer_report(request: Request) -> Response:
        names = request.query_params.getlist("run")
        return JSONResponse(await anyio.to_thread.run_sync(board.report, names))

    async def answer_follow(request: Request) -> Response:
        names = request.query_params.getlist("run")
        return StreamingResponse(_events(board, names), media_type="text/event-stream")

    return [
        Route("/api/runs", answer_list),
        Route("/api/runs/report", answer_report),
        Route("/api/runs/follow", answer_follow),
    ]


async def _events(board: RunsBoard, names: Sequence[str]) -> AsyncIterator[str]:
    """Yield the page as server-sent events: as a whole at first, then what changed."""
    shown: Json = {}

    def work() -> tuple[str, Json, float]:
        start = time.thread_time()
        try:
            page = board.page(names)
        except FituneError as error:
            return event("error", translated(str(error))), shown, time.thread_time() - start
        patch = merge_patch(shown, page)
        # a comment, so that a connection that is gone is noticed
        return event("page", patch) if patch else ":\n\n", page, time.thread_time() - start

    text, shown, _ = await anyio.to_thread.run_sync(work)
    yield text
    # a run is read as a whole once, which is not what following it takes
    wait = LEAST_WAIT_SECONDS
    while True:
        await anyio.sleep(wait)
        text, shown, seconds = await anyio.to_thread.run_sync(work)
        yield text
        wait = max(LEAST_WAIT_SECONDS, seconds / WORK_FRACTION)
