"""fitune's own training step on the card."""

from typing import Any

import numpy as np
import torch

from fitune.config import RunConfig
from fitune.data.rows import Batch, sequences_of
from fitune.model.load import load_model
from fitune.objectives.objective import Objective
from fitune.step.assemble import assemble, choose_precision
from fitune.step.evaluate import evaluate
from fitune.step.work import train_step
from rehearsal.cases import Rows, StepCase
from rehearsal.history import History


def measure(case: StepCase, config: RunConfig, *, keep: int = 1) -> History:
    """The passes of the case on the card. keep: as in `History`."""
    if (
        config.memory.allocator
    ):  # a run sets PYTORCH_ALLOC_CONF before CUDA starts, and here it has started
        torch._C._accelerator_setAllocatorSettings(config.memory.allocator)
    card = torch.device("cuda", 0)
    precision = choose_precision(config.model, card)
    model: Any = load_model(config.model, card, precision=precision, seed=config.train.seed)
    setup = assemble(model, config, device=card, precision=precision)
    batch = batch_of(case.rows, model.config.vocab_size, setup.settings.objective)

    def step(number: int) -> None:
        if case.kinds[number - 1] == "eval":
            evaluate(setup.model, setup.eval_layout.split(batch), settings=setup.settings)
        elif case.kinds[number - 1] == "reference":
            sequences = setup.eval_layout.split(sequences_of(batch.rows))
            evaluate(setup.model, sequences, settings=setup.settings.of_reference())
        else:
            micro_batches = setup.layout.split(batch)
            train_step(
                setup.model,
                setup.optimizer,
                micro_batches,
                settings=setup.settings,
                scaler=setup.scaler,
            )

    history = History(num_steps=len(case.kinds), keep=keep)
    history.watch(step)
    return history


def batch_of(rows: Rows, vocab_size: int, objective: Objective) -> Batch:
    """The supervised tokens are the last ones of each row."""
    generator = np.random.default_rng(0)
    return Batch(
        tuple(
            objective.made_up_row(number, generator.integers(0, vocab_size, length), num_supervised)
            for number, (length, num_supervised) in enumerate(rows)
        )
    )
