"""The safe step in a loop of plain PyTorch."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fitune
from faults import failing
from fitune.errors import OutOfMemoryError
from tiny_steps import Capture, distance, labelled, make_model

ROWS = ((3, 1), (12, 10), (7, 4), (9, 2), (12, 12))


def plain_step(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """The usual loop: the whole batch at once."""
    capture = Capture(model.parameters())
    loss = model(**batch).loss
    loss.backward()
    capture.step()
    capture.zero_grad()
    return capture.vector(), loss.item()


@pytest.mark.parametrize("commit", [False, True])
def test_it_is_the_usual_step_also_where_memory_runs_out(commit: bool) -> None:
    model, batch = make_model().train(), labelled(*ROWS)
    expected, loss = plain_step(model, batch)
    capture = Capture(model.parameters())
    step = fitune.SafeStep(model, capture, clip=0.0, commit=commit)
    step(batch)
    with failing(model, "forward of layer 1", 0, 1, 2):
        result = step(batch)
    assert len(result.failures) == 3
    assert len(result.plan) > 1
    assert result.step.loss == pytest.approx(loss, rel=1e-6)
    assert distance(capture.vector(), expected) < 1e-6


def test_a_loss_of_ones_own_is_cut_the_same_way() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batch = {"inputs": torch.randn(6, 4), "targets": torch.randint(3, (6,))}
    expected = Capture(model.parameters())
    nn.functional.cross_entropy(model(batch["inputs"]), batch["targets"]).backward()
    expected.step()
    expected.zero_grad()

    def loss(model: nn.Module, rows: Mapping[str, Tensor], num_targets: float) -> Tensor:
        return nn.functional.cross_entropy(model(rows["inputs"]), rows["targets"], reduction="sum") / num_targets

    capture = Capture(model.parameters())
    step = fitune.SafeStep(
        model, capture, loss=loss, num_targets=lambda rows: len(rows["targets"]), clip=0.0, most_rows=4
    )
    result = step(batch)
    assert [len(rows) for rows in result.plan] == [4, 2]
    assert distance(capture.vector(), expected.vector()) < 1e-6
    assert step.verdict is not None
    assert step.verdict.exact


def test_a_mean_is_warned_of() -> None:
    model = make_model()
    step = fitune.SafeStep(model, Capture(model.parameters()), loss=lambda model, rows, _: model(**rows).loss)
    with pytest.warns(UserWarning, match="mean of means"):
        step(labelled(*ROWS))


def test_what_was_learned_stays_for_the_next_batch() -> None:
    model = make_model()
    step = fitune.SafeStep(model, Capture(model.parameters()))
    step(labelled(*ROWS))
    with failing(model, "forward of layer 0", 0, 1):
        step(labelled(*ROWS))
    result = step(labelled(*ROWS))
    assert result.failures == ()
    assert len(result.plan) > 1


def test_one_row_that_does_not_fit_is_named_and_nothing_is_changed() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    step = fitune.SafeStep(model, optimizer)
    step(labelled((12, 10)))
    before = [parameter.clone() for parameter in model.parameters()]
    with failing(model, "forward of layer 0", *range(10)), pytest.raises(OutOfMemoryError, match="row 0"):
        step(labelled((12, 10)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "step.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model = make_model().train()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    exec(code, {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": [labelled(*ROWS)] * 2})
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
