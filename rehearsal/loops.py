"""Plain training loops, as people write them around a model of transformers."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rehearsal.cases import LoopCase
from rehearsal.models import causal_model

Step = Callable[[], None]


def build(case: LoopCase) -> Any:
    model = causal_model(case.model, dtype=case.dtype, lora=case.lora, attention=case.attention)
    if case.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def optimizer_of(case: LoopCase, model: Any) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    if case.optimizer == "fused":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return torch.optim.AdamW(parameters, lr=1e-4, foreach=case.optimizer == "foreach")


def loop(case: LoopCase, model: Any, device: torch.device) -> Step:
    """As `fitune.predict_loop` takes it."""
    optimizer = optimizer_of(case, model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler("cuda", enabled=case.scaler)
    autocast = None if case.autocast is None else getattr(torch, case.autocast)

    def forward() -> torch.Tensor:
        input_ids = torch.zeros(case.batch, case.length, dtype=torch.long).to(device)
        attention_mask = torch.ones(case.batch, case.length, dtype=torch.long)
        if case.padded:
            attention_mask[:, -case.length // 4 :] = 0
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
            loss: torch.Tensor = model(
                input_ids=input_ids, attention_mask=attention_mask.to(device), labels=input_ids
            ).loss
            return loss

    def step() -> None:
        with (
            nullcontext()
            if case.kernel is None
            else sdpa_kernel(SDPBackend.__members__[case.kernel])
        ):
            for _ in range(case.accumulation):
                scaler.scale(forward() / case.accumulation).backward()
            if case.clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, case.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=not case.keeps_gradients)
            if case.evaluates:
                model.eval()
                with torch.no_grad():
                    forward()
                model.train()

    return step
