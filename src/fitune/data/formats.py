"""Convert a row in any known format into a conversation: messages, and a loss weight for each.

    format              found by these keys                        becomes
    messages            messages: [{role, content}]                itself
    conversations       conversations: [{role, content}]           itself (minimind; looks like
                                                                   ShareGPT, but is not)
    sharegpt            conversations or messages:                 human -> user,
                        [{from, value}]                            gpt -> assistant, ...
    pairs               conversations or messages:                 user and assistant messages
                        [[question, answer]]                       (Vicuna)
    alpaca              instruction, output                        user and assistant messages
                        [input history system]
    prompt_completion   prompt, completion (text or messages)      messages; those of the prompt
                                                                   get the loss weight 0
    question_answer     one of instruction, prompt, query,         user and assistant messages
                        question, input and one of response,       (Dolly, ms-swift, GSM8K,
                        answer, output, completion, target         Firefly)
    text                text                                       plain text without a template,
                                                                   every token supervised
    preference          chosen, rejected                           two conversations
                                                                   (data/preferences.py)

The keys of the row decide, never the name of the file; `data.columns` names keys that have other
names. Texts may be lists of typed parts; tools and tool_calls may be JSON strings. None stands for
a missing key, since tables (parquet, csv) have no other way to express that. Keys that would change
the meaning of a row (a preference, a label, images) refuse it; keys without a meaning here are
counted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from fitune.boundary import parse_json
from fitune.data.keys import (
    ANSWER_KEYS,
    CONTEXT_KEYS,
    QUESTION_KEYS,
    REASONING_KEYS,
    SYSTEM_KEYS,
    TURN_KEYS,
    fault_of_turns,
    is_none,
    plain_keys,
    question_and_answer,
    refuse_other_meanings,
    refuse_several,
    template_arguments,
    unknown_keys,
)
from fitune.data.messages import (
    LEAST_WEIGHT,
    MOST_WEIGHT,
    PREFERENCE_KEYS,
    TOOL_KEYS,
    Message,
    RowError,
    joined_calls,
    kind_of,
    parsed,
    read_message,
    read_tools,
    role_of,
    split_results,
    text_of,
)

__all__ = [
    "LEAST_WEIGHT",
    "MOST_WEIGHT",
    "Conversation",
    "Format",
    "Message",
    "RowError",
    "detect_format",
    "normalise",
    "object_of",
    "renamed",
]

Format = Literal[
    "messages",
    "conversations",
    "sharegpt",
    "pairs",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "text",
    "preference",
    "labelled",
]


#: A text is tokenised as a whole, which takes about 220 bytes of memory a character.
_MOST_TEXT_CHARS = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that is ready for a chat template, or a plain text."""

    #: in the form that chat templates take
    messages: tuple[Message, ...]
    #: the loss weight of each message, None where the row gives none
    weights: tuple[float | None, ...]
    tools: list[dict[str, Any]] | None
    #: only in the format `text`, which has no messages
    text: str | None
    #: 64 bits of a hash of all this; the same content has the same digest in any format, file,
    #: order or run
    digest: int
    #: the variables other than messages and tools that the row gives the template
    template_arguments: dict[str, Any] | None = None
    #: the keys of the row that have no meaning here, for the report
    ignored: tuple[str, ...] = ()
    #: whether the answer is desirable, of a row of the objective kto
    label: bool | None = None

    @property
    def assistant_weights(self) -> tuple[float | None, ...]:
        turns = zip(self.messages, self.weights, strict=True)
        return tuple(weight for message, weight in turns if message["role"] == "assistant")


def detect_format(row: Mapping[str, object]) -> Format | None:
    """Return the format of one row, or None if its keys fit no format."""
    for key in TURN_KEYS:
        turns = parsed(row.get(key))
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            if turns[0].get("role") is not None:
                return "messages" if key == "messages" else "conversations"
            if turns[0].get("from") is not None:
                return "sharegpt"
        if _are_pairs(turns):
            return "pairs"
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "prompt_completion"
    if row.get("instruction") is not None and row.get("output") is not None:
        return "alpaca"
    if question_and_answer(row) is not None:
        return "question_answer"
    if row.get("text") is not None:
        return "text"
    return None


def _are_pairs(turns: object) -> bool:
    """Return whether these are pairs of texts, question-answer objects, or alternating texts."""
    if not isinstance(turns, list) or not turns:
        return False
    if all(isinstance(turn, str) for turn in turns):
        return len(turns) > 1
    return all(
        question_and_answer(pair) is not None
        if isinstance(pair, dict)
        else isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(isinstance(side, str) for side in pair)
        for pair in turns
    )


def normalise(
    row: Any, *, columns: Mapping[str, str] | None = None, ignored: Sequence[str] = ()
) -> tuple[Format, Conversation]:
    """Convert one row into its format and its conversation.

    columns: our name of a column -> its name in the rows.
    ignored: keys to ignore, even where they would change the meaning of the row.

    Raises RowError with the reason if the row cannot be used.
    """
    row = object_of(row, ignored)
    if columns:
        row = renamed(row, columns)
    found = detect_format(row)
    if found is None and (found := detect_format(plain := plain_keys(row))) is not None:
        row = plain
    refuse_other_meanings(row, found)
    if found is None:
        keys = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
        raise RowError(
            fault_of_turns(row)
            or f"its keys ({keys}) fit no known format: data.columns names them, as in "
            "data.columns.prompt=question data.columns.completion=answer"
        )
    if found == "question_answer":
        refuse_several(row)
    unknown = unknown_keys(row, found)
    if found == "text":
        _check_text(row["text"])
        return found, _conversation([], None, row["text"], unknown=unknown)
    turns = [part for turn in _TURNS[found](row) for part in split_results(turn)]
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if role_of(first) != "system":
        system = next((row[key] for key in SYSTEM_KEYS if row.get(key)), None)
        turns = turns if system is None else [{"role": "system", "content": system}, *turns]
    tools = read_tools(next((row[key] for key in TOOL_KEYS if row.get(key)), None))
    # minimind has the tools in its system message.
    if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":
        tools = tools or read_tools(
            next((turns[0][key] for key in TOOL_KEYS if turns[0].get(key)), None)
        )
        if len(turns) > 1 and all(
            turns[0].get(key) is None for key in ("content", "value", "text")
        ):
            turns = turns[1:]
    messages = [read_message(turn, number) for number, turn in enumerate(joined_calls(turns), 1)]
    return found, _conversation(
        messages, tools, None, arguments=template_arguments(row), unknown=unknown
    )


def _check_text(text: object) -> None:
    """Raise RowError if a plain text is none, is empty or is too long to be tokenised."""
    if text == "":
        raise RowError("'text' is empty")
    if not isinstance(text, str):
        raise RowError(f"'text' is {kind_of(text)}, not a text")
    if len(text) > _MOST_TEXT_CHARS:
        raise RowError(
            f"'text' has {len(text):,} characters, more than {_MOST_TEXT_CHARS:,}: cut it into "
            "several"
        )


def object_of(row: object, ignored: Sequence[str]) -> dict[str, object]:
    """Return a row as an object, also if it is a list of messages, a text, or JSON text.

    Keys to be ignored are left out, and what stands for nothing is None. Raises RowError for
    anything else.
    """
    return {
        key: None if is_none(value) else value
        for key, value in _any_object_of(row).items()
        if key not in ignored
    }


def _any_object_of(row: object) -> dict[str, object]:
    if isinstance(row, str) and row.lstrip().startswith(("{", "[")):
        try:
            row = parse_json(row)
        except ValueError:
            return {"text": row}
    if isinstance(row, str):
        return {"text": row}
    if (
        isinstance(row, list)
        and row
        and all(isinstance(turn, dict) and role_of(turn) is not None for turn in row)
    ):
        return {"messages": row}
    if not isinstance(row, dict):
        raise RowError(f"it is {kind_of(row)}, not an object")
    return row


def renamed(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Return the row with its columns under our names.

    Keys that would decide the format are dropped if `columns` maps other keys to their meaning.
    """
    named = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
    missing = [
        theirs
        for ours, theirs in named.items()
        if row.get(theirs) is None and ours not in _OPTIONAL_COLUMNS
    ]
    if missing:
        raise RowError(
            f"it has no '{missing[0]}', which data.columns names; its keys are {', '.join(map(str, row))}"
        )
    format_keys = {*TURN_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, "text"} if named else set()
    if {"prompt", "completion"} & named.keys():
        format_keys -= {"prompt", "completion"}
    # One answer of a preference was selected by data.columns.
    if set(PREFERENCE_KEYS) & set(named.values()):
        format_keys |= set(PREFERENCE_KEYS)
    rest = {
        key: value
        for key, value in row.items()
        if key not in format_keys and key not in named.values()
    }
    renamed = {
        **rest,
        **{ours: row[theirs] for ours, theirs in named.items() if row.get(theirs) is not None},
    }
    role, content = columns.get("role"), columns.get("content")
    key = next((key for key in TURN_KEYS if isinstance(parsed(renamed.get(key)), list)), None)
    if key is None or (role is None and content is None):
        return renamed
    turns = []
    for turn in parsed(renamed[key]):
        if isinstance(turn, dict):
            turn = dict(turn)
            for ours, theirs in (("role", role), ("content", content)):
                if theirs is not None and theirs in turn:
                    turn[ours] = turn.pop(theirs)
        turns.append(turn)
    return {**renamed, key: turns}


_OPTIONAL_COLUMNS = ("input", "system", "history", "tools")


def _conversation(
    messages: list[tuple[Message, float | None]],
    tools: list[dict[str, object]] | None,
    text: str | None,
    *,
    arguments: dict[str, object] | None = None,
    unknown: tuple[str, ...] = (),
) -> Conversation:
    parts = [messages, tools, text] if arguments is None else [messages, tools, text, arguments]
    try:
        content = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"it holds what JSON cannot write: {error}") from None
    try:
        content = json.dumps([messages, tools, text], sort_keys=True, ensure_ascii=False)
        digest = int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big")
    except UnicodeEncodeError:
        raise RowError(
            "its text is not valid Unicode (bytes that are not UTF-8, or a lone surrogate)"
        ) from None
    # A parquet file may contain values that JSON cannot express.
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(
            f"it holds values that are no text, number, list or object ({error})"
        ) from None
    return Conversation(
        tuple(message for message, _ in messages),
        tuple(weight for _, weight in messages),
        tools,
        text,
        digest,
        arguments,
        unknown,
    )


def _turns_of_list(row: Mapping[str, Any]) -> list[object]:
    key = next(key for key in TURN_KEYS if parsed(row.get(key)))
    turns: list[object] = parsed(row[key])
    return turns


def _turns_of_pairs(row: Mapping[str, object]) -> list[object]:
    turns = _turns_of_list(row)
    if all(isinstance(turn, str) for turn in turns):
        roles = ("user", "assistant")
        return [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return _pairs(turns)


def _pairs(pairs: Sequence[Any]) -> list[object]:
    turns: list[object] = []
    for pair in pairs:
        if isinstance(pair, dict):
            system = next((pair[key] for key in SYSTEM_KEYS if pair.get(key)), None)
            turns += [] if system is None else [{"role": "system", "content": system}]
            turns += _turns_of_question(pair)
        else:
            turns += [
                {"role": "user", "content": pair[0]},
                {"role": "assistant", "content": pair[1]},
            ]
    return turns


def _turns_of_question(row: Mapping[str, object]) -> list[object]:
    question_key, answer_key = question_and_answer(row) or ("", "")
    if detect_format(row) == "alpaca":
        question_key, answer_key = "instruction", "output"
    return [*_turns_before_answer(row, question_key), *_answer_turns(row, answer_key)]


def _turns_of_prompt(row: Mapping[str, object]) -> list[object]:
    turns = [
        {**turn, "loss_weight": 0} for turn in _turns_before_answer(row, "prompt", is_weighed=True)
    ]
    return [*turns, *_answer_turns(row, "completion")]


def _turns_before_answer(
    row: Mapping[str, Any], question_key: str, *, is_weighed: bool = False
) -> list[Any]:
    """Return the messages before the answer: those of a list, or the history and the question.

    The messages of a list get the loss weight 0, unless `is_weighed`.
    """
    if (messages := _messages_in(row[question_key])) is not None:
        return messages if is_weighed else [{**turn, "loss_weight": 0} for turn in messages]
    return [*_history(row), {"role": "user", "content": _question(row, question_key)}]


def _history(row: Mapping[str, object]) -> list[object]:
    history = parsed(row.get("history")) or []
    if not isinstance(history, list):
        raise RowError(f"'history' is {kind_of(history)}, not a list of pairs")
    if (messages := _messages_in(history)) is not None:
        return messages
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowError("'history' is not a list of pairs of a question and an answer")
    return _pairs(history)


def _question(row: Mapping[str, object], question_key: str) -> str:
    """Return the question, followed by its context."""
    keys = (question_key, *(key for key in CONTEXT_KEYS if key != question_key))
    return "\n".join(part for key in keys if (part := text_of(row.get(key) or "", f"'{key}'")))


def _answer_turns(row: Mapping[str, Any], answer_key: str) -> list[object]:
    answer = row[answer_key]
    if (messages := _messages_in(answer)) is not None:
        return messages
    if (
        isinstance(answer, list)
        and len(answer) > 1
        and any(isinstance(part, str) for part in answer)
    ):
        raise RowError(f"'{answer_key}' is a list of {len(answer)} answers, not one")
    thought = next(
        (row[key] for key in REASONING_KEYS if isinstance(row.get(key), str) and row[key]), None
    )
    if (
        thought is not None
        and isinstance(answer, str)
        and ("</think>" in answer or thought.strip() in answer)
    ):
        # The answer already contains the reasoning.
        thought = None
    turn = {"role": "assistant", "content": answer}
    return [turn if thought is None else {**turn, "reasoning_content": thought}]


def _messages_in(value: object) -> list[Any] | None:
    turns = parsed(value)
    is_messages = (
        isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
    )
    return turns if is_messages and role_of(turns[0]) is not None else None


_TURNS = {
    "messages": _turns_of_list,
    "conversations": _turns_of_list,
    "sharegpt": _turns_of_list,
    "pairs": _turns_of_pairs,
    "alpaca": _turns_of_question,
    "prompt_completion": _turns_of_prompt,
    "question_answer": _turns_of_question,
}
