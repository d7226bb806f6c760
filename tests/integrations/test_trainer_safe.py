"""A Trainer that runs out of memory and trains on as if it had not, where its own remedy changes the batch."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Trainer

from faults import failing
from fitune.errors import OutOfMemoryError, UsageError
from fitune.integrations.transformers import SafeSteps
from tiny_trainers import hf_trainer, needs_trl, rows, sft_trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class SafeTrainer(SafeSteps, Trainer):
    pass


def safe_sft(directory: Path, **changes: Any) -> Any:
    from trl import SFTTrainer

    class SafeSFTTrainer(SafeSteps, SFTTrainer):  # type: ignore[misc]
        pass

    return sft_trainer(directory, kind=SafeSFTTrainer, **changes)


def safe_hf(directory: Path, **changes: Any) -> Any:
    return hf_trainer(directory, kind=SafeTrainer, **changes)


PAIRS = pytest.mark.parametrize(
    ("plain", "safe"),
    [(hf_trainer, safe_hf), pytest.param(sft_trainer, safe_sft, marks=needs_trl)],
    ids=["hf", "trl"],
)


def logged(trainer: Any, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if name in log]


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def assert_the_same(trainer: Any, expected: Any, *, bits: bool = False) -> None:
    for name in ("loss", "grad_norm", "learning_rate"):
        found, wanted = logged(trainer, name), logged(expected, name)
        assert found == (wanted if bits else pytest.approx(wanted, rel=1e-5))
    assert trainer.state.global_step == expected.state.global_step
    if bits:
        assert torch.equal(weights(trainer), weights(expected))


@PAIRS
@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_a_failure_nothing_differs(
    plain: Any, safe: Any, accumulation: int, tmp_path: Path
) -> None:
    changes = {"gradient_accumulation_steps": accumulation}
    expected, trainer = plain(tmp_path, **changes), safe(tmp_path, **changes)
    expected.train()
    trainer.train()
    assert trainer.safe_verdict.exact
    assert_the_same(trainer, expected, bits=accumulation == 1)


@PAIRS
@pytest.mark.parametrize("place", ["forward of layer 1", "backward of layer 0"])
def test_running_out_of_memory_changes_no_loss(
    plain: Any, safe: Any, place: str, tmp_path: Path
) -> None:
    changes = {"gradient_accumulation_steps": 2}
    expected, trainer = plain(tmp_path, **changes), safe(tmp_path, **changes)
    expected.train()
    with failing(trainer.model, place, 9, 10) as fault:
        trainer.train()
    assert next(fault.counter) > 13
    assert_the_same(trainer, expected)
    assert len(trainer.safe_result.plan) > 1  # it stays with what fitted
    if logged(expected, "num_tokens"):
        assert logged(trainer, "num_tokens") == logged(expected, "num_tokens")


def test_a_failure_that_passes_is_done_again_at_the_same_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, trainer = hf_trainer(tmp_path), safe_hf(tmp_path)
    expected.train()
    with failing(
        trainer.model, "forward of layer 1", 8
    ):  # 6 forwards look at two rows, then a step is one
        trainer.train()
    assert "step 3: out of memory" in caplog.text
    assert "done again at the same size" in caplog.text
    assert_the_same(trainer, expected, bits=True)
    assert len(trainer.safe_result.plan) == 1  # and nothing shrinks because of it


@pytest.mark.parametrize("call", [0, 2])
def test_a_row_that_fails_alone_is_tried_again_before_the_run_ends(
    call: int, tmp_path: Path
) -> None:
    expected, trainer = (
        make(tmp_path, per_device_train_batch_size=1) for make in (hf_trainer, safe_hf)
    )
    expected.train()
    with failing(trainer.model, "backward of layer 0", call) as fault:
        trainer.train()
    assert next(fault.counter) == 5
    assert_the_same(trainer, expected, bits=True)


def test_a_batch_that_is_longer_than_the_first_is_not_cut_without_need(tmp_path: Path) -> None:
    data = rows((4,) * 4 + (30,) * 4)
    trainer = safe_hf(tmp_path, data=data, train_sampling_strategy="sequential", max_steps=2)
    trainer.train()
    assert trainer.safe_result.plan == ((0, 1, 2, 3),)


def over(rows: int) -> Any:
    """The model finds no memory for more rows than that."""

    def check(module: Any, inputs: Any) -> None:
        if inputs[0].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return check


@PAIRS
def test_the_trainers_own_remedy_changes_the_batch_and_ours_does_not(
    plain: Any, safe: Any, tmp_path: Path
) -> None:
    changes = {"max_steps": -1, "num_train_epochs": 1}
    expected, trainer, own = plain(tmp_path, **changes), safe(tmp_path, **changes), plain(
        tmp_path, auto_find_batch_size=True, **changes
    )  # fmt: skip
    expected.train()
    for each in (trainer, own):
        each.model.model.layers[0].register_forward_pre_hook(over(2))
    trainer.train()
    own.train()
    assert_the_same(trainer, expected)
    assert (
        own.state.global_step > expected.state.global_step
    )  # of less than the batch that was asked for


@PAIRS
def test_a_row_that_does_not_fit_alone_ends_the_run_in_one_sentence(
    plain: Any, safe: Any, tmp_path: Path
) -> None:
    trainer = safe(tmp_path)
    before = weights(trainer)
    with (
        failing(trainer.model, "forward of layer 0", *range(6, 60)),
        pytest.raises(OutOfMemoryError, match="step 1"),
    ):
        trainer.train()
    assert torch.equal(weights(trainer), before)


def test_a_loss_that_is_a_mean_stays_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = safe_hf(tmp_path, max_steps=1)
    with patch.object(type(trainer.model), "accepts_loss_kwargs", False, create=True):
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
    assert not trainer.safe_verdict.exact
    assert "stay whole" in caplog.text
    assert trainer.safe_result.plan == ((0,),)


def test_a_batch_size_that_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="auto_find_batch_size"):
        safe_hf(tmp_path, auto_find_batch_size=True).train()
