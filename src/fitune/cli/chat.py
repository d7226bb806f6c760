"""Implement `fitune chat`, a conversation with a fine-tuned model in the terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from fitune.cli.arguments import run_path
from fitune.cli.output import print_aside, print_text
from fitune.errors import UsageError
from fitune.language import say, translated

if TYPE_CHECKING:
    from fitune.model.answer import Message, Sampling, Speaker


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """How answers are generated."""

    temperature: Annotated[
        float,
        Parameter(validator=Number(gte=0), help="0 always takes the most likely token"),
    ] = 0.7
    top_p: Annotated[
        float,
        Parameter(
            validator=Number(gt=0, lte=1),
            help="only the most likely tokens that together have this probability",
        ),
    ] = 0.95
    max_new_tokens: Annotated[
        int, Parameter(validator=Number(gt=0), help="the longest answer, in tokens")
    ] = 512
    seed: Annotated[int, Parameter(help="of the random numbers; equal seeds, equal answers")] = 0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model answers, and through which template."""

    weights: Annotated[
        Literal["best", "last"] | None, Parameter(help="best where there is one, else last")
    ] = None
    template: Annotated[
        Path | None, Parameter(help="a Jinja chat template file; the model's own where left out")
    ] = None
    trust_remote_code: Annotated[
        bool, Parameter(help="run Python code that comes with the run's model")
    ] = False


def chat(
    run: Annotated[
        Path, Parameter(help="a run's directory or name, an exported directory, or a .gguf file")
    ],
    *,
    system: Annotated[str | None, Parameter(metavar="TEXT", help="the system message")] = None,
    base: Annotated[
        bool, Parameter(help="also ask the base model, in a conversation of its own")
    ] = False,
    answers: AnswerFlags = AnswerFlags(),
    model: ModelFlags = ModelFlags(),
) -> None:
    """Talk with a fine-tuned model.

    Ctrl-C stops an answer, /reset begins a new conversation, /exit or Ctrl-D ends. From a pipe
    each line is a question of its own, and only the answers are printed.
    """
    path = run_path(run)
    from fitune.model.answer import Sampling
    from fitune.model.speakers import open_speakers

    speakers = open_speakers(
        path,
        weights=model.weights,
        with_base=base,
        template=None if model.template is None else str(model.template),
        trust_remote_code=model.trust_remote_code,
    )
    sampling = Sampling(
        max_new_tokens=answers.max_new_tokens,
        temperature=answers.temperature,
        top_p=answers.top_p,
        seed=answers.seed,
    )
    talks = [
        Conversation(speaker, sampling, system=system, name=say(name) if base else None)
        for name, speaker in speakers
    ]
    if sys.stdin.isatty():
        _converse(talks, path)
        return
    for question in filter(None, map(str.strip, sys.stdin)):
        for talk in talks:
            talk.reset()
            talk.ask(question)


class Conversation:
    """The messages of a conversation with one model."""

    def __init__(
        self,
        speaker: "Speaker",
        sampling: "Sampling",
        *,
        system: str | None,
        name: str | None,
    ) -> None:
        self._speaker, self._sampling, self._name = speaker, sampling, name
        self._system: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.reset()

    def reset(self) -> None:
        self._messages = list(self._system)

    def ask(self, question: str) -> None:
        """Print the answer while it is generated; Ctrl-C ends it, and what was said remains.

        Raises UsageError if the conversation has no room for it, and forgets the question.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        prompt, said = self._speaker.prompt(messages), list[str]()
        if self._name is not None:
            print_text(f"{self._name}: ", end="")

        def show(text: str) -> None:
            said.append(text)
            print_text(text, end="")

        try:
            self._speaker.answer(prompt, self._sampling, show=show)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        print_text("")
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]


def _converse(talks: Sequence[Conversation], path: Path) -> None:
    """Ask for questions at a terminal until the user ends."""
    with suppress(ImportError):  # makes the line editable and keeps earlier ones
        import_module("readline")
    print_aside(
        say(
            "{path} answers; Ctrl-C stops an answer, /reset begins anew, /exit or Ctrl-D ends",
            path=path,
        )
    )
    for question in _questions():
        if question == "/reset":
            for talk in talks:
                talk.reset()
        elif question.startswith("/"):
            print_aside(say("{word} is no command: /reset or /exit", word=question.split()[0]))
        else:
            try:
                for talk in talks:
                    talk.ask(question)
            except UsageError as error:
                print_aside(translated(str(error)))


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            print_text("")
            continue
        except EOFError:
            print_text("")
            return
        if question == "/exit":
            return
        if question:
            yield question
