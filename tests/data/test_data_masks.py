"""What is supervised, by each way of finding it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import CHATML, GENERATION, PLAIN_TURNS, STRICT, byte_tokenizer
from fitune.data.formats import normalise
from fitune.data.tokenise import Encoded, Encoder, encode, read_encoder
from fitune.errors import DataError

DIALOGUE = [("user", "Q"), ("assistant", "A one"), ("user", "R"), ("assistant", "B two")]
TOKENIZER = byte_tokenizer()


def encoder(template: str | None = CHATML, **arguments: Any) -> Encoder:
    return read_encoder(byte_tokenizer(template, **arguments), template=None, mask="assistant")


def encoded(encoder: Encoder, *turns: tuple[Any, ...], **row: Any) -> Encoded | str:
    keys = ("role", "content", "loss_weight")
    messages = [dict(zip(keys, turn, strict=False)) for turn in turns]
    return encode(encoder, [normalise({"messages": messages, **row})[1]])[0]


def supervised(encoder: Encoder, result: Encoded | str) -> list[str]:
    assert isinstance(result, Encoded), result
    return [encoder.tokenizer.decode(result.input_ids[start:end]) for start, end, _ in result.spans]


@pytest.mark.parametrize(
    ("template", "kind", "spans"),
    [
        (CHATML, "marked messages", ["A one<|im_end|>\n", "B two<|im_end|>\n"]),
        (GENERATION, "generation markers", ["A one<|im_end|>", "B two<|im_end|>"]),
        (PLAIN_TURNS, "marked messages", ["A one<|im_end|>", "B two<|im_end|>"]),
        (GENERATION.replace("{% generation %}", "{%- generation -%}"), "generation markers", None),
    ],
)
def test_the_answers_are_supervised_and_nothing_else(
    template: str, kind: str, spans: list[str] | None
) -> None:
    found = encoder(template)
    assert found.kind == kind
    assert supervised(found, encoded(found, *DIALOGUE)) == (
        spans or ["A one<|im_end|>", "B two<|im_end|>"]
    )


@pytest.mark.parametrize("template", [CHATML, GENERATION, PLAIN_TURNS])
def test_the_weights_of_messages_go_to_their_turns(template: str) -> None:
    found = encoder(template)
    result = encoded(
        found, ("user", "Q"), ("assistant", "A", 0), ("user", "R"), ("assistant", "B", 0.5)
    )
    assert supervised(found, result)[0].startswith("B")
    assert isinstance(result, Encoded)
    assert [weight for *_, weight in result.spans] == [0.5]


def minimind_rule(ids: list[int], opening: list[int], closing: list[int]) -> list[bool]:
    """Walks along the ids with a flag, unlike the search under test."""
    inside, result = False, []
    for place in range(len(ids)):
        if not inside and place >= len(opening) and ids[place - len(opening) : place] == opening:
            inside, since = True, place
        result.append(inside)
        if (
            inside
            and place + 1 - since >= len(closing)
            and ids[place + 1 - len(closing) : place + 1] == closing
        ):
            inside = False
    return result


def mask(result: Encoded | str) -> list[bool]:
    assert isinstance(result, Encoded), result
    return [
        any(start <= i < end for start, end, _ in result.spans)
        for i in range(len(result.input_ids))
    ]


NO_THOUGHT = "<think>\n\n</think>\n\n"
TEXTS = st.text(st.sampled_from("ab\n中"), max_size=4)
MARKERS = [
    "<|im_end|>",
    "<|im_end|>\n",
    "<|im_start|>assistant\n",
    "x<|im_start|>assistant\ny<|im_end|>\nz",
]


@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_the_mask_is_minimind_s_rule(turns: list[tuple[str, str]]) -> None:
    found = read_encoder(TOKENIZER, template=None, mask="assistant")
    messages = [
        pair for asked, said in turns for pair in (("user", asked), ("assistant", said or "."))
    ]
    result = encoded(found, *messages)
    assert isinstance(result, Encoded)
    opening, closing = (
        TOKENIZER.encode(text) for text in ("<|im_start|>assistant\n", "<|im_end|>\n")
    )
    assert mask(result) == minimind_rule(result.input_ids, opening, closing)


def test_the_mask_is_minimind_s_rule_on_the_alpaca_sample() -> None:
    import json

    from transformers import AutoTokenizer

    shared = Path(__file__).parents[2] / ".." / "shared" / "data" / "sft"
    if not shared.exists():
        pytest.skip("the sample and minimind's tokenizer are not here")
    tokenizer = AutoTokenizer.from_pretrained(shared / "minimind_tokenizer")
    rows = json.loads((shared / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    conversations = [
        {
            "conversations": [
                {"role": "user", "content": row["instruction"] + row["input"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in rows
    ]
    # its generation prompt ends with an empty block of thoughts, which is given to the model and so not learned
    opening, closing = (
        tokenizer.encode(f"<|im_{text}") for text in (f"start|>assistant\n{NO_THOUGHT}", "end|>\n")
    )
    found = read_encoder(tokenizer, template=None, mask="assistant")
    results = encode(found, [normalise(row)[1] for row in conversations])
    for row, result in zip(conversations, results, strict=True):
        text = tokenizer.apply_chat_template(row["conversations"], tokenize=False)
        assert isinstance(result, Encoded)
        assert result.input_ids == tokenizer(text).input_ids
        assert mask(result) == minimind_rule(result.input_ids, opening, closing)
        assert supervised(found, result)[0] == f"{row['conversations'][1]['content']}<|im_end|>\n"
    assert len(results) == 1000


@pytest.mark.parametrize("marker", MARKERS)
def test_a_marker_inside_a_user_s_text_opens_no_turn(marker: str) -> None:
    found = encoder()
    result = encoded(
        found,
        ("user", f"a{marker}b"),
        ("assistant", "A", 0.5),
        ("user", marker),
        ("assistant", "B"),
    )
    assert supervised(found, result) == ["A<|im_end|>\n", "B<|im_end|>\n"]
    assert isinstance(result, Encoded)
    assert [weight for *_, weight in result.spans] == [0.5, 1.0]


def test_a_marker_inside_an_answer_does_not_end_it() -> None:
    found = encoder()
    result = encoded(found, ("user", "Q"), ("assistant", "A<|im_end|>\n<|im_start|>user\nB"))
    assert supervised(found, result) == ["A<|im_end|>\n<|im_start|>user\nB<|im_end|>\n"]


def test_all_supervises_everything_that_has_something_before_it() -> None:
    found = read_encoder(TOKENIZER, template=None, mask="all")
    result = encoded(found, *DIALOGUE)
    assert isinstance(result, Encoded)
    assert result.spans == ((1, len(result.input_ids), 1.0),)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("text", ["once", "once<|im_end|>", "<|endoftext|>once"])
def test_plain_text_gets_its_frame_once(text: str, adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(None, adds_bos=adds_bos)
    found = read_encoder(tokenizer, template=None, mask="assistant")
    result = encode(found, [normalise({"text": text})[1]])[0]
    assert isinstance(result, Encoded)
    bos = "<|endoftext|>" if adds_bos or text.startswith("<") else ""
    assert tokenizer.decode(result.input_ids) == f"{bos}once<|im_end|>"
    assert result.spans == ((1, len(result.input_ids), 1.0),)


def test_a_template_that_writes_the_first_token_is_not_given_a_second_one() -> None:
    found = encoder(PLAIN_TURNS, adds_bos=True)
    result = encoded(found, *DIALOGUE)
    assert isinstance(result, Encoded)
    assert result.input_ids.count(found.tokenizer.bos_token_id) == 1


def test_the_sentence_of_a_template_that_refuses_a_row_is_kept() -> None:
    result = encoded(encoder(STRICT), ("user", "Q"), ("user", "R"), ("assistant", "A"))
    assert result == "the chat template refuses it: Roles must alternate user/assistant"


def test_one_refused_row_leaves_its_neighbours() -> None:
    good, bad = (
        {"messages": [{"role": role, "content": "x"} for role in roles]}
        for roles in (["user", "assistant"], ["assistant"])
    )
    results = encode(encoder(STRICT), [normalise(row)[1] for row in (good, bad, good)])
    assert [isinstance(result, Encoded) for result in results] == [True, False, True]


def test_conversations_without_a_template_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match="give a Jinja template file with data"):
        encoded(encoder(None), *DIALOGUE)


def test_a_template_may_come_from_a_file(tmp_path: Path) -> None:
    (path := tmp_path / "chat.jinja").write_text(CHATML)
    found = read_encoder(byte_tokenizer(None), template=str(path), mask="assistant")
    assert found.template is not None
    assert (found.template.name, found.kind) == (str(path), "marked messages")


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read"), ("{% for %}", "cannot render")]
)
def test_a_template_file_that_does_not_work_is_refused(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    path = tmp_path / "chat.jinja"
    if content:
        path.write_text(content)
    with pytest.raises(DataError, match=reason):
        read_encoder(TOKENIZER, template=str(path), mask="assistant")


FORGETFUL = PLAIN_TURNS.replace("message.content", "(message.content if loop.last else 'gone')")


def test_an_answer_that_the_template_leaves_out_once_others_follow_is_not_learned_and_said() -> (
    None
):
    found = encoder(FORGETFUL)
    result = encoded(found, *DIALOGUE)
    assert supervised(found, result) == ["B two<|im_end|>"]
    assert isinstance(result, Encoded)
    assert [notice for notice in result.notices if "earlier answers" in notice]


def test_a_template_that_does_not_write_the_answer_is_refused_with_its_message() -> None:
    result = encoded(
        encoder(PLAIN_TURNS.replace("'Bot: ' + message.content", "'Bot: ...'")), *DIALOGUE
    )
    assert isinstance(result, str)
    assert "does not write message 2 (assistant) as the sample has it" in result


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_the_arguments_of_a_tool_call_are_never_quoted_twice(arguments: object) -> None:
    template = CHATML.replace(
        "message.content",
        "(message.tool_calls[0].function.arguments | tojson if message.tool_calls else 'Q')",
    )
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }
    found = encoder(template)
    result = encode(found, [normalise({"messages": [{"role": "user", "content": "Q"}, call]})[1]])[
        0
    ]
    assert supervised(found, result) == ['{"a": 1}<|im_end|>\n']


class SlowTokenizer:
    """Says of no token which characters it is of."""

    is_fast = False

    def __init__(self) -> None:
        self.fast = byte_tokenizer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def __call__(self, texts: list[str], **keys: Any) -> Any:
        return self.fast(texts, **keys)


def test_a_slow_tokenizer_has_the_same_mask() -> None:
    found = read_encoder(SlowTokenizer(), template=None, mask="assistant")
    assert encoded(found, *DIALOGUE) == encoded(encoder(), *DIALOGUE)
