"""Choose, prepare and render the chat template of a tokenizer; no other module runs a template.

A template is a program that comes with a model, and each expects its own form of input. Tool calls
are given in the form that this template writes well, including their ids and the `function` wrapper
of tools. Like transformers, the template named `tool_use` is taken for rows with tools. The date
that a template may write is the date of the run, so the same rows have the same tokens on the next
day.
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

#: a call of strftime_now with a literal format
_DATE_CALL = re.compile(r"strftime_now\(\s*(?:format\s*=\s*)?(\"[^\"]*\"|'[^']*')\s*\)")
#: the directives of strftime that `_date_macro` knows
_DIRECTIVES = "aAbBdeFHIjmMpSuUVwWxXyY"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_KEY, _VALUE = "akey", "avalue"
#: a conversation that every template should render
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
    """Raised when a template refuses a conversation; its text is the template's own message."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template that is ready to render."""

    #: Jinja source, with the date already written into it
    text: str
    #: where it comes from, for messages to the user
    name: str
    #: variables such as bos_token that templates refer to
    special_tokens: Mapping[str, Any]
    #: the date that the template writes, None if it writes none
    date: datetime.date | None

    @property
    def marks_generation(self) -> bool:
        return _GENERATION.search(self.text) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, object] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Render the messages as one text.

        arguments: the variables that the row itself gives the template.

        Raises TemplateError.
        """
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
        arguments: Mapping[str, object] | None = None,
        add_generation_prompt: bool = False,
        marks: bool = True,
    ) -> tuple[str, list[CharSpan]]:
        """Render the messages and return the text and the ranges of its {% generation %} blocks.

        The ranges are empty without `marks`. Raises TemplateError.
        """
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
        arguments: Mapping[str, object] | None = None,
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
        # The next row would take as long, so the whole data is refused.
        except LimitError as error:
            raise DataError(
                f"the chat template ({self.name}) goes beyond its bounds with one conversation: "
                f"{error}; give another "
                "one with data.template"
            ) from error
        # A template is a program, which may raise anything.
        except Exception as error:
            raise TemplateError(str(error).split("\n")[0] or type(error).__name__) from error
        return texts[0], spans[0] if marks else []

    @cached_property
    def _wants_parts(self) -> bool:
        """Return whether the template expects each text as a list of typed parts.

        Templates of models that take images may expect that.
        """
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
        """Return whether the template writes only tools that are wrapped in `function`.

        OpenAI's older `functions` lack that wrapper.
        """
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
        """Return the messages with their tool calls in the form that this template writes well.

        Raises TemplateError.
        """
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
        """Return whether tool calls need ids of nine letters and digits, as Mistral's do."""
        accepted = []
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
                accepted.append(False)
            else:
                accepted.append(True)
        return accepted[0] and not all(accepted)

    @cached_property
    def _call_form(self) -> "_CallForm":
        """The form of tool calls that the template writes best.

        Of equally good forms the first is taken. A choice that makes no difference is None.
        """
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
        """Return how well the template writes such a call: 2 well, 1 quoted twice, 0 not at all."""
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
    """The form in which a template gets a tool call; None leaves a choice as the row has it."""

    #: whether the content of a message with tool calls is None, not ''
    without_content: bool
    #: whether name and arguments are inside `function`
    nested: bool | None
    #: whether the arguments are JSON text, not an object
    as_text: bool | None


def _in_form(call: Mapping[str, Any], form: _CallForm) -> dict[str, object]:
    """Return a tool call in this form.

    Raises TemplateError if the arguments are not valid JSON.
    """
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
    """Replace the ids of tool calls and their results by ids of nine letters and digits.

    Ids that already have this form stay. A result without an id gets that of the first call without
    a result.
    """
    short: dict[Any, str] = {}
    unanswered_ids: list[str] = []
    renamed: list[Message] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for place, call in enumerate(message["tool_calls"]):
                given_id = call.get("id")
                short[given_id] = own = _short_id(given_id, f"{number} {place}")
                unanswered_ids.append(own)
                calls.append({**call, "id": own})
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            given_id = message.get("tool_call_id")
            own = (
                short[given_id]
                if given_id is not None and given_id in short
                else (unanswered_ids[:1] or [_short_id(given_id, "0")])[0]
            )
            if own in unanswered_ids:
                unanswered_ids.remove(own)
            message = {**message, "tool_call_id": own}
        renamed.append(message)
    return renamed


def _short_id(given_id: Any, place: str) -> str:
    if isinstance(given_id, str) and re.fullmatch(r"[A-Za-z0-9]{9}", given_id):
        return given_id
    return blake2b(
        str(place if given_id is None else given_id).encode(), digest_size=5
    ).hexdigest()[:9]


def _framed(tool: Mapping[str, Any]) -> dict[str, object]:
    """Return a tool wrapped in `function`, if it is not yet."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return dict(tool)
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type"},
    }


def _date_macro(day: datetime.date) -> str:
    """Return a Jinja macro in place of strftime_now, for templates that compute its format."""
    known = {
        **{f"%{letter}": day.strftime(f"%{letter}") for letter in _DIRECTIVES},
        "%-d": f"{day.day}",
    }
    replaced = "".join(
        f" | replace({directive!r}, {value!r})" for directive, value in known.items()
    )
    body = f"{{{{ format{replaced} }}}}"
    return f"{{%- macro strftime_now(format) -%}}{body}{{%- endmacro -%}}{{{{ '' }}}}"


def today() -> datetime.date:
    return datetime.datetime.now().astimezone().date()


def _checked(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{name} is no text: give a Jinja file with data.template")
    return text


def read_template(
    tokenizer: Any, path: str | None, *, date: datetime.date | None = None
) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """Return (the template, the template for rows with tools); None if the tokenizer has none.

    path: a Jinja file or the name of one of the tokenizer's templates; None for its own.
    date: the date that the template may write; today if None.

    Raises DataError if the file cannot be read or it is unclear which template is meant.
    """

    def template(given: object, name: str) -> ChatTemplate:
        text = _checked(given, name)
        day = date or today()
        written = _DATE_CALL.sub(lambda call: repr(day.strftime(call[1][1:-1])), text)
        if "strftime_now(" in written:
            written = _date_macro(day) + written
        writes_date = "strftime_now" in text
        return ChatTemplate(
            written, name, tokenizer.special_tokens_map, day if writes_date else None
        )

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
            f"the tokenizer has several chat templates ({', '.join(sorted(named))}) and none named "
            "default: name the "
            "one to use with data.template"
        )
    default = template(named["default"], "the tokenizer's chat template")
    if "tool_use" not in named:
        return default, default
    return default, template(named["tool_use"], "the tokenizer's chat template 'tool_use'")


def template_text(own: str | dict[str, str] | None, path: str) -> str:
    """Return the text of the template that `read_template` finds.

    own: the tokenizer's template, or several by name.
    """
    if isinstance(own, dict) and path in own and not Path(path).exists():
        return own[path]
    return read_plain(Path(path).expanduser(), follow=True).decode()


def _with_parts(message: Message) -> Message:
    content = message["content"]
    return (
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, str)
        else message
    )


def _arguments(arguments: Any, *, as_text: bool) -> object:
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
    """Return the messages with each system message put at the front of the next user message."""
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
