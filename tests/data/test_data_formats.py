"""Rows of every format become the messages that were meant, and unusable ones say why."""

import json
from typing import Any

import pytest

from fitune.data.formats import Conversation, RowError, normalise

ASKED = [("user", "Q"), ("assistant", "A")]


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "messages",
        ),
        (
            {
                "conversations": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "conversations",
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "sharegpt",
        ),
        (
            {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "sharegpt",
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca"),
        ({"instruction": "Q", "output": "A"}, "alpaca"),
        ({"prompt": "Q", "completion": "A"}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}, "prompt_completion"),
        (
            {
                "messages": json.dumps(
                    [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
                )
            },
            "messages",
        ),
    ],
)
def test_a_format_is_told_by_its_keys_and_becomes_messages(row: dict[str, Any], name: str) -> None:
    found, conversation = normalise(row)
    assert (found, pairs(conversation)) == (name, ASKED)


def test_plain_text_has_no_messages() -> None:
    found, conversation = normalise({"text": "once", "id": 3})
    assert (found, conversation.text, conversation.messages) == ("text", "once", ())


def test_an_alpaca_row_puts_input_under_its_instruction_and_history_before_it() -> None:
    row = {"instruction": "Q", "input": "I", "output": "A", "history": [["q", "a"]], "system": "S"}
    turns = [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Q\nI"),
        ("assistant", "A"),
    ]
    assert pairs(normalise(row)[1]) == turns


def test_a_prompt_of_text_that_looks_like_a_list_stays_text() -> None:
    assert pairs(normalise({"prompt": "[1, 2]", "completion": "A"})[1]) == [
        ("user", "[1, 2]"),
        ("assistant", "A"),
    ]


def test_the_assistant_turns_of_a_prompt_carry_no_loss() -> None:
    prompt = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Q"},
    ]
    assert normalise({"prompt": prompt, "completion": "A"})[1].assistant_weights == (0.0, None)


def test_sharegpt_tool_turns_become_tool_calls_and_tool_answers() -> None:
    call = '{"name": "clock", "arguments": {"zone": "UTC"}}'
    turns = [("human", "Q"), ("function_call", call), ("observation", "12:00"), ("gpt", "noon")]
    row = {
        "conversations": [{"from": a, "value": b} for a, b in turns],
        "system": "S",
        "tools": '[{"name": "clock"}]',
    }
    conversation = normalise(row)[1]
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2]["tool_calls"] == [json.loads(call)]
    assert conversation.tools == [{"name": "clock"}]


def test_tools_and_tool_calls_may_be_json_text_as_in_minimind() -> None:
    system = {
        "role": "system",
        "content": "S",
        "tools": '[{"type": "function", "function": {"name": "f"}}]',
    }
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": '[{"name": "f", "arguments": "{}"}]',
    }
    conversation = normalise({"conversations": [system, {"role": "user", "content": "Q"}, called]})[
        1
    ]
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]
    assert conversation.messages[2]["tool_calls"] == [{"name": "f", "arguments": "{}"}]
    assert "tools" not in conversation.messages[0]


def test_the_system_text_of_a_row_comes_first_unless_the_messages_have_one() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert pairs(normalise({"system": "S", "messages": turns})[1])[0] == ("system", "S")
    own = [{"role": "system", "content": "own"}, *turns]
    assert pairs(normalise({"system": "S", "messages": own})[1])[0] == ("system", "own")


def test_reasoning_is_kept_for_the_template() -> None:
    answer = {"role": "assistant", "content": "A", "reasoning_content": "because"}
    conversation = normalise({"messages": [{"role": "user", "content": "Q"}, answer]})[1]
    assert conversation.messages[1]["reasoning_content"] == "because"


@pytest.mark.parametrize("key", ["text", "value"])
def test_typed_parts_are_joined(key: str) -> None:
    parts = [{"type": "text", key: "A"}, {"type": "text", key: "B"}]
    assert pairs(normalise({"messages": [{"role": "assistant", "content": parts}]})[1]) == [
        ("assistant", "AB")
    ]


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"loss_weight": 0.5}, 0.5),
        ({"weight": 0}, 0.0),
        ({"train": False}, 0.0),
        ({"loss": True}, 1.0),
        ({"loss_weight": None}, None),
        ({}, None),
    ],
)
def test_a_message_may_carry_its_loss_weight(keys: dict[str, Any], weight: float | None) -> None:
    conversation = normalise({"messages": [{"role": "assistant", "content": "A", **keys}]})[1]
    assert conversation.weights == (weight,)
    assert not conversation.messages[0].keys() - {"role", "content"}


def test_none_stands_for_a_missing_key_as_in_tables() -> None:
    answer = {"role": "assistant", "content": "A", "tool_calls": None, "reasoning_content": None}
    row = {
        "text": None,
        "conversations": None,
        "messages": [{"role": "user", "content": "Q", "tool_calls": None}, answer],
    }
    found, conversation = normalise(row)
    assert (found, conversation.messages[1]) == ("messages", {"role": "assistant", "content": "A"})


def test_the_same_content_has_the_same_digest_in_every_format() -> None:
    alpaca = normalise({"instruction": "Q", "output": "A"})[1]
    sharegpt = normalise(
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    )[1]
    assert alpaca.digest == sharegpt.digest == 0x3F3B20BC1B2DAC5E


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, 2], "it is a list, not an object"),
        ({"question": "Q"}, "its keys (question) fit no known format"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "x"}, "'messages' is a text, not a list of messages"),
        (
            {"conversations": {"role": "user"}},
            "'conversations' is an object, not a list of messages",
        ),
        ({"messages": ["x"]}, "the first of 'messages' is a text, not an object"),
        ({"messages": [{"content": "x"}]}, "the first of 'messages' has neither 'role' nor 'from'"),
        ({"text": ""}, "'text' is empty"),
        ({"text": 3}, "'text' is a number"),
        ({"messages": [{"role": "narrator", "content": "A"}]}, "message 1 has the role 'narrator'"),
        ({"messages": [{"role": "user"}]}, "message 1 (user) has no content"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "message 1 (assistant) is empty"),
        ({"instruction": "Q", "output": ""}, "message 2 (assistant) is empty"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "the content of message 1 (user) is a number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "of type 'image'",
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, "A"]},
            "message 2 is a text, not an object",
        ),
        (
            {"messages": [{"role": "assistant", "content": "A", "loss_weight": -1}]},
            "loss_weight -1",
        ),
        (
            {"messages": [{"role": "assistant", "content": "A", "weight": float("nan")}]},
            "weight nan",
        ),
        ({"messages": [{"role": "assistant", "content": "A", "tool_calls": "[{"}]}, "broken JSON"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": "f"}]}]},
            "has no name",
        ),
        ({"tools": "x", "messages": [{"role": "assistant", "content": "A"}]}, "tools: broken JSON"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"instruction": "Q", "output": "A", "history": ["q"]}, "'history' is not a list of pairs"),
    ],
)
def test_an_unusable_row_says_why(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert reason in str(caught.value)
