"""Write an Ollama `Modelfile` for a GGUF file.

Ollama renders conversations by a template of its own in the language of Go. It recognises the chat
templates of some well-known models, and for any other model it sends the question bare. So the
parts of the chat template are found by rendering it, and are used only if they render conversations
exactly as the chat template does.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.model.gguf_tokenizer import adds_bos

Message = dict[str, str]
_PLACES = {"system": "\x01s\x01", "user": "\x01u\x01", "assistant": "\x01a\x01"}
_MORE_USER = "\x01v\x01"
#: what would end a text of a Modelfile, or begin an action of a template
_SIGNS = ('"""', "{{")


@dataclass(frozen=True, slots=True)
class TurnParts:
    """What a chat template writes around each message."""

    #: role -> text before and after its content
    around: dict[str, tuple[str, str]]
    #: the text that asks for an answer
    prompt: str
    #: the system message that the template writes if a conversation has none
    system: str | None
    #: the first token of a conversation, where the tokenizer does not add it anyway
    start: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """Render messages and ask for an answer, as Ollama does with `go_template`."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        turns = (self.around[message["role"]] for message in messages)
        return (
            self.start
            + "".join(
                before + message["content"] + after
                for message, (before, after) in zip(messages, turns, strict=True)
            )
            + self.prompt
        )

    def go_template(self) -> str:
        roles = [
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{before}{{{{ .Content }}}}{after}"
            for number, (role, (before, after)) in enumerate(self.around.items())
        ]
        turns = f"{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}"
        return f"{self.start}{turns}{self.prompt}"


def modelfile(file_name: str, tokenizer: Tokenizer, *, end_ids: Sequence[int]) -> str:
    """Return the text of a Modelfile beside `file_name`.

    end_ids: the tokens at which a generation stops.
    """
    lines = [f"FROM ./{file_name}"]
    if (parts := find_parts(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{parts.go_template()}"""')
        if parts.system is not None:
            lines.append(f'SYSTEM """{parts.system}"""')
    else:
        lines.append(
            "# The chat template has more than turns one after the other, so there is no TEMPLATE\n"
            "# here: Ollama uses its own if it recognises the template in the file."
        )
    ends = dict.fromkeys(tokenizer.convert_ids_to_tokens(list(end_ids)))
    lines += [f'PARAMETER stop "{end}"' for end in ends if '"' not in end]
    return "\n".join(lines) + "\n"


def find_parts(tokenizer: Tokenizer) -> TurnParts | None:
    """Return what the chat template writes around messages; None if it does more than that."""
    for start in ("", tokenizer.bos_token):
        with suppress(TemplateError, ValueError, TypeError, KeyError, IndexError):
            parts = None if start is None else _split(Template(tokenizer, start))
            if parts is not None and _agrees(parts, Template(tokenizer, start)):
                parts = replace(parts, start="" if adds_bos(tokenizer) else start)
                texts = [*(text for pair in parts.around.values() for text in pair), parts.prompt]
                texts += [parts.system or "", parts.start]
                return None if any(sign in text for text in texts for sign in _SIGNS) else parts
    return None


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template whose text is known to begin with `start`, which is left out."""

    tokenizer: Tokenizer
    start: str

    def render(self, messages: Sequence[Message], *, asks: bool = True) -> str:
        """Render messages. Raises ValueError if the text does not begin with `start`."""
        text = str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=asks
            )
        )
        if not text.startswith(self.start):
            raise ValueError("the template begins with something else")
        return text.removeprefix(self.start)


def _agrees(parts: TurnParts, template: Template) -> bool:
    """Return whether both render some conversations alike."""
    return all(
        template.render(messages) == parts.render(messages)
        for messages in _conversations(with_system="system" in parts.around)
    )


def _split(template: Template) -> TurnParts | None:
    """Cut a rendered conversation at the contents of its messages."""
    question = {"role": "user", "content": _PLACES["user"]}
    answer = {"role": "assistant", "content": _PLACES["assistant"]}
    more = {"role": "user", "content": _MORE_USER}
    whole = template.render([question, answer, more])
    head, rest = whole.split(_PLACES["user"])
    between, rest = rest.split(_PLACES["assistant"])
    after_answer, tail = rest.split(_MORE_USER)
    asked = template.render([question])
    unasked = template.render([question], asks=False)
    prompt = asked.removeprefix(unasked)
    if not asked.startswith(unasked) or not tail.endswith(prompt):
        return None
    user_end = unasked.partition(_PLACES["user"])[2]
    before_answer = between.removeprefix(user_end)
    ended = template.render([question, answer], asks=False)
    answer_end = ended.partition(_PLACES["assistant"])[2]
    user_start = after_answer.removeprefix(answer_end)
    around = {"user": (user_start, user_end), "assistant": (before_answer, answer_end)}
    default = head.removesuffix(user_start)
    try:
        given = template.render([{"role": "system", "content": _PLACES["system"]}, question])
        before, after = given.split(_PLACES["system"])
    except (TemplateError, ValueError):
        return TurnParts(around, prompt, None) if not default else None
    system_end = after.partition(_PLACES["user"])[0].removesuffix(user_start)
    around = {"system": (before, system_end), **around}
    if not default:
        return TurnParts(around, prompt, None)
    if not default.startswith(before) or not default.endswith(system_end):
        return None
    return TurnParts(around, prompt, default[len(before) : len(default) - len(system_end)])


def _conversations(*, with_system: bool) -> list[list[Message]]:
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A test\nof two lines."},
        {"role": "user", "content": "And this?"},
        {"role": "assistant", "content": "Another one."},
        {"role": "user", "content": "Then it ends."},
    ]
    found = [turns[:1], turns[:3], turns]
    if with_system:
        found += [[{"role": "system", "content": "Be brief."}, *each] for each in found]
    return found
