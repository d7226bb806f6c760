"""Find the turns of the assistant from marked renderings of a conversation (data/marked.py).

`turns.py` says where a turn begins and ends, and why.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fitune.data.chat_template import TemplateError
from fitune.data.lost_parts import (
    ADDED_END,
    LOST_THOUGHT,
    NO_END,
    NO_END_BEFORE,
    NOT_SHOWN,
    REWRITTEN,
    TEXT_END,
    THINKING,
    loses_thought,
    writes_reasoning,
)
from fitune.data.marked import (
    FIRST_MARK,
    MARKS_PER_MESSAGE,
    PARTS,
    Anchor,
    MarkedRendering,
    TurnAnchors,
    UnclearError,
    content_of,
)


@dataclass
class MarkedConversation(MarkedRendering):
    """Finds the turns of the assistant in a marked rendering of a conversation."""

    def turns(
        self, text: str, anchors: Sequence[Anchor]
    ) -> tuple[tuple[TurnAnchors | None, ...], str]:
        """Return the turn of each assistant message, and what must be added to end the last one.

        Raises UnclearError if the last answer is not in the text as the row has it.
        """
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
        """Return the turn of one message and what must be added to the text to end it.

        The turn is None if the template does not write the message as the row has it.
        """
        message = self.messages[number]
        own_anchors = [place for place, anchor in enumerate(anchors) if anchor.message == number]
        parts = [anchors[place].part for place in own_anchors]
        if not own_anchors and not content_of(message):
            self.notices.add(
                NOT_SHOWN.format(
                    what="tool_calls" if message.get("tool_calls") else "reasoning_content"
                )
            )
            return None, ""
        if (
            not own_anchors
            or len(own_anchors) != own_anchors[-1] - own_anchors[0] + 1
            or parts.count("content") > 1
        ):
            self.notices.add(REWRITTEN)
            return None, ""
        if content_of(message) and "content" not in parts:
            self.notices.add(REWRITTEN)
            return None, ""
        if message.get("tool_calls") and "tool_calls" not in parts:
            self.notices.add(NOT_SHOWN.format(what="tool_calls"))
        before = self._before(number, own_anchors[0], text, anchors)
        first, end = anchors[own_anchors[0]].first, anchors[own_anchors[0]].end
        start = (end if first is None else first) - before
        if not self._keeps_thought(number, text[start : anchors[own_anchors[-1]].end], parts):
            self.notices.add(LOST_THOUGHT)
            return None, ""
        after, suffix = self._after(number, own_anchors[-1], text, anchors)
        return TurnAnchors(own_anchors[0], own_anchors[-1], before, after), suffix

    def _keeps_thought(self, number: int, rendered: str, parts: Sequence[str]) -> bool:
        """Return whether a turn may be trained on as to its thinking.

        False if the thinking of an earlier turn is missing in what the template writes of it.
        """
        message = self.messages[number]
        lost = bool(message.get("reasoning_content")) and "reasoning_content" not in parts
        if lost and not writes_reasoning(self.habits.template.text):
            self.notices.add(NOT_SHOWN.format(what="reasoning_content"))
            return True
        lost = lost or (self.style != "empty" and loses_thought(content_of(message), rendered))
        is_last = all(later["role"] != "assistant" for later in self.messages[number + 1 :])
        if lost and is_last:
            self.notices.add(NOT_SHOWN.format(what="thinking"))
        return not lost or is_last

    def _before(self, number: int, place: int, text: str, anchors: Sequence[Anchor]) -> int:
        """Return how many characters before its first anchor a turn begins."""
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
        thinks = self.style != "empty" and THINKING.match(message["content"] or "") is not None
        if common and (thinks or "tool_calls" in message or "reasoning_content" in message):
            return len(lead) - len(common)
        return self._spaces(number, lead[len(common) :])

    def _is_plain(self, number: int) -> bool:
        """Return whether only the template decides the text around a message's marks.

        That text then holds for other rows too.
        """
        content = self.messages[number]["content"] or ""
        return self.style == "empty" or content == content.strip()

    def _spaces(self, number: int, lead: str) -> int:
        """Return how many white-space characters before the first anchor belong to the message."""
        content = self.messages[number]["content"] or ""
        spaces = content[: len(content) - len(content.lstrip())]
        if not spaces or self.style == "empty" or not lead.endswith(spaces):
            return 0
        # A template that strips the message may itself write such white space before it.
        message, *later = self.marked[number:]
        stripped = {**message, "content": message["content"].lstrip()}
        try:
            # in its place, since a template may strip the last answer alone
            texts = [self.render(number, each, *later)[0] for each in (message, stripped)]
            is_stripped = texts[0] == texts[1]
        except TemplateError:
            is_stripped = False
        return 0 if is_stripped else len(spaces)

    def _opening(self, number: int, previous: Anchor | None) -> str | None:
        """Return what the template writes between the previous message and an answer.

        Returns None if the template does not render a generation prompt there.
        """
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
            # The template has no generation prompt: either it has opened the answer already, or
            # the opening is written with each answer.
            mark = FIRST_MARK + number * MARKS_PER_MESSAGE + 2 * PARTS.index("content")
            answer = {"role": "assistant", "content": chr(mark) + chr(mark + 1)}
            answered, anchors = self.render(number, answer)
        except TemplateError:
            return opening
        if not anchors or anchors[-1].message != number or anchors[-1].first is None:
            return opening
        lead = answered[anchors[-2].end if len(anchors) > 1 else 0 : anchors[-1].first]
        return lead if lead.startswith(opening) and lead[len(opening) :].strip() else opening

    def _before_first(self, number: int, lead: str) -> int:
        """Return the same as `_before` for an answer without a generation prompt to compare with.

        The template renders no prompt there: the answer is the first message, or follows one that
            may not be the last. The opening of an answer to a question is taken instead.
        """
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
        """Return what the template writes between a question and its answer.

        It is '' if the template refuses a question.
        """
        key = ("a question", self.key)
        if key not in self.habits.openings:
            question = {"role": "user", "content": f"Question{chr(FIRST_MARK)}"}
            try:
                prompt = self.habits.template.render(
                    [question], arguments=self.chat.template_arguments, add_generation_prompt=True
                )
            except TemplateError:
                prompt = ""
            self.habits.openings[key] = prompt.rpartition(chr(FIRST_MARK))[2]
        return self.habits.openings[key]

    def _after(
        self, number: int, place: int, text: str, anchors: Sequence[Anchor]
    ) -> tuple[int, str]:
        """Return how many characters after its last anchor a turn ends, and what to add there.

        The first number includes the added characters.
        """
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
        """Record the end of an answer that other messages follow.

        Nothing after such an answer is learned, so an answer without an end teaches nothing wrong;
        it only does not teach to stop. An end that is added there would not be in any prompt of a
        generation.
        """
        if end is not None:
            self.ends.add(end)
        elif not closing.strip() and not has_calls:
            self.notices.add(NO_END_BEFORE)

    def _end_before_others(self, number: int, anchor: Anchor, rest: str) -> tuple[int, str | None]:
        """Return how many characters after its text an answer ends, and the token that ends it.

        rest: the text between this answer and the next message.
        """
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
        """Return the token that stops a generation.

        It is the first one after the text of an answer, and the last one after tool calls, since
        those contain tokens of their own.
        """
        tokens = self.habits.special.findall(closing)
        return tokens[-1 if has_calls else 0] if tokens else None

    @property
    def _ends_answers(self) -> bool:
        """Return whether the template writes anything but white space after a plain answer."""
        if self.key not in self.habits.ends_answers:
            mark = chr(FIRST_MARK)
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
        """Return the same as `_after`, for the last message.

        rest: what the template writes after it.
        """
        if rest.strip() and (not has_calls or self._ends_answers):
            if (end := self._ending_token(rest, has_calls=has_calls)) is None:
                self.notices.add(TEXT_END.format(text=repr(rest.strip()[-40:])))
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
        """Return the length of `rest` without a prompt for another answer.

        Some templates always write one.
        """
        specials = self.habits.special.findall(self._opening_after_question())
        if not specials or specials[-1] not in rest or len(self.habits.special.findall(rest)) < 2:
            return len(rest)
        return rest.rindex(specials[-1])

    def _suffix(
        self, number: int, rest: str, *, has_calls: bool
    ) -> tuple[str, str | None, str | None]:
        """Return (what to add after the last answer, the token that ends it, the notice)."""
        mark = FIRST_MARK + (number + 1) * MARKS_PER_MESSAGE + 2 * PARTS.index("content")
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
        """Return `right` if `left` begins with it, else their common beginning.

        The common beginning ends after white space or after a token that the tokenizer never
        splits.
        """
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
