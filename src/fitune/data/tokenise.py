"""Convert conversations into token ids and the ranges of them that are supervised.

The chat template makes a text of a conversation; the tokenizer makes ids of it without adding
special tokens, since the template writes them. The assistant's turns are found in the text by the
template's own {% generation %} blocks if it has any, else by marks around the messages
(data/turns.py).

A token is supervised if it contains a character of an assistant's turn and, beyond the turn, only
white space. A token that contains text of anybody else is never supervised.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fitune.boundary import raised_as
from fitune.data.chat_template import (
    PROBE,
    CharSpan,
    ChatTemplate,
    TemplateError,
    merged_system,
    read_template,
)
from fitune.data.formats import Conversation, Message
from fitune.data.lost_parts import LOST_THOUGHT, NOT_SHOWN, loses_thought, writes_reasoning
from fitune.data.template_limits import limited
from fitune.data.tokenizer_limits import in_time
from fitune.data.turns import TurnFinder, Turns
from fitune.errors import DataError, ModelError

Mask = Literal["assistant", "last", "all"]
MaskKind = Literal["generation markers", "marked messages", "all"]
#: first token, token after the last, loss weight
Span = tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised conversation."""

    input_ids: list[int]
    #: the supervised ranges in order, without overlap; never token 0, since no token predicts
    #: it
    spans: tuple[Span, ...]
    #: the tokens that its answers, or the text, end with
    ends: frozenset[str] = frozenset()
    #: what the user should know about it
    notices: frozenset[str] = frozenset()
    #: the token that the tokenizer puts before a text, if it puts one
    begins: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer with all decisions that depend on its chat template."""

    tokenizer: Any
    #: for conversations without tools; None if there is no template, so only plain text can be
    #: encoded
    finder: TurnFinder | None
    #: for conversations with tools
    tool_finder: TurnFinder | None
    mask: Mask
    kind: MaskKind
    #: whether a system message is put at the front of the next user message
    merges_system: bool = False

    @property
    def template(self) -> ChatTemplate | None:
        return None if self.finder is None else self.finder.template

    def finder_of(self, chat: Conversation) -> TurnFinder:
        """Return the finder for a conversation; raises DataError if there is no template."""
        finder = self.tool_finder if chat.tools else self.finder
        if finder is None:
            raise DataError(
                "the tokenizer has no chat template, and these samples are conversations: give a "
                "Jinja template file "
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
    """Read the chat template and check that it renders a question and its answer.

    template: the path of a Jinja file or the name of a template of the tokenizer; None for its own.
    merges_system: put each system message at the front of the next user message.
    date: the date that the template writes as today's, if it writes one.

    Raises DataError if the file cannot be read or the template cannot render the question and its
    answer.
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
    """Tokenise each conversation; the result is a message where one cannot be tokenised.

    Raises DataError if there are messages but no template, or the template exceeds its limits.
    Raises ModelError if the mask needs a fast tokenizer, or the tokenizer takes too long.
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
    """Render a conversation and find the assistant's turns in the text.

    Raises TemplateError if the template refuses it or the turns cannot be found.
    """
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
            f"the chat template refuses it: {error}{_suggestion(encoder, chat)}"
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
    """Return the turns that the template marks by {% generation %} blocks.

    Raises TemplateError if the sample has loss weights for other turns than those.
    """
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
    shown: list[CharSpan | None] = []
    notices = set()
    for message, (first, end) in zip(answers, spans, strict=True):
        thought, rendered = message.get("reasoning_content", "").strip(), text[first:end]
        loses_thinking = loses_thought(message["content"], rendered)
        if thought not in rendered:
            if writes_reasoning(finder.template.text):
                loses_thinking = True
            else:
                notices.add(NOT_SHOWN.format(what="reasoning_content"))
        calls = [call.get("function") or call for call in message.get("tool_calls", ())]
        lacks_call = any(call["name"] not in rendered for call in calls)
        is_last = message is answers[-1]
        if lacks_call:
            notices.add(NOT_SHOWN.format(what="tool_calls"))
        if loses_thinking:
            notices.add(NOT_SHOWN.format(what="thinking") if is_last else LOST_THOUGHT)
        shown.append(None if lacks_call or (loses_thinking and not is_last) else (first, end))
    return Turns(text, tuple(shown), frozenset(ends), frozenset(notices))


def _suggestion(encoder: Encoder, chat: Conversation) -> str:
    """Return what would make the template accept a conversation, or '' if nothing known does.

    It is tried before it is suggested.
    """
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
    encoder: Encoder, chat: Conversation, turns: Turns, ids: list[int], parts: object
) -> Encoded:
    """Return the ids with the supervised ranges that the mask selects.

    parts: the tokenizers.Encoding of the text; None with a slow tokenizer.
    """
    if encoder.mask == "all":
        return Encoded(ids, _weighted([(0, len(ids))], [None]), turns.ends, turns.notices)
    weights = chat.assistant_weights
    if len(weights) != len(turns.spans):
        weights = (None,) * len(turns.spans)
    answers = [
        (span, weight)
        for span, weight in zip(turns.spans, weights, strict=True)
        if span is not None
    ]
    if encoder.mask == "last":
        answers = answers[-1:]
    spans = [span for span, _ in answers]
    found = (
        [_tokens_of(parts, turns.text, span) for span in spans]
        if parts is not None
        else _tokens_of_parts(encoder, turns.text, spans, ids)
    )
    return Encoded(
        ids, _weighted(found, [weight for _, weight in answers]), turns.ends, turns.notices
    )


def _tokens_of(parts: Any, text: str, span: CharSpan) -> tuple[int, int]:
    """Return the range of tokens with characters of `span` and, beyond it, only white space."""
    first_char, end_char = span
    first = last = None
    while first_char < end_char and (first := parts.char_to_token(first_char)) is None:
        first_char += 1
    while end_char > first_char and (last := parts.char_to_token(end_char - 1)) is None:
        end_char -= 1
    if first is None or last is None:
        return 0, 0
    num_tokens = len(parts)
    # A character may be several tokens.
    while last + 1 < num_tokens:
        start, end = parts.token_to_chars(last + 1)
        if not start < end or start >= end_char:
            break
        last += 1
    while first <= last and text[parts.token_to_chars(first)[0] : first_char].strip():
        first += 1
    while first <= last and text[end_char : parts.token_to_chars(last)[1]].strip():
        last -= 1
    return first, last + 1


def _tokens_of_parts(
    encoder: Encoder, text: str, spans: Sequence[CharSpan], ids: list[int]
) -> list[tuple[int, int]]:
    """Return the ranges of tokens for a tokenizer that does not map characters to tokens.

    The text is cut at the borders of the turns, and the parts are tokenised separately. Raises
    ModelError if that gives other tokens than the whole text.
    """
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
            f"the mask by {encoder.kind} needs a fast tokenizer, which "
            f"{type(encoder.tokenizer).__name__} is not: "
            "give another tokenizer with model.tokenizer, or train on every token with "
            "data.mask=all"
        )
    return found


def _framed(tokenizer: Any, ids: list[int]) -> Encoded:
    """Add the end-of-text token to plain text; neither it nor the first token is doubled."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    begins = {str(tokenizer.bos_token)} if ids and ids[0] == tokenizer.bos_token_id else ()
    ends = () if tokenizer.eos_token_id is None else {str(tokenizer.eos_token)}
    spans = _weighted([(0, len(ids))], [None])
    return Encoded(ids, spans, frozenset(ends), begins=frozenset(begins))


def _ids(
    tokenizer: object, texts: list[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
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

    with raised_as(
        ModelError,
        f"the tokenizer {tokenizer.name_or_path} fails on this text",
        "mend its tokenizer.json, or take the model's own tokenizer",
    ):
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
