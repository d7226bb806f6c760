"""Conversations -> token ids and the ranges of them that are supervised.

A conversation becomes text by the chat template and then ids, without special tokens of the tokenizer's own: the
template writes them. What the model learns to say is found in the text by the template's own {% generation %} blocks
where it has some, else by marks around the messages (data/turns.py). A token is supervised when it holds a character of
what is said and, where it reaches beyond, nothing but white space there: no token of anybody else's words is.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fitune.data.chat_template import (
    PROBE,
    CharSpan,
    ChatTemplate,
    TemplateError,
    merged_system,
    read_template,
)
from fitune.data.formats import Conversation, Message
from fitune.data.marked import LOST_THOUGHT, NOT_SHOWN, loses_thought, writes_reasoning
from fitune.data.template_limits import limited
from fitune.data.tokenizer_limits import in_time
from fitune.data.turns import TurnFinder, Turns
from fitune.errors import DataError, ModelError

Mask = Literal["assistant", "last", "all"]
MaskKind = Literal["generation markers", "marked messages", "all"]
Span = tuple[int, int, float]  # first token, token after the last, loss weight


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation. spans: the supervised ranges, in order, without overlap, never token 0, which nothing
    comes before. ends: the tokens that its answers end with. notices: what a person must know of it."""

    input_ids: list[int]
    spans: tuple[Span, ...]
    ends: frozenset[str] = frozenset()
    notices: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with everything decided that depends on its template. finder and tool_finder, for rows without and
    with tools, are None where there is no template: then only plain text can be encoded."""

    tokenizer: Any
    finder: TurnFinder | None
    tool_finder: TurnFinder | None
    mask: Mask
    kind: MaskKind
    merges_system: bool = False

    @property
    def template(self) -> ChatTemplate | None:
        return None if self.finder is None else self.finder.template

    def finder_of(self, chat: Conversation) -> TurnFinder:
        """Raises DataError where there is none."""
        finder = self.tool_finder if chat.tools else self.finder
        if finder is None:
            raise DataError(
                "the tokenizer has no chat template, and these samples are conversations: give a Jinja template file "
                "with data.template, or plain text in 'text'"
            )
        return finder


def read_encoder(
    tokenizer: Any,
    *,
    template: str | None,
    mask: Mask,
    merges_system: bool = False,
    date: datetime.date | None = None,
) -> Encoder:
    """template: the path of a Jinja file, None for the tokenizer's own. merges_system: whether a system message becomes
    the front of the user's next one. date: what a template writes as today's, if it does.

    Raises DataError when the file cannot be read or the template cannot render a question and its answer.
    """
    chosen, for_tools = read_template(tokenizer, template, date=date)
    if chosen is None:
        return Encoder(
            tokenizer,
            None,
            None,
            mask,
            "all" if mask == "all" else "marked messages",
            merges_system,
        )
    try:
        chosen.render(PROBE)
    except TemplateError as error:
        raise DataError(
            f"the chat template ({chosen.name}) cannot render a question and its answer: {error}"
        ) from error
    kind: MaskKind = "generation markers" if chosen.marks_generation else "marked messages"
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    special = list(dict.fromkeys((*added, *map(str, tokenizer.all_special_tokens))))
    finder = TurnFinder(chosen, special, tokenizer.eos_token)
    tool_finder = finder
    if for_tools is not None and for_tools is not chosen:
        tool_finder = TurnFinder(for_tools, special, tokenizer.eos_token)
    return Encoder(
        tokenizer, finder, tool_finder, mask, "all" if mask == "all" else kind, merges_system
    )


def encode(encoder: Encoder, conversations: Sequence[Conversation]) -> list[Encoded | str]:
    """Each conversation tokenised, or the sentence that says why it cannot be.

    Raises DataError when there are messages but no template or one that goes beyond its bounds, ModelError when the
    mask needs a fast tokenizer, or the tokenizer takes too long.
    """
    with limited():
        return _encode(encoder, conversations)


def _encode(encoder: Encoder, conversations: Sequence[Conversation]) -> list[Encoded | str]:
    results: list[Encoded | str | None] = [None] * len(conversations)
    plain = {index: chat.text for index, chat in enumerate(conversations) if chat.text is not None}
    for index, ids in zip(plain, _ids(encoder.tokenizer, list(plain.values())), strict=True):
        results[index] = _framed(encoder.tokenizer, ids)
    found: dict[int, Turns] = {}
    for index, chat in enumerate(conversations):
        if index not in plain:
            try:
                found[index] = _find(encoder, chat)
            except TemplateError as error:
                results[index] = str(error)
    if found:
        encoding = _tokenised(
            encoder.tokenizer, [turns.text for turns in found.values()], add_special_tokens=False
        )
        for place, (index, turns) in enumerate(found.items()):
            ids = encoding["input_ids"][place]
            parts = encoding.encodings[place] if encoder.tokenizer.is_fast else None
            results[index] = _encoded(encoder, conversations[index], turns, ids, parts)
    return [result for result in results if result is not None]


def _find(encoder: Encoder, chat: Conversation) -> Turns:
    """The text of a conversation and what is said in it. Raises TemplateError with the reason where there is none."""
    finder = encoder.finder_of(chat)
    messages: Sequence[Message] = (
        merged_system(chat.messages) if encoder.merges_system else chat.messages
    )
    try:
        messages = finder.template.prepared(messages)
        text, spans = finder.template.render_generation(
            messages,
            tools=chat.tools,
            arguments=chat.template_arguments,
            marks=finder.template.marks_generation and encoder.mask != "all",
        )
    except TemplateError as error:
        raise TemplateError(
            f"the chat template refuses it: {error}{_way_out(encoder, chat)}"
        ) from error
    if finder.template.marks_generation and encoder.mask != "all":
        return _generated(chat, finder, text, spans)
    if encoder.mask == "all" and not (messages and messages[-1]["role"] == "assistant"):
        return Turns(text, ())
    try:
        return finder.find(chat, messages, text)
    except TemplateError:
        if encoder.mask == "all":
            return Turns(text, ())
        raise


def _generated(
    chat: Conversation, finder: TurnFinder, text: str, spans: Sequence[CharSpan]
) -> Turns:
    """The turns are those that the template marks itself. Raises TemplateError where weights have no turns."""
    ends = [
        tokens[-1]
        for first, end in spans[-1:]
        if (tokens := finder.special.findall(text[first:end]))
    ]
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    num_answers = len(answers)
    if len(spans) != num_answers and any(weight is not None for weight in chat.assistant_weights):
        raise TemplateError(
            f"the template marks {len(spans)} turns, the sample weighs {num_answers} assistant messages"
        )
    if len(spans) != num_answers:
        return Turns(text, tuple(spans), frozenset(ends))
    kept: list[CharSpan | None] = []
    notices = set()
    for message, (first, end) in zip(answers, spans, strict=True):
        thought, said = message.get("reasoning_content", "").strip(), text[first:end]
        loses = loses_thought(message["content"], said)
        if thought not in said:
            if writes_reasoning(finder.template.text):
                loses = True
            else:
                notices.add(NOT_SHOWN.format(what="reasoning_content"))
        calls = [call.get("function") or call for call in message.get("tool_calls", ())]
        is_mute = any(call["name"] not in said for call in calls)
        is_last = message is answers[-1]
        if is_mute:
            notices.add(NOT_SHOWN.format(what="tool_calls"))
        if loses:
            notices.add(NOT_SHOWN.format(what="thinking") if is_last else LOST_THOUGHT)
        kept.append(None if is_mute or (loses and not is_last) else (first, end))
    return Turns(text, tuple(kept), frozenset(ends), frozenset(notices))


def _way_out(encoder: Encoder, chat: Conversation) -> str:
    """What else could be done with a row that the template refuses, tried before it is said."""
    if encoder.merges_system or not any(message["role"] == "system" for message in chat.messages):
        return ""
    template = encoder.finder_of(chat).template
    try:
        template.render(
            template.prepared(merged_system(chat.messages)),
            tools=chat.tools,
            arguments=chat.template_arguments,
        )
    except TemplateError:
        return ""
    return ". data.system=merge puts the system message at the front of the user's first one, which it takes"


def _encoded(
    encoder: Encoder, chat: Conversation, turns: Turns, ids: list[int], parts: Any
) -> Encoded:
    if encoder.mask == "all":
        return Encoded(ids, _weighted([(0, len(ids))], [None]), turns.ends, turns.notices)
    weights = chat.assistant_weights
    if len(weights) != len(turns.spans):
        weights = (None,) * len(turns.spans)
    said = [
        (span, weight)
        for span, weight in zip(turns.spans, weights, strict=True)
        if span is not None
    ]
    if encoder.mask == "last":
        said = said[-1:]
    spans = [span for span, _ in said]
    found = (
        [_tokens_of(parts, turns.text, span) for span in spans]
        if parts is not None
        else _pieces(encoder, turns.text, spans, ids)
    )
    return Encoded(ids, _weighted(found, [weight for _, weight in said]), turns.ends, turns.notices)


def _tokens_of(parts: Any, text: str, span: CharSpan) -> tuple[int, int]:
    """The tokens that hold characters of `span` and, beyond it, white space only."""
    first_char, end_char = span
    first = last = None
    while first_char < end_char and (first := parts.char_to_token(first_char)) is None:
        first_char += 1
    while end_char > first_char and (last := parts.char_to_token(end_char - 1)) is None:
        end_char -= 1
    if first is None or last is None:
        return 0, 0
    num_tokens = len(parts)
    while last + 1 < num_tokens:  # a character may be several tokens
        start, end = parts.token_to_chars(last + 1)
        if not start < end or start >= end_char:
            break
        last += 1
    while first <= last and text[parts.token_to_chars(first)[0] : first_char].strip():
        first += 1
    while first <= last and text[end_char : parts.token_to_chars(last)[1]].strip():
        last -= 1
    return first, last + 1


def _pieces(
    encoder: Encoder, text: str, spans: Sequence[CharSpan], ids: list[int]
) -> list[tuple[int, int]]:
    """For tokenizers that do not say which characters a token is of: the text is cut at the borders of the turns, which
    must give the same tokens as the whole. Raises ModelError where it does not."""
    found, joined, position = [], [], 0
    for first_char, end_char in spans:
        joined += _ids(encoder.tokenizer, [text[position:first_char]], add_special_tokens=False)[0]
        first = len(joined)
        joined += _ids(encoder.tokenizer, [text[first_char:end_char]], add_special_tokens=False)[0]
        found.append((first, len(joined)))
        position = end_char
    joined += _ids(encoder.tokenizer, [text[position:]], add_special_tokens=False)[0]
    if joined != ids:
        raise ModelError(
            f"the mask by {encoder.kind} needs a fast tokenizer, which {type(encoder.tokenizer).__name__} is not: "
            "give another tokenizer with model.tokenizer, or train on every token with data.mask=all"
        )
    return found


def _framed(tokenizer: Any, ids: list[int]) -> Encoded:
    """Plain text as the tokenizer frames it, with its end-of-text token after it; neither that nor the first twice."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    return Encoded(ids, _weighted([(0, len(ids))], [None]))


def _ids(tokenizer: Any, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = _tokenised(tokenizer, texts, add_special_tokens=add_special_tokens)[
        "input_ids"
    ]
    return ids


def _tokenised(tokenizer: Any, texts: list[str], *, add_special_tokens: bool) -> Any:
    def call() -> Any:
        return tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    return in_time(call, num_chars=sum(map(len, texts))) if tokenizer.is_fast else call()


def _weighted(
    turns: Sequence[tuple[int, int]], weights: Sequence[float | None]
) -> tuple[Span, ...]:
    spans = []
    for (first, end), weight in zip(turns, weights, strict=True):
        weight = 1.0 if weight is None else weight
        if weight > 0 and max(first, 1) < end:
            spans.append((max(first, 1), end, weight))
    return tuple(spans)
