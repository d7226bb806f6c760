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
SAID, ASKED, TOLD = "XYZ中文é", "αβγδ", "жшюя"  # in no template: what is supervised tells whose it is


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
        pairs = [("▁", "X"), ("▁X", "Y"), ("▁", "A"), ("Y", "Z"), ("▁", "Y"), ("\n", "\n"), ("▁", "α")]
        words = ["<unk>", "▁", "\n", *plain, *("".join(pair) for pair in pairs)]
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
        backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Metaspace()
    else:
        words = ["[UNK]", *plain, *(f"##{letter}" for letter in plain), "XY", "##YZ", "αβ"]
        backend = Tokenizer(
            models.WordPiece({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]")
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=EOS, pad_token="<pad>")


@cache
def encoder(name: str, kind: str = "bytes", mask: str = "assistant") -> Encoder:
    return read_encoder(tokenizer(kind), template=str(TEMPLATES / f"{name}.jinja"), mask=mask)  # type: ignore[arg-type]


def supervised(found: Encoder, result: Encoded | str) -> list[str]:
    assert isinstance(result, Encoded), result
    return [found.tokenizer.decode(result.input_ids[start:end]) for start, end, _ in result.spans]


def conversation(*turns: tuple[str, str], **row: object) -> Conversation:
    return normalise({"messages": [{"role": role, "content": content} for role, content in turns], **row})[1]


def texts(letters: str) -> st.SearchStrategy[str]:
    spaces = st.sampled_from(["", "", "", " ", "\n"])
    word = st.text(st.sampled_from(letters), min_size=1, max_size=4)
    joined = st.lists(word, min_size=1, max_size=3).flatmap(
        lambda words: st.sampled_from([" ", "\n", ", ", "\n\n"]).map(lambda joint: joint.join(words))
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
        roles += [draw(st.sampled_from(starts)), *draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=4))]
        roles = [
            role for place, role in enumerate(roles) if roles[place - 1 : place] != ["assistant"] or role != "assistant"
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
    assert supervised(encoder(name), encode(encoder(name), [conversation(*turns)])[0]) == expected(name, turns)


@given(chat=chats(), again=st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_supervised_text_is_what_the_assistant_says_and_its_end_in_every_conversation(
    chat: tuple[str, tuple[tuple[str, str], ...]], again: bool
) -> None:
    name, turns = chat
    results = encode(encoder(name), [conversation(*turns)] * (3 if again else 1))
    assert supervised(encoder(name), results[-1]) == expected(name, turns)
