"""Conversations -> token ids and the ranges of them that are supervised.

A conversation becomes text by the chat template and then ids, without special tokens of the tokenizer's own: the
template writes them. What the model learns to say is found in one of three ways, the first that the template allows:

    generation markers   the template's own {% generation %} blocks
    turn markers         the ids after a known opening of an assistant turn up to and with its closing; minimind's rule,
                         what follows `<|im_start|>assistant\\n` up to and with `<|im_end|>\\n`, nothing else
    prefix difference    what the rendering gains when the assistant's message is added, after its generation prompt
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fitune.data.formats import Conversation, Message
from fitune.data.template_limits import MOST_CHARS, LimitError, Limits, check_size, limited
from fitune.errors import DataError, ModelError

MaskKind = Literal["generation markers", "turn markers", "prefix difference", "all"]
Span = tuple[int, int, float]  # first token, token after the last, loss weight

# Openings and closings of an assistant turn: ChatML, Llama 3, Gemma, Phi 3.
_TURN_MARKERS = (
    ("<|im_start|>assistant\n", "<|im_end|>\n"),
    ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<start_of_turn>model\n", "<end_of_turn>\n"),
    ("<|assistant|>\n", "<|end|>\n"),
)
_PROBE = ({"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"})


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation. spans: the supervised ranges, in order, without overlap, never token 0, which nothing
    comes before. marker_in_text: a turn's opening stands inside some message's text, where it opens a turn as well."""

    input_ids: list[int]
    spans: tuple[Span, ...]
    marker_in_text: bool = False


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with everything decided that depends on its template. template is None where there is none: then
    only plain text can be encoded."""

    tokenizer: Any
    template: str | None
    template_name: str
    mask: MaskKind
    start_ids: list[int]
    end_ids: list[int]


def read_encoder(tokenizer: Any, *, template: str | None, mask: Literal["assistant", "all"]) -> Encoder:
    """template: the path of a Jinja file, None for the tokenizer's own. Raises DataError when the file cannot be read
    or the template cannot render a question and its answer."""
    text, name = _read_template(tokenizer, template)
    encoder = Encoder(tokenizer, text, name, "all", [], [])
    if text is None:
        return encoder
    try:
        with limited() as limits:
            rendered, _ = _render(encoder, limits, _PROBE, None)
        ids = _ids(tokenizer, [rendered])[0]
    except TemplateError as error:
        raise DataError(f"the chat template ({name}) cannot render a question and its answer: {error}") from error
    if mask == "all":
        return encoder
    if re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text):
        return Encoder(tokenizer, text, name, "generation markers", [], [])
    for start, end in _TURN_MARKERS:
        start_ids, end_ids = (tokenizer.encode(marker, add_special_tokens=False) for marker in (start, end))
        turns = _marked_turns(ids, start_ids, end_ids)
        if len(turns) == 1 and ids[turns[0][1] - len(end_ids) : turns[0][1]] == end_ids:
            return Encoder(tokenizer, text, name, "turn markers", start_ids, end_ids)
    return Encoder(tokenizer, text, name, "prefix difference", [], [])


def encode(encoder: Encoder, conversations: Sequence[Conversation]) -> list[Encoded | str]:
    """Each conversation tokenised, or the sentence that says why it cannot be.

    Raises DataError when there are messages but no template or one that goes beyond its bounds, ModelError when the
    mask needs a fast tokenizer.
    """
    with limited() as limits:
        return _encode(encoder, limits, conversations)


def _encode(encoder: Encoder, limits: Limits, conversations: Sequence[Conversation]) -> list[Encoded | str]:
    results: list[Encoded | str | None] = [None] * len(conversations)
    plain = {index: chat.text for index, chat in enumerate(conversations) if chat.text is not None}
    for index, ids in zip(plain, _ids(encoder.tokenizer, list(plain.values()), add_special_tokens=True), strict=True):
        results[index] = _framed(encoder.tokenizer, ids)
    rendered: dict[int, str] = {}
    for index, chat in enumerate(conversations):
        if index in plain:
            continue
        try:
            text, char_spans = _render(encoder, limits, chat.messages, chat.tools)
        except TemplateError as error:
            results[index] = f"the chat template refuses it: {error}"
            continue
        if encoder.mask in ("generation markers", "prefix difference"):
            results[index] = _encode_spans(encoder, limits, chat, text, char_spans)
        else:
            rendered[index] = text
    for index, ids in zip(rendered, _ids(encoder.tokenizer, list(rendered.values())), strict=True):
        results[index] = _encode_marked(encoder, limits, conversations[index], rendered[index], ids)
    return [result for result in results if result is not None]


class TemplateError(ValueError):
    """The template refused a conversation; the text is the template's own."""


def _encode_marked(
    encoder: Encoder, limits: Limits, conversation: Conversation, text: str, ids: list[int]
) -> Encoded | str:
    if encoder.mask == "all":
        return Encoded(ids, _weighted([(0, len(ids))], [None]))
    turns = _marked_turns(ids, encoder.start_ids, encoder.end_ids)
    weights = conversation.assistant_weights
    if len(turns) == len(weights):
        return Encoded(ids, _weighted(turns, weights))
    if len(turns) > len(weights) and all(weight is None for weight in weights):
        return Encoded(ids, _weighted(turns, [None] * len(turns)), marker_in_text=True)
    # A marker's last token has merged with the text after it, or it is unclear which turn a weight is for.
    return _encode_spans(encoder, limits, conversation, text, [])


def _encode_spans(
    encoder: Encoder, limits: Limits, conversation: Conversation, text: str, char_spans: list[tuple[int, int]]
) -> Encoded | str:
    weights = conversation.assistant_weights
    if encoder.mask != "generation markers":
        try:
            char_spans = _prefix_differences(encoder, limits, conversation, text)
        except TemplateError as error:
            return f"its assistant turns cannot be told apart: {error}"
    if len(char_spans) != len(weights):
        if any(weight is not None for weight in weights):
            return f"the template marks {len(char_spans)} turns, the row weighs {len(weights)} assistant messages"
        weights = (None,) * len(char_spans)
    if not encoder.tokenizer.is_fast:
        raise ModelError(
            f"the mask by {encoder.mask} needs a fast tokenizer, which {type(encoder.tokenizer).__name__} is not: "
            "give another tokenizer with model.tokenizer, or train on every token with data.mask=all"
        )
    encoding = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    turns, index, offsets = [], 0, encoding["offset_mapping"]
    for first_char, end_char in char_spans:
        while index < len(offsets) and offsets[index][0] < first_char:
            index += 1
        first = index
        while index < len(offsets) and offsets[index][0] < end_char:
            index += 1
        turns.append((first, index))
    return Encoded(encoding["input_ids"], _weighted(turns, weights))


def _prefix_differences(
    encoder: Encoder, limits: Limits, conversation: Conversation, text: str
) -> list[tuple[int, int]]:
    """Character ranges of the assistant's messages in `text`. Raises TemplateError where the template writes a turn
    differently once others follow it."""
    spans = []
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise TemplateError("it starts with one, and this template does not mark where a turn begins")
        before = conversation.messages[:index]
        prompt, _ = _render(encoder, limits, before, conversation.tools, add_generation_prompt=True)
        start = _common_length(prompt, text)
        plain, _ = _render(encoder, limits, before, conversation.tools)
        whole, _ = _render(encoder, limits, (*before, message), conversation.tools)
        end = _common_length(whole, text)
        said = end == len(whole) or (message["content"].strip() in text[start:end] and "tool_calls" not in message)
        if start < len(plain) or not said:
            raise TemplateError(f"the template writes message {index + 1} differently once others follow")
        spans.append((start, end))
    return spans


def _render(
    encoder: Encoder, limits: Limits, messages: Sequence[Message], tools: Any, *, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text of the messages and the character ranges of {% generation %} blocks. Raises TemplateError, and DataError
    for a template that goes beyond its bounds: the next row would take as long."""
    from transformers.utils.chat_template_utils import render_jinja_template

    if encoder.template is None:
        raise DataError(
            "the tokenizer has no chat template, and these rows are conversations: give a Jinja template file with "
            "data.template, or plain text in 'text'"
        )
    if _TAKES_OBJECTS.search(encoder.template) and "arguments is string" not in encoder.template:
        messages = [_with_parsed_arguments(message) for message in messages]
    marks = encoder.mask == "generation markers"
    try:
        with limits:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=encoder.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **encoder.tokenizer.special_tokens_map,
            )
        if len(texts[0]) > MOST_CHARS:
            check_size(texts[0], len(json.dumps([list(messages), tools], default=str)))
    except LimitError as error:
        raise DataError(
            f"the chat template ({encoder.template_name}) goes beyond its bounds with one conversation: {error}; give "
            "another one with data.template"
        ) from error
    except Exception as error:  # a template is a program: anything may go wrong in it
        raise TemplateError(str(error).split("\n")[0] or type(error).__name__) from error
    return texts[0], spans[0] if marks else []


# A template that writes the arguments of a tool call as JSON itself would quote those given as JSON text once more.
_TAKES_OBJECTS = re.compile(r"arguments\s*\|\s*tojson")


def _with_parsed_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or call
        if isinstance(function.get("arguments"), str):
            try:
                function = {**function, "arguments": json.loads(function["arguments"])}
            except json.JSONDecodeError as error:
                raise TemplateError(f"the arguments of a tool call are broken JSON, {error}") from error
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _framed(tokenizer: Any, ids: list[int]) -> Encoded:
    """Plain text as the tokenizer frames it, with its end-of-text token after it; neither that nor the first twice."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Encoded(ids, _weighted([(0, len(ids))], [None]))


def _ids(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return ids


def _marked_turns(ids: list[int], start_ids: list[int], end_ids: list[int]) -> list[tuple[int, int]]:
    turns, position = [], 0
    while (opening := _find(ids, start_ids, position)) is not None:
        first = opening + len(start_ids)
        closing = _find(ids, end_ids, first)
        position = len(ids) if closing is None else closing + len(end_ids)
        turns.append((first, position))
    return turns


def _find(ids: list[int], wanted: list[int], position: int) -> int | None:
    try:
        while True:
            position = ids.index(wanted[0], position)
            if ids[position : position + len(wanted)] == wanted:
                return position
            position += 1
    except ValueError:
        return None


def _weighted(turns: Sequence[tuple[int, int]], weights: Sequence[float | None]) -> tuple[Span, ...]:
    spans = []
    for (first, end), weight in zip(turns, weights, strict=True):
        weight = 1.0 if weight is None else weight
        if weight > 0 and max(first, 1) < end:
            spans.append((max(first, 1), end, weight))
    return tuple(spans)


def _common_length(left: str, right: str) -> int:
    if right.startswith(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _read_template(tokenizer: Any, path: str | None) -> tuple[str | None, str]:
    if path is not None:
        try:
            return Path(path).expanduser().read_text(encoding="utf-8"), path
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.template {path} cannot be read: {error}") from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise DataError(
                f"the tokenizer has several chat templates ({', '.join(sorted(own))}) and none named default: save the "
                "one to use as a file and give it with data.template"
            )
        own = own["default"]
    return own, "the tokenizer's chat template" if own else "none"
