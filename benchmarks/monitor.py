"""What watching costs: processor time of the sampling thread and of the training thread, for a model of 25.8 M weights.

Both are read from the clocks of the threads themselves, so that a busy machine does not matter. The bound is half a
percent of one core, whatever a step takes: the thread samples twice a second, and a step calls its watcher once.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from fitune.config import read_config
from fitune.model.load import load_model
from fitune.run.directory import create_run
from fitune.run.metrics import StepMetrics
from fitune.step.assemble import assemble, choose_precision
from fitune.watch.monitor import SAMPLE_SECONDS, run_monitor

RESULT = Path(__file__).parent / "results" / "monitor.json"
CPU = torch.device("cpu")
CONFIG = {
    "model": {"source": "minimind2-small", "init": "random"},
    "data": {"train": "unused.jsonl"},
}
STEP = StepMetrics(
    step=1, tokens=8192, supervised_tokens=4096, total_tokens=8192, loss=2.0, lr=1e-4, grad_norm=0.5, seconds=1.0,
    tokens_per_second=8192.0, num_micro_batches=4, micro_batch=4,
)  # fmt: skip


def measure(*, num_samples: int, num_steps: int) -> dict[str, float]:
    config = read_config(CONFIG).config
    precision = choose_precision(config.model, CPU)
    setup = assemble(
        load_model(config.model, CPU, precision=precision), config, device=CPU, precision=precision
    )
    for parameter in setup.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    setup.optimizer.step()
    with tempfile.TemporaryDirectory() as directory:
        monitor = run_monitor(
            config, setup, create_run(Path(directory), "run"), notify=lambda _: None
        )
        monitor.sample()
        start = time.thread_time()
        for _ in range(num_samples):
            monitor.sample()
        sampled = time.thread_time()
        for _ in range(num_steps):
            monitor.step(STEP, progress=0.5)
        stepped = time.thread_time()
    sample_seconds = (sampled - start) / num_samples
    return {
        "seconds_per_sample": sample_seconds,
        "seconds_per_step": (stepped - sampled) / num_steps,
        "core_fraction": sample_seconds / SAMPLE_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of it, written nowhere")
    scale = 1 if parser.parse_args().quick else 10
    result = measure(num_samples=100 * scale, num_steps=200 * scale)
    print(
        f"a sample      {result['seconds_per_sample'] * 1e3:.2f} ms, {result['core_fraction']:.2%} of a core"
    )
    print(f"a step        {result['seconds_per_step'] * 1e6:.0f} us")
    if scale > 1:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
