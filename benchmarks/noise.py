"""What measuring the gradient noise costs: the training step with and without it, in turns, on SmolLM2-135M.

python benchmarks/noise.py            eight micro-batches of 512 tokens a step, about eight minutes on one core
python benchmarks/noise.py --quick    micro-batches of 64 tokens

Every fiftieth step of a run also reads the norms weighted by Adam's second moment; both kinds are timed, in seconds of
the processor and one thread, and weighed as a run does them. Writes benchmarks/results/noise.json.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from fitune.batch_size.noise import PRECONDITIONED_EVERY
from fitune.batch_size.norms import NormRecorder
from fitune.cli.demo import smollm2_file
from fitune.config import ModelConfig, OptimConfig
from fitune.data.packing import lay_out
from fitune.data.rows import MicroBatch, Row
from fitune.model.head import Head, decoder_and_head
from fitune.model.load import load_model
from fitune.objectives.supervised import Supervised
from fitune.step.optimizer import build_optimizer
from fitune.step.work import StepSettings, train_step

RESULT = Path(__file__).parent / "results" / "noise.json"
KINDS = ("plain", "noise", "preconditioned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_micro, num_tokens, rounds = (2, 64, 3) if arguments.quick else (8, 512, 4)
    device = torch.device("cpu")
    model = load_model(ModelConfig(source=str(smollm2_file())), device)
    optimizer = build_optimizer(model, OptimConfig(), lr=1e-6, device=device)
    head = decoder_and_head(model)
    settings = StepSettings(Supervised(head if isinstance(head, Head) else None))
    micro_batches = [micro_batch(number, num_tokens) for number in range(num_micro)]
    train_step(model, optimizer, micro_batches, settings=settings)  # the optimizer's state is made
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
            norms = (
                None
                if kind == "plain"
                else NormRecorder(optimizer, preconditioned=kind == "preconditioned")
            )
            start = time.process_time()
            train_step(model, optimizer, micro_batches, settings=settings, norms=norms)
            seconds[kind].append(time.process_time() - start)
    plain, noise, preconditioned = (statistics.median(seconds[kind]) for kind in KINDS)
    share = 1 / PRECONDITIONED_EVERY
    overhead = ((1 - share) * noise + share * preconditioned) / plain - 1
    found = {
        "micro_batch_tokens": num_tokens,
        "plain_seconds": plain,
        "noise_seconds": noise,
        "preconditioned_seconds": preconditioned,
        "overhead_fraction": overhead,
    }
    print(
        f"step of {num_micro} x {num_tokens} tokens: {plain:.2f} s of CPU; with norms {noise / plain - 1:+.2%}, "
        f"with weighted norms too {preconditioned / plain - 1:+.2%}; as a run does it {overhead:+.2%}"
    )
    if not arguments.quick:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


def micro_batch(number: int, num_tokens: int) -> MicroBatch:
    ids = np.random.default_rng(number).integers(0, 40_000, num_tokens).astype(np.int32)
    return lay_out([Row(number, ids, np.ones(num_tokens, np.float32))], packed=True)


if __name__ == "__main__":
    main()
