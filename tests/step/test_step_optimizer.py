"""step/optimizer.py: variants of AdamW that move its state and change nothing else."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from fitune.config import OptimConfig
from fitune.errors import ConfigError
from fitune.optimizers.host_adamw import HostAdamW
from fitune.optimizers.table import OPTIMIZERS
from fitune.step.optimizer import build_optimizer, set_lr
from fitune.step.optimizer_state import create_state

CPU, CARD = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3
) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        set_lr(optimizer, 0.01 / (1 + step))
        model(torch.randn(5, 8, generator=generator)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (parameter.detach() for parameter in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_says_which_optimizers_have_their_state_before_the_first_step(
    model: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = OPTIMIZERS[name]
    monkeypatch.setitem(
        OPTIMIZERS, name, replace(kind, build=kind.stand_in or kind.build)
    )  # needs no library
    optimizer = build_optimizer(model, OptimConfig(name=name), lr=0.01, device=CARD)
    assert create_state(optimizer) == (not kind.state_comes_late)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_says_how_large_the_state_of_an_optimizer_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """state_share, measured on a matrix that is large enough for 8-bit states."""
    kind = OPTIMIZERS[name]
    monkeypatch.setitem(OPTIMIZERS, name, replace(kind, build=kind.stand_in or kind.build))
    linear = nn.Linear(512, 512, bias=False)
    optimizer = build_optimizer(linear, OptimConfig(name=name), lr=0.01, device=CARD)
    linear.weight.grad = torch.zeros_like(linear.weight)
    optimizer.step()
    tensors = {
        id(t): t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    }
    share = sum(tensor.nbytes for tensor in tensors.values()) / linear.weight.nbytes
    assert share <= kind.state_share + 0.01


def test_the_state_on_the_host_changes_no_bit(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    optim = OptimConfig(weight_decay=0.1)
    ours = train(
        model,
        build_optimizer(
            model, OptimConfig(name="adamw_host", weight_decay=0.1), lr=0.01, device=CARD
        ),
    )
    theirs = train(other, build_optimizer(other, optim, lr=0.01, device=CPU))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_state_on_the_host_is_saved_and_loaded(model: nn.Module) -> None:
    optim = OptimConfig(name="adamw_host")
    optimizer = build_optimizer(model, optim, lr=0.01, device=CARD)
    list(train(model, optimizer))
    other = copy.deepcopy(model)
    continued = build_optimizer(other, optim, lr=0.01, device=CARD)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(train(model, optimizer), train(other, continued), strict=True):
        assert torch.equal(ours, theirs)


def test_the_state_is_found_at_the_parameters_and_made_beforehand(model: nn.Module) -> None:
    optimizer = build_optimizer(model, OptimConfig(name="adamw_host"), lr=0.01, device=CARD)
    before = [parameter.clone() for parameter in model.parameters()]
    assert create_state(optimizer)
    assert {name for parameter in model.parameters() for name in optimizer.state[parameter]} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parameters_written_between_steps_count(model: nn.Module) -> None:
    optimizer = build_optimizer(model, OptimConfig(name="adamw_host"), lr=0.01, device=CARD)
    list(train(model, optimizer, steps=1))
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    list(train(model, optimizer, steps=1))
    assert (model[0].weight - 7.0).abs().max() < 0.1


@pytest.mark.parametrize("name", ["adamw_host", "adamw_8bit_paged"])
def test_what_needs_a_card_is_refused_on_a_cpu(name: str, model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="use adamw"):
        build_optimizer(model, OptimConfig(name=name), lr=0.01, device=CPU)


def test_a_frozen_or_unused_parameter_stays(model: nn.Module) -> None:
    optimizer = HostAdamW(
        [{"params": [model[0].weight, model[2].weight]}], lr=0.1, betas=(0.9, 0.999), eps=1e-8
    )
    before = model[2].weight.clone()
    model[0](torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_8bit_paged"])
def test_8_bit_adamw_trains_where_it_is_installed(name: str, model: nn.Module) -> None:
    pytest.importorskip("bitsandbytes")
    if name.endswith("paged") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    before = model[0].weight.detach().clone()
    list(train(model, build_optimizer(model, OptimConfig(name=name), lr=0.01, device=CPU)))
    assert not torch.equal(model[0].weight, before)
