"""Generate answers with a model, as text that can be shown while it grows."""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig, PreTrainedModel, TextStreamer
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.data.chat_template import ChatTemplate, TemplateError, read_template
from fitune.errors import ModelError, UsageError
from fitune.model.load import quiet_transformers

if TYPE_CHECKING:
    from peft import PeftModel

Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of an answer are chosen."""

    max_new_tokens: int
    #: 0 takes the most likely token
    temperature: float = 0.0
    #: only the most likely tokens that together have this probability
    top_p: float = 1.0
    #: of the random numbers that choose tokens, in a conversation
    seed: int = 0
    #: tokens that end an answer, besides those of the model's generation configuration
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model that answers."""

    model: "PreTrainedModel | PeftModel"
    tokenizer: Tokenizer
    template: ChatTemplate
    #: whether it answers without its adapters
    without_adapters: bool = False

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation that ends where an answer begins.

        Raises UsageError if the chat template refuses it.
        """
        try:
            text = self.template.render(messages, add_generation_prompt=True)
        except TemplateError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        show: Callable[[str], None],
    ) -> None:
        """Generate an answer, which `show` gets piece by piece.

        prompt: the tokens of a conversation, as `prompt` returns them.

        Raises UsageError if the answer would go beyond the positions of the model.
        """
        room = _room(len(prompt), self.model.config)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        adapters = self.model.disable_adapter() if self.without_adapters else nullcontext()
        device = self.model.get_input_embeddings().weight.device
        torch.manual_seed(sampling.seed)
        with adapters:
            generate(
                self.model,
                torch.tensor([list(prompt)], device=device),
                tokenizer=self.tokenizer,
                sampling=sampling,
                streamer=ShownText(self.tokenizer, show),
            )


class ShownText(TextStreamer):  # type: ignore[misc]
    """Passes the text of an answer on as soon as it is certain."""

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def chat_template(tokenizer: Tokenizer, path: str | None, *, source: object) -> ChatTemplate:
    """Return the chat template of a file, or the tokenizer's own.

    source: what the tokenizer came with, for the message.

    Raises ModelError if there is none.
    """
    template, _ = read_template(tokenizer, path)
    if template is None:
        raise ModelError(
            f"{source} has no chat template, which turns a conversation into tokens: give one with "
            "--template FILE.jinja"
        )
    return template


def _room(num_tokens: int, config: PretrainedConfig) -> int:
    """Return how many tokens fit behind a prompt. Raises UsageError if none does."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and num_tokens >= most:
        raise UsageError(
            f"the conversation has {num_tokens:,} tokens and the model {most:,} positions: begin "
            "a new one with /reset"
        )
    return sys.maxsize if most is None else most - num_tokens


# Not inference_mode: a tensor that a layer keeps could not be used in training.
@torch.no_grad()
def generate(
    model: "PreTrainedModel | PeftModel",
    prompt_BT: torch.Tensor,
    *,
    tokenizer: Tokenizer,
    sampling: Sampling,
    streamer: TextStreamer | None = None,
) -> torch.Tensor:
    """Return the tokens [B, T + N] of prompts and answers. The model must be in evaluation mode.

    Without temperature no random number is drawn.
    """
    samples = sampling.temperature > 0
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    unused = {"temperature": None, "top_p": None, "top_k": None}
    known = model.generation_config.eos_token_id
    ends = [*(known if isinstance(known, list) else [known]), *sampling.end_ids]
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(  # type: ignore[no-any-return]
            input_ids=prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=samples,
            use_cache=True,
            eos_token_id=[end for end in dict.fromkeys(ends) if end is not None] or None,
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **(chosen if samples else unused),
        )
