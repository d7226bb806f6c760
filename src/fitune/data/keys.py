"""What the keys of a row mean: those that are read, those that change its meaning, and those that mean nothing here."""

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
QUESTION_KEYS = (*("instruction", "prompt", "query", "question", "problem", "inputs", "user", "human", "input"),)
ANSWER_KEYS = (
    *("response", "answer", "output", "completion", "solution", "target", "targets", "assistant", "bot", "gpt"),
    *("reply", "content"),
)
CONTEXT_KEYS = ("input", "context")
SYSTEM_KEYS = ("system", "system_prompt")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "think", "cot", "complex_cot", "chain_of_thought")
"""Of a question and its answer: what is thought before it is said."""
_ARGUMENT_KEYS = ("chat_template_kwargs",)
_ARGUMENT_NAMES = (
    *("enable_thinking", "thinking", "reasoning_effort", "preserve_thinking", "keep_past_thinking"),
    *("thinking_budget", "model_identity", "builtin_tools", "custom_instructions", "python_tools", "xml_tools"),
)
"""What templates of public models are given beside the messages; a text under `thinking` is what is thought."""
_KNOWN_KEYS = (*SYSTEM_KEYS, *TOOL_KEYS, *_ARGUMENT_KEYS, *_ARGUMENT_NAMES, "documents")
_LABEL_KEYS = (
    *("label", "kto_tag", "desirable", "is_desirable", "accepted", "is_accepted", "correct", "is_correct"),
    *("is_good", "thumbs_up"),
)
_BAD_LABELS = (
    *("false", "0", "0.0", "-1", "-1.0", "no", "bad", "negative", "undesirable", "rejected", "wrong", "incorrect"),
)
_ROW_WEIGHT_KEYS = ("loss_weight", "weight", "sample_weight", "loss_scale")
_ONE_ANSWER = ("response", "answer", "output", "completion", "solution", "target", "targets")
_ONE_QUESTION = ("instruction", "prompt", "query", "question", "problem", "inputs")
_HARMLESS_KEYS = frozenset(
    (
        *("id", "_id", "ids", "uid", "uuid", "idx", "index", "row_id", "prompt_id", "conversation_id", "message_id"),
        *("source", "dataset", "dataset_name", "origin", "url", "title", "license", "author", "created", "created_at"),
        *("date", "timestamp", "category", "type", "task", "task_name", "tag", "tags", "topic", "domain", "subject"),
        *("lang", "language", "model", "generator", "metadata", "meta", "extra", "info", "hash", "md5", "num_turns"),
        *("num_tokens", "token_count", "length", "score", "rating", "quality", "difficulty", "level"),
        *("__index_level_0__", "unnamed: 0", ""),  # the index of a table
    )
)
LEAVE_OUT = "leave the key out, or name it in data.ignore_keys to train on the sample all the same"


def is_none(value: Any) -> bool:
    """Whether a table says so that a row has no such value: None, or a number that is none."""
    return value is None or (isinstance(value, float) and value != value)


def plain_keys(row: Mapping[Any, Any]) -> dict[Any, Any]:
    """The row under its keys in small letters, without white space around them; itself where two would be the same."""
    plain = {key.strip().lower() if isinstance(key, str) else key: value for key, value in row.items()}
    return plain if len(plain) == len(row) else dict(row)


def question_and_answer(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of a row that hold them, None where it has no such keys."""
    asked = next((key for key in QUESTION_KEYS if row.get(key) is not None), None)
    said = next((key for key in ANSWER_KEYS if row.get(key) is not None), None)
    return None if asked is None or said is None else (asked, said)


def refuse_several(row: Mapping[str, Any]) -> None:
    """Raises RowError where a row has several questions or answers, of which either could be meant."""
    for keys, what, ours in ((_ONE_QUESTION, "questions", "prompt"), (_ONE_ANSWER, "answers", "completion")):
        held = {key: row[key] for key in keys if row.get(key) not in (None, "")}
        if len({str(value).strip() for value in held.values()}) > 1:
            words = " and ".join(f"'{key}'" for key in held)
            raise RowError(f"it has several {what}, {words}: data.columns.{ours}={next(iter(held))} names the one")


def refuse_other_meanings(row: Mapping[str, Any], found: str | None) -> None:
    """Raises RowError for a key that says that this row is not an answer to learn, or not text alone.

    found: the row's format."""
    for key, value in row.items():
        if value is None or value in ([], "", {}):
            continue
        if key in PREFERENCE_KEYS:
            takes_it = (
                "data.columns.completion=chosen (of texts with a prompt), data.columns.text=chosen (of texts alone) or "
                "data.columns.messages=chosen trains on it alone"
            )
            hint = takes_it if key == "chosen" else LEAVE_OUT
            raise RowError(f"'{key}' makes it a preference, and only answers to imitate can be trained on: {hint}")
        if key in MEDIA_KEYS:
            raise RowError(f"'{key}' gives it pictures or sound, and only text can be trained on: {LEAVE_OUT}")
        if key in TRAINED_PARTS_KEYS and found != "text":
            raise RowError(f"'{key}' says what of it is learned, in a way that is not known here: {LEAVE_OUT}")
        if key in _ROW_WEIGHT_KEYS and found is not None and value not in (1, "1", "1.0"):
            raise RowError(
                f"'{key}' is {str(value)[:40]}, which weighs the whole sample: here its messages may carry "
                "a loss_weight; "
                f"{LEAVE_OUT}"
            )
    for key in _LABEL_KEYS:
        value = row.get(key)
        if found not in (None, "text") and value is not None and str(value).strip().lower() in _BAD_LABELS:
            raise RowError(f"its '{key}' is {value}, which marks its answer as a bad one (KTO): {LEAVE_OUT}")


def unknown_keys(row: Mapping[str, Any], found: str) -> tuple[str, ...]:
    """The keys of a row of the format `found` that nothing reads and that are not harmless."""
    harmless: set[str] = set()
    if found in ("messages", "conversations", "sharegpt", "pairs"):
        used = {next(key for key in TURN_KEYS if parsed(row.get(key)))}
        harmless = {"prompt"}  # of the first message, as in UltraChat
    elif found == "text":
        used = {"text"}
    else:
        asked, said = question_and_answer(row) or ("prompt", "completion")
        used = {asked, said, "instruction", "output"} if found == "alpaca" else {asked, said}
        if found == "prompt_completion":
            used = {"prompt", "completion"}
        used |= {*CONTEXT_KEYS, "history", *REASONING_KEYS}
        harmless = {"text"} if found == "alpaca" else set()  # the same once more, as in Alpaca's own files
    known = {*used, *harmless, *_KNOWN_KEYS} if found != "text" else {*used, *harmless}
    return tuple(
        str(key)
        for key, value in row.items()
        if value not in (None, "", [], {}) and key not in known and str(key).lower() not in _HARMLESS_KEYS
    )


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the row gives its template beside messages and tools. Raises RowError."""
    arguments: dict[str, Any] = {}
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


def _object(value: Any, what: str) -> dict[str, Any] | None:
    value = parsed(value, what)
    if value is not None and not isinstance(value, dict):
        raise RowError(f"'{what}' is {kind_of(value)}, not an object")
    return value


def fault_of_turns(row: Mapping[str, Any]) -> str | None:
    """Why the messages of a row that has some cannot be read; None where it has none."""
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
    return (
        f"the first of '{key}' has neither 'role' nor 'from'; its keys are {keys}: data.columns.role=KEY names the one"
    )
