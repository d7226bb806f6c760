"""Answers the prompts of `eval.prompts` at each evaluation, so that one can read what is learned.

The most likely token is always taken, so no random number is drawn and the training goes on as
without it. One prompt is answered at a time, without gradients.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fitune.config import DataConfig
from fitune.config.sections import EvalConfig
from fitune.data.chat_template import TemplateError, read_template
from fitune.errors import DataError
from fitune.machine.out_of_memory import memory_failure, release_memory
from fitune.model.answer import Sampling, generate
from fitune.model.ends import ids_of
from fitune.model.evaluation_mode import evaluation_mode
from fitune.run.answers import EvalAnswer
from fitune.step.assemble import Setup
from fitune.training.log import RunLog
from fitune.training.samples import Data, Prompt
from fitune.training.state import RunState
from fitune.units import format_bytes


def encode_prompts(
    evaluation: EvalConfig, data: DataConfig, tokenizer: Tokenizer
) -> tuple[Prompt, ...]:
    """Return the prompts of the configuration, through the chat template if there is one.

    Raises DataError for a prompt that the template refuses, or that leaves no room for its answer
    in data.max_length tokens.
    """
    if not evaluation.prompts:
        return ()
    template, _ = read_template(tokenizer, data.template)
    prompts = []
    for text in evaluation.prompts:
        try:
            rendered = (
                text
                if template is None
                else template.render(
                    [{"role": "user", "content": text}], add_generation_prompt=True
                )
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses eval.prompts {text!r}: {error}") from error
        ids = tokenizer(rendered, add_special_tokens=template is None)["input_ids"]
        if len(ids) + evaluation.new_tokens > data.max_length:
            raise DataError(
                f"eval.prompts {text[:40]!r} has {len(ids):,} tokens, and with eval.new_tokens "
                f"{evaluation.new_tokens:,} it exceeds data.max_length "
                f"{data.max_length:,}: shorten it, or lower eval.new_tokens"
            )
        prompts.append(Prompt(text, tuple(ids)))
    return tuple(prompts)


def cache_note(prompts: Sequence[Prompt], *, num_new_tokens: int, model: PreTrainedModel) -> str:
    """Return a sentence with the size of the largest key-value cache."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    width = (getattr(config, "num_key_value_heads", None) or num_heads) * head_dim
    num_tokens = num_new_tokens + max(len(prompt.token_ids) for prompt in prompts)
    element_bytes = model.get_input_embeddings().weight.element_size()
    cache_bytes = 2 * config.num_hidden_layers * width * num_tokens * element_bytes
    return (
        f"eval.prompts: {len(prompts)} answers at each evaluation, one at a time between steps; "
        f"the key-value cache takes up to {format_bytes(cache_bytes)}, which the plan "
        "does not count"
    )


class PromptAnswers:
    """Answers the prompts with the present weights, and logs the answers."""

    def __init__(
        self, config: EvalConfig, setup: Setup, log: RunLog, *, data: Data, tokenizer: Tokenizer
    ) -> None:
        self._model, self._settings = setup.model, setup.settings
        self._prompts, self._log, self._tokenizer = data.prompts, log, tokenizer
        ends = ids_of(data.train.report.ends, tokenizer)
        self._sampling = Sampling(max_new_tokens=config.new_tokens, end_ids=tuple(ends))

    def ask(self, state: RunState) -> None:
        """Answer each prompt, in the first of several processes.

        Without memory for it, an event is logged.
        Neither the model nor a random state changes.
        """
        if not self._prompts or not self._log.writes:
            return
        try:
            answers = [self._answer(prompt) for prompt in self._prompts]
        except Exception as error:
            if memory_failure(error) is None:
                raise
            release_memory(self._device)
            message = f"step {state.step}: no memory for the answers to eval.prompts"
            self._log.event("answers_left_out", message, step=state.step)
            return
        for prompt, (text, num_tokens) in zip(self._prompts, answers, strict=True):
            self._log.answer(
                EvalAnswer(
                    step=state.step,
                    total_tokens=state.tokens,
                    prompt=prompt.text,
                    answer=text,
                    num_tokens=num_tokens,
                )
            )

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return device

    def _answer(self, prompt: Prompt) -> tuple[str, int]:
        """Return the text of an answer, and the number of its tokens."""
        prompt_BT = torch.tensor([prompt.token_ids], device=self._device)
        # A compiled layer would be compiled again for the lengths of a growing answer.
        with evaluation_mode(self._model), torch.compiler.set_stance("force_eager"):
            whole_BT = self._settings.run(
                self._device,
                lambda: generate(
                    self._model, prompt_BT, tokenizer=self._tokenizer, sampling=self._sampling
                ),
            )
        ids = whole_BT[0, len(prompt.token_ids) :].tolist()
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip(), len(ids)
