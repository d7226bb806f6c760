"""What `speed.py` compares: the rows, and the trainers that see the same ones in the same order.

Each trainer starts from the same weights and takes one optimizer step for `rows_per_step` rows: AdamW without decay, a
constant rate, gradients clipped to a norm of 1, float32. They differ in how a step is computed. TRL's packing alone
also changes which rows make a step.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from fitune.cli.demo import corpus_directory, smollm2_file
from fitune.config import DataConfig, ModelConfig, RunConfig, read_config
from fitune.data.examples import load_examples
from fitune.data.rows import Batch, Row
from fitune.machine.process_memory import program_bytes, read_peak, reset_peak
from fitune.model.load import load_config, load_model, load_tokenizer
from fitune.step.assemble import assemble, choose_precision
from fitune.step.work import train_step

CPU = torch.device("cpu")
MEAN_TOKENS, SIGMA = 250, 0.9
LR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """padded_rows: rows in one forward of the trainer that pads, where the whole step does not fit into memory. method:
    lora has the adapters of `model.lora`'s defaults, the same ones in every trainer."""

    model: str
    max_length: int
    method: Literal["full", "lora"] = "full"
    rows_per_step: int = 8
    num_steps: int = 2
    padded_rows: int | None = None
    threads: int = 1
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows_per_step * self.num_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one process. tokens: real ones, no padding. peak_bytes: largest resident set above that with the model loaded.
    losses: mean over the supervised tokens of each optimizer step."""

    tokens: int
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    losses: list[float]


# ---- rows -----------------------------------------------------------------------------------------------------------


def task_config(task: Task, **model: Any) -> RunConfig:
    source = str(smollm2_file()) if task.model == "SmolLM2-135M" else task.model
    init = {"init": "random"} if source == task.model and not Path(source).exists() else {}
    model = {"source": source, "method": task.method, **init, **model}
    data = {"train": "none", "max_length": task.max_length}
    optim = {"lr": LR, "weight_decay": 0.0}
    return read_config({"model": model, "data": data, "optim": optim}).config


def row_lengths(task: Task) -> list[int]:
    """Log-normal, mean 250: the middles of as many equal shares of the distribution as there are rows, so that few rows
    are as good as many; in a seeded order, cut at max_length."""
    mu = np.log(MEAN_TOKENS) - SIGMA**2 / 2
    shares = (np.arange(task.num_rows) + 0.5) / task.num_rows
    lengths = [int(np.exp(mu + SIGMA * NormalDist().inv_cdf(float(share)))) for share in shares]
    order = np.random.default_rng(task.seed).permutation(task.num_rows)
    return [min(max(lengths[place], 8), task.max_length) for place in order]


def dialogue_rows(task: Task) -> list[Row]:
    """Real dialogues of chatterbot-corpus in SmolLM2's chat template, as many of them in a row as its length needs, cut
    at the beginning, so that a row ends with an answer; what the assistant says is supervised. A smaller vocabulary
    gets the ids modulo its size."""
    vocab_size = load_config(task_config(task).model).get_text_config().vocab_size
    random = np.random.default_rng(task.seed)
    pool = _dialogues()
    rows = []
    for row_id, length in enumerate(row_lengths(task)):
        parts: list[Row] = []
        while sum(map(len, parts)) < length:
            parts.append(pool[int(random.integers(len(pool)))])
        ids = np.concatenate([part.input_ids for part in parts])[-length:] % vocab_size
        weights = np.concatenate([part.loss_weights for part in parts])[-length:]
        weights[0] = 0
        rows.append(Row(row_id, ids.astype(np.int32), weights.astype(np.float32)))
    return rows


def _dialogues() -> list[Row]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "dialogues.jsonl"
        with path.open("w") as file:
            for corpus in sorted(corpus_directory("english").glob("*.yml")):
                for turns in yaml.safe_load(corpus.read_text())["conversations"]:
                    texts = [
                        str(turn) for turn in turns[: len(turns) // 2 * 2] if str(turn).strip()
                    ]
                    if len(texts) >= 2:
                        roles = ("user", "assistant")
                        messages = [
                            {"role": roles[i % 2], "content": text} for i, text in enumerate(texts)
                        ]
                        file.write(json.dumps({"messages": messages}) + "\n")
        data = DataConfig(train=str(path), eval_fraction=0)
        examples = load_examples(
            data,
            load_tokenizer(ModelConfig(source=_tokenizer_source())),
            split="train",
            eval_max_rows=0,
        )
        return [examples[index] for index in range(len(examples))]


def _tokenizer_source() -> str:
    return str(smollm2_file())


# ---- trainers -------------------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """Measures from its making on: time, and the largest resident set above the one at that moment."""

    resident_bytes: int = field(default_factory=lambda: program_bytes(CPU) or 0)

    def __post_init__(self) -> None:
        reset_peak(CPU)
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def outcome(self, tokens: int, losses: list[float]) -> Outcome:
        cpu_seconds, wall_seconds = time.process_time() - self.cpu, time.perf_counter() - self.wall
        peak_bytes = (read_peak(CPU).device_bytes or 0) - self.resident_bytes
        return Outcome(
            tokens=tokens,
            cpu_seconds=cpu_seconds,
            wall_seconds=wall_seconds,
            peak_bytes=peak_bytes,
            losses=losses,
        )


def run_fitune(task: Task, rows: Sequence[Row], *, recompute: str = "off") -> Outcome:
    config = task_config(task, recompute=recompute)
    precision = choose_precision(config.model, CPU)
    model = load_model(config.model, CPU, precision=precision).train()
    clock, losses = _Clock(), []
    setup = assemble(model, config, device=CPU, precision=precision)
    for batch in _batches(task, rows):
        micro_batches = setup.layout.split(batch)
        losses.append(
            train_step(model, setup.optimizer, micro_batches, settings=setup.settings).loss or 0.0
        )
    return clock.outcome(_num_tokens(rows), losses)


def run_padding(task: Task, rows: Sequence[Row]) -> Outcome:
    """Every row filled up to max_length, all logits, torch's default AdamW: the plain fine-tuning script."""
    model = _plain_model(task)
    clock, losses = _Clock(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for batch in _batches(task, rows):
        at_once, loss_sum = task.padded_rows or len(batch.rows), 0.0
        for first in range(0, len(batch.rows), at_once):
            ids_BS, labels_BS = _padded(batch.rows[first : first + at_once], task.max_length)
            logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
            losses_T = F.cross_entropy(
                logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="sum"
            )
            loss = losses_T / batch.loss_weight
            loss.backward()
            loss_sum += loss.item()
            del logits_BSV, losses_T, loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss_sum)
    return clock.outcome(_num_tokens(rows), losses)


def run_trl(task: Task, rows: Sequence[Row], *, packing: bool = False, **options: Any) -> Outcome:
    """TRL's SFTTrainer in float32, otherwise at its defaults but for `options`. With packing, a step sees so many
    packed rows that the number of steps stays."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []
    clocks: list[_Clock] = []
    outcomes: list[Outcome] = []

    class Measured(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            losses[-1] += loss.item()
            return loss

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clocks.append(_Clock())

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            losses.append(0.0)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            outcomes.append(clocks[0].outcome(_num_tokens(rows), losses))

    model = _plain_model(task)
    columns = {
        "input_ids": [row.input_ids.tolist() for row in rows],
        "labels": [np.where(row.loss_weights > 0, row.input_ids, -100).tolist() for row in rows],
    }
    if packing:  # one packed row in a forward; TRL flattens them, so more at once are no faster
        num_packed = -(-_num_tokens(rows) // task.max_length)
        batch = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": max(1, num_packed // task.num_steps),
        }
    else:
        batch = {"per_device_train_batch_size": task.rows_per_step}
    with TemporaryDirectory() as directory:
        arguments = SFTConfig(
            output_dir=directory, max_length=None if options.get("padding_free") else task.max_length,
            bf16=False, use_cpu=True, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, num_train_epochs=1, train_sampling_strategy="sequential", save_strategy="no",
            logging_strategy="no", report_to="none", disable_tqdm=True, packing=packing, **batch, **options,
        )  # fmt: skip
        tokenizer = load_tokenizer(ModelConfig(source=_tokenizer_source()))
        trainer = Measured(model, arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
                           callbacks=[Watch()])  # fmt: skip
        trainer.train()
    return outcomes[0]


TRAINERS: dict[str, Callable[[Task, Sequence[Row]], Outcome]] = {
    "fitune": run_fitune,
    "fitune, recompute full": lambda task, rows: run_fitune(task, rows, recompute="full"),
    "padding to max_length": run_padding,
    "TRL, float32": lambda task, rows: run_trl(task, rows),
    "TRL, recompute off": lambda task, rows: run_trl(task, rows, gradient_checkpointing=False),
    "TRL, padding-free": lambda task, rows: run_trl(
        task, rows, gradient_checkpointing=False, padding_free=True
    ),
    "TRL, padding-free, recompute": lambda task, rows: run_trl(task, rows, padding_free=True),
    "TRL, packing": lambda task, rows: run_trl(
        task, rows, gradient_checkpointing=False, packing=True
    ),
}


def _plain_model(task: Task) -> Any:
    """The same weights with transformers' own attention."""
    config = task_config(task)
    model: Any = load_model(
        config.model, CPU, precision=choose_precision(config.model, CPU)
    ).train()
    model.set_attn_implementation("sdpa")
    return model


def _batches(task: Task, rows: Sequence[Row]) -> Iterator[Batch]:
    for first in range(0, len(rows), task.rows_per_step):
        yield Batch(tuple(rows[first : first + task.rows_per_step]))


def _padded(rows: Sequence[Row], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BS = torch.zeros((len(rows), width), dtype=torch.int64)
    labels_BS = torch.full((len(rows), width), -100)
    for place, row in enumerate(rows):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        ids_BS[place, : len(row)] = ids
        labels_BS[place, : len(row)] = torch.where(
            torch.from_numpy(row.loss_weights > 0), ids, -100
        )
    return ids_BS, labels_BS


def _num_tokens(rows: Sequence[Row]) -> int:
    return sum(map(len, rows))
