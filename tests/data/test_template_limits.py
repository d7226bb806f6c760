"""A chat template that never ends, or fills the memory, is one sentence."""

import sys
import threading
import time
from types import SimpleNamespace

import pytest

from byte_tokenizer import CHATML, byte_tokenizer
from fitune.data import template_limits
from fitune.data.chat_template import read_template
from fitune.data.formats import Conversation
from fitune.data.template_limits import limited
from fitune.data.tokenise import encode, read_encoder
from fitune.errors import DataError

GROWS = "{%% set n = namespace(x=%s) %%}{%% for a in range(99) %%}{%% set n.x = n.x %s n.x %%}{%% endfor %%}{{ n.x }}"
LOOPS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a number that grows": GROWS % (3, "*"),
}
SIZES = {
    "a product of text": "{{ 'a' * 4000000000 }}",
    "text that doubles": GROWS % ("'ab'", "~"),
    "a list that doubles": GROWS % ("[1]", "+"),
    "a filter": "{{ 'a'|center(4000000000) }}",
    "a format": "{{ '%4000000000d' % 1 }}",
    "a replacement": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "much text": "{{ 'a' * 30000000 }}",
}
MESSAGES = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def conversation(*messages: dict[str, str]) -> Conversation:
    return Conversation(
        messages=messages, weights=(None,) * len(messages), tools=None, text=None, digest=0
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.5)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", LOOPS)
def test_a_template_without_end_is_broken_off(kind: str) -> None:
    started = time.perf_counter()
    with pytest.raises(DataError, match=r"goes beyond its bounds.*data\.template"):
        read_encoder(byte_tokenizer(LOOPS[kind]), template=None, mask="assistant")
    assert time.perf_counter() - started < 30


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("kind", SIZES)
def test_a_template_that_fills_the_memory_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match=r"goes beyond its bounds.*(memory|characters)"):
        read_encoder(byte_tokenizer(SIZES[kind]), template=None, mask="assistant")


@pytest.mark.usefixtures("short")
def test_a_row_that_makes_it_endless_ends_the_reading_and_not_the_row_alone() -> None:
    template = CHATML + "{% if messages|length > 2 %}" + LOOPS["nested loops"] + "{% endif %}"
    found = read_encoder(byte_tokenizer(template), template=None, mask="all")
    with pytest.raises(DataError, match=r"more than 0\.5 seconds"):
        encode(found, [conversation(*MESSAGES, *MESSAGES)])


@pytest.mark.usefixtures("short")
def test_a_template_cannot_catch_the_end_of_its_time() -> None:
    template = "{{ [1]|map(attribute='a')|list }}" + LOOPS["nested loops"] + "{{ 1/0 }}"
    with pytest.raises(DataError, match=r"more than 0\.5 seconds"):
        read_encoder(byte_tokenizer(template), template=None, mask="assistant")


def test_text_as_long_as_its_conversation_is_no_excess() -> None:
    found = read_encoder(byte_tokenizer(CHATML), template=None, mask="all")
    long = ({"role": "user", "content": "a" * 1_100_000}, MESSAGES[1])
    (row,) = encode(found, [conversation(*long)])
    assert not isinstance(row, str)


def test_the_limits_are_gone_afterwards_and_nothing_comes_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resource = pytest.importorskip("resource")
    before, threads = resource.getrlimit(resource.RLIMIT_AS), threading.active_count()
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.0)
    monkeypatch.setattr(template_limits, "_CHECK_SECONDS", 0.0)
    with limited() as limits:
        for _ in range(300):  # most end before they are broken off, some just then
            try:
                with limits:
                    sum(range(3000))
            except template_limits.LimitError:
                pass
    sum(range(100_000))
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert threading.active_count() == threads


def test_a_template_that_was_compiled_without_limits_is_compiled_again_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer("{% if messages|length > 1 %}{{ 2 ** 1000000 > 1 }}{% endif %}")
    assert tokenizer.apply_chat_template([dict(MESSAGES[0])], tokenize=False) == ""
    with pytest.raises(DataError, match="number of"):
        read_encoder(tokenizer, template=None, mask="assistant")


def test_other_users_of_transformers_keep_its_own_sandbox() -> None:
    tokenizer = byte_tokenizer("{{ 2 ** 200000 > 1 }}")
    with pytest.raises(DataError):
        read_encoder(tokenizer, template=None, mask="assistant")
    assert tokenizer.apply_chat_template([dict(MESSAGES[0])], tokenize=False) == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("moment", ["when a rendering begins", "when it ends"])
def test_ctrl_c_in_any_moment_leaves_the_process_its_memory(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)

    def interrupted() -> float:
        raise KeyboardInterrupt

    class Interrupted:
        def __enter__(self) -> None:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None: ...

    with pytest.raises(KeyboardInterrupt), limited() as limits:  # noqa: PT012 (both moments are entered by it)
        if moment == "when a rendering begins":
            monkeypatch.setattr(template_limits, "time", SimpleNamespace(process_time=interrupted))
            limits.__enter__()
        limits.__enter__()
        monkeypatch.setattr(limits, "_lock", Interrupted())
        limits.__exit__(None, None, None)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("given", [5, ["{{ messages }}"], {"default": 5}])
def test_a_template_that_is_no_text_is_one_sentence(given: object) -> None:
    tokenizer = SimpleNamespace(chat_template=given, special_tokens_map={})
    with pytest.raises(DataError, match="the tokenizer's chat template is no text: give a Jinja"):
        read_template(tokenizer, None)
