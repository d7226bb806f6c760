"""TRL's SFTTrainer with half the memory that its batch needs: alone, with `auto_find_batch_size`, with SafeSteps.

python benchmarks/trainer_memory.py            a model of 3.7 M parameters: about 3 minutes
python benchmarks/trainer_memory.py --quick    fewer steps, shorter rows, written nowhere

Each run has a process of its own, on one thread. The limit (RLIMIT_DATA) is half of what the run without one took
beside the loaded program, and what fails are the allocations of the real training step. Writes
benchmarks/results/trainer_memory.json and the table of docs/trainer.md.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "trainer_memory.json"
PAGE = HERE.parent / "docs" / "trainer.md"
HEADROOM_FRACTION = 0.5
ROWS = 16
"""Of a step's batch."""
KINDS = {
    "free": "SFTTrainer, enough memory",
    "callback": "the same with FituneCallback",
    "plain": "SFTTrainer, half the memory",
    "auto": "the same with auto_find_batch_size",
    "safe": "the same with SafeSteps",
}


@dataclass(frozen=True)
class Outcome:
    """losses: of each step, those before a restart too. batch_rows: of each start of the training. need_bytes: resident
    peak above what was resident before training, which SafeSteps measures anew in each step. num_failures: of memory,
    within steps that went on. error: what ended it."""

    kind: str
    losses: list[float] = field(default_factory=list)
    batch_rows: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_failures: int = 0
    need_bytes: int = 0
    error: str | None = None


def train(kind: str, *, headroom_bytes: int, quick: bool) -> Outcome:
    """In this process, whose memory is limited from here on."""
    import resource

    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from fitune.integrations.transformers import FituneCallback, SafeSteps
    from fitune.machine.out_of_memory import memory_failure
    from fitune.machine.process_memory import read_peak, reset_peak

    torch.set_num_threads(1)
    outcome = Outcome(kind)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            outcome.batch_rows.append(state.train_batch_size)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any
        ) -> None:
            if "loss" in logs:
                outcome.losses.append(logs["loss"])

    class SafeSFTTrainer(SafeSteps, SFTTrainer):  # type: ignore[misc]
        num_failures = 0

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            loss = super().training_step(*arguments, **named)
            self.num_failures += len(self.safe_result.failures)
            return loss

    with tempfile.TemporaryDirectory() as directory:
        args = SFTConfig(
            output_dir=directory, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=ROWS,
            num_train_epochs=1, logging_steps=1, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            learning_rate=3e-4, activation_checkpointing=False, auto_find_batch_size=kind == "auto",
        )  # fmt: skip
        callbacks = [
            Watch(),
            *([FituneCallback(Path(directory) / "runs", "run")] if kind == "callback" else []),
        ]
        trainer = (SafeSFTTrainer if kind == "safe" else SFTTrainer)(
            model=_model(),
            args=args,
            train_dataset=_rows(quick),
            processing_class=_tokenizer(),
            callbacks=callbacks,
        )
        device = torch.device("cpu")
        reset_peak(device)
        before = read_peak(device).device_bytes or 0
        if headroom_bytes:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + headroom_bytes, hard))
        error = None
        try:
            trainer.train()
        except Exception as raised:
            if memory_failure(raised) is None and "No executable batch size" not in str(raised):
                raise
            error = "out of memory"
        peak = read_peak(device).device_bytes or 0
    return Outcome(
        kind,
        losses=outcome.losses,
        batch_rows=outcome.batch_rows,
        num_steps=trainer.state.global_step,
        num_failures=getattr(trainer, "num_failures", 0),
        need_bytes=peak - before,
        error=error,
    )


def _model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _rows(quick: bool) -> Any:
    """Of very unequal length, the first third of each no target."""
    import datasets

    draw = random.Random(0)
    lengths = [draw.randint(8, 96 if quick else 192) for _ in range(ROWS * (3 if quick else 8))]
    ids = [[draw.randrange(3, 300) for _ in range(length)] for length in lengths]
    labels = [
        [-100 if place < len(row) // 3 else token for place, token in enumerate(row)] for row in ids
    ]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def _data_bytes() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def measure(kinds: Sequence[str] = tuple(KINDS), *, quick: bool) -> list[Outcome]:
    """Each in a process of its own; the first is "free", whose need sets the limit of those that have one."""
    outcomes: list[Outcome] = []
    for kind in kinds:
        limited = kind in ("plain", "auto", "safe")
        headroom_bytes = int(outcomes[0].need_bytes * HEADROOM_FRACTION) if limited else 0
        command = [
            sys.executable,
            __file__,
            "--kind",
            kind,
            "--headroom-bytes",
            str(headroom_bytes),
        ]
        # freed blocks go back to the system at once, so that the limit is one on tensors
        environment = os.environ | {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        ran = subprocess.run(
            command + ["--quick"] * quick,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        outcomes.append(Outcome(**json.loads(ran.stdout.splitlines()[-1])))
    return outcomes


def largest_difference(outcome: Outcome, expected: Outcome) -> float | None:
    """Relative, of the losses; None where there is not one for each."""
    if len(outcome.losses) != len(expected.losses):
        return None
    return max(abs(a / b - 1) for a, b in zip(outcome.losses, expected.losses, strict=True))


def table(outcomes: Sequence[Outcome]) -> str:
    lines = [
        "| run | batch samples | steps | failures survived | loss of the last step | largest difference of a loss |"
    ]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for outcome in outcomes:
        difference = largest_difference(outcome, outcomes[0])
        last = (
            f"{outcome.losses[-1]:.6f}"
            if outcome.losses and outcome.error is None
            else outcome.error
        )
        steps = f"{outcome.num_steps}"
        if len(outcome.batch_rows) > 1:
            steps += f", begun {len(outcome.batch_rows)} times"
        said = (
            ""
            if outcome is outcomes[0]
            else "another run"
            if difference is None
            else f"{difference:.1e}"
        )
        rows = ", ".join(str(rows) for rows in outcome.batch_rows)
        lines.append(
            f"| {KINDS[outcome.kind]} | {rows} | {steps} | {outcome.num_failures} | {last} | {said} |"
        )
    return "\n".join(lines)


def write(outcomes: Sequence[Outcome]) -> None:
    RESULTS.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    old = re.compile(r"^\| run \| batch rows .*?(?=\n\n)", re.MULTILINE | re.DOTALL)
    PAGE.write_text(
        old.sub(lambda _: table(outcomes), PAGE.read_text(encoding="utf-8")), encoding="utf-8"
    )


def read_results() -> list[Outcome]:
    return [Outcome(**outcome) for outcome in json.loads(RESULTS.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kind", choices=list(KINDS), help="this one run, in this process")
    parser.add_argument("--headroom-bytes", type=int, default=0)
    options = parser.parse_args()
    if options.kind is not None:
        print(
            json.dumps(
                asdict(
                    train(options.kind, headroom_bytes=options.headroom_bytes, quick=options.quick)
                )
            )
        )
        return
    outcomes = measure(quick=options.quick)
    print(table(outcomes))
    if not options.quick:
        write(outcomes)


if __name__ == "__main__":
    main()
