"""The recorder's truth: what it sees on fake tensors is what it sees on real ones, event by event."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fitune.config import Routing
from fitune.model.load import build_model
from fitune.recorder.events import MemoryTrace
from fitune.recorder.record import Build, Loop, RecordSettings, record_loop
from tiny_models import TINY_DBRX, TINY_JETMOE

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "use_cache": False,
}


def llama(**config: Any) -> Build:
    return lambda: LlamaForCausalLM(LlamaConfig(**SMALL | config)).train()


def lora() -> nn.Module:
    model = get_peft_model(
        llama()(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert isinstance(model, nn.Module)
    return model.train()


def recompute() -> nn.Module:
    model = llama()()
    assert isinstance(model, PreTrainedModel)
    model.activation_checkpointing_enable()
    return model


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, use_cache=False
        )
    ).train()


def mixture(kind: type[PreTrainedModel], config: type[Any], experts: str) -> Build:
    def build() -> nn.Module:
        settings = config(
            **SMALL,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            **{"num_local_experts" if kind is MixtralForCausalLM else "num_experts": 4},
        )
        settings._experts_implementation = experts
        return kind(settings).train()

    return build


def loop(*, num_micro_batches: int = 1, autocast: bool = False, optimizer: str = "foreach") -> Loop:
    def set_up(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        update = torch.optim.AdamW(parameters, lr=1e-4, **{optimizer: True})
        ids = torch.randint(0, VOCABULARY, (2, 16), device=device)

        def step() -> None:
            for _ in range(num_micro_batches):
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    out = model(input_ids=ids, labels=ids)
                (out.loss / num_micro_batches).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            update.step()
            update.zero_grad(set_to_none=True)

        return step

    return set_up


CASES: dict[str, tuple[Build, Loop]] = {
    "full": (llama(), loop()),
    "fused": (llama(), loop(optimizer="fused")),
    "eager attention": (llama(attn_implementation="eager"), loop()),
    "tied weights": (llama(tie_word_embeddings=True), loop()),
    "gpt2": (gpt2, loop()),
    "lora": (lora, loop()),
    "recompute": (recompute, loop()),
    "autocast": (llama(), loop(autocast=True)),
    "accumulation": (llama(), loop(num_micro_batches=3)),
    "mixtral eager": (mixture(MixtralForCausalLM, MixtralConfig, "eager"), loop()),
    "mixtral grouped_mm": (mixture(MixtralForCausalLM, MixtralConfig, "grouped_mm"), loop()),
    "qwen3 moe eager": (mixture(Qwen3MoeForCausalLM, Qwen3MoeConfig, "eager"), loop()),
    "qwen3 moe batched_mm": (mixture(Qwen3MoeForCausalLM, Qwen3MoeConfig, "batched_mm"), loop()),
}


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # inside peft
@pytest.mark.parametrize("case", CASES)
def test_a_recording_on_fake_tensors_equals_one_on_real_tensors(case: str) -> None:
    build, set_up = CASES[case]
    fake = record_loop(build, set_up, RecordSettings(mode="fake", num_steps=2))
    real = record_loop(build, set_up, RecordSettings(mode="real", num_steps=2))
    for mine, true in zip(fake.events, real.events, strict=False):
        assert mine == true
    assert len(fake.events) == len(real.events)


@pytest.mark.parametrize("routing", ["balanced", "worst"])
@pytest.mark.parametrize("config", [TINY_DBRX, TINY_JETMOE], ids=lambda config: config.model_type)
def test_experts_that_are_called_one_by_one_get_the_tokens_of_the_routing(
    config: PretrainedConfig, routing: Routing
) -> None:
    def build() -> nn.Module:
        tiny = copy.deepcopy(config)
        tiny.vocab_size = VOCABULARY
        return build_model(tiny).train()

    def record(mode: Literal["fake", "real"]) -> MemoryTrace:
        return record_loop(build, loop(), RecordSettings(mode=mode, num_steps=1, routing=routing))

    assert record("fake").events == record("real").events
