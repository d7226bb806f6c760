"""Interpret the keys of a row: which ones are read, which refuse the row, which are ignored."""

from collections.abc import Mapping
from typing import Any

from fitune.data.messages import (
    MEDIA_KEYS,
    PREFERENCE_KEYS,
    TOOL_KEYS,
    TRAINED_PARTS_KEYS,
    RowError,
    kind_of,
    parsed,
)

TURN_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
QUESTION_KEYS = (
    "instruction", "prompt", "query", "question", "problem", "inputs", "user", "human", "input",
)  # fmt: skip
ANSWER_KEYS = (
    "response", "answer", "output", "completion", "solution", "target", "targets", "assistant",
    "bot", "gpt", "reply", "content",
)  # fmt: skip
CONTEXT_KEYS = ("input", "context")
SYSTEM_KEYS = ("system", "system_prompt")
#: reasoning that precedes the answer, in a row of a question and its answer
REASONING_KEYS = (
    "reasoning_content", "reasoning", "thinking", "think", "cot", "complex_cot", "chain_of_thought",
)  # fmt: skip
_ARGUMENT_KEYS = ("chat_template_kwargs",)
#: Variables other than the messages that chat templates of public models take. A text under
#: `thinking` is reasoning instead.
_ARGUMENT_NAMES = (
    "enable_thinking", "thinking", "reasoning_effort", "preserve_thinking", "keep_past_thinking",
    "thinking_budget", "model_identity", "builtin_tools", "custom_instructions", "python_tools",
    "xml_tools",
)  # fmt: skip
_KNOWN_KEYS = (*SYSTEM_KEYS, *TOOL_KEYS, *_ARGUMENT_KEYS, *_ARGUMENT_NAMES, "documents")
LABEL_KEYS = (
    "label", "kto_tag", "desirable", "is_desirable", "accepted", "is_accepted", "correct",
    "is_correct", "is_good", "thumbs_up",
)  # fmt: skip
BAD_LABELS = (
    "false", "0", "0.0", "-1", "-1.0", "no", "bad", "negative", "undesirable", "rejected", "wrong",
    "incorrect",
)  # fmt: skip
_ROW_WEIGHT_KEYS = ("loss_weight", "weight", "sample_weight", "loss_scale")
_ONE_ANSWER = ("response", "answer", "output", "completion", "solution", "target", "targets")
_ONE_QUESTION = ("instruction", "prompt", "query", "question", "problem", "inputs")
#: keys that do not change what a row means, so they are ignored without a warning
_HARMLESS_KEYS = frozenset((
    "id", "_id", "ids", "uid", "uuid", "idx", "index", "row_id", "prompt_id", "conversation_id",
    "message_id", "source", "dataset", "dataset_name", "origin", "url", "title", "license",
    "author", "created", "created_at", "date", "timestamp", "category", "type", "task", "task_name",
    "tag", "tags", "topic", "domain", "subject", "lang", "language", "model", "generator",
    "metadata", "meta", "extra", "info", "hash", "md5", "num_turns", "num_tokens", "token_count",
    "length", "score", "rating", "quality", "difficulty", "level", "__index_level_0__",
    "unnamed: 0", "",
))  # fmt: skip
LEAVE_OUT = "leave the key out, or name it in data.ignore_keys to train on the sample all the same"


def is_none(value: object) -> bool:
    """Return whether this is how a table writes a missing value: None or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def plain_keys(row: Mapping[object, object]) -> dict[Any, object]:
    """Return the row with keys in lower case, without white space around them.

    If two keys would become the same, the row is returned as it is.
    """
    plain = {
        key.strip().lower() if isinstance(key, str) else key: value for key, value in row.items()
    }
    return plain if len(plain) == len(row) else dict(row)


def question_and_answer(row: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the keys of the question and the answer; None where the row has no such keys."""
    question_key = next((key for key in QUESTION_KEYS if row.get(key) is not None), None)
    answer_key = next((key for key in ANSWER_KEYS if row.get(key) is not None), None)
    return None if question_key is None or answer_key is None else (question_key, answer_key)


def refuse_several(row: Mapping[str, object]) -> None:
    """Raise RowError if a row has several questions or answers, any of which could be meant."""
    for keys, what, ours in (
        (_ONE_QUESTION, "questions", "prompt"),
        (_ONE_ANSWER, "answers", "completion"),
    ):
        given = {key: row[key] for key in keys if row.get(key) not in (None, "")}
        if len({str(value).strip() for value in given.values()}) > 1:
            listed = " and ".join(f"'{key}'" for key in given)
            raise RowError(
                f"it has several {what}, {listed}: data.columns.{ours}={next(iter(given))} names the one"
            )


def refuse_other_meanings(row: Mapping[str, object], found: str | None) -> None:
    """Raise RowError for a key by which the row is no answer to imitate, or is not text alone.

    found: the row's format.
    """
    for key, value in row.items():
        if value is None or value in ([], "", {}):
            continue
        if key in PREFERENCE_KEYS:
            takes_it = (
                "data.columns.completion=chosen (of texts with a prompt), data.columns.text=chosen "
                "(of texts alone) or "
                "data.columns.messages=chosen trains on it alone, objective=dpo on both answers"
            )
            hint = takes_it if key == "chosen" else LEAVE_OUT
            raise RowError(
                f"'{key}' makes it a preference, and only answers to imitate can be trained on: {hint}"
            )
        if key in MEDIA_KEYS:
            raise RowError(
                f"'{key}' gives it pictures or sound, and only text can be trained on: {LEAVE_OUT}"
            )
        if key in TRAINED_PARTS_KEYS and found != "text":
            raise RowError(
                f"'{key}' says what of it is learned, in a way that is not known here: {LEAVE_OUT}"
            )
        if key in _ROW_WEIGHT_KEYS and found is not None and value not in (1, "1", "1.0"):
            raise RowError(
                f"'{key}' is {str(value)[:40]}, which weighs the whole sample: here its messages "
                "may carry "
                "a loss_weight; "
                f"{LEAVE_OUT}"
            )
    for key in LABEL_KEYS:
        value = row.get(key)
        if (
            found not in (None, "text")
            and value is not None
            and str(value).strip().lower() in BAD_LABELS
        ):
            raise RowError(
                f"its '{key}' is {value}, which marks its answer as a bad one (KTO): {LEAVE_OUT}"
            )


def unknown_keys(row: Mapping[str, object], found: str) -> tuple[str, ...]:
    """Return the keys of a row in the format `found` that are neither read nor harmless."""
    harmless: set[str] = set()
    if found in ("messages", "conversations", "sharegpt", "pairs"):
        used = {next(key for key in TURN_KEYS if parsed(row.get(key)))}
        # UltraChat repeats the first message under "prompt".
        harmless = {"prompt"}
    elif found == "text":
        used = {"text"}
    else:
        question_key, answer_key = question_and_answer(row) or ("prompt", "completion")
        used = (
            {question_key, answer_key, "instruction", "output"}
            if found == "alpaca"
            else {question_key, answer_key}
        )
        if found == "prompt_completion":
            used = {"prompt", "completion"}
        used |= {*CONTEXT_KEYS, "history", *REASONING_KEYS}
        # Alpaca's own files repeat the whole sample under "text".
        harmless = {"text"} if found == "alpaca" else set()
    known = {*used, *harmless, *_KNOWN_KEYS} if found != "text" else {*used, *harmless}
    return tuple(
        str(key)
        for key, value in row.items()
        if value not in (None, "", [], {})
        and key not in known
        and str(key).lower() not in _HARMLESS_KEYS
    )


def template_arguments(row: Mapping[str, object]) -> dict[str, Any] | None:
    """Return the variables other than messages and tools that a row gives its chat template.

    Raises RowError if they have a reserved name.
    """
    arguments: dict[str, object] = {}
    for key in _ARGUMENT_NAMES:
        value = row.get(key)
        if value is not None and not (key == "thinking" and not isinstance(value, bool)):
            arguments[key] = value
    for key in _ARGUMENT_KEYS:
        given = _object(row.get(key), key)
        arguments |= {name: value for name, value in (given or {}).items() if value is not None}
    if (documents := parsed(row.get("documents"))) and isinstance(documents, list):
        arguments["documents"] = documents
    if reserved := sorted({"messages", "tools", "add_generation_prompt"} & arguments.keys()):
        raise RowError(f"its template arguments name '{reserved[0]}', which is not one")
    return arguments or None


def _object(value: object, what: str) -> dict[str, object] | None:
    value = parsed(value, what)
    if value is not None and not isinstance(value, dict):
        raise RowError(f"'{what}' is {kind_of(value)}, not an object")
    return value


def fault_of_turns(row: Mapping[str, object]) -> str | None:
    """Return why the messages of a row cannot be read; None where it has no messages."""
    key = next((key for key in TURN_KEYS if row.get(key) is not None), None)
    if key is None:
        return None
    turns = parsed(row[key])
    if not isinstance(turns, list):
        keys = ", ".join(str(key) for key, value in row.items() if value is not None)
        return f"'{key}' is {kind_of(turns)}, not a list of messages; the sample's keys are {keys}"
    if not turns:
        return f"'{key}' is empty"
    if not isinstance(turns[0], dict):
        return f"the first of '{key}' is {kind_of(turns[0])}, not an object"
    keys = ", ".join(map(str, turns[0]))
    return f"the first of '{key}' has neither 'role' nor 'from'; its keys are {keys}: data.columns.role=KEY names the one"
