"""Pre-trains a GPT at module level, as many people's own scripts do: token files, evaluation first, accumulation.

Settings are globals that `--name=value` replaces.
"""

import math
import os
import sys
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional

out_dir, data_dir = "out", "data/corpus"
eval_interval, eval_iters = 100, 20
gradient_accumulation_steps, batch_size, block_size = 2, 4, 128
layers, heads, width, vocabulary, dropout = 2, 4, 128, 1024, 0.0
learning_rate, max_iters = 6e-4, 50
device, dtype, compile = "cuda", "bfloat16", False
for word in sys.argv[1:]:
    key, _, value = word.removeprefix("--").partition("=")
    kind = type(globals()[key])
    globals()[key] = value == "True" if kind is bool else kind(value)

os.makedirs(out_dir, exist_ok=True)
torch.manual_seed(1337)
torch.backends.cuda.matmul.allow_tf32 = True
device_type = "cuda" if "cuda" in device else "cpu"
half = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
context = nullcontext() if device_type == "cpu" else torch.amp.autocast(device_type, dtype=half)


def get_batch(split):
    data = np.memmap(os.path.join(data_dir, f"{split}.bin"), dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack(
        [torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts]
    )
    if device_type == "cuda":
        return (
            x.pin_memory().to(device, non_blocking=True),
            y.pin_memory().to(device, non_blocking=True),
        )
    return x.to(device), y.to(device)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.first(x)).split(width, dim=2)
        q, k, v = (p.view(batch, length, heads, -1).transpose(1, 2) for p in (q, k, v))
        y = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout if self.training else 0
        )
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, ids, targets):
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, functional.cross_entropy(logits.view(-1, vocabulary), targets.view(-1))


model = GPT()
model.to(device)
scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
decayed = [p for p in model.parameters() if p.dim() >= 2]
others = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
    lr=learning_rate,
    fused=device_type == "cuda",
)
if compile:
    model = torch.compile(model)


@torch.no_grad()
def estimate_loss():
    found = {}
    model.eval()
    for split in ("train", "val"):
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            x, y = get_batch(split)
            with context:
                _, loss = model(x, y)
            losses[k] = loss.item()
        found[split] = losses.mean()
    model.train()
    return found


x, y = get_batch("train")
began = time.time()
for step in range(max_iters):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / max_iters))
    if step % eval_interval == 0:
        found = estimate_loss()
        print(f"step {step}: train {found['train']:.4f}, val {found['val']:.4f}")
        torch.save({"model": model.state_dict(), "step": step}, os.path.join(out_dir, "last.pt"))
    for _ in range(gradient_accumulation_steps):
        with context:
            logits, loss = model(x, y)
            loss = loss / gradient_accumulation_steps
        x, y = get_batch("train")
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    seen = loss.item() * gradient_accumulation_steps
    print(f"step {step}: loss {seen:.4f}, {time.time() - began:.1f} s")
