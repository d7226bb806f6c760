"""The norms that hooks read are those of what each micro-batch adds to the gradient."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from fitune.batch_size.noise import pairwise_sample
from fitune.batch_size.norms import GradientNorms, NormRecorder
from fitune.data.packing import split
from fitune.data.rows import MicroBatch
from fitune.model.load import build_model
from fitune.model.recompute import set_recompute
from fitune.recovery.protection import Protection
from fitune.recovery.step import safe_step
from fitune.step.optimizer_state import create_state
from fitune.step.step import StepResult
from fitune.step.work import micro_batch_work, train_step
from tiny_models import TINY_GPT2, TINY_LLAMA
from tiny_steps import make_batch, make_model, settings_for

SEQUENCES, LENGTH = 4, 12


def tokens(*, rows: int = SEQUENCES, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: torch.Tensor, weight: int) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return (
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        / weight
    )


def flat_gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [
            p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
            for p in model.parameters()
        ]
    )


def contributions(
    model: nn.Module, rows: Iterator[torch.Tensor], weight: int
) -> Iterator[torch.Tensor]:
    before = torch.zeros(())
    for ids in rows:
        loss_of(model, ids, weight).backward()
        now = flat_gradient(model)
        yield now - before
        before = now.clone()


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_GPT2], ids=["tied llama", "gpt2"])
@pytest.mark.parametrize("recompute", ["off", "full"])
def test_hooks_read_the_norm_of_every_contribution(
    config: PretrainedConfig, recompute: str
) -> None:
    model = build_model(config).train()
    set_recompute(model, recompute)
    recorder = NormRecorder(torch.optim.AdamW(model.parameters()))
    for ids in tokens().split(1):
        with recorder.reading():
            loss_of(model, ids, SEQUENCES * LENGTH).backward()
        recorder.keep(11)
    total = float(flat_gradient(model).norm())
    found = recorder.read(recorder.values().tolist(), total_norm=total)
    model.zero_grad()
    expected = [
        float(c.double().square().sum())
        for c in contributions(model, tokens().split(1), SEQUENCES * LENGTH)
    ]
    assert found.micro == pytest.approx(expected, rel=1e-5)
    assert found.total == pytest.approx(total**2)
    assert found.momentum_dot is None
    assert found.weights == (11,) * SEQUENCES


def test_norms_of_what_has_gathered_in_grad_would_be_noticed() -> None:
    """What a hook after the accumulation would read, so that the test above can fail."""
    added = torch.stack(
        list(contributions(build_model(TINY_LLAMA).train(), tokens().split(1), SEQUENCES * LENGTH))
    )
    gathered = added.cumsum(0).square().sum(1)[1:] / added.square().sum(1)[1:]
    assert (gathered > 1.05).all()


def test_weighted_norms_and_the_product_use_adams_memory_from_before_the_step() -> None:
    model = build_model(TINY_LLAMA).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model, tokens(seed=1), 44).backward()
    optimizer.step()
    optimizer.zero_grad()
    m, v = (
        torch.cat([optimizer.state[p][key].flatten() for p in model.parameters()])
        for key in ("exp_avg", "exp_avg_sq")
    )
    recorder = NormRecorder(optimizer, preconditioned=True)
    expected = list(contributions(model, tokens().split(1), 44))
    model.zero_grad()
    for ids in tokens().split(1):
        with recorder.reading():
            loss_of(model, ids, 44).backward()
        recorder.keep(11)
    gradient = flat_gradient(model)
    found = recorder.read(recorder.values().tolist(), total_norm=1.0)
    assert found.momentum_dot == pytest.approx(float(gradient @ m), rel=1e-4)
    assert found.preconditioned_total == pytest.approx(
        float((gradient**2 / (v.sqrt() + 1e-12)).sum()), rel=1e-4
    )
    assert found.preconditioned_micro == pytest.approx(
        [float((c**2 / (v.sqrt() + 1e-12)).sum()) for c in expected], rel=1e-3
    )


def test_what_adam_has_not_seen_weighs_nothing() -> None:
    """The state made before the first update, and the row of a word that has not come yet: a weight of 1 / EPS there
    would be all that an average remembers."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.0, weight_decay=0.0)

    def read(*micro_batches: list[float]) -> GradientNorms:
        recorder = NormRecorder(optimizer, preconditioned=True)
        for gradient in micro_batches:
            with recorder.reading():
                (weight * torch.tensor(gradient)).sum().backward()
            recorder.keep(1)
        found = recorder.read(recorder.values().tolist(), total_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        return found

    create_state(optimizer)
    assert read([2.0, 0.0], [2.0, 0.0]).preconditioned_total == 0.0
    v = 4.0**2 * 0.001
    assert read([1.0, 3.0], [1.0, 0.0]).preconditioned_micro == pytest.approx([v**-0.5, v**-0.5])


def test_what_a_failed_backward_left_is_not_counted() -> None:
    model = build_model(TINY_LLAMA).train()
    recorder = NormRecorder(torch.optim.SGD(model.parameters()))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of memory")

    embedding = model.get_input_embeddings().register_forward_hook(
        lambda *args: Fails.apply(args[2])
    )
    with pytest.raises(RuntimeError, match="out of memory"), recorder.reading():
        loss_of(model, tokens(), 44).backward()
    embedding.remove()
    model.zero_grad()
    with recorder.reading():
        loss_of(model, tokens(), 44).backward()
    recorder.keep(44)
    found = recorder.read(recorder.values().tolist(), total_norm=1.0)
    assert found.micro == pytest.approx([float(flat_gradient(model).square().sum())], rel=1e-5)
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_on_a_real_model_signal_and_variance_are_those_of_its_own_sequences() -> None:
    """The gradients of 120 sequences of very unequal length, from which micro-batches are drawn many times."""
    model = build_model(TINY_LLAMA).train()
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(2.3 + 0.7 * random.standard_normal(120)), 3, 60).astype(int)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(3, 64, (1, int(length)), generator=torch.Generator().manual_seed(index))
        ids[0, 1::9] = 7  # what all have in common: a signal, of the size of the noise
        model.zero_grad()
        loss_of(model, ids, 1).backward()
        rows.append(flat_gradient(model).double())
    gradients = torch.stack(rows)
    gram = (gradients @ gradients.T).numpy()
    targets = lengths - 1
    truth = float(gram.sum() / targets.sum() ** 2)

    draws, num_micro, per_micro = (
        1500,
        4,
        16,
    )  # many sequences: a ratio of sums is biased by one over their number
    drawn = random.integers(0, len(rows), (draws, num_micro * per_micro))
    weights = targets[drawn].reshape(draws, num_micro, per_micro).sum(axis=2)
    tokens_of_step = weights.sum(axis=1)
    products = gram[drawn[:, :, None], drawn[:, None, :]] / tokens_of_step[:, None, None] ** 2
    blocks = products.reshape(draws, num_micro, per_micro, num_micro, per_micro).sum(axis=(2, 4))
    total = blocks.sum(axis=(1, 2))
    to_truth = gram.sum(axis=1)[drawn].sum(axis=1) / (tokens_of_step * targets.sum())
    samples = [
        pairwise_sample(np.diag(block), float(block.sum()), weights=list(n))
        for block, n in zip(blocks, weights, strict=True)
    ]
    assert np.mean([sample.signal for sample in samples]) == pytest.approx(truth, rel=0.05)
    assert (
        abs(np.mean(total - np.trace(blocks, axis1=1, axis2=2)) / truth - 1) > 0.05
    )  # without its denominator
    variance = np.mean([sample.variance / sample.tokens for sample in samples])
    assert variance == pytest.approx(np.mean(total - 2 * to_truth + truth), rel=0.02)


def run_steps(
    *, recorded: bool, preconditioned: bool = False
) -> tuple[list[torch.Tensor], list[StepResult]]:
    model, batch = make_model(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    results = []
    for _ in range(3):
        norms = NormRecorder(optimizer, preconditioned=preconditioned) if recorded else None
        micro_batches = split(batch, packed=True, micro_rows=2)
        settings = settings_for(model, "chunked")
        results.append(train_step(model, optimizer, micro_batches, settings=settings, norms=norms))
    return [parameter.detach() for parameter in model.parameters()], results


@pytest.mark.parametrize("preconditioned", [False, True])
def test_reading_the_norms_changes_no_bit_of_the_step(preconditioned: bool) -> None:
    with_norms, results = run_steps(recorded=True, preconditioned=preconditioned)
    without, plain = run_steps(recorded=False)
    assert all(torch.equal(a, b) for a, b in zip(with_norms, without, strict=True))
    assert [result.grad_norm for result in results] == [result.grad_norm for result in plain]
    last = results[-1].norms
    assert last is not None
    assert last.total == pytest.approx((results[-1].grad_norm or 0.0) ** 2)
    assert (last.preconditioned_micro is not None) == preconditioned


@pytest.mark.parametrize("commit", [False, True], ids=["begun again", "committed"])
def test_a_step_that_ran_out_of_memory_has_the_norms_of_one_that_did_not(commit: bool) -> None:
    def norms_of(failures: set[int]) -> GradientNorms:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        settings = replace(settings_for(model, "chunked"), commit=commit)
        work = micro_batch_work(model, optimizer, settings)
        calls = iter(range(100))

        def loss_share(piece: MicroBatch, loss_weight: float) -> torch.Tensor:
            loss = work.loss_share(piece, loss_weight)
            if next(calls) in failures:
                raise torch.OutOfMemoryError("out of memory")
            return loss

        protection = Protection(work=replace(work, loss_share=loss_share))
        norms = NormRecorder(optimizer)
        micro_batches = split(make_batch(), packed=True, micro_rows=2)
        found = safe_step(
            protection, micro_batches, step=1, fits=lambda size: True, norms=norms
        ).step.norms
        assert found is not None
        return found

    undisturbed, failed = norms_of(set()), norms_of({2})
    assert failed.weights == undisturbed.weights
    assert failed.micro == pytest.approx(undisturbed.micro, rel=1e-5)
    assert failed.total == pytest.approx(undisturbed.total, rel=1e-5)


def test_a_state_that_the_host_holds_is_not_read() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        state = torch.zeros(parameter.shape, device="meta")  # another device than the parameter's
        optimizer.state[parameter] = {"exp_avg": state, "exp_avg_sq": state}
    recorder = NormRecorder(optimizer, preconditioned=True)
    with recorder.reading():
        model(torch.ones(1, 4)).sum().backward()
    recorder.keep(1)
    norms = recorder.read(recorder.values().tolist(), total_norm=1.0)
    assert norms.micro == pytest.approx((5.0,))
    assert (norms.momentum_dot, norms.preconditioned_micro) == (None, None)
