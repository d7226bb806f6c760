"""Plans in a process of its own, which keeps its recordings.

The process has torch and transformers loaded, which the server is spared. A step that was recorded
serves every later question about the same model, so a moved slider is answered at once. A new
question takes the place of one that is still worked on; after an answer the process records the
settings next to it, until it is asked again. It ends with the server.
"""

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from types import TracebackType
from typing import Literal, Self

import psutil

from fitune.board.answer import held, plan_answer, shown_candidate
from fitune.boundary import unexpected
from fitune.config import read_config
from fitune.errors import FituneError
from fitune.language import Language, choose_language, say, speaking, translated
from fitune.model.source import check_source
from fitune.planning.choices import Choice, settings_of_candidate
from fitune.planning.forecast import Library
from fitune.planning.search import Search, choose_plan
from fitune.units import GIB

#: what a question is answered with; all but a stage end it
Kind = Literal["stage", "plan", "error", "superseded"]
_END_SECONDS = 2.0
#: without a question, before something is recorded that was not asked for
_QUIET_SECONDS = 0.5
#: of the process: recordings of many models are forgotten from here on
_MOST_BYTES = 2 * GIB


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be planned."""

    #: keys of the configuration, each 'key.sub=value'
    settings: tuple[str, ...]
    #: as in `choose_plan`
    search: Search | Choice
    language: Language = field(default_factory=choose_language)
    #: settings that may be changed next, each 'key.sub=value': they are recorded when there is
    #: nothing else to do
    ahead: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A part of the answer to a question."""

    kind: Kind
    content: object = None


class Planner:
    """The process that plans. It is started by the first question, and anew where it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._waiting: dict[int, SimpleQueue[Reply]] = {}
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            process, connection = self._process, self._connection
        if process is not None and connection is not None:
            connection.close()
            process.terminate()
            process.join(_END_SECONDS)
            process.kill()

    def ask(self, question: Question) -> Iterator[Reply]:
        """Yield the parts of the answer; the last one is no stage."""
        replies: SimpleQueue[Reply] = SimpleQueue()
        with self._lock:
            self._number = number = self._number + 1
            self._waiting[number] = replies
            self._running().send((number, question))
        try:
            while True:
                reply = replies.get()
                yield reply
                if reply.kind != "stage":
                    return
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def _running(self) -> Connection:
        """Return the connection to the process, which is started if there is none."""
        if self._process is None or self._connection is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            # as a daemon it does not fork, and has all recordings itself
            self._process = context.Process(target=_answer_questions, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            threading.Thread(
                target=self._receive, args=(self._connection,), name="planner", daemon=True
            ).start()
        return self._connection

    def _receive(self, connection: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, reply = connection.recv()
                if (waiting := self._waiting.get(number)) is not None:
                    waiting.put(reply)
        with self._lock:
            if self._connection is connection:
                self._process = None
            left = list(self._waiting.values())
        for waiting in left:
            waiting.put(Reply("error", say("the planning process has ended: try again")))


class _SupersededError(Exception):
    """Another question has come."""


def _answer_questions(connection: Connection) -> None:
    """Answer the questions that come, the newest alone, until the other end is closed."""
    # Ctrl-C reaches this process too, which the server ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    library = Library()
    with suppress(EOFError, OSError):
        while True:
            number, question = connection.recv()
            while connection.poll():
                connection.send((number, Reply("superseded")))
                number, question = connection.recv()
            reply, found = _answer(connection, number, question, library)
            connection.send((number, reply))
            if found is not None:
                _look_ahead(connection, question, found, library)
            if psutil.Process().memory_info().rss > _MOST_BYTES:
                library = Library()


def _answer(
    connection: Connection, number: int, question: Question, library: Library
) -> tuple[Reply, Choice | None]:
    """Return the last part of the answer, and the setting that it shows."""

    def notify(stage: str) -> None:
        if connection.poll():
            raise _SupersededError
        connection.send((number, Reply("stage", stage)))

    with speaking(question.language):
        try:
            config = read_config(None, question.settings).config
            check_source(config.model.source)
            plan = choose_plan(config, search=question.search, library=library, on_stage=notify)
        except _SupersededError:
            return Reply("superseded"), None
        except FituneError as error:
            return Reply("error", translated(str(error))), None
        except Exception as error:
            return Reply("error", translated(str(unexpected(error, "fitune board")))), None
        settings = [settings_of_candidate(candidate, config) for candidate in plan.candidates]
        shown = plan.candidates[shown_candidate(plan)]
        return Reply("plan", plan_answer(plan, settings)), held(shown).choice


def with_change(settings: Sequence[str], change: str) -> list[str]:
    """Return the settings with one of them replaced or added; each is 'key.sub=value'."""
    key = change.partition("=")[0]
    return [*(each for each in settings if not each.startswith(f"{key}=")), change]


def _look_ahead(
    connection: Connection, question: Question, found: Choice, library: Library
) -> None:
    """Record what is likely asked for next, until a question comes."""

    def notify(_: str) -> None:
        if connection.poll():
            raise _SupersededError

    for change in question.ahead:
        if connection.poll(_QUIET_SECONDS):
            return
        # what cannot be planned is said where it is asked for
        with suppress(Exception):
            settings = with_change(question.settings, change)
            config = read_config(None, settings).config
            choose_plan(config, search=found, library=library, on_stage=notify)
