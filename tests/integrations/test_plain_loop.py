"""The safe step in a loop of plain PyTorch."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fitune
from faults import Fault, failing
from fitune.errors import OutOfMemoryError, UnexpectedError, UsageError
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
        return (
            nn.functional.cross_entropy(model(rows["inputs"]), rows["targets"], reduction="sum")
            / num_targets
        )

    capture = Capture(model.parameters())
    step = fitune.SafeStep(
        model,
        capture,
        loss=loss,
        num_targets=lambda rows: len(rows["targets"]),
        clip=0.0,
        most_rows=4,
    )
    result = step(batch)
    assert [len(rows) for rows in result.plan] == [4, 2]
    assert distance(capture.vector(), expected.vector()) < 1e-6
    assert step.verdict is not None
    assert step.verdict.exact


def test_a_mean_is_warned_of() -> None:
    model = make_model()
    step = fitune.SafeStep(
        model, Capture(model.parameters()), loss=lambda model, rows, _: model(**rows).loss
    )
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
    with (
        failing(model, "forward of layer 0", *range(10)),
        pytest.raises(OutOfMemoryError, match="sample 0"),
    ):
        step(labelled((12, 10)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "step.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model = make_model().train()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    exec(
        code,
        {
            "model": model,
            "optimizer": optimizer,
            "schedule": schedule,
            "loader": [labelled(*ROWS)] * 2,
        },
    )
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def freeze(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1" in name
    return model


def add_unused(model: nn.Module) -> nn.Module:
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


def add_hooks(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    return model


def embed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    table = model.get_input_embeddings()  # type: ignore[operator]
    return {"inputs_embeds": table(batch.pop("input_ids")).detach(), **batch}


Change = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
BATCHES: dict[str, Change] = {
    "plain": lambda _, batch: batch,
    "one row": lambda _, batch: {name: value[1:2] for name, value in batch.items()},
    "non-contiguous": lambda _, batch: {
        name: value.t().contiguous().t() for name, value in batch.items()
    },
    "three dimensions": embed,
    "position ids": lambda _, batch: (
        batch | {"position_ids": torch.arange(12).expand(len(ROWS), 12)}
    ),
}
MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": freeze,
    "unused parameter": add_unused,
    "gradient hooks": add_hooks,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "untied": lambda _: make_model(tied=False),
}


# torch.compile looks at the gradient of everything that it meets, and PyTorch warns of those that have none
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("commit", [False, True], ids=["restart", "commit"])
@pytest.mark.parametrize(
    ("change", "batch"),
    [
        *((lambda model: model, batch) for batch in BATCHES),
        *((MODELS[name], "plain") for name in MODELS),
    ],
    ids=[*BATCHES, *MODELS],
)
def test_odd_models_and_batches_have_the_usual_gradient_where_memory_runs_out(
    change: Callable[[nn.Module], nn.Module], batch: str, commit: bool
) -> None:
    model = change(make_model().train())
    rows = BATCHES[batch](model, labelled(*ROWS))
    expected, _ = plain_step(model, rows)
    fault = Fault(frozenset())

    def loss(model: nn.Module, rows: Mapping[str, Tensor], num_targets: float) -> Tensor:
        found: Tensor = model(**rows, num_items_in_batch=num_targets).loss
        fault.reach()
        return found

    capture = Capture(model.parameters())
    step = fitune.SafeStep(model, capture, loss=loss, clip=0.0, commit=commit)
    step(rows)
    fault.calls = frozenset({next(fault.counter) + 1})
    result = step(rows)
    assert len(result.failures) == 1
    assert distance(capture.vector(), expected) < 1e-6
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("first", [True, False])
def test_the_gradient_that_another_backward_has_left_is_in_no_step(first: bool) -> None:
    """Nor in the state that is made before the first one."""
    moments = []
    for left in (False, True):
        model, batch = make_model().train(), labelled(*ROWS)
        optimizer = torch.optim.AdamW(model.parameters())
        step = fitune.SafeStep(model, optimizer)
        if not first:
            step(batch)
        if left:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        step(batch)
        moments.append([state["exp_avg"] for state in optimizer.state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_no_gradient_stays_of_what_the_optimizer_does_not_train() -> None:
    model = make_model().train()
    step = fitune.SafeStep(model, torch.optim.AdamW(list(model.parameters())[:3]))
    step(labelled(*ROWS))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_without_targets_is_no_step_and_the_model_is_checked_on_the_next() -> None:
    model, batch = make_model(), labelled(*ROWS)
    step = fitune.SafeStep(model, Capture(model.parameters()))
    result = step(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert not result.step.updated
    assert step.verdict is None
    step(batch)
    assert step.verdict is not None


def test_several_groups_of_parameters_and_a_scaler_survive_running_out() -> None:
    found = []
    for calls in ((), (0,)):
        model = make_model().train()
        parameters = list(model.parameters())
        groups = [
            {"params": parameters[:3], "lr": 0.1},
            {"params": parameters[3:], "lr": 0.01, "weight_decay": 0.0},
        ]
        step = fitune.SafeStep(
            model, torch.optim.AdamW(groups), scaler=torch.amp.GradScaler("cpu", init_scale=8.0)
        )
        step(labelled(*ROWS))
        with failing(model, "clip", *calls):
            assert step(labelled(*ROWS)).step.updated
        found.append([parameter.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_memory_that_is_too_small_for_the_check_of_two_rows_does_not_end_the_loop() -> None:
    model = make_model()
    step = fitune.SafeStep(model, Capture(model.parameters()))
    with failing(model, "forward of layer 0", 0, 1):
        result = step(labelled(*ROWS))
    assert len(result.failures) == 1
    assert step.verdict is None


class OwnLoss(nn.Module):
    """No model of transformers: what it puts out is given to it."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(2)), output

    def forward(self, **_: Any) -> Any:
        return self.output


class NoCount(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, labels: Tensor) -> Any:
        return labels


LABELS = torch.tensor([[1, 2], [1, -100]])


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((LABELS, LABELS), "mapping of names to tensors, and this is a tuple"),
        ({}, "has no sample"),
        ({"labels": LABELS[:0]}, "has no sample"),
        ({"labels": LABELS, "texts": ["a", "b"]}, "'texts' of the batch is a list"),
        ({"labels": LABELS, "count": torch.tensor(2)}, "'count' of the batch is a single number"),
        (
            {"labels": LABELS, "position_ids": torch.zeros(3, 2, 2)},
            "first dimension of 3, and 'labels' one of 2",
        ),
        ({"inputs": LABELS}, "has no labels"),
        ({"labels": LABELS[:, 0]}, "labels of one dimension"),
        ({"labels": LABELS}, "put out a tuple without a loss"),
    ],
)
def test_a_batch_that_has_no_rows_to_take_apart_is_refused_in_a_sentence(
    batch: Any, words: str
) -> None:
    model = OwnLoss((torch.zeros(()),))
    step = fitune.SafeStep(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(UsageError, match=words):
        step(batch)


def test_a_model_that_cannot_be_told_the_number_of_targets_is_refused() -> None:
    model = NoCount()
    with pytest.raises(UsageError, match="takes no num_items_in_batch"):
        fitune.SafeStep(model, torch.optim.SGD(model.parameters()))


def test_parameters_beside_the_model_are_refused() -> None:
    """Their gradients would be counted twice by a step that is done again."""
    model = make_model()
    with pytest.raises(UsageError, match="1 parameters that are not the model's"):
        fitune.SafeStep(model, torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))]))


def test_an_optimizer_that_computes_the_loss_itself_is_refused() -> None:
    model = make_model()
    with pytest.raises(UsageError, match="LBFGS"):
        fitune.SafeStep(model, torch.optim.LBFGS(model.parameters()))


def test_a_model_whose_processes_wait_for_each_other_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        DistributedDataParallel, "__init__", lambda self, model: nn.Module.__init__(self)
    )
    model = make_model()
    with pytest.raises(UsageError, match="DistributedDataParallel"):
        fitune.SafeStep(DistributedDataParallel(model), torch.optim.SGD(model.parameters()))


def linear_step(loss: Any, **options: Any) -> fitune.SafeStep:
    model = nn.Linear(4, 3)
    return fitune.SafeStep(
        model,
        torch.optim.SGD(model.parameters()),
        loss=loss,
        num_targets=lambda rows: len(rows["x"]),
        **options,
    )


def mean(model: nn.Module, rows: Mapping[str, Tensor], num_targets: float) -> Tensor:
    loss: Tensor = model(rows["x"]).sum() / num_targets
    return loss


def test_an_error_of_the_callers_own_loss_comes_through_as_it_is() -> None:
    def wrong(model: nn.Module, rows: Mapping[str, Tensor], num_targets: float) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        linear_step(wrong)({"x": torch.randn(2, 4)})
    assert caught.traceback[-1].name == "wrong"


def test_an_error_of_torch_in_the_callers_model_comes_through_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        linear_step(mean)({"x": torch.randn(2, 5)})
    assert "mean" in [entry.name for entry in caught.traceback]


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda *_: 1.0, "is a float: return a tensor of one element"),
        (
            lambda model, rows, _: model(rows["x"]),
            r"is a tensor of shape \(2, 3\): return a tensor of one element",
        ),
        (
            lambda *arguments: mean(*arguments).detach(),
            "leads to no parameter that is trained: compute it without",
        ),
    ],
)
def test_a_loss_that_cannot_be_learned_from_is_said(loss: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        linear_step(loss)({"x": torch.randn(2, 4)})


def test_what_nobody_foresaw_is_a_sentence_that_keeps_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = linear_step(mean)
    monkeypatch.setattr("fitune.integrations.own_loop.create_state", lambda _: int("x"))
    # as if torch had raised it: the place is one of ours
    monkeypatch.setattr("fitune.boundary._passed_others_code", lambda _: False)
    with pytest.raises(
        UnexpectedError, match=r"fitune\.SafeStep met an error .*: ValueError"
    ) as caught:
        step({"x": torch.randn(2, 4)})
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_error_of_torch_outside_of_the_callers_code_is_a_sentence() -> None:
    """A graph that is used twice: only torch and fitune are in the traceback."""
    kept: list[Tensor] = []

    def again(model: nn.Module, rows: Mapping[str, Tensor], num_targets: float) -> Tensor:
        kept[:] = kept or [model(rows["x"]).square().sum()]
        return kept[0]

    with pytest.raises(
        UnexpectedError, match=r"fitune\.SafeStep met an error .* RuntimeError .*second time"
    ):
        linear_step(again, most_rows=2)({"x": torch.randn(2, 4)})
