"""Over the chat templates of all families: the supervised text is what the assistant says and what ends it, exactly."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fitune.data.formats import Conversation, normalise
from fitune.data.tokenise import Encoded, Encoder, encode, read_encoder
from template_families import EOS, FAMILIES, TEMPLATES, TOKENS

KINDS = ("bytes", "sentencepiece", "wordpiece")
SAID, ASKED, TOLD = (
    "XYZ中文é",
    "αβγδ",
    "жшюя",
)  # in no template: what is supervised tells whose it is


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """All with the same tokens of their own; a word of the sentencepiece kind takes the space before it along."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else []
    plain = [chr(code) for code in range(33, 127)] + list(SAID + ASKED + TOLD + "｜")
    if kind == "bytes":
        pairs = [("X", "Y"), ("Y", "Z")]
        words = [*letters, *("".join(pair) for pair in pairs)]
        backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "sentencepiece":
        pairs = [
            ("▁", "X"),
            ("▁X", "Y"),
            ("▁", "A"),
            ("Y", "Z"),
            ("▁", "Y"),
            ("\n", "\n"),
            ("▁", "α"),
        ]
        words = ["<unk>", "▁", "\n", *plain, *("".join(pair) for pair in pairs)]
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
        backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Metaspace()
    else:
        words = ["[UNK]", *plain, *(f"##{letter}" for letter in plain), "XY", "##YZ", "αβ"]
        backend = Tokenizer(
            models.WordPiece(
                {word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"
            )
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=EOS, pad_token="<pad>"
    )


@cache
def encoder(name: str, kind: str = "bytes", mask: str = "assistant") -> Encoder:
    return read_encoder(tokenizer(kind), template=str(TEMPLATES / f"{name}.jinja"), mask=mask)  # type: ignore[arg-type]


def supervised(found: Encoder, result: Encoded | str) -> list[str]:
    assert isinstance(result, Encoded), result
    return [found.tokenizer.decode(result.input_ids[start:end]) for start, end, _ in result.spans]


def conversation(*turns: tuple[str, str], **row: object) -> Conversation:
    return normalise(
        {"messages": [{"role": role, "content": content} for role, content in turns], **row}
    )[1]


def texts(letters: str) -> st.SearchStrategy[str]:
    spaces = st.sampled_from(["", "", "", " ", "\n"])
    word = st.text(st.sampled_from(letters), min_size=1, max_size=4)
    joined = st.lists(word, min_size=1, max_size=3).flatmap(
        lambda words: st.sampled_from([" ", "\n", ", ", "\n\n"]).map(
            lambda joint: joint.join(words)
        )
    )
    return st.tuples(spaces, joined, spaces).map("".join)


WORDS = {"assistant": texts(SAID), "user": texts(ASKED), "system": texts(TOLD)}


@st.composite
def chats(draw: st.DrawFn) -> tuple[str, tuple[tuple[str, str], ...]]:
    """A template and a conversation that it takes, which ends in an answer."""
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    roles = ["system"] if "system" in family.starts_with and draw(st.booleans()) else []
    if family.is_strict:
        roles += ["user", "assistant"] * draw(st.integers(1, 3))
    else:
        starts = [role for role in ("user", "assistant") if role in family.starts_with]
        roles += [
            draw(st.sampled_from(starts)),
            *draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=4)),
        ]
        roles = [
            role
            for place, role in enumerate(roles)
            if roles[place - 1 : place] != ["assistant"] or role != "assistant"
        ]
        if roles[-1] != "assistant":
            roles.append("assistant")
    return name, tuple((role, draw(WORDS[role])) for role in roles)


def expected(name: str, turns: tuple[tuple[str, str], ...]) -> list[str]:
    last = len(turns) - 1
    return [
        FAMILIES[name].answer(content, is_last=place == last)
        for place, (role, content) in enumerate(turns)
        if role == "assistant"
    ]


def test_every_template_has_its_family() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)
    assert len(FAMILIES) >= 40


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_and_their_ends_are_supervised_and_nothing_else(name: str) -> None:
    turns = (("user", "αβ γ"), ("assistant", "XY Z"), ("user", "γ"), ("assistant", "Z"))
    assert supervised(encoder(name), encode(encoder(name), [conversation(*turns)])[0]) == expected(
        name, turns
    )


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if "user" in family.starts_with]
)
def test_the_first_conversation_is_read_as_later_ones_are(name: str) -> None:
    """Qwen 3 strips the last answer alone: an earlier one keeps the line break that it begins with."""
    new = read_encoder(
        tokenizer("bytes"), template=str(TEMPLATES / f"{name}.jinja"), mask="assistant"
    )
    turns = (("user", "αβ γ"), ("assistant", "\nXY Z"), ("user", "γ"), ("assistant", "\nZ"))
    for result in encode(new, [conversation(*turns)] * 3):
        assert supervised(new, result) == expected(name, turns)


@given(chat=chats(), again=st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_supervised_text_is_what_the_assistant_says_and_its_end_in_every_conversation(
    chat: tuple[str, tuple[tuple[str, str], ...]], again: bool
) -> None:
    name, turns = chat
    results = encode(encoder(name), [conversation(*turns)] * (3 if again else 1))
    assert supervised(encoder(name), results[-1]) == expected(name, turns)


def test_white_space_that_a_template_writes_is_not_taken_for_that_which_it_strips() -> None:
    """The system's text and two newlines stand before an answer that begins with one."""
    turns = (("system", "ж"), ("assistant", "\nX "))
    (result,) = encode(encoder("gemma3"), [conversation(*turns)])
    assert supervised(encoder("gemma3"), result) == expected("gemma3", turns)


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
@given(chat=chats())
@settings(max_examples=150, deadline=None)
def test_every_kind_of_token_of_the_answers_is_supervised_and_no_other(
    kind: str, chat: tuple[str, tuple[tuple[str, str], ...]]
) -> None:
    name, turns = chat
    found = encoder(name, kind)
    result = encode(found, [conversation(*turns)])[0]
    assert isinstance(result, Encoded), result
    said = "".join(supervised(found, result)).replace("##", "")
    assert not set(said) & set(ASKED + TOLD)
    wanted = "".join(expected(name, turns))
    assert [letter for letter in said if letter in SAID] == [
        letter for letter in wanted if letter in SAID
    ]
    for token in TOKENS:
        assert said.count(token) == wanted.count(token), token


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "wind", "arguments": {"city": "Oslo"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "wind", "parameters": {"type": "object", "properties": {}}},
    }
]


def with_tools(arguments: object) -> Conversation:
    call = {**CALL, "function": {"name": "wind", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "α"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ж", "tool_call_id": "abcdefghi", "name": "wind"},
        {"role": "assistant", "content": "XY"},
    ]
    return normalise({"messages": messages, "tools": TOOLS})[1]


QWEN_CALL = '<tool_call>\n{"name": "wind", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
CALLS = {
    "qwen25": [f"\n{QWEN_CALL}"[1:], "XY<|im_end|>\n"],
    "qwen3": [QWEN_CALL, "<think>\n\n</think>\n\nXY<|im_end|>\n"],
    "llama31": ['{"name": "wind", "parameters": {"city": "Oslo"}}<|eot_id|>', "XY<|eot_id|>"],
    "deepseek_v3": [f'<｜tool_call｜>wind\n{{"city": "Oslo"}}<｜end_call｜>{EOS}', f"XY{EOS}"],
    "string_arguments": [f'<call>wind {{"city": "Oslo"}}</call>{EOS}', f"XY{EOS}"],
    "mistral_v3": [
        f'[TOOL_CALLS] [{{"name": "wind", "arguments": {{"city": "Oslo"}}, "id": "abcdefghi"}}]{EOS}',
        f" XY{EOS}",
    ],
    "glm45": [
        "\n<think></think>\n<tool_call>wind\n<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call><|observation|>",
        "\n<think></think>\nXY<|user|>",
    ],
    "harmony": [
        ' to=functions.wind<|channel|>commentary<|message|>{"city": "Oslo"}<|call|>',
        "<|channel|>final<|message|>XY<|return|>",
    ],
}


@pytest.mark.parametrize(
    "arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "text"]
)
@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_learned_with_their_end_however_their_arguments_are_given(
    name: str, arguments: object
) -> None:
    chat = with_tools(arguments)
    for result in encode(encoder(name), [chat, chat]):
        assert supervised(encoder(name), result) == CALLS[name]


THOUGHT = "<think>\nYZ\n</think>\n\nX"


@pytest.mark.parametrize(
    ("name", "spans", "is_said"),
    [
        ("qwen3", ["<think>\nYZ\n</think>\n\nX<|im_end|>\n"], True),
        ("qwen3_thinking", ["YZ\n</think>\n\nX<|im_end|>\n"], True),
        ("glm45", ["\n<think>YZ</think>\nX<|user|>"], True),
        ("deepseek_r1", [f"\n\nX{EOS}"], True),
        ("chatml", [f"{THOUGHT}<|im_end|>\n"] * 2, False),
        ("minimind", ["YZ\n</think>\n\nX<|im_end|>\n"] * 2, False),
    ],
)
def test_earlier_turns_whose_thinking_the_template_drops_are_not_learned(
    name: str, spans: list[str], is_said: bool
) -> None:
    chat = conversation(
        ("user", "α"), ("assistant", THOUGHT), ("user", "β"), ("assistant", THOUGHT)
    )
    for result in encode(encoder(name), [chat, chat, chat]):
        assert supervised(encoder(name), result) == spans
        assert isinstance(result, Encoded)
        assert any("thinking in earlier turns" in notice for notice in result.notices) is is_said


@pytest.mark.parametrize(
    ("name", "spans"),
    [
        ("qwen3", ["<think>\nYZ\n</think>\n\nX<|im_end|>\n"]),
        (
            "harmony",
            [
                "<|channel|>analysis<|message|>YZ<|end|><|start|>assistant<|channel|>final<|message|>X<|return|>"
            ],
        ),
        ("chatml", ["X<|im_end|>\n", "X<|im_end|>\n"]),
    ],
)
def test_reasoning_is_learned_where_the_template_writes_it(name: str, spans: list[str]) -> None:
    turns = [
        {"role": "user", "content": "α"},
        {"role": "assistant", "content": "X", "reasoning_content": "YZ"},
    ] * 2
    chat = normalise({"messages": turns})[1]
    for result in encode(encoder(name), [chat, chat, chat]):
        assert supervised(encoder(name), result) == spans


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("glm4", "<|user|>"),
        ("falcon_instruct", EOS),
        ("solar", EOS),
        ("phi2", EOS),
        ("amber_end_at_last", EOS),
    ],
)
def test_an_answer_that_the_template_does_not_end_gets_an_end_which_is_said(
    name: str, end: str
) -> None:
    result = encode(encoder(name), [conversation(("user", "α"), ("assistant", "X"))])[0]
    assert isinstance(result, Encoded)
    assert supervised(encoder(name), result)[0].endswith(end)
    assert result.ends == {end}
    assert any("does not end" in notice for notice in result.notices) is (
        name != "amber_end_at_last"
    )


def test_the_end_of_a_turn_among_others_is_not_taken_for_an_end_of_the_text() -> None:
    turns = (("user", "α"), ("assistant", "X"), ("user", "β"), ("assistant", "Y"))
    result = encode(encoder("harmony"), [conversation(*turns)])[0]
    assert isinstance(result, Encoded)
    assert result.ends == {"<|return|>"}


def test_the_last_turn_alone_is_learned_with_mask_last() -> None:
    found = encoder("llama3", mask="last")
    turns = (("user", "α"), ("assistant", "X"), ("user", "β"), ("assistant", "Y"))
    assert supervised(found, encode(found, [conversation(*turns)])[0]) == ["Y<|eot_id|>"]


def test_a_system_message_that_a_template_refuses_is_merged_where_that_is_set_and_else_the_setting_is_named() -> (
    None
):
    chat = conversation(("system", "ж"), ("user", "α"), ("assistant", "X"))
    refused = encode(encoder("gemma"), [chat])[0]
    assert isinstance(refused, str)
    assert "System role not supported. data.system=merge puts" in refused
    path = str(TEMPLATES / "gemma.jinja")
    merging = read_encoder(tokenizer("bytes"), template=path, mask="assistant", merges_system=True)
    result = encode(merging, [chat])[0]
    assert supervised(merging, result) == ["X<end_of_turn>\n"]
    assert isinstance(result, Encoded)
    assert "user\nж\n\nα<end_of_turn>" in merging.tokenizer.decode(result.input_ids)


def test_a_row_with_tools_takes_the_template_for_tools() -> None:
    own = tokenizer("bytes")
    templates = {
        name: (TEMPLATES / f"{path}.jinja").read_text()
        for name, path in (("default", "zephyr"), ("tool_use", "qwen25"))
    }
    own.chat_template = templates
    try:
        found = read_encoder(own, template=None, mask="assistant")
        plain, tools = encode(
            found, [conversation(("user", "α"), ("assistant", "X")), with_tools({"city": "Oslo"})]
        )
        named = read_encoder(own, template="tool_use", mask="assistant")
    finally:
        own.chat_template = None
    assert supervised(found, plain) == [f"X{EOS}\n"]
    assert supervised(found, tools) == CALLS["qwen25"]
    assert named.template is not None
    assert named.template.name == "the tokenizer's chat template 'tool_use'"


def test_what_a_row_gives_its_template_is_given_to_it() -> None:
    messages = [{"role": "user", "content": "α"}, {"role": "assistant", "content": "X"}]
    chats = [
        normalise({"messages": messages, "chat_template_kwargs": {"enable_thinking": on}})[1]
        for on in (True, False)
    ]
    found = encoder("qwen3")
    results = [supervised(found, result) for result in encode(found, chats)]
    assert results == [["<think>\n\n</think>\n\nX<|im_end|>\n"], ["X<|im_end|>\n"]]


def test_a_token_across_the_border_is_learned_where_it_adds_white_space_alone() -> None:
    found = encoder("deepseek_v2", "sentencepiece")
    result = encode(found, [conversation(("user", "α"), ("assistant", "XY"))])[0]
    assert isinstance(result, Encoded)
    start, _, _ = result.spans[0]
    assert found.tokenizer.convert_ids_to_tokens(result.input_ids[start]) == "▁XY"


def test_a_text_that_holds_the_marks_own_characters_is_learned_all_the_same() -> None:
    found = encoder("zephyr")
    result = encode(found, [conversation(("user", "α\U00100000"), ("assistant", "X\U00100003"))])[0]
    assert supervised(found, result) == [f"X\U00100003{EOS}\n"]
