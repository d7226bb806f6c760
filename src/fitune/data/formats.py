"""A row in any of the formats people have -> a conversation: messages for a chat template and a loss weight for each.

    format              told by these keys                           becomes
    messages            messages: [{role, content}]                  itself
    conversations       conversations: [{role, content}]             itself (minimind; looks like ShareGPT, is not)
    sharegpt            conversations or messages: [{from, value}]   human -> user, gpt -> assistant, ...
    alpaca              instruction, output [input history system]   user and assistant messages
    prompt_completion   prompt, completion (text or messages)        the prompt's messages get the loss weight 0
    text                text                                         plain text, no template, every token supervised

The keys of the row decide, never the name of the file. Texts may be lists of typed parts; tools and tool_calls may be
JSON strings; a None stands for a missing key, since tables (parquet, csv) have no other way to say so.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

from fitune.boundary import parse_json

Format = Literal["messages", "conversations", "sharegpt", "alpaca", "prompt_completion", "text"]
Message = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_WEIGHT_KEYS = ("loss_weight", "weight", "loss", "train")
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
"""Of a message that is trained on: far within float32, also squared and summed up."""
_TOOL_KEYS = ("tools", "functions")


class RowError(ValueError):
    """One row that cannot be used, and why; counted and listed by the reader."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: as a chat template takes them. weights: one per message, None where the row gives none.
    text: set for the format `text`, which has no messages. digest: 64 bits of a hash of all this, the same for the same
    content in any format, file, order or run."""

    messages: tuple[Message, ...]
    weights: tuple[float | None, ...]
    tools: list[dict[str, Any]] | None
    text: str | None
    digest: int

    @property
    def assistant_weights(self) -> tuple[float | None, ...]:
        turns = zip(self.messages, self.weights, strict=True)
        return tuple(weight for message, weight in turns if message["role"] == "assistant")


def detect_format(row: Mapping[str, Any]) -> Format | None:
    """The format of one row, None when its keys fit none."""
    for key in ("messages", "conversations"):
        turns = _parsed(row.get(key))
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            if turns[0].get("role") is not None:
                return "messages" if key == "messages" else "conversations"
            if turns[0].get("from") is not None:
                return "sharegpt"
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "prompt_completion"
    if row.get("instruction") is not None and row.get("output") is not None:
        return "alpaca"
    if row.get("text") is not None:
        return "text"
    return None


def normalise(row: Any) -> tuple[Format, Conversation]:
    """One row -> its format and its conversation. Raises RowError with the reason when it cannot be used."""
    if not isinstance(row, dict):
        raise RowError(f"it is {_kind(row)}, not an object")
    found = detect_format(row)
    if found is None:
        keys = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
        raise RowError(_fault_of_turns(row) or f"its keys ({keys}) fit no known format")
    if found == "text":
        if not isinstance(row["text"], str) or not row["text"]:
            raise RowError("'text' is empty" if row["text"] == "" else f"'text' is {_kind(row['text'])}, not a text")
        return found, _conversation([], None, row["text"])
    turns = _TURNS[found](row)
    tools = _tools(next((row[key] for key in _TOOL_KEYS if row.get(key)), None))
    if turns and turns[0].get("role") == "system":  # minimind's place for tools
        tools = tools or _tools(next((turns[0][key] for key in _TOOL_KEYS if turns[0].get(key)), None))
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    return found, _conversation(messages, tools, None)


def _fault_of_turns(row: Mapping[str, Any]) -> str | None:
    """Why the messages of a row that has some cannot be read; None where it has none."""
    key = next((key for key in ("messages", "conversations") if row.get(key) is not None), None)
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
    messages: list[tuple[Message, float | None]], tools: list[dict[str, Any]] | None, text: str | None
) -> Conversation:
    try:
        content = json.dumps([messages, tools, text], sort_keys=True, ensure_ascii=False)
        digest = int.from_bytes(blake2b(content.encode(), digest_size=8).digest(), "big")
    except UnicodeEncodeError:
        raise RowError("its text is not valid Unicode (bytes that are not UTF-8, or a lone surrogate)") from None
    except (TypeError, ValueError, RecursionError) as error:  # what a parquet file may hold and JSON cannot say
        raise RowError(f"it holds values that are no text, number, list or object ({error})") from None
    return Conversation(
        tuple(message for message, _ in messages), tuple(weight for _, weight in messages), tools, text, digest
    )


def _turns_of_list(row: Mapping[str, Any]) -> list[Any]:
    key = "messages" if _parsed(row.get("messages")) else "conversations"
    turns: list[Any] = _parsed(row[key])
    system = row.get("system") or row.get("system_prompt")
    has_system = isinstance(turns[0], dict) and (turns[0].get("role") or turns[0].get("from")) == "system"
    return turns if not system or has_system else [{"role": "system", "content": system}, *turns]


def _turns_of_alpaca(row: Mapping[str, Any]) -> list[Any]:
    asked = "\n".join(part for key in ("instruction", "input") if (part := _text(row.get(key) or "", f"'{key}'")))
    turns: list[Any] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = _parsed(row.get("history")) or []
    if not isinstance(history, list):
        raise RowError(f"'history' is {_kind(history)}, not a list of pairs")
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("'history' is not a list of pairs of a question and an answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _turns_of_prompt(row: Mapping[str, Any]) -> list[Any]:
    turns: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = _parsed(row[key])
        is_messages = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
        part = value if is_messages and "role" in value[0] else [{"role": role, "content": row[key]}]
        if key == "prompt":
            part = [{**turn, "loss_weight": 0} for turn in part]
        turns += part
    return turns


_TURNS = {
    "messages": _turns_of_list,
    "conversations": _turns_of_list,
    "sharegpt": _turns_of_list,
    "alpaca": _turns_of_alpaca,
    "prompt_completion": _turns_of_prompt,
}


def _message(turn: Any, number: int) -> tuple[Message, float | None]:
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is {_kind(turn)}, not an object")
    named = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise RowError(f"message {number} has the role {named!r}; known are {', '.join(_ROLES)}")
    place = f"message {number} ({role})"
    message: Message = {"role": role}
    for key, value in turn.items():
        if value is not None and key not in ("role", "from", "content", "value", *_WEIGHT_KEYS, *_TOOL_KEYS):
            message[key] = value
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls")
    if named == "function_call":
        content, calls = "", content
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, place)
    says = bool(message.get("tool_calls") or message.get("reasoning_content"))
    if content is None and not says:
        raise RowError(f"{place} has no content")
    message["content"] = "" if content is None else _text(content, f"the content of {place}")
    if role == "assistant" and not message["content"] and not says:
        raise RowError(f"{place} is empty")
    return message, _weight(turn, place)


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
    if not isinstance(value, (bool, int, float)) or not (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
        raise RowError(
            f"{place} has {key} {str(value)[:40]}; a loss weight is 0, a number from {LEAST_WEIGHT:g} to "
            f"{MOST_WEIGHT:g}, or true or false"
        )
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
        return parse_json(value)
    except ValueError as error:
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
