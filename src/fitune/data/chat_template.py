"""A tokenizer's chat template: chosen, made ready, and rendered. This is the one place where a template runs.

A template is a program that comes with a model, and each has its own idea of its input. Tool calls are given in the
shape that the template writes well, as transformers chooses the one named `tool_use` for rows with tools, and the date
that a template may write is that of the run, so that the same rows have the same tokens on the next day.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fitune.data.formats import Message
from fitune.errors import DataError

CharSpan = tuple[int, int]

_DATE_CALL = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(\"[^\"]*\"|'[^']*')\s*\)")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CALL_SHAPES = ("object", "text")
_NAME, _KEY, _VALUE = "fname", "akey", "avalue"
_PROBE_CALL = {"id": "abcdefghi", "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}


class TemplateError(ValueError):
    """The template refused a conversation; the text is the template's own."""


@dataclass(frozen=True)
class ChatTemplate:
    """text: Jinja, with the date written into it. name: where it comes from, for a reader. special_tokens: bos_token
    and the like, which templates name. date: the one that it writes, None where it writes none."""

    text: str
    name: str
    special_tokens: Mapping[str, Any]
    date: datetime.date | None

    @property
    def marks_generation(self) -> bool:
        return _GENERATION.search(self.text) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The messages as one text. arguments: what the row itself gives the template. Raises TemplateError."""
        return self.render_generation(
            messages, tools=tools, arguments=arguments, add_generation_prompt=add_generation_prompt, marks=False
        )[0]

    def render_generation(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
        marks: bool = True,
    ) -> tuple[str, list[CharSpan]]:
        """The text and the ranges of its {% generation %} blocks. Raises TemplateError."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **(arguments or {})},
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise TemplateError(str(error).split("\n")[0] or type(error).__name__) from error
        return texts[0], spans[0] if marks else []

    def prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with their tool calls in the shape that this template writes well. Raises TemplateError."""
        if not any("tool_calls" in message for message in messages):
            return messages
        return [
            {**message, "tool_calls": [self._prepared_call(call) for call in message["tool_calls"]]}
            if "tool_calls" in message
            else message
            for message in messages
        ]

    def _prepared_call(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function")
        nested, shape = self._call_shape
        inner = {key: call[key] for key in ("name", "arguments") if key in call} if function is None else dict(function)
        if shape is not None:
            inner["arguments"] = _as_shape(inner.get("arguments", {}), shape)
        if nested is None:
            nested = function is not None
        outer = {key: value for key, value in call.items() if key not in ("name", "arguments", "function")}
        return {"type": "function", **outer, "function": inner} if nested else {**outer, **inner}

    @cached_property
    def _call_shape(self) -> tuple[bool | None, str | None]:
        """(whether a call stands under `function`, how its arguments are given); None for what makes no difference."""
        scores: dict[tuple[bool, str], int] = {}
        for nested in (True, False):
            for shape in _CALL_SHAPES:
                function = _PROBE_CALL["function"]
                assert isinstance(function, dict)
                inner = {**function, "arguments": _as_shape(function["arguments"], shape)}
                call = {**_PROBE_CALL, "function": inner} if nested else {"id": "abcdefghi", **inner}
                scores[nested, shape] = self._score(call)
        best = max(scores.values())
        if best == 0:
            return None, None
        good = [key for key, score in scores.items() if score == best]
        nested_ones, shapes = ({key[place] for key in good} for place in (0, 1))
        return (
            None if len(nested_ones) == 2 else good[0][0],
            None if len(shapes) == 2 else good[0][1],
        )

    def _score(self, call: Mapping[str, Any]) -> int:
        """How well the template writes this call: 0 not at all, 1 quoted once more than it should be, 2 well."""
        question = {"role": "user", "content": "Question"}
        best = 0
        for content in ("", None):
            for before in ((question,), ()):
                try:
                    text = self.render((*before, {"role": "assistant", "content": content, "tool_calls": [call]}))
                except TemplateError:
                    continue
                if _NAME in text and _KEY in text and _VALUE in text:
                    misquoted = f'\\"{_KEY}' in text or f"'{_KEY}'" in text
                    best = max(best, 1 if misquoted else 2)
        return best


def read_template(
    tokenizer: Any, path: str | None, *, date: datetime.date | None = None
) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """(the template, the one for rows with tools), None where the tokenizer has none.

    path: of a Jinja file, or the name of one of the tokenizer's templates; None for its own. date: that a template may
    write, today when left out. Raises DataError where the file cannot be read or it is unclear which template is meant.
    """

    def template(text: str, name: str) -> ChatTemplate:
        day = date or datetime.datetime.now().astimezone().date()
        written = _DATE_CALL.sub(lambda call: repr(day.strftime(call[1][1:-1])), text)
        return ChatTemplate(written, name, tokenizer.special_tokens_map, day if written != text else None)

    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if path is not None and path in named and not Path(path).exists():
        chosen = template(named[path], f"the tokenizer's chat template '{path}'")
        return chosen, chosen
    if path is not None:
        try:
            chosen = template(Path(path).expanduser().read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.template {path} cannot be read: {error}") from error
        return chosen, chosen
    if not own:
        return None, None
    if not named:
        chosen = template(own, "the tokenizer's chat template")
        return chosen, chosen
    if "default" not in named:
        raise DataError(
            f"the tokenizer has several chat templates ({', '.join(sorted(named))}) and none named default: name the "
            "one to use with data.template"
        )
    default = template(named["default"], "the tokenizer's chat template")
    if "tool_use" not in named:
        return default, default
    return default, template(named["tool_use"], "the tokenizer's chat template 'tool_use'")


def _as_shape(arguments: Any, shape: str) -> Any:
    if shape == "text":
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError as error:
        raise TemplateError(f"the arguments of a tool call are broken JSON, {error}") from error


def merged_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with each system message put at the front of the next one of the user."""
    merged: list[Message] = []
    held: list[str] = []
    for message in messages:
        if message["role"] == "system":
            held.append(message["content"])
        elif message["role"] == "user" and held:
            merged.append({**message, "content": "\n\n".join((*held, message["content"]))})
            held = []
        else:
            merged.append(message)
    return tuple(merged) if not held else (*merged, {"role": "user", "content": "\n\n".join(held)})
