"""Convert a row of preferences into two conversations: with the chosen and the rejected answer.

    found by                                              prompt
    chosen, rejected: texts                               prompt, instruction (input, history), ...
                                                          or conversations without their last answer
    chosen, rejected: a message or messages that          as above (TRL, LLaMA-Factory)
        begin with the assistant
    chosen, rejected: whole conversations                 the messages that both begin with
                                                          (TRL without a prompt, UltraFeedback)
    chosen, rejected: texts without any prompt            the tokens that both begin with (HH-RLHF)

Only what follows the prompt is judged. Every other key means what it means for one answer
(data/formats.py), which reads the two conversations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TypeGuard

from fitune.data.formats import Conversation, Format, normalise, object_of, renamed
from fitune.data.keys import ANSWER_KEYS, QUESTION_KEYS, TURN_KEYS
from fitune.data.messages import RowError, kind_of, parsed, role_of
from fitune.data.tokenise import Encoded

#: the keys of the better and of the worse answer, as TRL, LLaMA-Factory and ms-swift name them
_CHOSEN_KEYS = ("chosen", "chosen_response", "chosen_answer")
_REJECTED_KEYS = ("rejected", "rejected_response", "rejected_answer")
#: what was said of the answers, of which only the order matters here
_SCORE_KEYS = frozenset((
    "score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating",
    "rejected_rating", "chosen-rating", "rejected-rating", "chosen_model", "rejected_model",
    "chosen-model", "rejected-model", "margin", "preference_strength",
))  # fmt: skip
_ASSISTANTS = ("assistant", "gpt", "model", "bot", "chatgpt", "function_call", "tool_call")


def normalise_pair(
    row: object, *, columns: Mapping[str, str] | None = None, ignored: Sequence[str] = ()
) -> tuple[Format, tuple[Conversation, Conversation]]:
    """Convert one row into the conversations of its chosen and of its rejected answer.

    columns, ignored: as in `normalise`.

    Raises RowError with the reason if the row cannot be used.
    """
    row = object_of(row, ignored)
    if named := {ours: name for ours, name in (columns or {}).items() if ours != name}:
        row = renamed(row, named)
    chosen_key, rejected_key = (
        next((key for key in keys if row.get(key) not in (None, "", [], {})), None)
        for keys in (_CHOSEN_KEYS, _REJECTED_KEYS)
    )
    if chosen_key is None or rejected_key is None:
        missing = "chosen" if chosen_key is None else "rejected"
        raise RowError(
            f"it has no '{missing}' answer, which a pair of preferences needs; its keys are "
            f"{', '.join(map(str, row))}: data.columns.{missing}=KEY names it"
        )
    chosen, rejected = _answer(row[chosen_key]), _answer(row[rejected_key])
    if chosen == rejected:
        raise RowError("its chosen and its rejected answer are the same")
    rest = {
        key: value
        for key, value in row.items()
        if key not in (*_CHOSEN_KEYS, *_REJECTED_KEYS) and key not in _SCORE_KEYS
    }
    prompt, answers = _prompt_and_answers(rest, chosen, rejected)
    rest = {
        key: rest[key]
        for key in rest
        if key not in (*TURN_KEYS, *QUESTION_KEYS, *ANSWER_KEYS) or key == "input"
    }
    if prompt is None:
        pair = [{**rest, "text": answer} for answer in answers]
    else:
        pair = [{**rest, "prompt": prompt, "completion": answer} for answer in answers]
    (_, first), (_, second) = (normalise(each) for each in pair)
    return "preference", (first, second)


def _prompt_and_answers(
    row: Mapping[str, object], chosen: object, rejected: object
) -> tuple[object, tuple[object, object]]:
    """Return the prompt, None where texts alone are compared, and both answers.

    Raises RowError if the answers are neither texts nor messages, or no prompt is found.
    """
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, str) and not _are_messages(answer):
            raise RowError(f"its '{name}' is {kind_of(answer)}, not a text or messages")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("one of its answers is a text and the other is messages: write both alike")
    if _are_messages(chosen) and _are_messages(rejected) and not _is_answer(chosen[0]):
        same = takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False))
        common = [turn for turn, _ in same]
        if not common or len(common) == min(len(chosen), len(rejected)):
            raise RowError(
                "its chosen and its rejected conversation do not differ in their answers after the "
                "same question"
            )
        return common, (chosen[len(common) :], rejected[len(common) :])
    turns = next((row[key] for key in TURN_KEYS if row.get(key)), None)
    question = next((row[key] for key in QUESTION_KEYS if row.get(key) is not None), None)
    prompt = question if turns is None else parsed(turns)
    if prompt is None and not isinstance(chosen, str):
        raise RowError("it has answers but no prompt: data.columns.prompt=KEY names it")
    return prompt, (chosen, rejected)


def after_common_prefix(parts: list[Encoded], sample: Sequence[Conversation]) -> list[Encoded]:
    """Return the sequences of a sample, of which only what differs is judged in a pair of texts."""
    if len(parts) == 1 or sample[0].text is None:
        return parts
    first, second = (part.input_ids for part in parts)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    start = max(1, sum(1 for _ in same))
    return [
        replace(
            part,
            spans=tuple(
                (max(first, start), end, weight) for first, end, weight in part.spans if end > start
            ),
        )
        for part in parts
    ]


def _answer(value: object) -> object:
    """Return messages as a list of them, also if they are JSON text; anything else as it is."""
    read = parsed(value)
    read = [read] if isinstance(read, dict) else read
    return read if _are_messages(read) else value


def _are_messages(value: object) -> TypeGuard[list[dict[str, object]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and role_of(turn) is not None for turn in value)
    )


def _is_answer(turn: Mapping[str, object]) -> bool:
    return str(role_of(turn)).strip().lower() in _ASSISTANTS
