"""optimizers that update the matrices of hidden layers in another way than the rest: Muon and APOLLO."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fitune.batch_size.norms import NormRecorder
from fitune.config import OptimConfig
from fitune.model.load import build_model
from fitune.optimizers.apollo import PROJECTION_STEPS, Apollo, Variant
from fitune.step.optimizer import build_optimizer
from tiny_models import TINY_LLAMA

CPU = torch.device("cpu")
NAMES = ("muon", "apollo", "apollo_mini")


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model(TINY_LLAMA, seed=0)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(name=name, weight_decay=0.1), lr=0.01, device=CPU)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_only_matrices_of_hidden_layers_are_updated_in_another_way(
    name: str, model: PreTrainedModel
) -> None:
    of_adamw = copy.deepcopy(model)
    train(model, optimizer_of(name, model), 1, 2)
    train(of_adamw, optimizer_of("adamw", of_adamw), 1, 2)
    pairs = zip(model.named_parameters(), of_adamw.parameters(), strict=True)
    differing = {name for (name, ours), theirs in pairs if not torch.equal(ours, theirs)}
    assert differing == {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }


def test_muon_is_that_of_torch(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    train(model, optimizer_of("muon", model), 1, 2)
    matrix = other.model.layers[0].mlp.up_proj.weight
    theirs = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    train(other, theirs, 1, 2)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, matrix)


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_that_is_loaded_goes_on_bit_for_bit(name: str, model: PreTrainedModel) -> None:
    optimizer = optimizer_of(name, model)
    train(model, optimizer, 1, 2)
    other = copy.deepcopy(model)
    continued = optimizer_of(name, other)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its_optimizer in ((model, optimizer), (other, continued)):
        its_optimizer.param_groups[0]["lr"] = 0.02
        train(each, its_optimizer, 3, 4)
    assert equal(model, other)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
@pytest.mark.parametrize("by_column", [True, False])
def test_apollo_scales_the_gradient_as_adam_scales_its_projection(
    shape: tuple[int, int], by_column: bool
) -> None:
    """Equation 4 of the paper, with the matrices written out."""
    torch.manual_seed(0)
    matrix, gradient = nn.Parameter(torch.randn(shape)), torch.randn(shape)
    before = matrix.detach().clone()
    optimizer = Apollo(
        [{"params": [matrix]}], Variant(0.5, by_column, 3.0), lr=0.1, betas=(0.9, 0.999), eps=1e-12
    )
    matrix.grad = gradient.clone()
    optimizer.step()
    wide = gradient if shape[0] <= shape[1] else gradient.T
    drawn = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) / 3**0.5
    projected = drawn @ wide
    # Adam's first direction is the sign of its gradient.
    dim = 0 if by_column else None
    factor = projected.sign().norm(dim=dim) / projected.norm(dim=dim)
    expected = wide * factor * 3.0 * 0.1
    torch.testing.assert_close(
        before - matrix.detach(),
        expected if shape[0] <= shape[1] else expected.T,
        rtol=1e-4,
        atol=1e-6,
    )


def test_apollo_lets_no_update_grow_by_more_than_a_hundredth() -> None:
    matrix = nn.Parameter(torch.zeros(4, 4))
    optimizer = Apollo(
        [{"params": [matrix]}], Variant(0.5, False, 1.0), lr=1.0, betas=(0.0, 0.0), eps=1e-12
    )
    sizes = []
    for seed in range(20):
        before = matrix.detach().clone()
        matrix.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        sizes.append(float((matrix.detach() - before).norm()))
    growths = [after / before for before, after in itertools.pairwise(sizes)]
    assert 1.005 < max(growths) < 1.0101
    assert min(growths) < 1


def test_apollo_draws_a_new_projection_after_some_steps() -> None:
    matrix = nn.Parameter(torch.zeros(4, 4))
    optimizer = Apollo(
        [{"params": [matrix]}], Variant(0.0, False, 1.0), lr=1.0, betas=(0.9, 0.999), eps=1e-8
    )
    projected = []
    for _ in range(PROJECTION_STEPS + 1):
        matrix.grad = torch.eye(4)
        optimizer.step()
        projected.append(optimizer.state[matrix]["exp_avg"].clone())
    directions = [torch.nn.functional.normalize(each) for each in projected]
    torch.testing.assert_close(directions[0], directions[-2])
    assert (directions[-1] - directions[-2]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_noise_is_not_read_from_averages_of_something_else(
    name: str, model: PreTrainedModel
) -> None:
    optimizer = optimizer_of(name, model)
    train(model, optimizer, 1)
    recorder = NormRecorder(optimizer, preconditioned=True)
    with recorder.reading():
        model.model.layers[0].mlp.up_proj.weight.sum().backward()
    recorder.keep(1.0)
    norms = recorder.read(recorder.values().tolist(), total_norm=1.0)
    assert (norms.momentum_dot, norms.preconditioned_micro) == (None, None)
