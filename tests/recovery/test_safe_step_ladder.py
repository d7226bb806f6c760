"""What is done about running out of memory, in which order, and where it ends."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from faults import failing, out_of_memory
from fitune.data.packing import split
from fitune.data.rows import Batch, MicroBatch
from fitune.errors import OutOfMemoryError, RestartError
from fitune.objectives.logits import SMALL_CHUNK_TOKENS
from fitune.objectives.supervised import Supervised
from fitune.recovery.actions import MOST_ATTEMPTS
from fitune.recovery.evaluate import safe_evaluate
from fitune.recovery.fallbacks import allowed_fallbacks
from fitune.recovery.observed import observed
from fitune.recovery.protection import Fallback, Protection
from fitune.recovery.size_control import MemoryModel
from fitune.recovery.step import safe_step
from fitune.step.evaluate import evaluate
from fitune.step.gradients import CommitBuffer
from fitune.step.progress import Work
from fitune.step.random_state import micro_batch_seed
from fitune.step.step import StepResult
from fitune.step.work import StepSettings, micro_batch_work, train_step
from fitune.units import MIB
from tiny_steps import Capture, distance, make_batch, make_model, settings_for

FORWARD, LOSS = "forward of layer 0", "loss"
EVERY_CALL = tuple(range(1000))


def protected(model: nn.Module, *, commit: bool = False, **options: Any) -> Protection[MicroBatch]:
    """Protected training with a captured gradient instead of an update."""
    settings = replace(settings_for(model, "full"), commit=commit)
    return Protection(
        work=micro_batch_work(model, Capture(model.parameters()), settings), **options
    )


def pieces(batch: Batch, rows: int = 3) -> list[MicroBatch]:
    return split(batch, packed=True, micro_rows=rows)


def fails_above(
    protection: Protection[MicroBatch], most: int, error: Callable[[], BaseException]
) -> None:
    """Forwards of more positions than that find no memory, as with a real limit."""
    real = protection.work.loss_share

    def limited(piece: MicroBatch, loss_weight: float) -> torch.Tensor:
        if piece.num_positions > most:
            raise error()
        return real(piece, loss_weight)

    protection.work = replace(protection.work, loss_share=limited)


def pass_through(norm: nn.BatchNorm1d, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    norm(inputs[0][0].detach())


def test_a_size_is_banned_with_what_was_left_for_the_step_when_it_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process takes 60 MiB within the step, which itself holds 30 more for gradients when it fails."""
    batch, model = make_batch(), make_model()
    protection = protected(model, commit=True, query_free_bytes=lambda: 10 * MIB)
    fails_above(protection, 45, out_of_memory)
    monkeypatch.setattr(CommitBuffer, "num_bytes", 30 * MIB)
    memory = MemoryModel(planned=80)
    result = observed(
        memory,
        lambda: safe_step(protection, pieces(batch, 7), step=1),
        device=torch.device("cpu"),
        free_bytes=100 * MIB,
    )
    assert {failure.left_bytes for failure in result.failures} == {40 * MIB}
    assert {ban.free_bytes for ban in memory.bans.values()} == {40 * MIB}


def test_what_a_step_keeps_is_a_float32_gradient_of_what_it_trains() -> None:
    model = make_model()
    buffer = CommitBuffer(model)
    assert buffer.num_bytes == 0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    buffer.add()
    assert buffer.num_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("commit", [False, True])
def test_pieces_are_halved_until_they_fit(commit: bool) -> None:
    batch, model = make_batch(), make_model()
    protection = protected(model, commit=commit)
    fails_above(protection, 45, out_of_memory)
    result = safe_step(protection, pieces(batch, 7), step=1)
    assert Counter(row for piece in result.plan for row in piece) == Counter(batch.row_ids)
    assert result.most_positions <= 45
    assert 1 <= len(result.failures) <= 3


def test_a_piece_is_done_again_at_the_same_size_once_where_it_should_fit() -> None:
    model = make_model()
    with failing(model, FORWARD, 0):
        result = safe_step(protected(model), pieces(make_batch()), step=1, fits=lambda size: True)
    assert "same size" in result.failures[0].action
    assert [len(piece) for piece in result.plan] == [3, 3, 1]
    with failing(model, FORWARD, 0, 1):
        result = safe_step(protected(model), pieces(make_batch()), step=1, fits=lambda size: True)
    assert "split" in result.failures[1].action


def test_a_failure_says_what_was_missing_and_that_no_row_is_lost() -> None:
    model = make_model()
    with failing(model, FORWARD, 0):
        (failure,) = safe_step(protected(model), pieces(make_batch()), step=1).failures
    assert str(failure) == (
        "out of memory in the forward of 3 samples (50 tokens with padding), 20.0 MiB at once were missing: "
        "split into micro-batches of at most 25 tokens with padding; no sample is lost"
    )


def test_what_saves_memory_is_tried_only_at_a_single_row_and_in_order() -> None:
    model = make_model()
    tried: list[str] = []

    def fallback(name: str) -> Fallback[MicroBatch]:
        def apply(work: Work[MicroBatch]) -> Work[MicroBatch]:
            tried.append(name)
            return work

        return Fallback(name, apply)

    protection = protected(
        model, fallbacks=[fallback("first"), fallback("second"), fallback("third")]
    )
    with failing(model, FORWARD, 0, 1):
        result = safe_step(protection, pieces(make_batch(), 1), step=1)
    assert tried == ["first", "second"]
    assert [each.name for each in protection.fallbacks] == ["third"]
    assert [failure.action for failure in result.failures] == [
        "first from now on",
        "second from now on",
    ]


SMALL_LOSS = f"a loss of {SMALL_CHUNK_TOKENS} tokens at a time"
RECOMPUTE, OFFLOAD = "model.recompute=full", "model.offload_activations=true"


def test_fallbacks_are_what_the_configuration_leaves_open() -> None:
    model = make_model()
    full, chunked = settings_for(model, "full"), settings_for(model, "chunked")
    chunked = replace(chunked, objective=replace(chunked.objective, chunk_tokens=256))

    def names(settings: StepSettings, recompute: Any, loss: Any) -> list[str]:
        return [
            relief.name
            for relief in allowed_fallbacks(model, settings, recompute=recompute, loss=loss)
        ]

    assert names(chunked, "auto", "auto") == [RECOMPUTE, SMALL_LOSS]
    assert names(chunked, "off", "chunked") == [SMALL_LOSS]
    assert names(full, "off", "auto") == [SMALL_LOSS]
    assert names(full, "off", "full") == []
    model.to("meta")  # beside the host, as a card is
    assert names(chunked, "auto", "auto") == [RECOMPUTE, SMALL_LOSS, OFFLOAD]
    assert names(chunked, "full", "auto") == [SMALL_LOSS]


@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_fallbacks_change_no_gradient(loss: str) -> None:
    """A device beside the host has the same ones and one more."""
    batch = make_batch()
    gradients = []
    for num_failures in range(4):
        model = make_model()
        settings = settings_for(model, loss)
        settings = replace(settings, objective=replace(settings.objective, chunk_tokens=256))
        capture = Capture(model.parameters())
        fallbacks = allowed_fallbacks(model, settings, recompute="auto", loss="auto")
        elsewhere = allowed_fallbacks(
            make_model().to("meta"), settings, recompute="auto", loss="auto"
        )
        protection = Protection(
            work=micro_batch_work(model.train(), capture, settings),
            fallbacks=[*fallbacks, elsewhere[-1]],
        )
        with failing(model, FORWARD, *range(num_failures)):
            result = safe_step(protection, pieces(batch, 1), step=1)
        names = (RECOMPUTE, SMALL_LOSS, OFFLOAD)[:num_failures]
        assert result.fallbacks == (names,)
        assert [failure.action for failure in result.failures] == [
            f"{name} from now on" for name in names
        ]
        gradients.append(capture.vector())
    for gradient in gradients[1:]:
        assert distance(gradient, gradients[0]) < 1e-6


@pytest.mark.parametrize("commit", [False, True], ids=["restart", "commit"])
def test_a_step_that_fell_back_in_its_middle_is_the_step_that_was_so_from_the_beginning(
    commit: bool,
) -> None:
    batch = make_batch()
    gradients = []
    for failing_call in (3, 0):
        model = make_model()
        settings = replace(settings_for(model, "full"), commit=commit)
        capture = Capture(model.parameters())
        protection = Protection(
            work=micro_batch_work(model, capture, settings),
            fallbacks=allowed_fallbacks(model, settings, recompute="off", loss="auto"),
        )
        with failing(model, FORWARD, failing_call):
            safe_step(protection, pieces(batch, 1), step=1)
        gradients.append(capture.vector())
    assert torch.equal(*gradients)


def test_a_row_that_does_not_fit_alone_stops_the_run_with_its_number_and_changes_nothing() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    protection = Protection(
        work=micro_batch_work(model, optimizer, StepSettings(Supervised())),
        query_free_bytes=lambda: 2**20,
        way_out="give up",
    )
    fails_above(protection, 39, out_of_memory)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(OutOfMemoryError) as caught:
        safe_step(protection, pieces(make_batch()), step=1)
    assert str(caught.value) == (
        "no memory for 20.0 MiB in the forward of sample 1 (40 tokens with padding) with 1.0 MiB free, alone: give up"
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not optimizer.state


@pytest.mark.parametrize("commit", [False, True])
def test_a_row_that_is_left_out_leaves_the_step_of_the_other_rows(commit: bool) -> None:
    batch, model = make_batch(), make_model()
    protection = protected(model, commit=commit, quarantine=True)
    fails_above(protection, 39, out_of_memory)
    result = safe_step(protection, pieces(batch), step=1)
    assert result.quarantined == (1,)
    others = Batch(tuple(row for row in batch.rows if row.row_id != 1))
    expected = Capture(model.parameters())
    plain = train_step(model, expected, pieces(others), settings=settings_for(model, "full"))
    assert result.step.loss_weight == others.loss_weight
    assert result.step.loss == pytest.approx(plain.loss, rel=1e-6)
    assert isinstance(protection.work.optimizer, Capture)
    assert distance(protection.work.optimizer.vector(), expected.vector()) < 1e-6


def test_a_row_once_left_out_is_not_tried_again() -> None:
    protection = protected(make_model(), quarantine=True)
    fails_above(protection, 39, out_of_memory)
    safe_step(protection, pieces(make_batch()), step=1)
    result = safe_step(protection, pieces(make_batch()), step=2)
    assert result.quarantined == (1,)
    assert not [failure for failure in result.failures if failure.row_ids == (1,)]


def test_a_batch_whose_only_row_is_left_out_is_no_step() -> None:
    batch = Batch(make_batch().rows[1:2])
    protection = protected(make_model(), quarantine=True)
    fails_above(protection, 39, out_of_memory)
    result = safe_step(protection, pieces(batch), step=1)
    assert result.step == StepResult(loss=None, grad_norm=None, loss_weight=0.0, updated=False)
    assert result.plan == ()


def test_the_attempts_of_a_step_are_capped() -> None:
    model = make_model()
    endless = [Fallback(f"relief {number}", lambda work: work) for number in range(MOST_ATTEMPTS)]
    with (
        failing(model, FORWARD, *EVERY_CALL) as fault,
        pytest.raises(OutOfMemoryError, match=f"after {MOST_ATTEMPTS} attempts"),
    ):
        safe_step(protected(model, fallbacks=endless), pieces(make_batch(), 1), step=1)
    assert next(fault.counter) == MOST_ATTEMPTS


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_any_other_error_is_raised_as_it_is_at_once(error: Exception) -> None:
    model = make_model()
    with (
        failing(model, FORWARD, *EVERY_CALL, error=lambda: error) as fault,
        pytest.raises(type(error)) as caught,
    ):
        safe_step(protected(model), pieces(make_batch()), step=1)
    assert caught.value is error
    assert next(fault.counter) == 1


def test_the_machines_own_memory_running_out_stops_the_run_at_once() -> None:
    model = make_model()
    with (
        failing(model, FORWARD, *EVERY_CALL, error=MemoryError) as fault,
        pytest.raises(OutOfMemoryError, match="machine's own memory"),
    ):
        safe_step(protected(model), pieces(make_batch()), step=1)
    assert next(fault.counter) == 1


def test_an_update_that_is_torn_without_a_copy_asks_for_a_restart_from_the_checkpoint() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    protection = Protection(work=micro_batch_work(model, optimizer, StepSettings(Supervised())))
    with (
        failing(model, "update", 0),
        pytest.raises(RestartError, match="last checkpoint") as caught,
    ):
        safe_step(protection, pieces(make_batch()), step=1)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("place", ["clip", "update"])
def test_what_no_smaller_piece_can_cure_is_tried_twice(place: str) -> None:
    model = make_model()
    settings = StepSettings(Supervised(), commit=True)
    protection = Protection(
        work=micro_batch_work(model, torch.optim.AdamW(model.parameters()), settings)
    )
    before = [parameter.clone() for parameter in model.parameters()]
    with (
        failing(model, place, *EVERY_CALL) as fault,
        pytest.raises(OutOfMemoryError, match="no smaller micro-batch"),
    ):
        safe_step(protection, pieces(make_batch()), step=1)
    assert next(fault.counter) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_commit_that_fails_half_way_counts_nothing_twice() -> None:
    model, batch = make_model(), make_batch()
    plain = protected(model, commit=True)
    safe_step(plain, pieces(batch), step=1)
    protection = protected(model, commit=True)
    with failing(model, "commit", 1):
        result = safe_step(protection, pieces(batch), step=1)
    assert [failure.place for failure in result.failures] == ["commit"]
    assert isinstance(plain.work.optimizer, Capture)
    assert isinstance(protection.work.optimizer, Capture)
    assert distance(protection.work.optimizer.vector(), plain.work.optimizer.vector()) < 1e-6


def test_a_naive_retry_would_be_noticed() -> None:
    """What the failed backward left in `.grad`, kept: the gradient is far off, so the tests above can fail."""
    model, batch = make_model(), make_batch()
    good, naive = protected(model), protected(model)
    with failing(model, "backward of layer 0", 1):
        safe_step(good, pieces(batch), step=1)
    with failing(model, "backward of layer 0", 1):
        capture, settings = naive.work.optimizer, settings_for(model, "full")
        with pytest.raises(torch.OutOfMemoryError):
            train_step(model, capture, pieces(batch), settings=settings)
        train_step(model, capture, pieces(batch), settings=settings)
    assert isinstance(good.work.optimizer, Capture)
    assert isinstance(capture, Capture)
    assert distance(capture.vector(), good.work.optimizer.vector()) > 0.1


@pytest.mark.parametrize("commit", [False, True])
def test_float16_scaling_survives_a_failure_after_the_gradient_was_unscaled(commit: bool) -> None:
    batch = make_batch()
    found = []
    for calls in ((), (0,)):
        model = make_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        settings = StepSettings(Supervised(), 1.0, torch.float16, commit=commit)
        work = micro_batch_work(
            model, torch.optim.AdamW(model.parameters(), lr=0.1), settings, scaler=scaler
        )
        with failing(model, "clip", *calls):
            result = safe_step(Protection(work=work), pieces(batch), step=1)
        assert result.step.updated
        found.append(([parameter.clone() for parameter in model.parameters()], scaler.state_dict()))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_the_running_statistics_of_a_batch_norm_are_put_back() -> None:
    """Its kernel changes them without raising their version; its counter does raise it."""
    batch = make_batch()
    statistics = []
    for calls in ((), (1,)):
        model = make_model().train()
        norm = nn.BatchNorm1d(32, affine=False)
        inner = model.model  # type: ignore[union-attr]
        inner.layers[1].add_module("norm", norm)
        inner.layers[1].register_forward_pre_hook(functools.partial(pass_through, norm))
        with failing(model, LOSS, *calls):
            safe_step(protected(model), pieces(batch), step=1, fits=lambda size: True)
        statistics.append(norm.running_mean.clone())
        assert norm.num_batches_tracked == 3
    assert torch.equal(*statistics)


def test_each_micro_batch_draws_from_a_seed_of_its_own() -> None:
    seeds = {micro_batch_seed(*key[:1], step=key[1], first_row_id=key[2]) for key in [
        (run, step, row) for run in range(3) for step in range(3) for row in range(3)
    ]}  # fmt: skip
    assert len(seeds) == 27


def test_every_piece_of_every_step_of_a_run_begins_with_that_seed() -> None:
    """Not with one that all pieces of a step have, which would drop the same units in all of them."""
    seen = []
    for run, step in ((1, 1), (1, 2), (2, 1)):
        protection = protected(make_model(), seed=run)
        real = protection.work.loss_share

        def look(piece: MicroBatch, loss_weight: float, real: Any = real) -> torch.Tensor:
            seen.append(torch.initial_seed())
            return real(piece, loss_weight)  # type: ignore[no-any-return]

        protection.work = replace(protection.work, loss_share=look)
        safe_step(protection, pieces(make_batch()), step=step)
    assert len(set(seen)) == len(seen) == 9


def test_an_evaluation_has_its_own_ladder() -> None:
    model, batch = make_model(), make_batch()
    settings = settings_for(model, "full")
    expected = evaluate(model, pieces(batch), settings=settings)
    with failing(model, "evaluation", 0):
        found = safe_evaluate(
            model, pieces(batch), settings=settings, query_free_bytes=lambda: None
        )
    assert found.result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.result.totals == expected.totals
    assert found.result.num_supervised_tokens == expected.num_supervised_tokens
    assert found.most_positions == 25
    action = "evaluated in micro-batches of at most 25 tokens with padding from now on"
    assert [failure.action for failure in found.failures] == [action]


def test_a_row_that_cannot_be_evaluated_is_named() -> None:
    model, batch = make_model(), Batch(make_batch().rows[1:2])
    settings = settings_for(model, "full")
    with (
        failing(model, "evaluation", *EVERY_CALL),
        pytest.raises(OutOfMemoryError, match="sample 1"),
    ):
        safe_evaluate(model, pieces(batch), settings=settings, query_free_bytes=lambda: None)
    assert model.training
    with failing(model, "evaluation", 0):
        found = safe_evaluate(
            model,
            pieces(make_batch(), 1),
            settings=settings,
            query_free_bytes=lambda: None,
            quarantine=True,
        )
    assert found.left_out == (0,)
