"""A conversation and its template -> one text and, in it, what each of the assistant's turns says.

A template may do anything with a message, so its text is not searched for, and no two renderings are assumed to begin
alike. Instead the conversation is rendered once more with marks (characters of a private use area) around what each
message holds; without the marks that rendering must be the plain one, which proves for this very row where each message
stands. A turn of the assistant then

    begins   where a generation begins: after what the template writes between the message before it and an answer (its
             generation prompt). What it writes between there and the message (an empty <think> block, the name of a
             channel) is the model's to write
    ends     with what the template writes after the message when no other follows. Where that is nothing, with the
             token that opens the next role's turn, or after the last message else with the end-of-text token: without
             one of them the model would never learn to stop

Rows without tools whose conversations look alike (the same roles and keys) are rendered alike. What the template writes
between their messages is learned from one rendering of marks alone, a skeleton; a row's plain rendering is compared
with the skeleton filled in, and only where they differ is the row itself rendered with marks.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fitune.data.chat_template import CharSpan, TemplateError
from fitune.data.formats import Conversation, Message
from fitune.data.marked import (
    ADDED_END,
    MARK,
    MAX_MESSAGES,
    NO_END,
    MarkedConversation,
    TemplateHabits,
    TurnAnchors,
    UnclearError,
    content_of,
)

_TRIMS = (str, str.strip, str.lstrip, str.rstrip)
_MAX_SKELETONS = 4096


@dataclass(frozen=True, slots=True)
class Turns:
    """text: the conversation, with the end that its template does not write. spans: one for each message of the
    assistant, None where the template does not write it as the row has it. ends: the tokens that the turns end with
    when they are the last. notices: what a person must know of the row, as the rest of "12 rows ..."."""

    text: str
    spans: tuple[CharSpan | None, ...]
    ends: frozenset[str] = frozenset()
    notices: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What a template writes between the parts of conversations that look alike: pieces[i] stands before parts[i], the
    last piece at the end."""

    pieces: tuple[str, ...]
    parts: tuple[tuple[int, str], ...]
    turns: tuple[TurnAnchors | None, ...]
    suffix: str
    ends: frozenset[str]
    notices: frozenset[str]

    def fill(self, messages: Sequence[Message], text: str) -> Turns | None:
        """The turns of `text`, None where it is not this skeleton with the parts of `messages` in it."""
        position, places = 0, []
        if not text.startswith(self.pieces[0]):
            return None
        for number, (index, part) in enumerate(self.parts):
            position += len(self.pieces[number])
            following = self.pieces[number + 1]
            for trim in _TRIMS:
                value = trim(messages[index][part])
                if text.startswith(value, position) and text.startswith(
                    following, position + len(value)
                ):
                    break
            else:
                return None
            places.append((position, position + len(value)))
            position += len(value)
        if position + len(self.pieces[-1]) != len(text):
            return None
        spans = tuple(
            None
            if turn is None
            else (places[turn.first][0] - turn.before, places[turn.last][1] + turn.after)
            for turn in self.turns
        )
        return Turns(text + self.suffix, spans, self.ends, self.notices)


@dataclass
class TurnFinder(TemplateHabits):
    """Finds the assistant's turns in what one template makes of conversations."""

    skeletons: dict[Any, _Skeleton | None] = field(default_factory=dict)

    def find(self, chat: Conversation, messages: Sequence[Message], text: str) -> Turns:
        """messages: of `chat`, as the template takes them. text: what it makes of them. Raises TemplateError with the
        reason where the answers cannot be found in the text."""
        if (shape := _shape(chat, messages)) is not None:
            skeleton = self._skeleton(shape, chat, messages)
            if skeleton is not None and (found := skeleton.fill(messages, text)) is not None:
                return found
        return self._find_with_marks(chat, messages, text)

    def _skeleton(
        self, shape: Any, chat: Conversation, messages: Sequence[Message]
    ) -> _Skeleton | None:
        """Of conversations that look like this one; learned when a second one comes, None before."""
        if shape in self.skeletons:
            return self.skeletons[shape]
        if (shape, "seen") not in self.skeletons:
            if len(self.skeletons) < _MAX_SKELETONS:
                self.skeletons[shape, "seen"] = None
            return None
        self.skeletons[shape] = self._learn(chat, messages)
        return self.skeletons[shape]

    def _learn(self, chat: Conversation, messages: Sequence[Message]) -> _Skeleton | None:
        """None where the messages' texts decide what the template writes."""
        marked = MarkedConversation(self, chat, messages, range(len(messages)), style="empty")
        try:
            text, anchors = marked.render(len(messages))
            turns, suffix = marked.turns(text, anchors)
        except (TemplateError, UnclearError):
            return None
        pieces, position = [], 0
        for anchor in anchors:
            if anchor.first is None:
                return None
            pieces.append(text[position : anchor.first])
            position = anchor.end
        return _Skeleton(
            (*pieces, text[position:]),
            tuple((anchor.message, anchor.part) for anchor in anchors),
            turns,
            suffix,
            frozenset(marked.ends),
            frozenset(marked.notices),
        )

    def _find_with_marks(self, chat: Conversation, messages: Sequence[Message], text: str) -> Turns:
        if MARK.search(text) or len(messages) > MAX_MESSAGES:
            skeleton = (
                self._learn(chat, messages)
                if len(messages) <= MAX_MESSAGES and not chat.tools
                else None
            )
            if skeleton is not None and (found := skeleton.fill(messages, text)) is not None:
                return found
            raise TemplateError(
                f"its answers cannot be marked: it holds characters above U+100000, or over {MAX_MESSAGES:,} messages"
            )
        assistant = [
            number for number, message in enumerate(messages) if message["role"] == "assistant"
        ]
        for which, style in (
            (range(len(messages)), "both"),
            (assistant, "both"),
            (assistant, "ends"),
        ):
            marked = MarkedConversation(self, chat, messages, which, style=style)
            try:
                plain, anchors = marked.render(len(messages))
                if plain != text:
                    continue
                turns, suffix = marked.turns(text, anchors)
            except (TemplateError, UnclearError):
                continue
            spans: list[CharSpan | None] = []
            for turn in turns:
                if turn is None:
                    spans.append(None)
                    continue
                first = anchors[turn.first].first
                start = anchors[turn.first].end if first is None else first
                spans.append((start - turn.before, anchors[turn.last].end + turn.after))
            return Turns(
                text + suffix, tuple(spans), frozenset(marked.ends), frozenset(marked.notices)
            )
        return self._find_by_prefixes(chat, messages, text)

    def _find_by_prefixes(
        self, chat: Conversation, messages: Sequence[Message], text: str
    ) -> Turns:
        """For templates that write a message's text in another form, where no mark survives: what the text gains with
        each answer, as long as it only grows. Raises TemplateError where it does not."""
        grown: list[CharSpan] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt, whole = (
                    self.template.render(
                        messages[: number + is_answered],
                        tools=chat.tools,
                        arguments=chat.template_arguments,
                        add_generation_prompt=not is_answered,
                    )
                    for is_answered in (False, True)
                )
            except TemplateError:
                prompt, whole = text + "?", ""
            said = content_of(message)
            grows = text.startswith(prompt) and text.startswith(whole) and len(prompt) < len(whole)
            if not grows or ("tool_calls" not in message and said not in whole[len(prompt) :]):
                raise TemplateError(
                    "its assistant turns cannot be told apart: the chat template does not write message "
                    f"{number + 1} (assistant) as the sample has it. Give another template with data.template, or "
                    "train on every token with data.mask=all"
                )
            grown.append((len(prompt), len(whole)))
        if not grown or grown[-1][1] < len(text) or messages[-1]["role"] != "assistant":
            return Turns(text, tuple(grown))
        if tokens := self.special.findall(text[grown[-1][0] :]):
            return Turns(text, tuple(grown), frozenset(tokens[-1:]))
        if self.eos_token is None:
            return Turns(text, tuple(grown), notices=frozenset((NO_END,)))
        grown[-1] = (grown[-1][0], len(text) + len(self.eos_token))
        notice = ADDED_END.format(token=self.eos_token)
        return Turns(
            text + self.eos_token, tuple(grown), frozenset((self.eos_token,)), frozenset((notice,))
        )


def _shape(chat: Conversation, messages: Sequence[Message]) -> Any:
    """What two conversations share that are rendered alike but for their texts; None where the texts decide."""
    if chat.tools:
        return None
    looks: list[tuple[Any, ...]] = []
    for message in messages:
        content = message["content"]
        if "tool_calls" in message or "</think>" in content or content.isspace():
            return None
        if len(message) == 2:
            looks.append((message["role"], content == ""))
            continue
        others = {
            key: value
            for key, value in message.items()
            if key not in ("content", "reasoning_content")
        }
        thinks = bool(message.get("reasoning_content"))
        looks.append(
            (
                message["role"],
                content == "",
                thinks,
                json.dumps(others, sort_keys=True, default=str),
            )
        )
    arguments = chat.template_arguments
    return (tuple(looks), json.dumps(arguments, sort_keys=True) if arguments else None)
