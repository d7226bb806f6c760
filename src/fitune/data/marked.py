"""A conversation rendered by its chat template with marks around its messages, and what follows for its answers.

A template may do anything with a message. Marks (characters of a private use area) that come out beside the text of a
message tell where it stands, what the template writes before an answer, and what ends it (`turns.py` says why).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fitune.data.chat_template import ChatTemplate, TemplateError
from fitune.data.formats import Conversation, Message

_FIRST_MARK = 0x100000
_PARTS = ("reasoning_content", "content", "tool_calls")
_MARKS_PER_MESSAGE = 2 * len(_PARTS)  # one before and one after each part
MAX_MESSAGES = 0xFFF0 // _MARKS_PER_MESSAGE
MARK = re.compile("[\U00100000-\U0010fffd]")
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*)</think>\s*(?=\S)", re.DOTALL)

NOT_SHOWN = "hold {what}, which the chat template does not show to the model"
LOST_THOUGHT = "hold thinking in earlier turns, which the chat template leaves out there: those turns are not learned"
_REWRITTEN = "hold earlier answers that the chat template rewrites or leaves out: those turns are not learned"
ADDED_END = (
    "end in an answer that the chat template does not end: {token} is added after it, and learned"
)
_NO_END_BEFORE = "hold earlier answers that the chat template ends with nothing: the model learns to stop from the last one alone"
NO_END = "end in an answer that nothing ends, and the tokenizer has no end-of-text token: the model learns no end"
_TEXT_END = "end their answers with {text}, which is no token of its own here: generation needs it as a stop string"


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where one part of a message stands; first is None where only its end is marked."""

    message: int
    part: str
    first: int | None
    end: int


@dataclass(frozen=True, slots=True)
class TurnAnchors:
    """The numbers of the anchors that a turn begins and ends with, and how many characters it has beyond them."""

    first: int
    last: int
    before: int
    after: int


class UnclearError(Exception):
    """This way of marking does not tell the turns apart; another may."""


@dataclass
class TemplateHabits:
    """What one chat template was seen to write around messages, kept for the conversations that follow.

    special_tokens: the texts that the tokenizer keeps whole. eos_token: the one that ends a text."""

    template: ChatTemplate
    special_tokens: Sequence[str]
    eos_token: str | None
    openings: dict[Any, str] = field(default_factory=dict)
    headers: dict[Any, tuple[str, str | None]] = field(default_factory=dict)
    suffixes: dict[Any, tuple[str, str | None, str | None]] = field(default_factory=dict)
    ends_answers: dict[Any, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = sorted(
            (token for token in self.special_tokens if token.strip()), key=len, reverse=True
        )
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@dataclass
class MarkedConversation:
    """A conversation whose parts are marked in one of three styles.

    empty   a part is its two marks alone
    both    a mark before and one after its text
    ends    a mark after its text alone, for templates that look at how a text begins
    """

    habits: TemplateHabits
    chat: Conversation
    messages: Sequence[Message]
    which: Sequence[int]
    style: str
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
        for index, part in enumerate(_PARTS):
            mark = _FIRST_MARK + number * _MARKS_PER_MESSAGE + 2 * index
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
        """White space around a text and the thinking before it stay outside of the marks: a template may cut them."""
        if self.style == "empty":
            return chr(mark) + chr(mark + 1)
        thought = _THOUGHT.match(text) if is_answer else None
        core = text[thought.end() :].strip() if thought else text.strip()
        if not core:
            return (
                f"{'' if self.style == 'ends' else chr(mark)}{text}{chr(mark + 1)}"
                if is_answer
                else text
            )
        first = text.index(core, thought.end() if thought else 0)
        end = first + len(core)
        opening = "" if self.style == "ends" else chr(mark)
        return f"{text[:first]}{opening}{core}{chr(mark + 1)}{text[end:]}"

    def _marked_call(self, call: Mapping[str, Any], mark: int) -> Mapping[str, Any]:
        if isinstance(function := call.get("function"), Mapping):
            return {**call, "function": self._marked_call(function, mark)}
        opening = "" if self.style == "ends" else chr(mark)
        return {**call, "name": f"{opening}{call.get('name', '')}{chr(mark + 1)}"}

    def render(
        self, num_messages: int, *following: Message, add_generation_prompt: bool = False
    ) -> tuple[str, list[Anchor]]:
        """The text of the first messages and of those that follow them, without marks, and the anchors in it."""
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
            number, mark = divmod(ord(found.group()) - _FIRST_MARK, _MARKS_PER_MESSAGE)
            part = _PARTS[mark // 2]
            if mark % 2 == 0:
                opened[number, part] = length
            elif part != "tool_calls" or named[number] < len(self.messages[number][part]):
                named[number] += part == "tool_calls"  # what answers a call may name it once more
                anchors.append(Anchor(number, part, opened.pop((number, part), None), length))
        return "".join(pieces) + text[position:], anchors

    def turns(
        self, text: str, anchors: Sequence[Anchor]
    ) -> tuple[tuple[TurnAnchors | None, ...], str]:
        """The turn of each message of the assistant, and what must be added to the text to end the last one. Raises
        UnclearError where the last answer is not in the text as the row has it."""
        answers = [
            number for number, message in enumerate(self.messages) if message["role"] == "assistant"
        ]
        turns: list[TurnAnchors | None] = []
        suffix = ""
        for number in answers:
            turn, added = self._turn(number, text, anchors)
            if turn is None and number == answers[-1]:
                raise UnclearError
            turns.append(turn)
            suffix = added or suffix
        if self.marks_all:
            shown = {anchor.message for anchor in anchors}
            for number, message in enumerate(self.messages):
                if number not in shown and message["role"] != "assistant" and content_of(message):
                    self.notices.add(
                        NOT_SHOWN.format(what=f"a message of the role {message['role']}")
                    )
        return tuple(turns), suffix

    def _turn(
        self, number: int, text: str, anchors: Sequence[Anchor]
    ) -> tuple[TurnAnchors | None, str]:
        message = self.messages[number]
        own = [place for place, anchor in enumerate(anchors) if anchor.message == number]
        parts = [anchors[place].part for place in own]
        if not own and not content_of(message):
            self.notices.add(
                NOT_SHOWN.format(
                    what="tool_calls" if message.get("tool_calls") else "reasoning_content"
                )
            )
            return None, ""
        if not own or len(own) != own[-1] - own[0] + 1 or parts.count("content") > 1:
            self.notices.add(_REWRITTEN)
            return None, ""
        if content_of(message) and "content" not in parts:
            self.notices.add(_REWRITTEN)
            return None, ""
        if message.get("tool_calls") and "tool_calls" not in parts:
            self.notices.add(NOT_SHOWN.format(what="tool_calls"))
        before = self._before(number, own[0], text, anchors)
        first, end = anchors[own[0]].first, anchors[own[0]].end
        start = (end if first is None else first) - before
        if not self._keeps_thought(number, text[start : anchors[own[-1]].end], parts):
            self.notices.add(LOST_THOUGHT)
            return None, ""
        after, suffix = self._after(number, own[-1], text, anchors)
        return TurnAnchors(own[0], own[-1], before, after), suffix

    def _keeps_thought(self, number: int, said: str, parts: Sequence[str]) -> bool:
        """False where the thinking of an earlier turn is not in what the template writes of it."""
        message = self.messages[number]
        lost = bool(message.get("reasoning_content")) and "reasoning_content" not in parts
        if lost and not writes_reasoning(self.habits.template.text):
            self.notices.add(NOT_SHOWN.format(what="reasoning_content"))
            return True
        lost = lost or (self.style != "empty" and loses_thought(content_of(message), said))
        is_last = all(later["role"] != "assistant" for later in self.messages[number + 1 :])
        if lost and is_last:
            self.notices.add(NOT_SHOWN.format(what="thinking"))
        return not lost or is_last

    def _before(self, number: int, place: int, text: str, anchors: Sequence[Anchor]) -> int:
        """How many characters before its first anchor a turn begins."""
        anchor, previous = anchors[place], anchors[place - 1] if place else None
        lead_start = 0 if previous is None else previous.end
        lead = text[lead_start : anchor.end if anchor.first is None else anchor.first]
        key = None
        is_next = previous is not None and previous.message == number - 1
        if (
            self.marks_all
            and is_next
            and self._is_plain(number - 1)
            and self.messages[number - 1]["role"] != "assistant"
        ):
            key = (self.messages[number - 1]["role"], self.key)
            opening = self.habits.openings.get(key)
            if opening is not None and lead.startswith(opening):
                return len(lead) - len(opening)
        opening = self._opening(number, previous)
        if opening is not None and lead.startswith(opening):
            if key is not None:
                self.habits.openings.setdefault(key, opening)
            return len(lead) - len(opening)
        if anchor.first is None:
            raise UnclearError
        if opening is None:
            return self._before_first(number, lead)
        message = self.messages[number]
        common = self._common(lead, opening)
        thinks = self.style != "empty" and _THOUGHT.match(message["content"] or "") is not None
        if common and (thinks or "tool_calls" in message or "reasoning_content" in message):
            return len(lead) - len(common)
        return self._spaces(number, lead[len(common) :])

    def _is_plain(self, number: int) -> bool:
        """Whether what stands beside its marks is the template's alone, and can be kept for other rows."""
        content = self.messages[number]["content"] or ""
        return self.style == "empty" or content == content.strip()

    def _spaces(self, number: int, lead: str) -> int:
        """How many characters of white space before the first anchor are the message's own."""
        content = self.messages[number]["content"] or ""
        spaces = content[: len(content) - len(content.lstrip())]
        return len(spaces) if self.style != "empty" and lead.endswith(spaces) else 0

    def _opening(self, number: int, previous: Anchor | None) -> str | None:
        """What the template writes between the message before and an answer; None where it renders no such thing."""
        try:
            prompt, anchors = self.render(number, add_generation_prompt=True)
        except TemplateError:
            return None
        if previous is not None and (
            not anchors
            or (anchors[-1].message, anchors[-1].part) != (previous.message, previous.part)
        ):
            return None
        opening = prompt[anchors[-1].end if anchors else 0 :]
        try:
            if self.render(number)[0] != prompt:
                return opening
            # The template knows no generation prompt: either it has opened the answer already, or each answer brings
            # its opening with it.
            mark = _FIRST_MARK + number * _MARKS_PER_MESSAGE + 2 * _PARTS.index("content")
            answer = {"role": "assistant", "content": chr(mark) + chr(mark + 1)}
            answered, anchors = self.render(number, answer)
        except TemplateError:
            return opening
        if not anchors or anchors[-1].message != number or anchors[-1].first is None:
            return opening
        lead = answered[anchors[-2].end if len(anchors) > 1 else 0 : anchors[-1].first]
        return lead if lead.startswith(opening) and lead[len(opening) :].strip() else opening

    def _before_first(self, number: int, lead: str) -> int:
        """Of an answer that the template renders no prompt for: it stands at the beginning, or follows what may not be
        the last message. The opening is that after a question."""
        prompt = self._opening_after_question()
        places = {
            0,
            *(place for found in self.habits.special.finditer(prompt) for place in found.span()),
        }
        for place in sorted(places):
            if (opening := prompt[place:]).strip() and (found_at := lead.rfind(opening)) >= 0:
                return len(lead) - found_at - len(opening)
        return self._spaces(number, lead)

    def _opening_after_question(self) -> str:
        """What the template writes after a question for the answer to begin; empty where it does not take one."""
        key = ("a question", self.key)
        if key not in self.habits.openings:
            question = {"role": "user", "content": f"Question{chr(_FIRST_MARK)}"}
            try:
                prompt = self.habits.template.render(
                    [question], arguments=self.chat.template_arguments, add_generation_prompt=True
                )
            except TemplateError:
                prompt = ""
            self.habits.openings[key] = prompt.rpartition(chr(_FIRST_MARK))[2]
        return self.habits.openings[key]

    def _after(
        self, number: int, place: int, text: str, anchors: Sequence[Anchor]
    ) -> tuple[int, str]:
        """How many characters after its last anchor a turn ends, those included that are to be added to the text."""
        anchor, following = anchors[place], anchors[place + 1] if place + 1 < len(anchors) else None
        has_calls = "tool_calls" in self.messages[number]
        if number == len(self.messages) - 1:
            return self._after_last(number, text[anchor.end :], has_calls=has_calls)
        rest_end = (
            len(text)
            if following is None
            else following.end
            if following.first is None
            else following.first
        )
        rest = text[anchor.end : rest_end]
        key = None
        is_next = following is not None and following.message == number + 1
        if following is not None and self.marks_all and is_next and self._is_plain(number + 1):
            key = (
                has_calls,
                anchor.part,
                self.messages[number + 1]["role"],
                following.part,
                self.key,
            )
            header, end = self.habits.headers.get(key, ("", None))
            if header and rest.endswith(header):
                self._note_end(end, rest[: len(rest) - len(header)], has_calls=has_calls)
                return len(rest) - len(header), ""
        length, end = self._end_before_others(number, anchor, rest)
        self._note_end(end, rest[:length], has_calls=has_calls)
        if key is not None:
            self.habits.headers.setdefault(key, (rest[length:], end))
        return length, ""

    def _note_end(self, end: str | None, closing: str, *, has_calls: bool) -> None:
        """Of an answer that others follow. Nothing is learned of what comes after it, so one without an end teaches
        nothing wrong: it only does not teach to stop, and an end that is put there would stand in no generation's
        prompt."""
        if end is not None:
            self.ends.add(end)
        elif not closing.strip() and not has_calls:
            self.notices.add(_NO_END_BEFORE)

    def _end_before_others(self, number: int, anchor: Anchor, rest: str) -> tuple[int, str | None]:
        """rest: what stands between this answer and the next message."""
        closing = None
        try:
            alone, anchors = self.render(number + 1)
            if anchors and (anchors[-1].message, anchors[-1].part) == (number, anchor.part):
                closing = alone[anchors[-1].end :]
        except TemplateError:
            pass
        common = self._common(rest, closing or "")
        has_calls = "tool_calls" in self.messages[number]
        ends_itself = bool((closing or "").strip()) and (not has_calls or self._ends_answers)
        end = self._ending_token(closing or "", has_calls=has_calls) if ends_itself else None
        if common.strip() and ends_itself:
            return len(common), end
        start = len(common) if has_calls else 0
        opening = re.compile(rf"\s*({self.habits.special.pattern})").match(rest, start)
        if opening is None:
            return len(common), end
        return opening.end(), end if ends_itself else opening[1]

    def _ending_token(self, closing: str, *, has_calls: bool) -> str | None:
        """The one that stops a generation: the first after an answer's text, the last after the tool calls, which hold
        tokens of their own."""
        tokens = self.habits.special.findall(closing)
        return tokens[-1 if has_calls else 0] if tokens else None

    @property
    def _ends_answers(self) -> bool:
        """Whether the template writes anything after a plain answer, other than white space."""
        if self.key not in self.habits.ends_answers:
            mark = chr(_FIRST_MARK)
            probe = (
                {"role": "user", "content": "Question"},
                {"role": "assistant", "content": f"Answer{mark}"},
            )
            try:
                text = self.habits.template.render(probe, arguments=self.chat.template_arguments)
            except TemplateError:
                text = "?"
            self.habits.ends_answers[self.key] = bool(text.rpartition(mark)[2].strip())
        return self.habits.ends_answers[self.key]

    def _after_last(self, number: int, rest: str, *, has_calls: bool) -> tuple[int, str]:
        """rest: what the template writes after the last message."""
        if rest.strip() and (not has_calls or self._ends_answers):
            if (end := self._ending_token(rest, has_calls=has_calls)) is None:
                self.notices.add(_TEXT_END.format(text=repr(rest.strip()[-40:])))
                return len(rest), ""
            self.ends.add(end)
            return self._without_prompt(rest), ""
        key = (has_calls, rest, self.key)
        if has_calls or key not in self.habits.suffixes or not self.marks_all:
            self.habits.suffixes[key] = self._suffix(number, rest, has_calls=has_calls)
        suffix, end, notice = self.habits.suffixes[key]
        self.ends.update(() if end is None else (end,))
        if notice is not None:
            self.notices.add(notice)
        return len(rest) + len(suffix), suffix

    def _without_prompt(self, rest: str) -> int:
        """The length of `rest` without a prompt for another answer, which some templates write always."""
        specials = self.habits.special.findall(self._opening_after_question())
        if not specials or specials[-1] not in rest or len(self.habits.special.findall(rest)) < 2:
            return len(rest)
        return rest.rindex(specials[-1])

    def _suffix(
        self, number: int, rest: str, *, has_calls: bool
    ) -> tuple[str, str | None, str | None]:
        """(what to add after the last answer, the token that ends it, what to say of it)."""
        mark = _FIRST_MARK + (number + 1) * _MARKS_PER_MESSAGE + 2 * _PARTS.index("content")
        following = {"role": "tool" if has_calls else "user", "content": chr(mark) + chr(mark + 1)}
        try:
            text, anchors = self.render(number + 1, following)
        except TemplateError:
            anchors = []
        if len(anchors) > 1 and anchors[-1].message == number + 1 and anchors[-2].message == number:
            between = text[anchors[-2].end : anchors[-1].first]
            opening = re.match(rf"\s*({self.habits.special.pattern})", between)
            if opening is not None and between.startswith(rest):
                return (
                    between[len(rest) : opening.end()],
                    opening[1],
                    ADDED_END.format(token=opening[1]),
                )
        if (eos := self.habits.eos_token) is None:
            return "", None, NO_END
        if content_of(self.messages[number]).endswith(eos):
            return "", eos, None
        return eos, eos, ADDED_END.format(token=eos)

    def _common(self, left: str, right: str) -> str:
        """`right` where `left` begins with it, else their common beginning up to white space or a token that the
        tokenizer keeps whole."""
        if left.startswith(right):
            return right
        pairs = enumerate(zip(left, right, strict=False))
        length = next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))
        borders = {place + 1 for place in range(length) if left[place].isspace()}
        borders |= {found.end() for found in self.habits.special.finditer(left)}
        inside = {
            place
            for found in self.habits.special.finditer(left)
            for place in range(found.start() + 1, found.end())
        }
        return left[: max((place for place in borders - inside if place <= length), default=0)]


def content_of(message: Message) -> str:
    """Its text; the content of a message that only calls tools may be None."""
    return (message["content"] or "").strip()


def writes_reasoning(template: str) -> bool:
    """Whether a template may write the reasoning of a message."""
    return re.search("reasoning_content|thinking", template) is not None


def loses_thought(content: str, said: str) -> bool:
    """Whether the thinking at the beginning of a message is not in what the template writes of it."""
    thought = _THOUGHT.match(content)
    return thought is not None and thought[1].strip() not in said
