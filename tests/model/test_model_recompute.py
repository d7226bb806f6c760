"""model/recompute.py: less memory between forward and backward, and the same gradients."""

import copy
import shutil
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.config import LoraConfig, Recompute
from fitune.errors import ModelError
from fitune.model import recompute as recompute_module
from fitune.model.compile import compile_layers
from fitune.model.load import build_model
from fitune.model.lora import apply_lora
from fitune.model.packed_attention import attention_name, row_boundaries
from fitune.model.recompute import set_recompute
from tiny_models import TINY

CHOICES = typing.get_args(Recompute)


def loss(model: nn.Module, lengths: tuple[int, ...] = (20, 8)) -> torch.Tensor:
    ids = torch.arange(3, 3 + sum(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    boundaries = row_boundaries(lengths, device=torch.device("cpu"))
    return (
        model(input_ids=ids, position_ids=positions, use_cache=False, row_boundaries=boundaries)
        .logits.pow(2)
        .sum()
    )


def build(name: str, num_layers: int = 4) -> nn.Module:
    config = copy.deepcopy(TINY[name])
    if name in ("llama", "qwen3"):
        config = type(config)(
            **(config.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None})
        )
    return build_model(config, attention=attention_name(config, "auto"), seed=1).train()


def gradients(model: nn.Module, lengths: tuple[int, ...] = (20, 8)) -> Iterator[torch.Tensor]:
    model.zero_grad()
    loss(model, lengths).backward()
    return (parameter.grad for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("recompute", CHOICES)
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_without_recompute(name: str, recompute: Recompute) -> None:
    model = build(name)
    expected = [gradient.clone() for gradient in gradients(model)]
    set_recompute(model, recompute)
    for ours, reference in zip(gradients(model), expected, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-6, atol=1e-7)


def test_adapters_are_recomputed_too() -> None:
    model = apply_lora(build("qwen3"), LoraConfig(dropout=0.1))
    torch.manual_seed(0)
    expected = [gradient.clone() for gradient in gradients(model)]
    set_recompute(model, "full")
    torch.manual_seed(0)  # the same dropout
    for ours, reference in zip(gradients(model), expected, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-6, atol=1e-7)


class Held(TorchDispatchMode):
    """Bytes of the storages that an operator made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(storage),
                    storage.nbytes(),
                )
        return out

    def held_bytes(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def held_for_backward(recompute: Recompute) -> int:
    model = build("llama", num_layers=8)
    set_recompute(model, recompute)
    with Held() as held:
        result = loss(model)
    assert result.requires_grad
    return held.held_bytes()


def test_each_choice_holds_less_than_the_one_before() -> None:
    held = {recompute: held_for_backward(recompute) for recompute in CHOICES}
    assert held["off"] > held["every_4"] > held["every_2"] > held["full"]
    assert held["every_4"] > held["selective"] > held["full"]


class Calls(TorchDispatchMode):
    """How often each operator really ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("llama", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("llama", "aten::mm"),
        ("qwen3_moe", "aten::_grouped_mm"),
    ],
)
def test_selective_does_not_repeat_what_is_expensive(name: str, operator: str) -> None:
    def count(recompute: Recompute) -> int:
        model = build(name)
        set_recompute(model, recompute)
        with Calls() as calls:
            loss(model).backward()
        return calls.counts[operator]

    assert 0 < count("selective") == count("off") < count("full")


@pytest.mark.parametrize("recompute", [choice for choice in CHOICES if choice != "off"])
def test_offloaded_inputs_change_no_gradient(recompute: Recompute) -> None:
    model = apply_lora(build("qwen3"), LoraConfig(dropout=0.1))
    torch.manual_seed(0)
    expected = [gradient.clone() for gradient in gradients(model)]
    set_recompute(model, recompute, offload=True)
    torch.manual_seed(0)
    for ours, reference in zip(gradients(model), expected, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-6, atol=1e-7)


def test_only_the_inputs_of_layers_go_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.Size] = []

    class Watched(save_on_cpu):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (moved.append(tensor.shape), pack(tensor))[1]

    monkeypatch.setattr(recompute_module, "save_on_cpu", Watched)
    model = build("llama", num_layers=4)
    set_recompute(model, "every_2", offload=True)
    loss(model).backward()
    assert moved == [torch.Size((1, 28, 32))] * 2


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo looks at its inputs
def test_compiled_layers_have_the_same_gradients_for_any_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile_without_code(layer: nn.Module, **options: Any) -> None:
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_without_code)
    plain, compiled = build("llama"), build("llama")
    compile_layers(compiled, torch.device("cpu"))
    torch._dynamo.reset()
    num_graphs = []
    for lengths in ((20, 8), (5, 9), (30,), (3, 3, 3, 3, 40)):
        expected = list(gradients(plain, lengths))
        for ours, reference in zip(gradients(compiled, lengths), expected, strict=True):
            assert torch.allclose(ours, reference, rtol=1e-6, atol=1e-7)
        num_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_graphs[0] == num_graphs[-1]


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"model\.compile needs a C\+\+ compiler"):
        compile_layers(build("llama"), torch.device("cpu"))


def test_recompute_can_be_switched_off_again() -> None:
    model = build("llama")
    set_recompute(model, "full")
    set_recompute(model, "off")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.recompute=full"):
        set_recompute(nn.Sequential(nn.Linear(2, 2)), "full")
    set_recompute(nn.Sequential(nn.Linear(2, 2)), "off")
