"""Fine-tunes a small chat model as many people's own trainers do: argparse, autocast, GradScaler, padded samples.

It wants its weights from ../out and its samples from ../dataset, logs every few steps and saves now and then.
"""

import argparse
import json
import math
import os
import random
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn, optim
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.attention = Attention(width, heads)
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        y = self.second(x)
        return x + self.dropout(self.down(functional.silu(self.gate(y)) * self.up(y)))


class ChatModel(nn.Module):
    def __init__(self, vocabulary, width, layers, heads, dropout):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
            )
        return logits, loss


class Conversations(Dataset):
    """Samples of a JSON lines file, each padded to the longest length."""

    def __init__(self, path, max_length):
        from datasets import load_dataset

        self.samples = load_dataset("json", data_files=path, split="train")
        self.max_length = max_length

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        ids, labels = [], []
        for message in self.samples[index]["conversations"]:
            part = list(message["content"].encode())
            ids += part
            labels += part if message["role"] == "assistant" else [-100] * len(part)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        padding = self.max_length - len(ids)
        return torch.tensor(ids + [0] * padding), torch.tensor(labels + [-100] * padding)


def set_seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.cuda.manual_seed_all(seed)
    torch.backends.cudnn.deterministic = True


def train_epoch(epoch):
    began = time.time()
    for step, (ids, labels) in enumerate(loader, start=1):
        ids, labels = ids.to(args.device), labels.to(args.device)
        rate = args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / len(loader))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with context:
            _, loss = model(ids, labels)
            loss = loss / args.accumulation_steps
        scaler.scale(loss).backward()
        if step % args.accumulation_steps == 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        if step % args.log_interval == 0:
            seen = loss.item() * args.accumulation_steps
            print(
                f"epoch {epoch} step {step} loss {seen:.4f} lr {rate:.2e} {time.time() - began:.1f} s"
            )
        if step % args.save_interval == 0:
            model.eval()
            path = f"{args.save_dir}/chat.pth"
            torch.save({k: v.half().cpu() for k, v in model.state_dict().items()}, path + ".tmp")
            os.replace(path + ".tmp", path)
            with open(f"{args.save_dir}/state.json", "w") as file:
                json.dump({"step": step}, file)
            model.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--save_dir", default="../out")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--accumulation_steps", type=int, default=1)
    parser.add_argument("--log_interval", type=int, default=1)
    parser.add_argument("--save_interval", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--data", default="../dataset/sft.jsonl")
    parser.add_argument("--from_weight", default="pretrain")
    parser.add_argument("--use_wandb", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    set_seed(42)
    os.makedirs(args.save_dir, exist_ok=True)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float16
    context = nullcontext() if args.device == "cpu" else torch.autocast("cuda", dtype=dtype)
    if args.use_wandb:
        import wandb

        wandb.init(project="chat")
    model = ChatModel(259, args.width, args.layers, args.width // 32, args.dropout)
    if args.from_weight != "none":
        weights = torch.load(f"{args.save_dir}/{args.from_weight}.pth", map_location=args.device)
        model.load_state_dict(weights, strict=False)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    model = model.to(args.device)
    if args.compile:
        model = torch.compile(model)
    samples = Conversations(args.data, args.max_length)
    loader = DataLoader(
        samples,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.num_workers,
        pin_memory=True,
    )
    scaler = torch.amp.GradScaler("cuda", enabled=args.dtype == "float16")
    optimizer = optim.AdamW(model.parameters(), lr=args.learning_rate)
    train_epoch(0)
