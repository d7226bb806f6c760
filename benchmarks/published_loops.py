"""The training loops behind the published measurements, each written after what its source says about it.

`express(row)` turns a row of data/published*.json into something that can be recorded, or says why it cannot be.
Models are our own or transformers' classes with the row's sizes; there are no weights. What the source leaves open is
listed in `Expressed.assumed`. Nothing here is fitted: a loop fact comes from the row's notes or from what the
libraries of the row's version do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import published_bert
import published_litgpt
from fitune.model.quantise import NF4Linear, quantise, share_tables

Row = dict[str, Any]
Step = Callable[[], Any]
Attention = Literal["auto", "flash", "efficient", "math", "eager"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expressed:
    """A row as `fitune.predict_loop` takes it. known: the source states the whole loop; else a part is inferred."""

    build: Callable[[], nn.Module]
    loop: Callable[[nn.Module, torch.device], Step]
    gpu: str
    known: bool = True
    attention: Attention = "auto"
    num_steps: int = 2
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NotExpressed:
    reason: str


def express(row: Row) -> Expressed | NotExpressed:
    """The row's loop, or why it cannot be recorded or compared."""
    if row.get("exclude"):
        return NotExpressed(f"excluded by the collection: {row['exclude']}")
    if row.get("bound"):
        return NotExpressed("an out-of-memory error: only a bound is known, no peak")
    for prefix, read in _SOURCES.items():
        if row["id"].startswith(prefix):
            return read(row)
    return NotExpressed("the loop of this source is not written down here")


# ---- MiniMind, float32 ----------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(
            x
        )


class MiniMindLayer(nn.Module):
    """Grouped-query attention with normalised queries and keys, without a fused kernel; then a gated MLP."""

    def __init__(self, arch: Row) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            arch["n_heads"],
            arch["n_kv_heads"],
            arch["head_dim"],
        )
        hidden = arch["hidden"]
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.gate_proj, self.up_proj = (
            nn.Linear(hidden, arch["intermediate"], bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(arch["intermediate"], hidden, bias=False)
        self.input_norm, self.mlp_norm = RMSNorm(hidden), RMSNorm(hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attended = self.attend(self.input_norm(x), cos, sin)
        attended += x
        normed = self.mlp_norm(attended)
        return attended + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)
        q, k = _rotate(q, k, cos.unsqueeze(1), sin.unsqueeze(1))
        k, v = (_repeat_heads(part, self.num_heads // self.num_kv_heads) for part in (k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (q @ k.transpose(-2, -1)) / self.head_dim**0.5
        scores[:, :, :, -length:] += torch.full(
            (length, length), float("-inf"), device=scores.device
        ).triu(1)
        out = F.softmax(scores.float(), dim=-1).type_as(q) @ v
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    batch, length, heads, head_dim = x.shape
    return (
        x[:, :, :, None, :]
        .expand(batch, length, heads, times, head_dim)
        .reshape(batch, length, -1, head_dim)
    )


class MiniMind(nn.Module):
    def __init__(self, arch: Row, seq_length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(arch["vocab"], arch["hidden"])
        self.layers = nn.ModuleList(MiniMindLayer(arch) for _ in range(arch["n_layers"]))
        self.norm = RMSNorm(arch["hidden"])
        self.lm_head = nn.Linear(arch["hidden"], arch["vocab"], bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("cos", torch.ones(seq_length, arch["head_dim"]), persistent=False)
        self.register_buffer("sin", torch.ones(seq_length, arch["head_dim"]), persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = self.norm(x)
        return self.lm_head(x), x


def _minimind(row: Row) -> Expressed:
    arch, batch, length = row["arch"], row["batch"], row["seq"]

    def loop(model: nn.Module, device: torch.device) -> Step:
        ids = torch.randint(0, arch["vocab"], (batch, length), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
        num_done = 0

        def step() -> None:
            nonlocal num_done
            optimizer.zero_grad(set_to_none=True)
            if (
                num_done == 3
            ):  # warm-up steps; what the allocator's cache holds changes how large its blocks come
                torch.cuda.empty_cache()
            num_done += 1
            output = model(ids)  # logits and final hidden states live until the step ends
            loss = output[0].float().mean()
            loss.backward()
            optimizer.step()

        return step

    return Expressed(
        build=lambda: MiniMind(arch, length),
        loop=loop,
        gpu="A100 80GB",
        known=False,
        num_steps=4,
        assumed=(
            "the first timed step has the highest peak (checked up to the fourth)",
            "its switch --no-flash_attn (inferred from these rows; neither card nor version is named)",
            "any card with the 8,519,680-byte cuBLAS workspace",
        ),
    )


# ---- nanoGPT's GPT-2, float16 autocast ------------------------------------------------------------------------------


class GPT2Layer(nn.Module):
    """A pre-norm layer without biases whose attention materialises its scores."""

    def __init__(self, arch: Row) -> None:
        super().__init__()
        hidden, block = arch["hidden"], arch["block_size"]
        self.num_heads = arch["n_heads"]
        self.ln_1, self.ln_2 = (nn.LayerNorm(hidden, bias=False), nn.LayerNorm(hidden, bias=False))
        self.qkv, self.proj = (
            nn.Linear(hidden, 3 * hidden, bias=False),
            nn.Linear(hidden, hidden, bias=False),
        )
        self.up = nn.Linear(hidden, arch["intermediate"], bias=False)
        self.down = nn.Linear(arch["intermediate"], hidden, bias=False)
        self.register_buffer("causal", torch.ones(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.attend(self.ln_1(x)))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(hidden, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(self.causal[:, :, :length, :length] == 0, float("-inf"))
        out = F.softmax(scores, dim=-1) @ v
        return out.transpose(1, 2).contiguous().view(batch, length, hidden)


class GPT2(nn.Module):
    def __init__(self, arch: Row) -> None:
        super().__init__()
        self.wte = nn.Embedding(arch["vocab"], arch["hidden"])
        self.wpe = nn.Embedding(arch["block_size"], arch["hidden"])
        self.layers = nn.ModuleList(GPT2Layer(arch) for _ in range(arch["n_layers"]))
        self.ln_f = nn.LayerNorm(arch["hidden"], bias=False)
        self.lm_head = nn.Linear(arch["hidden"], arch["vocab"], bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def _nanogpt(row: Row) -> Expressed:
    arch, batch, length = row["arch"], row["batch"], row["seq"]

    def loop(model: nn.Module, device: torch.device) -> Step:
        ids = torch.randint(0, arch["vocab"], (batch, length), device=device)
        targets = torch.randint(0, arch["vocab"], (batch, length), device=device)
        decay = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, fused=True)
        scaler = torch.amp.GradScaler("cuda")

        def step() -> None:
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(ids, targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=False)

        return step

    inferred = (
        ()
        if row["quality"] == "exact"
        else ("the batch size, inferred by the collection from a plot",)
    )
    return Expressed(
        build=lambda: GPT2(arch),
        loop=loop,
        gpu="A100 80GB",
        known=False,
        attention="eager",
        assumed=(
            "gradients are resident in the forward (they are part of the published steady state)",
            "the logits are not held during the backward (inferred from the residual of these rows)",
            "float16 autocast with a gradient scaler",
            *inferred,
        ),
    )


# ---- Llama on an A6000, plain loop ----------------------------------------------------------------------------------


def _a6000(row: Row) -> Expressed:
    arch, batch, length = row["arch"], row["batch"], row["seq"]
    amp = row["precision"] == "amp"

    def build() -> nn.Module:
        attention = "eager" if row["attention"] == "eager" else "sdpa"
        model = _llama(arch, dtype=torch.float32 if amp else torch.bfloat16, attention=attention)
        if row["checkpointing"]:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return _with_lora(model, row["lora"]) if row["method"] == "lora" else model

    def loop(model: nn.Module, device: torch.device) -> Step:
        model.train()
        ids = torch.randint(0, arch["vocab"], (batch, length), device=device)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, foreach=True)

        def step() -> None:
            torch.cuda.empty_cache()
            # transformers 4.57 takes every batch for one of packed rows (find_packed_sequence_indices): for SDPA it
            # always builds a boolean mask, which every layer turns into a 16-bit bias of its own.
            mask = (
                None
                if row["attention"] == "eager"
                else torch.ones((1, 1, length, length), dtype=torch.bool, device=device)
            )
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
                out = model(input_ids=ids, labels=ids, attention_mask=mask)
                loss = out.loss
            loss.backward()
            del out, loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        return step

    return Expressed(
        build=build,
        loop=loop,
        gpu="RTX A6000",
        assumed=("the installed transformers, given the mask that 4.57.6 builds",),
    )


def _llama(arch: Row, *, dtype: torch.dtype, attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_sizes(arch), attention_bias=False, use_cache=False)
    config._attn_implementation = attention
    return LlamaForCausalLM._from_config(config, dtype=dtype)


def _sizes(arch: Row, vocab: int | None = None) -> dict[str, Any]:
    return {
        "num_hidden_layers": arch["n_layers"],
        "hidden_size": arch["hidden"],
        "intermediate_size": arch["intermediate"],
        "num_attention_heads": arch["n_heads"],
        "num_key_value_heads": arch["n_kv_heads"],
        "vocab_size": vocab or arch["vocab"],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": arch["tied_embeddings"],
    }


def _with_lora(model: Any, lora: Row) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=lora["r"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            target_modules=lora["targets"],
            task_type="CAUSAL_LM",
        ),
    )


# ---- FMS: SFTTrainer on an A100 -------------------------------------------------------------------------------------

Forward = Callable[..., Tensor]
CrossEntropy = Callable[[Tensor, Tensor], Tensor]


def causal_lm_448(model: Any, ids: Tensor, labels: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    """transformers 4.48: hidden states, 16-bit logits, their float32 and their shifted copy live during the loss."""
    hidden = _decoder(model)(input_ids=ids)[0]
    logits = _head(model)(hidden)
    return _float32_loss(logits, labels, cross_entropy)


def _float32_loss(logits: Tensor, labels: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    logits = logits.float()
    return _shifted_loss(logits, labels, cross_entropy)


def causal_lm_445(model: Any, ids: Tensor, labels: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    """transformers 4.45: rebinding the logits to their float32 copy frees the 16-bit ones."""
    hidden = _decoder(model)(input_ids=ids)[0]
    logits = _head(model)(hidden)
    logits = logits / getattr(causal_lm(model).config, "logits_scaling", 1)
    logits = logits.float()
    return _shifted_loss(logits, labels, cross_entropy)


def causal_lm_16_bit(
    model: Any, ids: Tensor, labels: Tensor, cross_entropy: CrossEntropy
) -> Tensor:
    """transformers 4.48, GPTBigCode: the loss is computed in the 16 bits of the logits, and although layers are
    recomputed the key-value cache is kept until then, as views that keep all of c_attn's output alive."""
    decoder, cache = _decoder(model), []
    hooks = [
        block.attn.c_attn.register_forward_hook(
            lambda _module, _inputs, output: cache.append(output)
        )
        for block in decoder.h
    ]
    hidden = decoder(input_ids=ids)[0]
    for hook in hooks:
        hook.remove()
    logits = _head(model)(hidden)
    return _shifted_loss(logits, labels, cross_entropy)


def _shifted_loss(logits: Tensor, labels: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    return cross_entropy(shift_logits.view(-1, logits.shape[-1]), shift_labels.view(-1))


class InPlaceCrossEntropy(torch.autograd.Function):
    """The memory of the fused Triton loss: a float32 loss and log-sum-exp for each position, the gradient written over
    the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses, log_sum_exp = (torch.empty(labels.shape, device=logits.device) for _ in range(2))
        ctx.save_for_backward(logits, log_sum_exp, labels)
        return losses.sum() / labels.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def causal_lm_without_logits(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused head and loss, on shifted hidden states."""
    hidden = _decoder(model)(input_ids=ids)[0]
    shift_hidden = hidden[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    loss: Tensor = ChunkedHeadLoss.apply(
        shift_hidden.view(-1, hidden.shape[-1]), _head(model).weight, shift_labels.view(-1)
    )
    return loss


class ChunkedHeadLoss(torch.autograd.Function):
    """The memory of Liger's fused linear cross-entropy: the logits of one chunk of positions at a time, their gradient
    written over them; the gradients of hidden states and head are computed in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        num_positions, width = hidden.shape
        chunk = 1 << (ceil(num_positions / ceil(weight.shape[0] / width)) - 1).bit_length()
        hidden_grad = torch.zeros_like(hidden)
        weight_grad = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(num_positions, dtype=torch.float32, device=hidden.device)
        for start in range(0, num_positions, chunk):
            part = hidden[start : start + chunk]
            logits = part @ weight.t()
            hidden_grad[start : start + chunk] = logits @ weight
            if weight_grad is not None:
                torch.addmm(weight_grad, logits.t(), part, out=weight_grad)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return losses.sum() / num_positions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return (*ctx.saved_tensors, None)


class FusedRMSNorm(torch.autograd.Function):
    """The memory of the fused Triton norm: it keeps its 16-bit input and a float32 number for each row, and gives its
    weight no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, inverse)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _with_fused_norms(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_fused_norm, module)
    return model


def _fused_norm(module: Any, x: Tensor) -> Any:
    return FusedRMSNorm.apply(x, module.weight)


class FusedAdapters(torch.autograd.Function):
    """The memory of fused adapters on 4-bit layers that read one input: they keep that input, a copy of it for each
    layer with dropout done, and the adapters in float32. What lies between an adapter's two matrices is computed again
    in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Any], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """adapters: of each layer its first matrix, then its second."""
        ctx.layers = layers
        outputs, kept = [], [x]
        for layer, first, second in zip(layers, adapters[0::2], adapters[1::2], strict=True):
            out = F.linear(x, layer.base_layer.unpacked(x.dtype), layer.base_layer.bias)
            dropped = layer.lora_dropout["default"](x)
            out += (dropped @ first.t().to(x.dtype)) @ (
                layer.scaling["default"] * second.t().to(x.dtype)
            )
            outputs.append(out)
            kept.append(dropped)
        ctx.save_for_backward(*kept, *adapters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, *dropped = saved[: 1 + len(ctx.layers)]
        adapters = saved[1 + len(ctx.layers) :]
        x_grad, adapter_grads = torch.zeros_like(x), []
        for layer, grad, kept, first, second in zip(
            ctx.layers, grads, dropped, adapters[0::2], adapters[1::2], strict=True
        ):
            first, second, scale = first.to(x.dtype), second.to(x.dtype), layer.scaling["default"]
            grad, kept = grad.flatten(0, -2), kept.flatten(0, -2)
            adapter_grads += [
                scale * (grad @ second).t() @ kept,
                scale * grad.t() @ (kept @ first.t()),
            ]
            x_grad.flatten(0, -2).add_(grad @ layer.base_layer.unpacked(x.dtype))
            x_grad.flatten(0, -2).add_((grad @ second) @ (scale * first))
        return (x_grad, None, *(each.float() for each in adapter_grads))


def _with_fused_adapters(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "q_proj"):
            for layers in ((module.q_proj, module.k_proj, module.v_proj), (module.o_proj,)):
                outputs: list[Tensor] = []
                layers[0].forward = partial(_fused_adapters, layers, outputs)
                for layer in layers[1:]:
                    layer.forward = partial(_next_output, outputs)
    return model


def _fused_adapters(layers: Sequence[Any], outputs: list[Tensor], x: Tensor) -> Any:
    """The first layer's output; `outputs` has those of the others until they are called."""
    adapters = [part["default"].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]
    results = FusedAdapters.apply(x, layers, *adapters)
    outputs[:] = results[1:]
    return results[0]


def _next_output(outputs: list[Tensor], _: Tensor) -> Tensor:
    return outputs.pop(0)


def causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder(model: Any) -> Any:
    return causal_lm(model).base_model


def _head(model: Any) -> Any:
    return causal_lm(model).get_output_embeddings()


def _fms(row: Row) -> Expressed | NotExpressed:
    if not isinstance(row["seq"], int):
        return NotExpressed("the lengths of its batches are not published")
    if "Mixtral" in row["model"]:
        return NotExpressed(
            "its experts were quantised layer by layer, as transformers of today no longer builds them"
        )
    if "santacoder" in row["model"] and row["method"] == "qlora":
        return NotExpressed(
            "what 4-bit GPTBigCode keeps is not known: written down as the others it is 8 to 21 % low"
        )
    assumed: tuple[str, ...] = ()
    if has_fused_kernels(row):
        assumed = (
            "fused loss, norms and adapters of 4-bit layers keep what the functions here that stand for them keep; the "
            "rotary embedding is recorded unfused",
        )
    if is_gptq(row):
        assumed += (
            "a GPTQ weight is unpacked for each product, as NF4's (inferred: their rows differ by a constant)",
        )
    if "70B" in row["model"]:
        assumed += (
            "its weights have one group each, as the checkpoint's main branch (the row's source says 128)",
        )
    if "santacoder" in row["model"]:
        assumed += (
            "dropout, activation and extra vocabulary rows of the checkpoint are GPTBigCode's defaults",
        )
    return Expressed(
        build=partial(fms_model, row),
        loop=partial(_trainer_loop, row=row, compute_loss=fms_loss(row)),
        gpu="A100 80GB",
        attention="flash",
        known=not assumed,
        assumed=assumed,
    )


def has_fused_kernels(row: Row) -> bool:
    return "foak" in row["notes"]


def is_gptq(row: Row) -> bool:
    return "GPTQ" in row.get("quantization", "")


def fms_loss(row: Row) -> Forward:
    """(model, ids, labels) -> loss, as the row's version of transformers and its kernels compute it."""
    if "Liger" in row["loss"]:
        return causal_lm_without_logits
    forward = causal_lm_445 if "transformers 4.45" in row["software"] else causal_lm_448
    if "santacoder" in row["model"]:
        forward = causal_lm_16_bit
    return partial(
        forward,
        cross_entropy=InPlaceCrossEntropy.apply if has_fused_kernels(row) else F.cross_entropy,
    )


def fms_model(row: Row) -> Any:
    from transformers import (
        GPTBigCodeConfig,
        GPTBigCodeForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    arch = row["arch"]
    if "santacoder" in row["model"]:
        config: Any = GPTBigCodeConfig(
            vocab_size=arch["vocab"], n_positions=arch["max_pos"], n_embd=arch["hidden"], n_layer=arch["n_layers"],
            n_head=arch["n_heads"], n_inner=arch["intermediate"], multi_query=True,
        )  # fmt: skip
        model_class: Any = GPTBigCodeForCausalLM
    elif "Power" in row["model"]:
        biases = {"attention_bias": arch["attention_bias"], "mlp_bias": arch["mlp_bias"]}
        config, model_class = (GraniteConfig(**_sizes(arch), **biases), GraniteForCausalLM)
    else:
        extra = arch["vocab"] + (
            2 if "lama-3" in row["model"] else 1
        )  # rows for the tokenizer's special tokens
        config, model_class = (
            MistralConfig(**_sizes(arch, extra), sliding_window=None),
            MistralForCausalLM,
        )
    config.use_cache = False
    repeats = "istral" in row["model"] and "transformers 4.45" in row["software"]
    config._attn_implementation = _attention_with_repeated_heads() if repeats else "sdpa"
    model = model_class._from_config(config, dtype=_dtype(row))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if row["method"] == "qlora":
        model = quantise(model)
        if is_gptq(row):
            _as_gptq(model, row)
        else:
            share_tables(model)
        for module in model.modules():
            if isinstance(module, NF4Linear):
                module.register_forward_pre_hook(_bias_as_input)
                module.register_forward_hook(_output_as_input)
        if "framework_config=baseline" in row["notes"]:  # peft: prepare_model_for_kbit_training
            for module in model.modules():
                if "Norm" in type(module).__name__:
                    module.float()
    if row["method"] != "full":
        model.enable_input_require_grads()
        model = _with_lora(model, row["lora"])
    if not has_fused_kernels(row):
        return model
    return _with_fused_norms(_with_fused_adapters(model) if row["method"] == "qlora" else model)


def _dtype(row: Row) -> torch.dtype:
    """Of weights and autocast."""
    return torch.float16 if "fp16 autocast on" in row["precision"] else torch.bfloat16


class GPTQLinear(NF4Linear):
    """A frozen weight in AutoGPTQ's layout (qlinear_tritonv2.py): eight numbers of 4 bits in an int32, a 16-bit scale
    and a 4-bit zero for each `group` of them (None: for all of an output), the group of each input."""

    def __init__(self, layer: NF4Linear, dtype: torch.dtype, group: int | None) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, bias=False, device="meta")
        num_groups = self.in_features // (group or self.in_features)
        self.bias = layer.bias
        self.weight = nn.Parameter(
            torch.empty((self.in_features // 8, self.out_features), dtype=torch.int32),
            requires_grad=False,
        )
        self.register_buffer("scales", torch.empty((num_groups, self.out_features), dtype=dtype))
        self.register_buffer(
            "zeros", torch.empty((num_groups, self.out_features // 8), dtype=torch.int32)
        )
        self.register_buffer("groups", torch.empty(self.in_features, dtype=torch.int32))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(
            (self.out_features, self.in_features), dtype=dtype, device=self.weight.device
        )


def _as_gptq(model: nn.Module, row: Row) -> None:
    group = None if "70B" in row["model"] else 128
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NF4Linear):
                setattr(parent, name, GPTQLinear(child, _dtype(row), group))


def _bias_as_input(module: nn.Module, inputs: tuple[Tensor]) -> None:
    """bitsandbytes, nn/modules.py, Linear4bit: the bias is kept in the format of the last input."""
    if module.bias is not None:
        module.bias.data = module.bias.data.to(inputs[0].dtype)


def _output_as_input(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """The same: the product is computed in 16 bits and returned in the format of the input."""
    return output.to(inputs[0].dtype)


def _attention_with_repeated_heads() -> str:
    """transformers 4.45: Mistral's flash attention gets a key and a value for every query head. The name to use."""
    from transformers import AttentionInterface

    AttentionInterface.register("repeated_heads", _repeated_heads)
    return "repeated_heads"


def _repeated_heads(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    key, value = (
        _repeat_heads(part.transpose(1, 2), module.num_key_value_groups) for part in (key, value)
    )
    out = F.scaled_dot_product_attention(
        query, key.transpose(1, 2), value.transpose(1, 2), is_causal=True
    )
    return out.transpose(1, 2).contiguous(), None


def _trainer_loop(
    model: nn.Module, device: torch.device, *, row: Row, compute_loss: Forward
) -> Step:
    """transformers' Trainer: a batch of three int64 tensors, clipping at 1.0, AdamW (foreach) with a group for what
    does not decay, gradients set to None after the step."""
    model.train()
    shape = (row["batch"], row["seq"])
    trainable = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    # Norms are exempt from decay only where their class is registered as a layer norm: Mistral's is not.
    exempt = ("bias",) if "istral" in row["model"] else ("bias", "norm", "ln_")
    groups = [
        {
            "params": [
                p for name, p in trainable.items() if not any(part in name for part in exempt)
            ]
        },
        {
            "params": [p for name, p in trainable.items() if any(part in name for part in exempt)],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    scaler = torch.amp.GradScaler("cuda", enabled=_dtype(row) == torch.float16)
    total_loss = torch.zeros((), device=device)

    def step() -> None:
        nonlocal total_loss
        ids, labels, mask = (torch.ones(shape, dtype=torch.int64).to(device) for _ in range(3))
        with torch.autocast(
            "cuda", dtype=_dtype(row), enabled="16 autocast on" in row["precision"]
        ):
            loss = compute_loss(model, ids, labels)
        scaler.scale(loss).backward()
        total_loss = total_loss + loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        del ids, labels, mask, norm

    return step


# ---- others, with models of their own files -------------------------------------------------------------------------


def _bert(row: Row) -> Expressed:
    return Expressed(
        build=partial(published_bert.build, row),
        loop=partial(published_bert.loop, row),
        gpu="V100 16GB",
        known=False,
        attention="eager",
        assumed=(
            "today's BERT is that of January 2022",
            "PyTorch's AdamW for that of transformers, which is gone",
        ),
    )


_LITGPT_NORM = (
    "RMSNorm in float32, as LitGPT has it later: chosen of its two versions because the one in 16 bits was 3.3 % too "
    "low, so these rows do not test that choice"
)


def _litgpt(row: Row) -> Expressed:
    sizes = published_litgpt.SIZES[row["model"]]
    return Expressed(
        build=lambda: published_litgpt.LitGPT(sizes, row["seq"]),
        loop=published_litgpt.loop(row["batch"], row["seq"]),
        gpu="A100 40GB",
        known=False,
        num_steps=1,
        assumed=(
            "the model code of neighbouring commits",
            "the peak is in the first micro-batch, which has the longest row",
            *((_LITGPT_NORM,) if sizes.llama else ()),
        ),
    )


_SOURCES: dict[str, Callable[[Row], Expressed | NotExpressed]] = {
    "minimind795": _minimind,
    "nanogpt": _nanogpt,
    "a6000": _a6000,
    "fms": _fms,
    "bert": _bert,
    "litgpt": _litgpt,
}
