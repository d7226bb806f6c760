"""What takes the memory when minimind2 is fine-tuned with 6 rows of 2,048 tokens, step by step, from fitune's own step
to the loop that minimind had when it was asked whether that fills 24 GB (jingyaogong/minimind #312, March 2025).

python benchmarks/minimind_24gb.py            the table; also written into docs/memory.md

Nothing is measured on a card: every line is a prediction for an RTX 4090, of the steady second step.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fitune
from fitune.allocator.prediction import Prediction

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
BEGIN, END = "<!-- minimind_24gb.py: begin -->", "<!-- minimind_24gb.py: end -->"
CARD = "RTX 4090"
ROWS, LENGTH = 6, 2048
WIDTH, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY = 768, 16, 8, 2, 2048, 6400
HEAD_DIM = WIDTH // HEADS
NUM_PARAMETERS = 104_030_976


@dataclass(frozen=True, slots=True)
class Line:
    """base: the number (from 1) of the line that this one is compared with."""

    what: str
    predict: Callable[[], Prediction]
    base: int | None = None


# ---- fitune's own step ----------------------------------------------------------------------------------------------


def own_step(*options: str, rows: int = ROWS, length: int = LENGTH) -> Prediction:
    tree = {
        "model": {"source": "minimind2", "init": "random", "precision": "autocast_bfloat16"},
        "data": {"train": "rows.jsonl", "max_length": length, "eval_fraction": 0.0},
        "batch": {"micro": rows, "accumulation": 1},
    }
    return fitune.predict(tree, gpu=CARD, overrides=options)


# ---- minimind's loop, early 2025 ------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Its result is float32 where the weight is: the rounded values are multiplied by a float32 weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(
            x
        )


class Layer(nn.Module):
    """fused: torch's scaled_dot_product_attention, as minimind does by default; else scores are materialised."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.query, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.attention_norm, self.mlp_norm = Norm(WIDTH), Norm(WIDTH)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        h = x + self.attend(self.attention_norm(x), rotation)
        normed = self.mlp_norm(h)
        return h + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def attend(self, x: Tensor, rotation: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, HEAD_DIM)
        q, k, v = (project(x).view(shape) for project in (self.query, self.key, self.value))
        q, k = (rotate(part, rotation) for part in (q, k))
        k, v = (repeat(part) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if self.fused
            else by_scores(q, k, v)
        )
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """As a product of complex numbers, in float32."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(3).type_as(x)


def repeat(x: Tensor) -> Tensor:
    """Keys and values once for each query head."""
    batch, length, heads, head_dim = x.shape
    return (
        x[:, :, :, None]
        .expand(batch, length, heads, HEADS // KV_HEADS, head_dim)
        .reshape(batch, length, -1, head_dim)
    )


def by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    scores = (q @ k.transpose(-2, -1)) / HEAD_DIM**0.5
    scores = scores + torch.full((length, length), float("-inf"), device=q.device).triu(1)
    return F.softmax(scores.float(), dim=-1).type_as(q) @ v


class Model(nn.Module):
    def __init__(self, *, fused: bool, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(fused=fused) for _ in range(LAYERS))
        self.norm = Norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer(
            "rotation", torch.ones(length, HEAD_DIM // 2, dtype=torch.complex64), persistent=False
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def minimind_step(
    *,
    fused: bool = True,
    autocast: bool = True,
    distributed: bool = False,
    rows: int = ROWS,
    length: int = LENGTH,
) -> Prediction:
    """bfloat16 autocast over float32 weights, cross-entropy of whole logits without reduction and a mask, AdamW as it
    comes (foreach), gradients clipped and set to None. distributed: with the buckets of DistributedDataParallel, into
    which it copies the gradients."""

    def loop(model: nn.Module, device: torch.device) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        scaler = torch.amp.GradScaler("cuda")
        buckets = (
            [torch.empty_like(parameter) for parameter in model.parameters()] if distributed else []
        )

        def step() -> None:
            ids, targets, mask = (
                torch.ones((rows, length), dtype=torch.int64).to(device) for _ in range(3)
            )
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                logits = model(ids)
                losses = F.cross_entropy(
                    logits.view(-1, VOCABULARY), targets.view(-1), reduction="none"
                )
                loss = (losses.view(targets.shape) * mask).sum() / mask.sum()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        step.buckets = buckets  # type: ignore[attr-defined]  # they live as long as the step does
        return step

    return fitune.predict_loop(
        partial(Model, fused=fused, length=length), loop, gpu=CARD, num_steps=2
    )


LINES = (
    Line("fitune: logits in chunks, fused norms and AdamW, rows packed", own_step),
    Line("the same, all logits at once", lambda: own_step("loss=full"), 1),
    Line(
        "the same, AdamW with foreach", lambda: own_step("loss=full", "optim.name=adamw_foreach"), 2
    ),
    Line("minimind's layers, loss and loop, one card", minimind_step, 3),
    Line(
        "the same on two cards (DistributedDataParallel)",
        lambda: minimind_step(distributed=True),
        4,
    ),
    Line("the same in float32 throughout", lambda: minimind_step(autocast=False), 4),
    Line("the same without a fused attention kernel", lambda: minimind_step(fused=False), 4),
)


def formula_bytes(*, num_parameters: int = NUM_PARAMETERS) -> int:
    """A common estimate: the activations of Korthikanti et al. 2022 (arXiv 2205.05198, equation 2: a layer takes
    s b h (34 + 5 a s / h) bytes, those of the scores of attention included) and 16 bytes a parameter."""
    activations = LAYERS * LENGTH * ROWS * (34 * WIDTH + 5 * HEADS * LENGTH)
    return activations + 16 * num_parameters


# ---- the table ------------------------------------------------------------------------------------------------------


def table(predictions: Sequence[tuple[Line, Prediction]]) -> Iterator[str]:
    yield "| | step | allocated | reserved | device | allocated beside | at the peak, largest first |"
    yield "|---:|---|---:|---:|---:|---:|---|"
    for number, (line, prediction) in enumerate(predictions, start=1):
        allocated, more = prediction.peak_allocated_bytes, ""
        if line.base is not None:
            base = predictions[line.base - 1][1].peak_allocated_bytes
            more = f"{(allocated - base) / 2**30:+.2f} GiB to {line.base}"
        parts = sorted(prediction.categories.items(), key=lambda part: -part[1])[:3]
        named = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts)
        device = prediction.device_bytes or 0
        sizes = f"{allocated:,} | {prediction.peak_reserved_bytes:,} | {device:,}"
        yield f"| {number} | {line.what} | {sizes} | {more} | {prediction.peak_phase}: {named} GiB |"


def with_table(page: str, lines: Sequence[str]) -> str:
    """The page with the lines between its two marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return "\n".join((head + BEGIN, "", *lines, "", END + tail))


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    predictions = []
    for line in LINES:
        predictions.append((line, line.predict()))
        print(
            f"{line.what}: {predictions[-1][1].peak_allocated_bytes:,}", file=sys.stderr, flush=True
        )
    lines = [
        *table(predictions),
        "",
        f"The usual formula (34 s b h + 5 a s² b bytes a layer, 16 bytes a parameter) gives {formula_bytes():,}.",
    ]
    print("\n".join(lines))
    PAGE.write_text(with_table(PAGE.read_text(), lines))


if __name__ == "__main__":
    main()
