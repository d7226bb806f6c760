"""DPO in one run beside supervised fine-tuning of the same tokens and beside TRL's DPOTrainer: peak memory and time.

    python benchmarks/preference.py                 all, each in a process of its own
    python benchmarks/preference.py --only fitune-dpo

Each trainer starts from the same weights, sees the same pairs in the same order, and takes AdamW without decay, a constant
rate, gradients clipped to a norm of 1, float32, one thread. peak: the largest resident set (VmHWM) in a step after the first,
above the program before the model was loaded. The processor's time is that of the process, so that other programs do not
count. losses: what each step minimised; those of fitune and TRL must agree. A run of all writes results/preference.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import LlamaConfig, TrainerCallback

from fitune.config import read_config
from fitune.data.rows import Batch, Judged, Row
from fitune.machine.process_memory import program_bytes, read_peak, reset_peak
from fitune.model.load import build_model, load_model
from fitune.step.assemble import assemble, choose_precision
from fitune.step.evaluate import evaluate
from fitune.step.work import train_step

TRAINERS = ("fitune-sft", "fitune-dpo", "fitune-dpo-copy", "trl-dpo-precomputed", "trl-dpo")
RESULTS = Path(__file__).parent / "results" / "preference.json"
CPU = torch.device("cpu")
LENGTH, PROMPT, PAIRS, MICRO_PAIRS, STEPS = 256, 64, 4, 2, 4
LR = 1e-4


def save_model(directory: Path) -> None:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    build_model(config, seed=0).save_pretrained(directory)


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected answer of each pair, all of one length, so that nobody pads."""
    draw = np.random.default_rng(0)

    def tokens(number: int) -> list[int]:
        return [int(token) for token in draw.integers(5, 32000, number)]

    answer = LENGTH - PROMPT
    return [(tokens(PROMPT), tokens(answer), tokens(answer)) for _ in range(PAIRS * STEPS)]


class Clock:
    """The processor's seconds and the peak of each step."""

    def __init__(self) -> None:
        self.before = program_bytes(CPU) or 0
        self.seconds: list[float] = []
        self.peaks: list[int] = []
        self._start = 0.0

    def begin(self) -> None:
        reset_peak(CPU)
        self._start = time.process_time()

    def end(self) -> None:
        self.seconds.append(time.process_time() - self._start)
        self.peaks.append((read_peak(CPU).device_bytes or 0) - self.before)

    def outcome(self, losses: list[float], reference: float = 0.0) -> dict[str, Any]:
        return {
            "peak_bytes": max(self.peaks[1:]),
            "seconds_per_pair": sum(self.seconds[1:]) / PAIRS / (STEPS - 1),
            "reference_seconds_per_pair": reference,
            "losses": losses,
        }


def row(number: int, *sequences: tuple[list[int], list[int]]) -> Row:
    """One sample of sequences of (prompt, answer), of which the answers are targets."""
    ids = [token for prompt, answer in sequences for token in (*prompt, *answer)]
    weights = [float(i >= PROMPT) for _ in sequences for i in range(LENGTH)]
    judged = Judged(LENGTH) if len(sequences) > 1 else None
    return Row(number, np.array(ids, np.int32), np.array(weights, np.float32), judged)


def fitune(directory: Path, *, objective: str, reference: str = "kept") -> dict[str, Any]:
    clock = Clock()
    per_row = 1 if objective == "dpo" else 2
    config = read_config(
        {
            "model": {"source": str(directory), "recompute": "off", "precision": "float32"},
            "objective": objective,
            "preference": {"reference": reference} if objective == "dpo" else {},
            "loss": "chunked",
            "data": {"train": "none", "max_length": LENGTH},
            "batch": {"effective": PAIRS * per_row, "micro": MICRO_PAIRS * per_row},
            "optim": {"lr": LR, "weight_decay": 0.0},
        }
    ).config
    precision = choose_precision(config.model, CPU)
    model = load_model(config.model, CPU, precision=precision, seed=0)
    setup = assemble(model, config, device=CPU, precision=precision)
    singles = [
        row(2 * number + place, (prompt, answer))
        for number, (prompt, *answers) in enumerate(pairs())
        for place, answer in enumerate(answers)
    ]
    rows, once = singles, 0.0
    if objective == "dpo":
        start = time.process_time()
        scoring = setup.settings.of_reference()
        groups = (singles[first : first + 4] for first in range(0, len(singles), 4))
        pieces = (piece for rows in groups for piece in setup.eval_layout.split(Batch(tuple(rows))))
        scores = np.array(evaluate(model, pieces, settings=scoring).row_losses).reshape(-1, 2)
        once = (time.process_time() - start) / len(scores) if reference == "kept" else 0.0
        rows = [
            replace(
                row(number, (prompt, chosen), (prompt, rejected)),
                judged=Judged(LENGTH, (-float(score[0]), -float(score[1]))),
            )
            for (number, (prompt, chosen, rejected)), score in zip(
                enumerate(pairs()), scores, strict=True
            )
        ]
    losses = []
    size = PAIRS * per_row
    for number in range(STEPS):
        batch = Batch(tuple(rows[number * size : (number + 1) * size]))
        clock.begin()
        result = train_step(
            model, setup.optimizer, setup.layout.split(batch), settings=setup.settings
        )
        clock.end()
        losses.append(float(result.loss or 0.0))
    return clock.outcome(losses, once)


def trl(directory: Path, *, precomputed: bool) -> dict[str, Any]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    clock = Clock()

    class Measuring(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.end()

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    made = [
        {"prompt": "", "chosen": "", "rejected": "", "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in pairs()
    ]  # fmt: skip
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
    )
    arguments = DPOConfig(
        output_dir=str(directory / "trl"),
        per_device_train_batch_size=MICRO_PAIRS,
        gradient_accumulation_steps=PAIRS // MICRO_PAIRS,
        max_steps=STEPS,
        learning_rate=LR,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=precomputed,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    start = time.process_time()
    trainer = Tokenised(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(made),
        processing_class=tokenizer,
        callbacks=[Measuring()],
    )
    reference = (time.process_time() - start) / len(made) if precomputed else 0.0
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.outcome(losses, reference)


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "fitune-sft": lambda directory: fitune(directory, objective="sft"),
    "fitune-dpo": lambda directory: fitune(directory, objective="dpo"),
    "fitune-dpo-copy": lambda directory: fitune(
        directory, objective="dpo", reference="frozen_copy"
    ),
    "trl-dpo-precomputed": lambda directory: trl(directory, precomputed=True),
    "trl-dpo": lambda directory: trl(directory, precomputed=False),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=TRAINERS)
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    if given.directory is not None:
        torch.set_num_threads(1)
        print(json.dumps(RUNS[given.only](given.directory)))
        return
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory))
        results = {}
        for name in TRAINERS if given.only is None else (given.only,):
            command = [sys.executable, __file__, "--only", name, "--directory", directory]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            results[name] = found
            losses = " ".join(f"{loss:.5f}" for loss in found["losses"])
            print(
                f"{name:20} peak {found['peak_bytes'] / 2**20:6.0f} MiB | "
                f"{found['seconds_per_pair']:5.2f} s of processor a pair, "
                f"{found['reference_seconds_per_pair']:4.2f} s for its reference | losses {losses}",
                flush=True,
            )
    if given.only is None:
        share = results["fitune-dpo"]["peak_bytes"] / results["fitune-sft"]["peak_bytes"] - 1
        print(
            f"DPO with a kept reference takes {share:+.1%} of the memory of supervised fine-tuning"
        )
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
