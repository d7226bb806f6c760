"""Read one message of a row into the form that chat templates take, with its loss weight.

Roles are accepted in any case and under the names that public data uses for them. The content may
be a text, a list of typed parts or, for the result of a tool, any value. Tool calls and tools may
be JSON text.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fitune.boundary import parse_json

Message = dict[str, Any]

_ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(
        ("user", "human", "prompter", "customer", "question", "instruction", "用户"), "user"
    ),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "chatbot", "agent", "robot"),
        "assistant",
    ),
    **dict.fromkeys(
        ("answer", "claude", "bard", "bing", "助手", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"
    ),
    **dict.fromkeys(
        ("tool_result", "function_result", "tool_output", "environment", "execution"), "tool"
    ),
}
CALL_ROLES = ("function_call", "tool_call")
_WEIGHT_KEYS = (
    "loss_weight", "weight", "loss", "train", "training", "trainable", "loss_scale", "learn",
)  # fmt: skip
_MASKED_KEYS = ("masked", "mask")
#: The range of the loss weight of a message that is trained on. Squares and sums of such weights
#: are still far within the range of float32.
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
TOOL_KEYS = ("tools", "functions")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CONTENT_KEYS = ("content", "value", "text")
_ARGUMENT_KEYS = ("arguments", "parameters", "input", "args")
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALL_PARTS = ("tool_call", "function_call", "tool_use")
MEDIA_KEYS = (
    "image", "images", "image_path", "image_paths", "image_url", "image_urls", "video", "videos",
    "video_path", "audio", "audios", "audio_path", "pixel_values",
)  # fmt: skip
TRAINED_PARTS_KEYS = (
    "train_detail", "train_on_input", "train_on_turn", "labels", "loss_mask", "assistant_masks",
)  # fmt: skip
PREFERENCE_KEYS = (
    "chosen", "rejected", "chosen_response", "rejected_response", "rejected_responses",
    "rejected_messages", "rejected_images", "rejected_answer", "chosen_answer", "preference",
    "preferred", "winner",
)  # fmt: skip


class RowError(ValueError):
    """Raised for one row that cannot be used; the reader counts and lists such rows."""


def role_of(turn: Mapping[str, object]) -> Any:
    """Return the value under the key that holds the role."""
    return turn.get("role") if turn.get("role") is not None else turn.get("from")


def is_call(turn: object) -> bool:
    """Return whether a message is a tool call by its role, as ShareGPT and ms-swift write one."""
    named = role_of(turn) if isinstance(turn, dict) else None
    return isinstance(named, str) and named.strip().lower() in CALL_ROLES


def joined_calls(turns: Sequence[Any]) -> list[object]:
    """Merge tool calls that follow each other, or the text of an answer, into one message.

    The model generates them in one turn.
    """
    joined: list[object] = []
    for turn in turns:
        before = joined[-1] if joined else None
        if (
            not is_call(turn)
            or not isinstance(before, dict)
            or _ROLES.get(str(role_of(before)).lower()) != "assistant"
        ):
            joined.append(turn)
            continue
        calls = _calls_of(turn)
        if is_call(before):
            before = {**before, "content": [*_calls_of(before), *calls]}
            before.pop("value", None)
        else:
            earlier_calls = parsed(before.get("tool_calls")) or []
            before = {
                **before,
                "tool_calls": [
                    *(earlier_calls if isinstance(earlier_calls, list) else [earlier_calls]),
                    *calls,
                ],
            }
        joined[-1] = before
    return joined


def _calls_of(turn: Mapping[str, object]) -> list[Any]:
    calls = parsed(content_of(turn), "a tool call")
    return calls if isinstance(calls, list) else [calls]


def content_of(turn: Mapping[str, object]) -> Any:
    return next((turn[key] for key in _CONTENT_KEYS if turn.get(key) is not None), None)


def split_results(turn: Any) -> list[object]:
    """Split a user message with tool results into one message for each result.

    The remaining parts follow as a user message.
    """
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, list):
        return [turn]
    results = [
        part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"
    ]
    if not results:
        return [turn]
    rest = [part for part in content if part not in results]
    split: list[object] = [
        {"role": "tool", "content": part.get("content"), "tool_call_id": part.get("tool_use_id")}
        for part in results
    ]
    return [*split, *([{**turn, "content": rest}] if rest else [])]


def read_message(turn: object, number: int) -> tuple[Message, float | None]:
    """Return a message in the form that chat templates take, and its loss weight if it has one.

    number: the position of the message in its row, from 1, for error messages.

    Raises RowError if the message cannot be used.
    """
    if not isinstance(turn, dict):
        raise RowError(f"message {number} is {kind_of(turn)}, not an object")
    named = role_of(turn)
    role = _ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise RowError(
            f"message {number} has the role {named!r}; known are {', '.join(_ROLES)}"
            + (
                ""
                if "role" in turn or "from" in turn
                else ": data.columns.role=KEY names the key that holds it"
            )
        )
    place = f"message {number} ({role})"
    _refuse_other_parts(turn, place)
    message: Message = {"role": role}
    for key, value in turn.items():
        if value is not None and key not in _READ_OF_A_MESSAGE:
            message[key] = without_none(value)
    content, calls = _content_and_calls(turn, role)
    thoughts = [turn[key] for key in _REASONING_KEYS if turn.get(key)][:1]
    if isinstance(content, list):
        content, more_thoughts, more_calls = _sorted_parts(content, place)
        thoughts += more_thoughts
        calls = [*(_tool_calls(calls, place) if calls else ()), *more_calls]
    if calls:
        message["tool_calls"] = _tool_calls(calls, place)
    if thoughts:
        thought = thoughts if len(thoughts) > 1 else thoughts[0]
        message["reasoning_content"] = text_of(thought, f"the reasoning of {place}")
    says = bool(message.get("tool_calls") or message.get("reasoning_content"))
    if content is None and not says:
        others = ", ".join(str(key) for key in turn if key not in _READ_OF_A_MESSAGE)
        hint = (
            f"; its other keys are {others}: data.columns.content=KEY names the one"
            if others
            else ""
        )
        raise RowError(f"{place} has no content{hint}")
    message["content"] = "" if content is None else text_of(content, f"the content of {place}")
    if role == "assistant" and not message["content"] and not says:
        raise RowError(f"{place} is empty")
    return message, _weight(turn, place)


def _content_and_calls(turn: Mapping[str, object], role: str) -> tuple[object, object]:
    """Return the content and the tool calls of a message, both as they are written there."""
    content, calls = content_of(turn), turn.get("tool_calls")
    if is_call(turn):
        content, calls = "", content
    # OpenAI's format before 2024.
    elif calls is None and isinstance(turn.get("function_call"), (dict, str)):
        calls = turn["function_call"]
    return _result_text(content) if role == "tool" else content, calls


_READ_OF_A_MESSAGE = frozenset(
    (
        *("role", "from", *_CONTENT_KEYS, "tool_calls", "function_call", *_REASONING_KEYS),
        *(*_WEIGHT_KEYS, *_MASKED_KEYS, *TOOL_KEYS),
    )
)


def _refuse_other_parts(turn: Mapping[str, object], place: str) -> None:
    for keys, meaning in (
        (MEDIA_KEYS, "only text can be trained on"),
        (TRAINED_PARTS_KEYS, "what it says of what is learned is not known here"),
        (PREFERENCE_KEYS, "only answers to imitate can be trained on"),
    ):
        if (key := next((key for key in keys if turn.get(key)), None)) is not None:
            raise RowError(f"{place} has '{key}', and {meaning}")


def _result_text(content: object) -> object:
    """Return the result of a tool as text.

    Values other than a text or a list of texts become JSON.
    """
    if content is None:
        return ""
    is_parts = isinstance(content, list) and all(
        isinstance(part, str)
        or (isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS and _is_text(part))
        for part in content
    )
    return (
        content
        if isinstance(content, str) or is_parts
        else json.dumps(without_none(content), ensure_ascii=False)
    )


def _is_text(part: Mapping[str, object]) -> bool:
    return isinstance(part.get("text"), str) or isinstance(part.get("value"), str)


def _sorted_parts(parts: Sequence[Any], place: str) -> tuple[list[object], list[object], list[Any]]:
    """Split a content that is a list of typed parts into (texts, reasoning, tool calls)."""
    texts, thoughts, calls = [], [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in ("reasoning", "thinking"):
            thoughts.append(
                next(
                    (part[key] for key in ("value", "text", kind) if part.get(key) is not None), ""
                )
            )
        elif kind in _CALL_PARTS:
            value = next(
                (part[key] for key in ("value", "text", kind) if part.get(key) is not None), part
            )
            if value is part:
                value = {key: item for key, item in part.items() if key != "type"}
            calls += _tool_calls(value, place)
        else:
            texts.append(part)
    return texts, thoughts, calls


def text_of(content: object, place: str) -> str:
    """Return a text, or a list of texts joined into one.

    Raises RowError for anything else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{place} is {kind_of(content)}, not a text")
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
            part = part.get("text") if part.get("text") is not None else part.get("value")
        if not isinstance(part, str):
            kind = (
                f"of type {part['type']!r}"
                if isinstance(part, dict) and "type" in part
                else f"that is {kind_of(part)}"
            )
            raise RowError(f"{place} has a part {kind}; only text can be trained on")
        parts.append(part)
    return "".join(parts)


def _weight(turn: Mapping[str, object], place: str) -> float | None:
    """Return the loss weight of a message; None if it has none.

    Raises RowError if the value is not a valid weight.
    """
    key = next((key for key in (*_WEIGHT_KEYS, *_MASKED_KEYS) if turn.get(key) is not None), None)
    if key is None:
        return None
    value = turn[key]
    if key in _MASKED_KEYS:
        if value not in (True, False):
            raise RowError(
                f"{place} has {key} {str(value)[:40]!r}, which is neither true nor false"
            )
        return float(not value)
    if not isinstance(value, (bool, int, float)) or not (
        value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT
    ):
        raise RowError(
            f"{place} has {key} {value if isinstance(value, (int, float)) else str(value)[:40]!r}; "
            "a loss weight is 0, "
            f"a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, or true or false"
        )
    return float(value)


def read_tools(value: object) -> list[dict[str, object]] | None:
    """Return the tool definitions of a row unchanged, without keys that are None.

    Raises RowError if they are not a list of objects.
    """
    tools = parsed(value, "tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return None
    if isinstance(tools, list):
        tools = [parsed(tool, "tools") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("'tools' is not a list of objects")
    return [without_none(tool) for tool in tools]


def _tool_calls(value: object, place: str) -> list[dict[str, object]]:
    calls = parsed(value, f"the tool calls of {place}")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"the tool calls of {place} are not a list of objects")
    return [_tool_call(without_none(call), place) for call in calls]


def _tool_call(call: dict[str, object], place: str) -> dict[str, Any]:
    """Return a tool call with its arguments under "arguments".

    Some data names them parameters, input or args.
    """
    function = call.get("function") or call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"a tool call of {place} has no name")
    key = next((key for key in _ARGUMENT_KEYS if key in function), None)
    if key is None or key == "arguments":
        return call
    named = {("arguments" if name == key else name): value for name, value in function.items()}
    return named if function is call else {**call, "function": named}


def parsed(value: object, what: str | None = None) -> Any:
    """Parse a list or an object that is given as JSON text or as a Python literal.

    what: the name of a value that must be a list or an object. Raises RowError if it is neither;
        without `what` such a text is returned unchanged.
    """
    if not isinstance(value, str) or not (what or value.lstrip().startswith("[")):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except ValueError as error:
        if (literal := _python_literal(value)) is not None:
            return literal
        if what is None:
            return value
        raise RowError(f"{what}: broken JSON, {error}") from None


def _python_literal(text: str) -> object:
    """Parse [{'role': 'user', ...}], which pandas writes for a list in csv; None for other text."""
    if not text.lstrip().startswith(("[{", "[[", "{")):
        return None
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def without_none(value: object) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def kind_of(value: object) -> str:
    if value is None:
        return "empty"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
