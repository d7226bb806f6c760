"""LitGPT's LoRA fine-tuning as its resource table of October 2023 measured it (tutorials/resource-tables.md).

The model's arithmetic is that of lit_gpt's model.py, lora.py and rmsnorm.py of that time: queries, keys and values of
one product, adapters of rank 8 on queries and values whose sum is scattered into a tensor as wide as all three, rotary
tables in float32. The script's first iteration takes the longest row of the data, and Lightning's 16-bit precision
hands the logits, computed 128 positions at a time, back in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], Any]
RANK, ALPHA, DROPOUT = 8, 16, 0.05
LOGIT_POSITIONS = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    num_layers: int
    num_heads: int
    hidden: int
    intermediate: int
    vocabulary: int
    rotary_fraction: float
    llama: bool  # RMSNorm, gated MLP, one branch after the other, no biases
    shared_norm: bool = False
    head_bias: bool = False


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = torch.mean(wide * wide, dim=-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + 1e-5)).to(x.dtype) * self.weight


class QueriesKeysValues(nn.Module):
    """The product for all three, with an adapter for the first and the last."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        hidden = sizes.hidden
        self.linear = nn.Linear(hidden, 3 * hidden, bias=not sizes.llama)
        self.lora_a = nn.Parameter(torch.zeros(2 * RANK, hidden))
        self.lora_b = nn.Parameter(torch.zeros(2 * hidden, RANK))
        self.dropout = nn.Dropout(DROPOUT)
        self.places = torch.cat((torch.arange(hidden), torch.arange(2 * hidden, 3 * hidden)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        low = F.linear(self.dropout(x), self.lora_a)
        high = F.conv1d(low.transpose(-2, -1), self.lora_b.unsqueeze(-1), groups=2).transpose(
            -2, -1
        )
        out += self._widen(high) * (ALPHA / RANK)
        return out

    def _widen(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        width = self.linear.out_features
        wide = x.new_zeros((*x.shape[:-1], width)).view(-1, width)
        wide = wide.index_copy(1, self.places.to(x.device), x.reshape(-1, x.shape[-1]))
        return wide.view(*x.shape[:-1], width).transpose(0, 1)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        hidden, bias = sizes.hidden, not sizes.llama
        self.norm_1, self.norm_2 = _norm(sizes), None if sizes.shared_norm else _norm(sizes)
        self.qkv, self.proj = QueriesKeysValues(sizes), nn.Linear(hidden, hidden, bias=bias)
        self.fc_1 = nn.Linear(hidden, sizes.intermediate, bias=bias)
        self.fc_2 = nn.Linear(hidden, sizes.intermediate, bias=bias) if sizes.llama else None
        self.down = nn.Linear(sizes.intermediate, hidden, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_1 = self.norm_1(x)
        attended = self.attend(n_1, cos, sin)
        if self.sizes.llama:
            assert self.norm_2 is not None
            x = attended + x
            return self.mlp(self.norm_2(x)) + x
        n_2 = n_1 if self.norm_2 is None else self.norm_2(x)
        return self.mlp(n_2) + attended + x

    def mlp(self, x: Tensor) -> Tensor:
        if self.fc_2 is None:
            return cast(Tensor, self.down(F.gelu(self.fc_1(x))))
        first, second = self.fc_1(x), self.fc_2(x)
        return cast(Tensor, self.down(F.silu(first) * second))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        heads, size = self.sizes.num_heads, hidden // self.sizes.num_heads
        qkv = self.qkv(x).view(batch, length, heads, 3, size).permute(0, 2, 3, 1, 4)
        q, k, v = (part.reshape(batch, -1, length, size) for part in qkv.split((1, 1, 1), dim=2))
        turned = cos.shape[-1]
        q, k = (
            torch.cat((_turn(part[..., :turned], cos, sin), part[..., turned:]), dim=-1)
            for part in (q, k)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)
        return cast(Tensor, self.proj(out.transpose(1, 2).reshape(batch, length, hidden)))


def _norm(sizes: Sizes) -> nn.Module:
    return RMSNorm(sizes.hidden) if sizes.llama else nn.LayerNorm(sizes.hidden)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (rotated * sin)).to(x.dtype)


class LitGPT(nn.Module):
    def __init__(self, sizes: Sizes, length: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.ln_f = _norm(sizes)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=sizes.head_bias)
        self.to(torch.bfloat16)
        turned = int(sizes.rotary_fraction * (sizes.hidden // sizes.num_heads))
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.ones(length, turned))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = self.wte(ids)
        cos, sin = (cast(Tensor, table)[: ids.shape[1]] for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return [self.lm_head(part) for part in self.ln_f(x).split(LOGIT_POSITIONS, dim=1)]


def loop(batch: int, length: int) -> Callable[[nn.Module, torch.device], Step]:
    """The first micro-batch of a step, which has the longest row, and the optimizer's part."""

    def set_up(model: nn.Module, device: torch.device) -> Step:
        model.train()
        optimizer = torch.optim.AdamW(
            parameter for parameter in model.parameters() if parameter.requires_grad
        )

        def step() -> None:
            ids, targets = (
                torch.zeros((batch, length), dtype=torch.int64).to(device) for _ in range(2)
            )
            logits = [part.float() for part in model(ids)]
            logits[-1] = logits[-1][..., :-1, :]
            parts = zip(logits, targets[..., 1:].split(logits[0].shape[1], dim=1), strict=True)
            losses = [
                F.cross_entropy(
                    part.reshape(-1, part.shape[-1]),
                    target.reshape(-1),
                    ignore_index=-1,
                    reduction="none",
                )
                for part, target in parts
            ]
            loss = torch.cat(losses).mean()
            (loss / 128).backward()
            loss.item()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return set_up


SIZES = {
    "phi-1.5": Sizes(24, 32, 2048, 8192, 51200, 0.5, llama=False, shared_norm=True, head_bias=True),
    "StableLM Alpha 3B": Sizes(16, 32, 4096, 16384, 50688, 0.25, llama=False),
    "Llama 2 7B": Sizes(32, 32, 4096, 11008, 32000, 1.0, llama=True),
    "Llama 2 13B": Sizes(40, 40, 5120, 13824, 32000, 1.0, llama=True),
}
