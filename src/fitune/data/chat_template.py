"""A tokenizer's chat template: chosen, made ready, and rendered. This is the one place where a template runs.

A template is a program that comes with a model, and each has its own idea of its input. Tool calls are given in the
shape that the template writes well (also their ids and the tools' frame), as transformers chooses the one named
`tool_use` for rows with tools, and the date that a template may write is that of the run, so that the same rows have
the same tokens on the next day.
"""

import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fitune.boundary import parse_json
from fitune.data.messages import Message, without_none
from fitune.data.template_limits import MOST_CHARS, LimitError, check_size, limited
from fitune.errors import DataError
from fitune.plain_files import read_plain

CharSpan = tuple[int, int]

_DATE_CALL = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(\"[^\"]*\"|'[^']*')\s*\)")
_DIRECTIVES = "aAbBdeFHIjmMpSuUVwWxXyY"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_KEY, _VALUE = "akey", "avalue"
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "Question"},
    {"role": "assistant", "content": "Answer"},
)
_PROBE_CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "fname", "arguments": {_KEY: _VALUE}},
}


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
            messages,
            tools=tools,
            arguments=arguments,
            add_generation_prompt=add_generation_prompt,
            marks=False,
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
        if self._wants_parts:
            messages = [_with_parts(message) for message in messages]
        if tools and self._wants_framed_tools:
            tools = [_framed(tool) for tool in tools]
        return self._render(
            messages,
            tools=tools,
            arguments=arguments,
            add_generation_prompt=add_generation_prompt,
            marks=marks,
        )

    def _render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[CharSpan]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with limited() as limits, limits:
                texts, spans = render_jinja_template(
                    [list(messages)],
                    tools=tools,
                    chat_template=self.text,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=add_generation_prompt,
                    **{**self.special_tokens, **(arguments or {})},
                )
            if len(texts[0]) > MOST_CHARS:
                check_size(texts[0], len(json.dumps([list(messages), tools], default=str)))
        except LimitError as error:  # for the next row it would take as long
            raise DataError(
                f"the chat template ({self.name}) goes beyond its bounds with one conversation: {error}; give another "
                "one with data.template"
            ) from error
        except Exception as error:  # a template is a program: anything may go wrong in it
            raise TemplateError(str(error).split("\n")[0] or type(error).__name__) from error
        return texts[0], spans[0] if marks else []

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether it wants a text as a list of typed parts, as templates of models that see pictures may."""
        for wrap in (dict, _with_parts):
            try:
                text, _ = self._render([wrap(message) for message in PROBE])
            except TemplateError:
                continue
            if all(message["content"] in text for message in PROBE):
                return wrap is _with_parts
        return False

    @cached_property
    def _wants_framed_tools(self) -> bool:
        """Whether it writes a tool that stands under `function`, and not one that is described without that frame, as
        OpenAI's older `functions` are."""
        bare = {
            "name": "fname",
            "description": "d",
            "parameters": {"type": "object", "properties": {}},
        }
        for tool in (bare, {"type": "function", "function": bare}):
            try:
                text, _ = self._render(PROBE[:1], tools=[tool])
            except TemplateError:
                continue
            if "fname" in text:
                return tool is not bare
        return False

    def prepared(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages with their tool calls in the form that this template writes well. Raises TemplateError."""
        if not any("tool_calls" in message for message in messages):
            return messages
        prepared = []
        for message in with_short_ids(messages) if self._wants_short_ids else messages:
            if "tool_calls" in message:
                calls = [_in_form(call, self._call_form) for call in message["tool_calls"]]
                content = message["content"] or (None if self._call_form.without_content else "")
                message = {**message, "tool_calls": calls, "content": content}
            prepared.append(message)
        return prepared

    @cached_property
    def _wants_short_ids(self) -> bool:
        """Whether it takes a tool call only with an id of nine letters and digits, as Mistral's do."""
        takes = []
        for call_id in (_PROBE_CALL["id"], "call_abcdefghijkl", None):
            call = {**_PROBE_CALL, "id": call_id}
            answer = {
                "role": "assistant",
                "content": "",
                "tool_calls": [_in_form(call, self._call_form)],
            }
            result = {"role": "tool", "content": "Result", "name": "fname", "tool_call_id": call_id}
            rows = (PROBE[0], answer, result, PROBE[1])
            try:
                self.render([without_none(message) for message in rows])
            except TemplateError:
                takes.append(False)
            else:
                takes.append(True)
        return takes[0] and not all(takes)

    @cached_property
    def _call_form(self) -> "_CallForm":
        """The first of those that the template writes best, and of its choices only those that make a difference."""
        choices = (True, False)
        forms = [_CallForm(*form) for form in itertools.product((False, True), choices, choices)]
        scores = {form: self._score(form) for form in forms}
        best = max(scores.values())
        good = [form for form in forms if scores[form] == best]
        if best == 0:
            return _CallForm(without_content=False, nested=None, as_text=None)
        chosen = [form for form in good if form.without_content == good[0].without_content]
        return _CallForm(
            without_content=good[0].without_content,
            nested=chosen[0].nested if len({form.nested for form in chosen}) == 1 else None,
            as_text=chosen[0].as_text if len({form.as_text for form in chosen}) == 1 else None,
        )

    def _score(self, form: "_CallForm") -> int:
        """How well the template writes a call in this form: 0 not at all, 1 quoted once more than is right, 2 well."""
        content = None if form.without_content else ""
        answer = {
            "role": "assistant",
            "content": content,
            "tool_calls": [_in_form(_PROBE_CALL, form)],
        }
        best = 0
        for before in ((PROBE[0],), ()):
            try:
                text = self.render((*before, answer))
            except TemplateError:
                continue
            if _KEY in text and _VALUE in text:
                misquoted = f'\\"{_KEY}' in text or f"'{_KEY}'" in text
                best = max(best, 1 if misquoted else 2)
        return best


@dataclass(frozen=True)
class _CallForm:
    """How a tool call is given: its message without content (None) or with an empty one, under `function` or not, its
    arguments as JSON text or as an object. None: as it is."""

    without_content: bool
    nested: bool | None
    as_text: bool | None


def _in_form(call: Mapping[str, Any], form: _CallForm) -> dict[str, Any]:
    """Raises TemplateError where the arguments are no JSON."""
    function = call.get("function")
    inner = (
        dict(function)
        if function
        else {key: call[key] for key in ("name", "arguments") if key in call}
    )
    if form.as_text is not None:
        inner["arguments"] = _arguments(inner.get("arguments", {}), as_text=form.as_text)
    outer = {
        key: value for key, value in call.items() if key not in ("name", "arguments", "function")
    }
    nested = bool(function) if form.nested is None else form.nested
    return {"type": "function", **outer, "function": inner} if nested else {**outer, **inner}


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with ids of nine letters and digits for tool calls and their answers, where they have others. An
    answer without an id is that of the first call that has none yet."""
    short: dict[Any, str] = {}
    open_ids: list[str] = []
    renamed: list[Message] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for place, call in enumerate(message["tool_calls"]):
                told = call.get("id")
                short[told] = own = _short_id(told, f"{number} {place}")
                open_ids.append(own)
                calls.append({**call, "id": own})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            told = message.get("tool_call_id")
            own = (
                short[told]
                if told is not None and told in short
                else (open_ids[:1] or [_short_id(told, "0")])[0]
            )
            if own in open_ids:
                open_ids.remove(own)
            message = {**message, "tool_call_id": own}
        renamed.append(message)
    return renamed


def _short_id(told: Any, place: str) -> str:
    if isinstance(told, str) and re.fullmatch(r"[A-Za-z0-9]{9}", told):
        return told
    return blake2b(str(place if told is None else told).encode(), digest_size=5).hexdigest()[:9]


def _framed(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool under `function`, where it is described without that."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return dict(tool)
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type"},
    }


def _date_macro(day: datetime.date) -> str:
    """A macro in the place of the function that tells the time, for templates that compute what they ask it for."""
    known = {
        **{f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES},
        "%-d": f"{day.day}",
    }
    replaced = "".join(f" | replace({told!r}, {value!r})" for told, value in known.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro -%}}{{{{ '' }}}}"


def today() -> datetime.date:
    return datetime.datetime.now().astimezone().date()


def read_template(
    tokenizer: Any, path: str | None, *, date: datetime.date | None = None
) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """(the template, the one for rows with tools), None where the tokenizer has none.

    path: of a Jinja file, or the name of one of the tokenizer's templates; None for its own. date: that a template may
    write, today when left out. Raises DataError where the file cannot be read or it is unclear which template is meant.
    """

    def template(text: str, name: str) -> ChatTemplate:
        day = date or today()
        written = _DATE_CALL.sub(lambda call: repr(day.strftime(call[1][1:-1])), text)
        if "strftime_now(" in written:
            written = _date_macro(day) + written
        asks = "strftime_now" in text
        return ChatTemplate(written, name, tokenizer.special_tokens_map, day if asks else None)

    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {}
    if path is not None and path in named and not Path(path).exists():
        chosen = template(named[path], f"the tokenizer's chat template '{path}'")
        return chosen, chosen
    if path is not None:
        try:
            chosen = template(read_plain(Path(path).expanduser(), follow=True).decode(), path)
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


def _with_parts(message: Message) -> Message:
    content = message["content"]
    return (
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, str)
        else message
    )


def _arguments(arguments: Any, *, as_text: bool) -> Any:
    if as_text:
        given = isinstance(arguments, str) and arguments.strip()
        return arguments if given else json.dumps(arguments or {}, ensure_ascii=False)
    if not isinstance(arguments, str):
        return arguments
    try:
        return parse_json(arguments) if arguments.strip() else {}
    except ValueError as error:
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
