"""A row in any of the formats people have -> a conversation: messages for a chat template and a loss weight for each.

    format              told by these keys                           becomes
    messages            messages: [{role, content}]                  itself
    conversations       conversations: [{role, content}]             itself (minimind; looks like ShareGPT, is not)
    sharegpt            conversations or messages: [{from, value}]   human -> user, gpt -> assistant, ...
    pairs               conversations or messages: [[asked, said]]   user and assistant messages (Vicuna)
    alpaca              instruction, output [input history system]   user and assistant messages
    prompt_completion   prompt, completion (text or messages)        the prompt's messages get the loss weight 0
    question_answer     one of instruction, prompt, query, question, user and assistant messages (Dolly, ms-swift,
                        input and one of response, answer, output,   GSM8K, Firefly)
                        completion, target
    text                text                                         plain text, no template, every token supervised

The keys of the row decide, never the name of the file; `data.columns` names those that are called otherwise. Texts may
be lists of typed parts; tools and tool_calls may be JSON strings; a None stands for a missing key, since tables
(parquet, csv) have no other way to say so. Keys that would change what a row means (a preference, a label, pictures)
refuse it; those that mean nothing here are counted.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

Format = Literal[
    "messages", "conversations", "sharegpt", "pairs", "alpaca", "prompt_completion", "question_answer", "text"
]
Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")
_WEIGHT_KEYS = ("loss_weight", "weight", "loss", "train")
_TOOL_KEYS = ("tools", "functions")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TURN_KEYS = ("messages", "conversations", "conversation")
_QUESTION_KEYS = ("instruction", "prompt", "query", "question", "input")
_ANSWER_KEYS = ("response", "answer", "output", "completion", "target")
_CONTEXT_KEYS = ("input", "context")
_SYSTEM_KEYS = ("system", "system_prompt")
_ARGUMENT_KEYS = ("chat_template_kwargs",)
_KNOWN_KEYS = (*_SYSTEM_KEYS, *_TOOL_KEYS, *_ARGUMENT_KEYS, "documents")
_PREFERENCE_KEYS = (
    *("chosen", "rejected", "rejected_response", "rejected_responses", "rejected_messages", "rejected_images"),
    *("preference", "preferred", "winner", "kto_tag"),
)
_MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios", "pixel_values")
_LABEL_KEYS = ("label",)
_TRAINED_PARTS_KEYS = ("train_detail", "train_on_input", "train_on_turn", "labels", "loss_mask", "assistant_masks")
_HARMLESS_KEYS = frozenset(
    (
        *("id", "_id", "ids", "uid", "uuid", "idx", "index", "row_id", "prompt_id", "conversation_id", "message_id"),
        *("source", "dataset", "dataset_name", "origin", "url", "title", "license", "author", "created", "created_at"),
        *("date", "timestamp", "category", "type", "task", "task_name", "tag", "tags", "topic", "domain", "subject"),
        *("lang", "language", "model", "generator", "metadata", "meta", "extra", "info", "hash", "md5", "num_turns"),
        *("num_tokens", "token_count", "length", "score", "rating", "quality", "difficulty", "level"),
        "__index_level_0__",
    )
)


class RowError(ValueError):
    """One row that cannot be used, and why; counted and listed by the reader."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: as a chat template takes them. weights: one per message, None where the row gives none.
    text: set for the format `text`, which has no messages. digest: 64 bits of a hash of all this, the same for the same
    content in any format, file, order or run. template_arguments: what the row gives the template beside them.
    ignored: keys of the row that have no meaning here, for a report."""

    messages: tuple[Message, ...]
    weights: tuple[float | None, ...]
    tools: list[dict[str, Any]] | None
    text: str | None
    digest: int
    template_arguments: dict[str, Any] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def assistant_weights(self) -> tuple[float | None, ...]:
        turns = zip(self.messages, self.weights, strict=True)
        return tuple(weight for message, weight in turns if message["role"] == "assistant")


def detect_format(row: Mapping[str, Any]) -> Format | None:
    """The format of one row, None when its keys fit none."""
    for key in _TURN_KEYS:
        turns = _parsed(row.get(key))
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
    if _question_and_answer(row) is not None:
        return "question_answer"
    if row.get("text") is not None:
        return "text"
    return None


def _are_pairs(turns: Any) -> bool:
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(side, str) for side in pair)
            for pair in turns
        )
    )


def _question_and_answer(row: Mapping[str, Any]) -> tuple[str, str] | None:
    asked = next((key for key in _QUESTION_KEYS if row.get(key) is not None), None)
    said = next((key for key in _ANSWER_KEYS if row.get(key) is not None), None)
    return None if asked is None or said is None else (asked, said)


def normalise(
    row: Any, *, columns: Mapping[str, str] | None = None, ignored: Sequence[str] = ()
) -> tuple[Format, Conversation]:
    """One row -> its format and its conversation.

    columns: our name of a column -> what the rows call it. ignored: keys to leave out of account, even where
    they would change the row's meaning. Raises RowError with the reason when it cannot be used.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is {_kind(row)}, not an object")
    if ignored:
        row = {key: value for key, value in row.items() if key not in ignored}
    if columns:
        row = _renamed(row, columns)
    found = detect_format(row)
    _refuse_other_meanings(row, found)
    if found is None:
        keys = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
        raise RowError(
            _fault_of_turns(row)
            or f"its keys ({keys}) fit no known format: data.columns names them, as in "
            "data.columns.prompt=question data.columns.completion=answer"
        )
    unknown = _unknown_keys(row, found)
    if found == "text":
        if not isinstance(row["text"], str) or not row["text"]:
            raise RowError("'text' is empty" if row["text"] == "" else f"'text' is {_kind(row['text'])}, not a text")
        return found, _conversation([], None, row["text"], unknown=unknown)
    turns = _TURNS[found](row)
    if not any(isinstance(turn, dict) and (turn.get("role") or turn.get("from")) == "system" for turn in turns[:1]):
        system = next((row[key] for key in _SYSTEM_KEYS if row.get(key)), None)
        turns = turns if system is None else [{"role": "system", "content": system}, *turns]
    tools = _tools(next((row[key] for key in _TOOL_KEYS if row.get(key)), None))
    if turns and isinstance(turns[0], dict) and turns[0].get("role") == "system":  # minimind's place for tools
        tools = tools or _tools(next((turns[0][key] for key in _TOOL_KEYS if turns[0].get(key)), None))
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    return found, _conversation(messages, tools, None, arguments=_template_arguments(row), unknown=unknown)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names; what it calls so itself and is not meant stands aside."""
    named = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
    missing = [theirs for ours, theirs in named.items() if row.get(theirs) is None and ours not in _OPTIONAL_COLUMNS]
    if missing:
        raise RowError(f"it has no '{missing[0]}', which data.columns names; its keys are {', '.join(map(str, row))}")
    telling = {*_TURN_KEYS, *_QUESTION_KEYS, *_ANSWER_KEYS, "text"} if named else set()
    if {"prompt", "completion"} & named.keys():
        telling -= {"prompt", "completion"}
    if set(_PREFERENCE_KEYS) & set(named.values()):  # one answer of a preference is chosen
        telling |= set(_PREFERENCE_KEYS)
    rest = {key: value for key, value in row.items() if key not in telling and key not in named.values()}
    renamed = {**rest, **{ours: row[theirs] for ours, theirs in named.items() if row.get(theirs) is not None}}
    role, content = columns.get("role"), columns.get("content")
    key = next((key for key in _TURN_KEYS if isinstance(_parsed(renamed.get(key)), list)), None)
    if key is None or (role is None and content is None):
        return renamed
    turns = []
    for turn in _parsed(renamed[key]):
        if isinstance(turn, dict):
            turn = dict(turn)
            for ours, theirs in (("role", role), ("content", content)):
                if theirs is not None and theirs in turn:
                    turn[ours] = turn.pop(theirs)
        turns.append(turn)
    return {**renamed, key: turns}


_OPTIONAL_COLUMNS = ("input", "system", "history", "tools")


def _refuse_other_meanings(row: Mapping[str, Any], found: Format | None) -> None:
    """Raises RowError for a key that says that this row is not an answer to learn, or not text alone."""
    way_out = "leave the key out, or name it in data.ignore_keys to train on the row all the same"
    for key, value in row.items():
        if value is None or value in ([], "", {}):
            continue
        if key in _PREFERENCE_KEYS:
            takes_it = "data.columns.completion=chosen (of texts) or data.columns.messages=chosen trains on it alone"
            hint = takes_it if key == "chosen" else way_out
            raise RowError(f"'{key}' makes it a preference, and only answers to imitate can be trained on: {hint}")
        if key in _MEDIA_KEYS:
            raise RowError(f"'{key}' gives it pictures or sound, and only text can be trained on: {way_out}")
        if key in _TRAINED_PARTS_KEYS and found != "text":
            raise RowError(f"'{key}' says what of it is learned, in a way that is not known here: {way_out}")
    for key in _LABEL_KEYS:
        value = row.get(key)
        if value is not None and found is not None and str(value).lower() in ("false", "0", "0.0"):
            raise RowError(f"its '{key}' is {value}, which marks its answer as a bad one (KTO): {way_out}")


def _unknown_keys(row: Mapping[str, Any], found: Format) -> tuple[str, ...]:
    if found in ("messages", "conversations", "sharegpt", "pairs"):
        used = {next(key for key in _TURN_KEYS if _parsed(row.get(key)))}
        harmless = {"prompt"}  # of the first message, as in UltraChat
    elif found == "text":
        used, harmless = {"text"}, set()
    else:
        asked, said = _question_and_answer(row) or ("prompt", "completion")
        used = {asked, said, "instruction", "output"} if found == "alpaca" else {asked, said}
        if found == "prompt_completion":
            used = {"prompt", "completion"}
        used |= {*_CONTEXT_KEYS, "history"}
        harmless = {"text"} if found == "alpaca" else set()  # the same once more, as in Alpaca's own files
    known = {*used, *harmless, *_KNOWN_KEYS} if found != "text" else {*used, *harmless}
    return tuple(
        str(key)
        for key, value in row.items()
        if value not in (None, "", [], {}) and key not in known and str(key).lower() not in _HARMLESS_KEYS
    )


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the row gives its template beside messages and tools."""
    arguments: dict[str, Any] = {}
    for key in _ARGUMENT_KEYS:
        given = _parsed_object(row.get(key), key)
        arguments |= {name: value for name, value in (given or {}).items() if value is not None}
    if (documents := _parsed(row.get("documents"))) and isinstance(documents, list):
        arguments["documents"] = documents
    if reserved := sorted({"messages", "tools", "add_generation_prompt"} & arguments.keys()):
        raise RowError(f"its template arguments name '{reserved[0]}', which is not one")
    return arguments or None


def _parsed_object(value: Any, what: str) -> dict[str, Any] | None:
    value = _parsed(value, what)
    if value is not None and not isinstance(value, dict):
        raise RowError(f"'{what}' is {_kind(value)}, not an object")
    return value


def _fault_of_turns(row: Mapping[str, Any]) -> str | None:
    """Why the messages of a row that has some cannot be read; None where it has none."""
    key = next((key for key in _TURN_KEYS if row.get(key) is not None), None)
    if key is None:
        return None
    turns = _parsed(row[key])
    if not isinstance(turns, list):
        return f"'{key}' is {_kind(turns)}, not a list of messages"
    if not turns:
        return f"'{key}' is empty"
    if not isinstance(turns[0], dict):
        return f"the first of '{key}' is {_kind(turns[0])}, not an object"
    return f"the first of '{key}' has neither 'role' nor 'from'"


def _conversation(
    messages: list[tuple[Message, float | None]],
    tools: list[dict[str, Any]] | None,
    text: str | None,
    *,
    arguments: dict[str, Any] | None = None,
    unknown: tuple[str, ...] = (),
) -> Conversation:
    parts = [messages, tools, text] if arguments is None else [messages, tools, text, arguments]
    try:
        content = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"it holds what JSON cannot write: {error}") from None
    try:
        digest = int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big")
    except UnicodeEncodeError:
        raise RowError("its text is not valid Unicode (bytes that are not UTF-8, or a lone surrogate)") from None
    return Conversation(
        tuple(message for message, _ in messages),
        tuple(weight for _, weight in messages),
        tools,
        text,
        digest,
        arguments,
        unknown,
    )


def _turns_of_list(row: Mapping[str, Any]) -> list[Any]:
    key = next(key for key in _TURN_KEYS if _parsed(row.get(key)))
    turns: list[Any] = _parsed(row[key])
    return turns


def _turns_of_pairs(row: Mapping[str, Any]) -> list[Any]:
    return _pairs(_turns_of_list(row))


def _pairs(pairs: Sequence[Sequence[Any]]) -> list[Any]:
    return [
        turn
        for asked, said in pairs
        for turn in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
    ]


def _turns_of_question(row: Mapping[str, Any]) -> list[Any]:
    asked, said = _question_and_answer(row) or ("", "")
    if detect_format(row) == "alpaca":
        asked, said = "instruction", "output"
    return [*_history(row), {"role": "user", "content": _asked(row, asked)}, _said(row, said)]


def _history(row: Mapping[str, Any]) -> list[Any]:
    history = _parsed(row.get("history")) or []
    if not isinstance(history, list):
        raise RowError(f"'history' is {_kind(history)}, not a list of pairs")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowError("'history' is not a list of pairs of a question and an answer")
    return _pairs(history)


def _asked(row: Mapping[str, Any], asked: str) -> str:
    """The question, and under it what it is about."""
    keys = (asked, *(key for key in _CONTEXT_KEYS if key != asked))
    return "\n".join(part for key in keys if (part := _text(row.get(key) or "", f"'{key}'")))


def _said(row: Mapping[str, Any], said: str) -> dict[str, Any]:
    answer = row[said]
    if isinstance(answer, list) and any(isinstance(part, str) for part in answer):
        raise RowError(f"'{said}' is a list of {len(answer)} answers, not one")
    return {"role": "assistant", "content": answer}


def _turns_of_prompt(row: Mapping[str, Any]) -> list[Any]:
    asked, said = _messages_in(row["prompt"]), _messages_in(row["completion"])
    if asked is None:
        asked = [*_history(row), {"role": "user", "content": _asked(row, "prompt")}]
    return [*({**turn, "loss_weight": 0} for turn in asked), *([_said(row, "completion")] if said is None else said)]


def _messages_in(value: Any) -> list[Any] | None:
    turns = _parsed(value)
    is_messages = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
    return turns if is_messages and "role" in turns[0] else None


_TURNS = {
    "messages": _turns_of_list,
    "conversations": _turns_of_list,
    "sharegpt": _turns_of_list,
    "pairs": _turns_of_pairs,
    "alpaca": _turns_of_question,
    "prompt_completion": _turns_of_prompt,
    "question_answer": _turns_of_question,
}


def _message(turn: Any, number: int) -> tuple[Message, float | None]:
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is {_kind(turn)}, not an object")
    named = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise RowError(
            f"message {number} has the role {named!r}; known are {', '.join(_ROLES)}"
            + ("" if "role" in turn or "from" in turn else ": data.columns.role=KEY names the key that holds it")
        )
    place = f"message {number} ({role})"
    _refuse_other_parts(turn, place)
    message: Message = {"role": role}
    for key, value in turn.items():
        if value is not None and key not in _READ_OF_A_MESSAGE:
            message[key] = _without_none(value)
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls")
    if isinstance(named, str) and named.strip().lower() in _CALL_ROLES:
        content, calls = "", content
    elif calls is None and isinstance(turn.get("function_call"), (dict, str)):  # as OpenAI wrote it before 2024
        calls = turn["function_call"]
    thoughts = [turn[key] for key in _REASONING_KEYS if turn.get(key)][:1]
    if isinstance(content, list):
        content, more_thoughts, more_calls = _sorted_parts(content, place)
        thoughts += more_thoughts
        calls = [*(_tool_calls(calls, place) if calls else ()), *more_calls]
    if calls:
        message["tool_calls"] = _tool_calls(calls, place)
    if thoughts:
        thought = thoughts if len(thoughts) > 1 else thoughts[0]
        message["reasoning_content"] = _text(thought, f"the reasoning of {place}")
    says = bool(message.get("tool_calls") or message.get("reasoning_content"))
    if content is None and not says:
        raise RowError(f"{place} has no content")
    message["content"] = "" if content is None else _text(content, f"the content of {place}")
    if role == "assistant" and not message["content"] and not says:
        raise RowError(f"{place} is empty")
    return message, _weight(turn, place)


_READ_OF_A_MESSAGE = frozenset(
    ("role", "from", "content", "value", "tool_calls", "function_call", *_REASONING_KEYS, *_WEIGHT_KEYS, *_TOOL_KEYS)
)


def _refuse_other_parts(turn: Mapping[str, Any], place: str) -> None:
    for keys, meaning in (
        (_MEDIA_KEYS, "only text can be trained on"),
        (_TRAINED_PARTS_KEYS, "what it says of what is learned is not known here"),
        (_PREFERENCE_KEYS, "only answers to imitate can be trained on"),
    ):
        if (key := next((key for key in keys if turn.get(key)), None)) is not None:
            raise RowError(f"{place} has '{key}', and {meaning}")


def _sorted_parts(parts: Sequence[Any], place: str) -> tuple[list[Any], list[Any], list[Any]]:
    """(texts, reasoning, tool calls) of a content that is a list of typed parts."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in ("reasoning", "thinking"):
            thoughts.append(next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), ""))
        elif kind in ("tool_call", "function_call"):
            value = next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), part)
            calls += _tool_calls(value, place)
        else:
            texts.append(part)
    return texts, thoughts, calls


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{place} is {_kind(content)}, not a text")
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(part, str):
            kind = (
                f"of type {part['type']!r}" if isinstance(part, dict) and "type" in part else f"that is {_kind(part)}"
            )
            raise RowError(f"{place} has a part {kind}; only text can be trained on")
        parts.append(part)
    return "".join(parts)


def _weight(turn: Mapping[str, Any], place: str) -> float | None:
    key = next((key for key in _WEIGHT_KEYS if turn.get(key) is not None), None)
    if key is None:
        return None
    value = turn[key]
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value) or value < 0:
        raise RowError(f"{place} has {key} {value!r}; a loss weight is a number of at least 0, or true or false")
    return float(value)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    tools = _parsed(value, "tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' is not a list of objects")
    return [_without_none(tool) for tool in tools]


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    calls = _parsed(value, f"the tool calls of {place}")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"the tool calls of {place} are not a list of objects")
    for call in calls:
        function = call.get("function") or call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"a tool call of {place} has no name")
    return [_without_none(call) for call in calls]


def _parsed(value: Any, what: str | None = None) -> Any:
    """Lists and objects given as JSON text; other texts stay as they are unless `what` names what must be JSON."""
    if not isinstance(value, str) or not (what or value.lstrip().startswith("[")):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        if what is None:
            return value
        raise RowError(f"{what}: broken JSON, {error}") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
