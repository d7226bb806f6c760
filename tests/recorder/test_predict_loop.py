"""The public call, on loops of other people's kind and on our own step."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from transformers import MixtralConfig, MixtralForCausalLM

import fitune
from fitune.config import OptimConfig
from fitune.data.rows import MicroBatch
from fitune.errors import UsageError
from fitune.model.packed_attention import attention_name
from fitune.model.presets import llama_config
from fitune.objectives.supervised import Supervised
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import ROUTED
from fitune.recorder.record import Build, RecordSettings, record_loop
from fitune.step.optimizer import build_optimizer
from fitune.step.work import StepSettings, train_step
from fitune.units import MIB

VOCABULARY, LENGTH = 64, 24


def linear() -> nn.Module:
    return nn.Linear(512, 512)


def train(model: nn.Module, device: torch.device) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(64, 512, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def test_a_loop_is_predicted_for_a_card_that_is_not_here() -> None:
    prediction = fitune.predict_loop(linear, train, gpu="A100 80GB")
    assert prediction.peak_allocated_bytes == sum(prediction.categories.values())
    assert prediction.categories["optimizer_state"] == 2 * (2 * MIB // 2 + 2048)
    assert prediction.categories["workspace"] == 2 * 8_519_680
    assert prediction.fits


@pytest.mark.parametrize("pin_memory", [False, True])
def test_what_a_loop_keeps_on_the_host_is_not_on_the_card(pin_memory: bool) -> None:
    """Torch calls such hooks outside of any mode, as it does all of a backward."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(8)))

    def train_with(
        keeping: Callable[[], AbstractContextManager[Any]],
    ) -> Callable[..., Callable[[], Any]]:
        def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
            def step() -> None:
                with keeping():
                    result = model(torch.ones(4096, 64, device=device)).sum()
                result.backward()
                model.zero_grad()

            return step

        return loop

    kept = fitune.predict_loop(build, train_with(nullcontext), gpu="RTX 4090")
    moved = fitune.predict_loop(
        build, train_with(partial(save_on_cpu, pin_memory=pin_memory)), gpu="RTX 4090"
    )
    assert kept.categories["activation"] >= 7 * MIB
    assert moved.categories["activation"] == 0


def test_a_hopper_card_has_larger_workspaces() -> None:
    assert fitune.predict_loop(linear, train, gpu="H100").categories["workspace"] == 64 * MIB


def test_a_cpu_has_none() -> None:
    assert fitune.predict_loop(linear, train, gpu="cpu").categories["workspace"] == 0


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown card"):
        fitune.predict_loop(linear, train, gpu="RTX 9999")


def test_a_loop_that_returns_no_step_is_told_so() -> None:
    with pytest.raises(UsageError, match="function that does one step"):
        fitune.predict_loop(linear, lambda model, device: None, gpu="A100 80GB")  # type: ignore[arg-type,return-value]


def test_importing_fitune_imports_no_torch() -> None:
    code = "import sys, fitune; sys.exit('torch' in sys.modules)"
    source = str(Path(fitune.__file__).parent.parent)
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False
        ).returncode
        == 0
    )


# ---- our own step ----


def tiny_llama(dtype: torch.dtype) -> Build:
    def build() -> nn.Module:
        config = llama_config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=64, intermediate_size=48,
        )  # fmt: skip
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention_name(config, "auto")
        )
        assert isinstance(model, nn.Module)
        return model.to(dtype).train()

    return build


def packed(device: torch.device, lengths: tuple[int, ...]) -> MicroBatch:
    num_targets = sum(lengths) - len(lengths)
    positions = torch.zeros(1, sum(lengths), dtype=torch.int64, device=device)
    targets = torch.zeros(num_targets, dtype=torch.int64, device=device)
    return MicroBatch(
        row_ids=tuple(range(len(lengths))),
        row_lengths=lengths,
        packed=True,
        input_ids_BS=positions,
        position_ids_BS=positions,
        target_index_N=targets,
        target_ids_N=targets,
        target_weights_N=torch.ones(num_targets, device=device),
        loss_weight=float(num_targets),
    )


def own_loop(lengths: tuple[int, ...]) -> Callable[[nn.Module, torch.device], Callable[[], Any]]:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        optimizer = build_optimizer(model, OptimConfig(), lr=1e-4, device=torch.device("cuda"))
        micro_batches = [packed(device, lengths), packed(device, lengths)]
        return lambda: train_step(
            model, optimizer, micro_batches, settings=StepSettings(Supervised())
        )

    return loop


def test_our_step_is_equal_on_fake_and_real_tensors() -> None:
    build, loop = tiny_llama(torch.float32), own_loop((16, 8))
    fake = record_loop(build, loop, RecordSettings(num_steps=2))
    assert fake.events == record_loop(build, loop, RecordSettings(num_steps=2, mode="real")).events


def test_our_packed_step_attends_by_one_kernel_on_cuda() -> None:
    loop = own_loop((16, 8))
    events = record_loop(
        tiny_llama(torch.bfloat16), loop, RecordSettings(target=CudaTarget(), num_steps=1)
    ).events
    kernels = [
        event.op for event in events if "attn" in event.op and event.num_bytes == LENGTH * 4 * 8 * 2
    ]
    assert kernels.count("torch_attn._varlen_attn.default") == 4  # 2 layers, 2 micro-batches
    assert not [event for event in events if "scaled_dot" in event.op]


# ---- mixtures of experts ----


def moe_loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
    ids = torch.zeros(2, LENGTH, dtype=torch.int64, device=device)
    return lambda: model(input_ids=ids, labels=ids).loss.backward()


def mixtral(experts: str) -> Build:
    def build() -> nn.Module:
        config = MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
        )  # fmt: skip
        config._experts_implementation = experts
        return MixtralForCausalLM(config).to(torch.bfloat16).train()

    return build


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_is_recorded_as_on_cuda(experts: str) -> None:
    trace = record_loop(
        mixtral(experts), moe_loop, RecordSettings(target=CudaTarget(), num_steps=1)
    )
    assert sum(event.num_bytes for event in trace.events if event.category == "gradient") > 0


def test_experts_get_equal_shares_or_everything() -> None:
    def largest(routing: Any) -> int:
        settings = RecordSettings(target=CudaTarget(), num_steps=1, routing=routing)
        trace = record_loop(mixtral("eager"), moe_loop, settings)
        assert ROUTED[routing] in trace.source
        return max(
            event.num_bytes
            for event in trace.events
            if event.phase == "forward" and "experts" in event.module and "mm" in event.op
        )

    assert largest("balanced") == 2 * LENGTH * 2 // 4 * 96 * 2
    assert largest("worst") == 2 * LENGTH * 96 * 2


class MaskedExperts(nn.Module):
    """Experts chosen by masks in a Python loop, with a branch where an expert gets no token, as minimind's."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = torch.topk(self.gate(x).softmax(-1), k=2, dim=-1, sorted=False)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if mask.any():
                tokens = mask.any(dim=-1).nonzero().flatten()
                out.index_add_(0, tokens, expert(x[tokens]) * weight[mask].view(-1, 1))
        return out


@pytest.mark.parametrize(("routing", "calls", "tokens"), [("balanced", 4, 8), ("worst", 2, 16)])
def test_experts_behind_masks_are_visited_by_the_same_policy(
    routing: Any, calls: int, tokens: int
) -> None:
    def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        x = torch.ones(16, 8, device=device)
        return lambda: model(x).sum().backward()

    settings = RecordSettings(target=CudaTarget(), num_steps=1, routing=routing)
    events = record_loop(MaskedExperts, loop, settings).events
    outputs = [
        e.num_bytes
        for e in events
        if e.op == "aten.addmm.default" and "experts" in e.module and e.num_bytes > 0
    ]
    assert outputs == [tokens * 8 * 4] * calls
