"""Render a conversation with marks around its messages, which show where each message is.

A template may do anything with a message. Marks are characters of a private use area. Where they
appear in the rendered text they show where a message is, what the template writes before an answer,
and what ends it (`marked_turns.py`; `turns.py` gives the reasons).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fitune.data.chat_template import ChatTemplate
from fitune.data.formats import Conversation, Message
from fitune.data.lost_parts import THINKING

FIRST_MARK = 0x100000
PARTS = ("reasoning_content", "content", "tool_calls")
# One mark before and one after each part.
MARKS_PER_MESSAGE = 2 * len(PARTS)
#: a conversation of more messages has too few private characters for its marks
MAX_MESSAGES = 0xFFF0 // MARKS_PER_MESSAGE
MARK = re.compile("[\U00100000-\U0010fffd]")


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where one part of a message is in the rendered text."""

    #: the number of the message
    message: int
    #: reasoning_content, content or tool_calls
    part: str
    #: None if only the end is marked
    first: int | None
    end: int


@dataclass(frozen=True, slots=True)
class TurnAnchors:
    """Where a turn of the assistant begins and ends, relative to anchors."""

    #: the number of the anchor that the turn begins with
    first: int
    #: the number of the anchor that the turn ends with
    last: int
    #: characters of the turn before its first anchor
    before: int
    #: characters of the turn after its last anchor
    after: int


class UnclearError(Exception):
    """Raised if this way of marking does not separate the turns; another one may."""


@dataclass
class TemplateHabits:
    """What one chat template was observed to write around messages; reused for later ones."""

    template: ChatTemplate
    #: the texts that the tokenizer never splits
    special_tokens: Sequence[str]
    #: the token that ends a text
    eos_token: str | None
    #: what the template writes before an answer, by the role of the message before it
    openings: dict[object, str] = field(default_factory=dict)
    #: what the template writes before the next message, and the token that ended the answer
    headers: dict[object, tuple[str, str | None]] = field(default_factory=dict)
    #: what must be added after a last answer, as `_suffix` returns it
    suffixes: dict[object, tuple[str, str | None, str | None]] = field(default_factory=dict)
    #: whether the template writes anything after a plain answer
    ends_answers: dict[object, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = sorted(
            (token for token in self.special_tokens if token.strip()), key=len, reverse=True
        )
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@dataclass
class MarkedRendering:
    """A conversation whose parts are marked in one of three styles.

    empty: a part is only its two marks.
    both: a mark before and a mark after the text of a part.
    ends: only a mark after the text, for templates that inspect how a text begins.
    """

    habits: TemplateHabits
    chat: Conversation
    messages: Sequence[Message]
    #: the numbers of the messages to mark
    which: Sequence[int]
    style: str
    #: the tokens that end the turns that were found
    ends: set[str] = field(default_factory=set)
    notices: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        chosen = set(self.which)
        self.marks_all = len(chosen) == len(self.messages)
        self.marked = [
            self._mark(number, message) if number in chosen else message
            for number, message in enumerate(self.messages)
        ]
        arguments = self.chat.template_arguments
        self.key = json.dumps(arguments, sort_keys=True) if arguments else None

    def _mark(self, number: int, message: Message) -> Message:
        marked = dict(message)
        for index, part in enumerate(PARTS):
            mark = FIRST_MARK + number * MARKS_PER_MESSAGE + 2 * index
            if not (value := message.get(part)):
                continue
            if part == "tool_calls":
                marked[part] = [self._marked_call(call, mark) for call in value]
            else:
                marked[part] = self._marked_text(
                    value, mark, is_answer=message["role"] == "assistant"
                )
        return marked

    def _marked_text(self, text: str, mark: int, *, is_answer: bool) -> str:
        """Return a text with its marks.

        White space around the text and the thinking before it stay outside the marks, since a
        template may strip them.
        """
        if self.style == "empty":
            return chr(mark) + chr(mark + 1)
        thought = THINKING.match(text) if is_answer else None
        stripped = text[thought.end() :].strip() if thought else text.strip()
        if not stripped:
            return (
                f"{'' if self.style == 'ends' else chr(mark)}{text}{chr(mark + 1)}"
                if is_answer
                else text
            )
        first = text.index(stripped, thought.end() if thought else 0)
        end = first + len(stripped)
        opening = "" if self.style == "ends" else chr(mark)
        return f"{text[:first]}{opening}{stripped}{chr(mark + 1)}{text[end:]}"

    def _marked_call(self, call: Mapping[str, object], mark: int) -> Mapping[str, Any]:
        if isinstance(function := call.get("function"), Mapping):
            return {**call, "function": self._marked_call(function, mark)}
        opening = "" if self.style == "ends" else chr(mark)
        return {**call, "name": f"{opening}{call.get('name', '')}{chr(mark + 1)}"}

    def render(
        self, num_messages: int, *following: Message, add_generation_prompt: bool = False
    ) -> tuple[str, list[Anchor]]:
        """Render the first messages and those that follow; return the text and its anchors.

        The text is without the marks.
        """
        text = self.habits.template.render(
            [*self.marked[:num_messages], *following],
            tools=self.chat.tools,
            arguments=self.chat.template_arguments,
            add_generation_prompt=add_generation_prompt,
        )
        pieces, anchors, opened, position, length = [], [], {}, 0, 0
        named: Counter[int] = Counter()
        for found in MARK.finditer(text):
            pieces.append(text[position : found.start()])
            length += found.start() - position
            position = found.end()
            number, mark = divmod(ord(found.group()) - FIRST_MARK, MARKS_PER_MESSAGE)
            part = PARTS[mark // 2]
            if mark % 2 == 0:
                opened[number, part] = length
            elif part != "tool_calls" or named[number] < len(self.messages[number][part]):
                # A tool result may repeat the name of its call, which is not another call.
                named[number] += part == "tool_calls"
                anchors.append(Anchor(number, part, opened.pop((number, part), None), length))
        return "".join(pieces) + text[position:], anchors


def content_of(message: Message) -> str:
    """Return the text of a message; the content of a message with only tool calls may be None."""
    return (message["content"] or "").strip()
