"""The loops that are counted: fitune's step and the loops of others, each on the same sixteen rows.

A loop takes `ended`, which it calls at the end of every step, and goes on until `ended` raises `Done`.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import peft
import torch
import transformers

from fitune.batch_size.norms import NormRecorder
from fitune.config import read_config
from fitune.data.rows import Batch, Row
from fitune.model.load import load_model
from fitune.model.presets import preset_config
from fitune.recovery.protection import Protection
from fitune.recovery.step import safe_step
from fitune.step.assemble import assemble, choose_precision
from fitune.step.work import micro_batch_work, train_step
from rehearsal.answers import answers
from rehearsal.models import LORA
from rehearsal.trainers import word_tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """arguments: of a Qwen2Config; of none for a preset of fitune, which `name` is then. lora: only adapters are
    trained, on weights of 16 bits."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    lora: bool = False

    def config(self) -> Any:
        return (
            transformers.Qwen2Config(**dict(self.arguments))
            if self.arguments
            else preset_config(self.name)
        )


_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
MODELS = {
    model.name: model
    for model in (
        Model("minimind2-small"),
        Model("minimind2"),
        Model("Qwen2.5-0.5B with LoRA", tuple(_QWEN.items()), lora=True),
    )
}
MOST_TOKEN_ID = 6400
"""Of all models' vocabularies the smallest: each sees the same tokens."""
NUM_ROWS, MICRO_ROWS, LONGEST = 16, 4, 2048
MEAN_TOKENS, SPREAD = 400, 0.7
"""Of the rows' lengths, which are distributed as chat data are: log-normally."""
SEED = 96
"""One whose sample has about the mean of the distribution."""
ANSWERED = 0.6
"""Of a row's tokens, the last ones: the answer, which is supervised."""
Ended = Callable[[], None]


class Done(Exception):  # noqa: N818 (no error)
    """Enough steps were done."""


def rows() -> list[list[int]]:
    """Token ids."""
    generator = np.random.default_rng(SEED)
    lengths = np.exp(generator.normal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, NUM_ROWS))
    return [
        generator.integers(5, MOST_TOKEN_ID, int(length)).tolist()
        for length in np.clip(lengths, 16, LONGEST)
    ]


def num_supervised(row: Sequence[int]) -> int:
    return max(1, int(len(row) * ANSWERED))


# ---- fitune ----------------------------------------------------------------------------------------------------------


def fitune_step(
    model: Model, ended: Ended, *, options: Sequence[str] = (), safe: bool = True
) -> None:
    """safe: as `fitune train` does it, able to begin the step again, with the norms that the gradient noise is read
    from; else the bare step."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "source": model.name,
            "init": "random",
            "method": "lora" if model.lora else "full",
        },
        "data": {"train": "rows.jsonl", "max_length": LONGEST, "eval_fraction": 0.0},
        "batch": {"effective": NUM_ROWS},
    }
    card = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as directory:
        if model.arguments:
            model.config().save_pretrained(directory)
            tree["model"]["source"] = directory
        config = read_config(tree, list(options)).config
        precision = choose_precision(config.model, card)
        loaded = load_model(config.model, card, precision=precision, seed=0)
    setup = assemble(loaded, config, device=card, precision=precision)
    batch = Batch(tuple(_fitune_row(number, row) for number, row in enumerate(rows())))
    work = micro_batch_work(setup.model, setup.optimizer, setup.settings, scaler=setup.scaler)
    protection = Protection(work=work)
    step = 0
    while True:
        micro_batches = setup.layout.split(batch)
        if safe:
            safe_step(protection, micro_batches, step=step, norms=NormRecorder(setup.optimizer))
        else:
            train_step(
                setup.model,
                setup.optimizer,
                micro_batches,
                settings=setup.settings,
                scaler=setup.scaler,
            )
        step += 1
        ended()


def _fitune_row(number: int, tokens: Sequence[int]) -> Row:
    weights = np.zeros(len(tokens), np.float32)
    weights[len(tokens) - num_supervised(tokens) :] = 1
    weights[0] = 0
    return Row(number, np.array(tokens, np.int32), weights)


# ---- others ----------------------------------------------------------------------------------------------------------


def made(model: Model) -> Any:
    with torch.device("cuda"):
        dtype = torch.bfloat16 if model.lora else torch.float32
        built: Any = transformers.AutoModelForCausalLM.from_config(model.config(), dtype=dtype)
        built.tie_weights()
        return peft.get_peft_model(built, peft.LoraConfig(**LORA)) if model.lora else built


def minimind(model: Model, ended: Ended, *, width: int | None = None) -> None:
    """As minimind's trainer does it: rows padded to `width`, else to the longest of their micro-batch; autocast,
    AdamW with foreach, a scaler that is off."""
    trained = made(model).train()
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    micro_batches = [rows()[begin : begin + MICRO_ROWS] for begin in range(0, NUM_ROWS, MICRO_ROWS)]
    while True:
        for micro_batch in micro_batches:
            inputs = _padded(micro_batch, width or max(map(len, micro_batch)))
            input_ids, labels = (tensor.pin_memory().to("cuda") for tensor in inputs)
            with torch.amp.autocast("cuda", dtype=torch.bfloat16):
                loss = trained(input_ids=input_ids, labels=labels, use_cache=False).loss / len(
                    micro_batches
                )
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        del loss
        ended()


def _padded(micro_batch: Sequence[Sequence[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels; padding and what is no answer have the label -100."""
    input_ids = torch.zeros(len(micro_batch), width, dtype=torch.long)
    labels = torch.full((len(micro_batch), width), -100, dtype=torch.long)
    for number, row in enumerate(micro_batch):
        tokens = torch.as_tensor(row, dtype=torch.long)
        begin = len(row) - num_supervised(row)
        input_ids[number, : len(row)] = tokens
        labels[number, begin : len(row)] = tokens[begin:]
    return input_ids, labels


class _StepEnds(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, ended: Ended) -> None:
        self.ended = ended

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended()


@contextmanager
def _in_order() -> Iterator[None]:
    """Trainers take the rows as they are, not shuffled: each step sees the same sixteen. Their masks are padded or of
    packed rows, not all ones; a loss over selected targets takes as many as a micro-batch has on average."""

    def sampler(self: Any, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    selected = sum(map(num_supervised, rows())) * MICRO_ROWS // NUM_ROWS
    with (
        patch.object(transformers.Trainer, "_get_train_sampler", sampler),
        answers(truth=0, selected=selected),
    ):
        yield


def _trainer_arguments(directory: str) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "per_device_train_batch_size": MICRO_ROWS,
        "gradient_accumulation_steps": NUM_ROWS // MICRO_ROWS,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # see rehearsal.trainers
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dataset() -> Any:
    import datasets

    datasets.disable_progress_bars()
    examples = []
    for row in rows():
        begin = len(row) - num_supervised(row)
        examples.append({"input_ids": row, "labels": [-100] * begin + row[begin:]})
    return datasets.Dataset.from_list(examples * 100)


def trainer(model: Model, ended: Ended, **arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as directory, _in_order():
        transformers.Trainer(
            model=made(model),
            args=transformers.TrainingArguments(**_trainer_arguments(directory), **arguments),
            train_dataset=_dataset(),
            data_collator=transformers.DataCollatorForSeq2Seq(word_tokenizer()),
            callbacks=[_StepEnds(ended)],
        ).train()


def sft(model: Model, ended: Ended, **arguments: Any) -> None:
    import trl

    with tempfile.TemporaryDirectory() as directory, _in_order():
        trl.SFTTrainer(
            model=made(model),
            args=trl.SFTConfig(**{"max_length": None} | _trainer_arguments(directory) | arguments),
            train_dataset=_dataset(),
            processing_class=word_tokenizer(),
            callbacks=[_StepEnds(ended)],
        ).train()


LOOPS: dict[str, Callable[[Model, Ended], None]] = {
    "fitune": fitune_step,
    "fitune, 4 samples at a time": partial(fitune_step, options=(f"batch.micro={MICRO_ROWS}",)),
    "fitune, gradient checkpointing": partial(fitune_step, options=("model.recompute=full",)),
    "fitune, model.compile": partial(fitune_step, options=("model.compile=true",)),
    "fitune, the bare step": partial(fitune_step, safe=False),
    "minimind, padded to 2,048": partial(minimind, width=LONGEST),
    "minimind, padded to the longest": minimind,
    "Trainer": trainer,
    "Trainer, bf16": partial(trainer, bf16=True),
    "SFTTrainer": sft,
    "SFTTrainer, no checkpointing": partial(sft, gradient_checkpointing=False),
    "SFTTrainer, padding-free, no checkpointing": partial(
        sft, gradient_checkpointing=False, padding_free=True
    ),
    "SFTTrainer, padding-free, Liger, no checkpointing": partial(
        sft, gradient_checkpointing=False, padding_free=True, use_liger_kernel=True
    ),
}
