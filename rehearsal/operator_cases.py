# mypy: disable-error-code="misc, assignment, arg-type, return-value"
# ruff: noqa: E501, E731, RUF100
# A table: mypy infers no lambda with defaults, and a row on one line reads best.
"""The operators that training steps use, each with shapes, dtypes and layouts at which a kernel changes its ways."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

F32, F16, BF16, I64, BOOL = torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool
SHORT = {F32: "f32", F16: "f16", BF16: "bf16", I64: "i64", BOOL: "bool"}
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """prepare(device): makes the inputs and returns the call that is looked at."""

    operator: str
    name: str
    prepare: Callable[[torch.device], Step]


def _plain(
    operator: str, name: str, make: Callable[[torch.device], Any], call: Callable[..., Any]
) -> Case:
    """`call` with what `make` returns."""

    def prepare(device: torch.device) -> Step:
        inputs = make(device)

        def step() -> None:
            call(*inputs)

        return step

    return Case(operator, f"{operator} {name}", prepare)


def _trained(
    operator: str, name: str, make: Callable[[torch.device], Any], call: Callable[..., Any]
) -> Case:
    """The same with its backward: the gradients of all inputs that need one."""

    def prepare(device: torch.device) -> Step:
        inputs = make(device)
        wanted = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
        with torch.no_grad():
            grad = torch.zeros_like(call(*inputs))

        def step() -> None:
            out = call(*inputs)
            grads = torch.autograd.grad(out, wanted, grad)
            del out
            del grads

        return step

    return Case(operator, f"{operator} {name}, backward", prepare)


def _tensor(
    shape: Any, dtype: torch.dtype, device: torch.device, *, layout: str = "", grad: bool = False
) -> Tensor:
    """layout: transposed in its last two dims, offset by one element, or a slice of wider rows."""
    if layout == "transposed":
        made = torch.empty(
            (*shape[:-2], shape[-1], shape[-2]), dtype=dtype, device=device
        ).transpose(-1, -2)
    elif layout == "offset":
        size = 1
        for each in shape:
            size *= each
        made = torch.empty(size + 1, dtype=dtype, device=device)[1:].view(shape)
    elif layout == "sliced":
        made = torch.empty((*shape[:-1], shape[-1] + 24), dtype=dtype, device=device)[
            ..., : shape[-1]
        ]
    elif layout == "expanded":
        made = torch.empty((1, *shape[1:]), dtype=dtype, device=device).expand(shape)
    else:
        made = torch.empty(shape, dtype=dtype, device=device)
    return made.requires_grad_() if grad else made


# ---- reductions ------------------------------------------------------------------------------------------------------

_REDUCED = [
    *(((rows, width), dims) for rows in (64, 1000, 8192, 65536) for width in (64, 768, 1000, 4096)
      for dims in ((0,), (1,), None)),
    *(((rows, width), (0,)) for rows in (512, 5000) for width in (1, 2, 6, 33, 128, 512, 1024, 2304, 11008)),
    *(((rows, width), (1,)) for rows in (1, 3, 16, 300) for width in (32, 127, 128, 50257, 151936)),
    *(((size,), None) for size in (1, 100, 4096, 65536, 65537, 1000003, 8388608, 33554432)),
    *(((4, 512, 768), dims) for dims in ((0, 1), (0,), (1,), (2,), (0, 2), (1, 2), None)),
    *(((2, 8, 512, 64), dims) for dims in ((0, 1), (0, 2), (0, 1, 2), (2,), (1,), (3,), (2, 3), (1, 3))),
    *(((3, 4096, 1024), dims) for dims in ((0, 1), (1,), (0, 2))),
    *(((1, 2048, 4096), dims) for dims in ((0, 1), (0,))),
    *(((1, 4, 4096, 4096), (0, 1)),),
]  # fmt: skip


def _sizes(shape: Any, dims: Any) -> str:
    return f"{'x'.join(map(str, shape))} over {'all' if dims is None else ','.join(map(str, dims))}"


def _reductions() -> Iterator[Case]:
    def reduce(
        name: str, call: Any, dtypes: Any, *, every: int = 1, layouts: Any = ("",)
    ) -> Iterator[Case]:
        for dtype, layout in product(dtypes, layouts):
            for shape, dims in _REDUCED[::every]:
                if layout == "transposed" and len(shape) < 2:
                    continue
                yield _plain(
                    name, f"{_sizes(shape, dims)} {SHORT[dtype]} {layout}".strip(),
                    lambda device, shape=shape, dims=dims, dtype=dtype, layout=layout: (
                        _tensor(shape, dtype, device, layout=layout), dims), call,
                )  # fmt: skip

    def over(call: Any) -> Any:
        return lambda x, dims: call(x) if dims is None else call(x, dims)

    def one(call: Any) -> Any:
        return lambda x, dims: call(x) if dims is None else call(x, dims[0])

    yield from reduce("sum", over(torch.sum), (F32, BF16))
    yield from reduce(
        "sum", over(torch.sum), (F32, BF16), every=4, layouts=("transposed", "sliced", "offset")
    )
    yield from reduce("sum", over(torch.sum), (F16, I64, BOOL), every=3)
    yield from reduce(
        "sum to float32", lambda x, dims: torch.sum(x, dims, dtype=F32), (BF16, F16), every=2
    )
    yield from reduce(
        "sum keepdim", lambda x, dims: torch.sum(x, dims, keepdim=True), (BF16, F32), every=3
    )
    yield from reduce("mean", over(torch.mean), (F32, BF16), every=2, layouts=("", "transposed"))
    yield from reduce(
        "amax", lambda x, dims: torch.amax(x, () if dims is None else dims), (F32, BF16), every=2
    )
    yield from reduce(
        "amin", lambda x, dims: torch.amin(x, () if dims is None else dims), (F32, I64), every=3
    )
    yield from reduce("max", one(torch.max), (F32, BF16, I64), every=2)
    yield from reduce("argmax", one(torch.argmax), (F32, BF16), every=2)
    yield from reduce(
        "vector_norm",
        lambda x, dims: torch.linalg.vector_norm(x, 2, dims),
        (F32, BF16, F16),
        every=2,
    )
    yield from reduce(
        "vector_norm inf",
        lambda x, dims: torch.linalg.vector_norm(x, float("inf"), dims),
        (F32,),
        every=3,
    )
    yield from reduce(
        "vector_norm 1", lambda x, dims: torch.linalg.vector_norm(x, 1, dims), (BF16,), every=3
    )
    yield from reduce(
        "norm to float32", lambda x, dims: torch.linalg.vector_norm(x, 2, dims, dtype=F32), (BF16,), every=3)  # fmt: skip
    yield from reduce("var_mean", lambda x, dims: torch.var_mean(x, dims), (F32, BF16), every=2)
    yield from reduce("var", lambda x, dims: torch.var(x, dims), (F32,), every=3)
    yield from reduce("all", over(torch.all), (BOOL,), every=2)
    yield from reduce("any", over(torch.any), (BOOL,), every=3)
    yield from reduce("isfinite all", lambda x, _: torch.isfinite(x).all(), (F32, BF16), every=4)
    yield from reduce(
        "logsumexp",
        lambda x, dims: torch.logsumexp(x, (0,) if dims is None else dims),
        (F32, BF16),
        every=3,
    )
    yield from reduce("count_nonzero", over(torch.count_nonzero), (F32, BOOL), every=4)
    yield from reduce("aminmax", lambda x, _: torch.aminmax(x), (F32,), every=5)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(
    name: str, call: Any, *, dtype: torch.dtype, shape: tuple[int, ...], kv_heads: int, backend: Any = None,
    mask: Any = None, trained: bool = True, by_head: bool = False,
) -> Case:  # fmt: skip
    """shape: batch, heads, positions of the queries and of the keys, size of a head. Heads are views of flat rows, or
    each lies for itself."""
    batch, heads, num_queries, num_keys, head = shape

    def prepare(device: torch.device) -> Step:
        def rows(length: int, number: int) -> Tensor:
            if by_head:
                return torch.empty(
                    batch, number, length, head, dtype=dtype, device=device, requires_grad=trained
                )
            made = torch.empty(batch, length, number, head, dtype=dtype, device=device)
            return made.transpose(1, 2).requires_grad_(trained)

        inputs = rows(num_queries, heads), rows(num_keys, kv_heads), rows(num_keys, kv_heads)
        bias = None if mask is None else mask(device)
        grad = torch.empty(batch, num_queries, heads, head, dtype=dtype, device=device).transpose(
            1, 2
        )

        def step() -> None:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                out = call(*inputs, bias)
            if trained:
                grads = torch.autograd.grad(out, inputs, grad)
                del out
                del grads

        return step

    return Case("attention", f"attention {name}{'' if trained else ', forward alone'}", prepare)


def _attentions() -> Iterator[Case]:
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
                "cudnn": SDPBackend.CUDNN_ATTENTION}  # fmt: skip

    def causal(gqa: bool, dropout: float = 0.0, is_causal: bool = True) -> Any:
        return lambda q, k, v, _: F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, dropout_p=dropout, enable_gqa=gqa)  # fmt: skip

    def masked(gqa: bool) -> Any:
        return lambda q, k, v, mask: F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=gqa
        )

    for dtype, (batch, heads, kv), length, head in product(
        (BF16, F32, F16),
        ((2, 8, 8), (1, 8, 2), (2, 8, 1)),
        (1, 100, 512),
        (32, 64, 80, 96, 128, 160, 200, 256),
    ):
        if (length == 1 and head != 64) or (length == 100 and head not in (64, 80)):
            continue
        yield _attention(
            f"{SHORT[dtype]} B{batch} H{heads}/{kv} S{length} D{head}", causal(heads != kv),
            dtype=dtype, shape=(batch, heads, length, length, head), kv_heads=kv,
        )  # fmt: skip
    for dtype, (name, backend), kv, head in product(
        (BF16, F32, F16), backends.items(), (8, 2), (64, 72, 128, 192)
    ):
        yield _attention(
            f"{name} {SHORT[dtype]} H8/{kv} S300 D{head}", causal(kv != 8), dtype=dtype,
            shape=(2, 8, 300, 300, head), kv_heads=kv, backend=backend,
        )  # fmt: skip
    for dtype, kv, head in product((BF16, F32, F16), (8, 2), (30, 33, 60, 64, 66, 128)):
        yield _attention(
            f"plain {SHORT[dtype]} H8/{kv} S256 D{head}", causal(kv != 8, is_causal=False), dtype=dtype,
            shape=(2, 8, 256, 256, head), kv_heads=kv,
        )  # fmt: skip
    for dtype, dropout, head in product((BF16, F32), (0.1, 0.125), (64, 80, 128, 256)):
        yield _attention(
            f"dropout {dropout} {SHORT[dtype]} D{head}", causal(False, dropout), dtype=dtype,
            shape=(2, 8, 256, 256, head), kv_heads=8,
        )  # fmt: skip
    for dtype, kind, kv, length in product(
        (BF16, F32), ("bool", "same", "f32", "broad"), (8, 2), (256, 300)
    ):
        made = BOOL if kind == "bool" else F32 if kind == "f32" else dtype
        lead = (1, 1) if kind == "broad" else (2, 1)
        yield _attention(
            f"mask {kind} {SHORT[dtype]} H8/{kv} S{length}", masked(kv != 8), dtype=dtype,
            shape=(2, 8, length, length, 64), kv_heads=kv,
            mask=lambda device, made=made, lead=lead, length=length: torch.empty(
                (*lead, length, length), dtype=made, device=device),
        )  # fmt: skip
    for dtype, (queries, keys) in product((BF16, F32), ((128, 256), (1, 256), (256, 1))):
        yield _attention(
            f"{queries} queries {keys} keys {SHORT[dtype]}", causal(False, is_causal=False), dtype=dtype,
            shape=(2, 8, queries, keys, 64), kv_heads=8,
        )  # fmt: skip
    for dtype, (name, backend), kv in product((BF16, F32), backends.items(), (8, 2)):
        yield _attention(
            f"{name} by head {SHORT[dtype]} H8/{kv} S256 D64", causal(kv != 8), dtype=dtype,
            shape=(2, 8, 256, 256, 64), kv_heads=kv, backend=backend, by_head=True,
        )  # fmt: skip
    for dtype, kv, head in product((BF16, F32, F16), (8, 2), (64, 128, 256)):
        yield _attention(
            f"{SHORT[dtype]} H8/{kv} S512 D{head}", causal(kv != 8), dtype=dtype, shape=(2, 8, 512, 512, head),
            kv_heads=kv, trained=False,
        )  # fmt: skip


def _varlen() -> Iterator[Case]:
    from torch.nn.attention.varlen import varlen_attn

    for dtype, kv, (tokens, rows), head in product(
        (BF16, F16), (8, 2), ((1000, 3), (4096, 9)), (64, 128)
    ):

        def make(
            device: Any,
            dtype: Any = dtype,
            kv: int = kv,
            tokens: int = tokens,
            rows: int = rows,
            head: int = head,
        ) -> Any:
            bounds = torch.arange(0, rows + 1, dtype=torch.int32, device=device)
            return (
                *(_tensor((tokens, number, head), dtype, device, grad=True) for number in (8, kv, kv)), bounds, tokens // 2)  # fmt: skip

        def call(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
            more = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
            return varlen_attn(
                q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), **more
            )

        yield _trained(
            "varlen_attn", f"{SHORT[dtype]} H8/{kv} T{tokens} rows{rows} D{head}", make, call
        )


# ---- what models are made of -----------------------------------------------------------------------------------------


def _layers() -> Iterator[Case]:
    floats = (F32, BF16, F16)
    rows = ((512, 768), (4096, 1024), (1000, 1000), (65536, 512), (2, 4096))
    for vocab, tokens, dtype in product(
        (100, 6400, 151936), (512, 3072, 3073, 4096, 8192, 20000), (F32, BF16)
    ):
        yield _trained(
            "embedding", f"{tokens} of {vocab} {SHORT[dtype]}",
            lambda device, vocab=vocab, tokens=tokens, dtype=dtype: (
                torch.empty(tokens, dtype=I64, device=device), _tensor((vocab, 64), dtype, device, grad=True)),
            F.embedding,
        )  # fmt: skip
    for dtype, shape in product(floats, rows):
        one = lambda device, shape=shape, dtype=dtype: (_tensor(shape, dtype, device, grad=True),)  # noqa: E731
        weighted = lambda device, shape=shape, dtype=dtype: (
            _tensor(shape, dtype, device, grad=True),
            *(_tensor(shape[-1:], dtype, device, grad=True) for _ in range(2)),
        )
        name = f"{'x'.join(map(str, shape))} {SHORT[dtype]}"
        yield _trained("layer_norm", name, weighted, lambda x, w, b: F.layer_norm(x, w.shape, w, b))
        yield _trained("rms_norm", name, lambda device, make=weighted: make(device)[:2],
                       lambda x, w: F.rms_norm(x, w.shape, w))  # fmt: skip
        yield _trained("softmax", name, one, lambda x: x.softmax(-1))
        yield _trained("softmax over rows", name, one, lambda x: x.softmax(0))
        yield _trained("log_softmax", name, one, lambda x: x.log_softmax(-1))
        yield _trained("softmax in float32", name, one, lambda x: F.softmax(x, -1, dtype=F32))
        yield _trained("gelu", name, one, F.gelu)
        yield _trained("gelu tanh", name, one, lambda x: F.gelu(x, approximate="tanh"))
        yield _trained("silu", name, one, F.silu)
        yield _trained("dropout", name, one, lambda x: F.dropout(x, 0.1))
        yield _trained("cumsum", name, one, lambda x: x.cumsum(-1))
        yield _trained(
            "rotary halves",
            name,
            one,
            lambda x: torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1),
        )
        yield _trained(
            "variance norm",
            name,
            one,
            lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
        )
        yield _trained("logsumexp", name, one, lambda x: x.logsumexp(-1))
        yield _trained("bias sum", name, weighted, lambda x, w, b: (x + b) * w)
    for dtype, (tokens, vocab), smoothing in product(
        floats, ((512, 6400), (2048, 32000), (1000, 50257)), (0.0, 0.1)
    ):
        yield _trained(
            "cross_entropy", f"{tokens}x{vocab} {SHORT[dtype]} smoothing {smoothing}",
            lambda device, tokens=tokens, vocab=vocab, dtype=dtype: (
                _tensor((tokens, vocab), dtype, device, grad=True), torch.zeros(tokens, dtype=I64, device=device)),
            lambda x, y, smoothing=smoothing: F.cross_entropy(x, y, label_smoothing=smoothing),
        )  # fmt: skip
    for dtype, bias, shape in product(
        floats,
        (False, True),
        (((2, 512), 768, 3072), ((1000,), 64, 64), ((4, 1, 33), 512, 50257), ((8192,), 100, 7)),
    ):
        lead, width, out = shape
        yield _trained(
            "linear", f"{'x'.join(map(str, lead))} {width} to {out} {SHORT[dtype]}{' bias' if bias else ''}",
            lambda device, lead=lead, width=width, out=out, dtype=dtype, bias=bias: (
                _tensor((*lead, width), dtype, device, grad=True), _tensor((out, width), dtype, device, grad=True),
                _tensor((out,), dtype, device, grad=True) if bias else None),
            F.linear,
        )  # fmt: skip
    for dtype, layout in product(floats, ("", "transposed", "sliced", "expanded")):
        yield _trained(
            "bmm", f"{SHORT[dtype]} {layout}".strip(),
            lambda device, dtype=dtype, layout=layout: (
                _tensor((8, 256, 64), dtype, device, layout=layout, grad=True), _tensor((8, 64, 256), dtype, device, grad=True)),
            torch.bmm,
        )  # fmt: skip
        yield _trained(
            "matmul", f"{SHORT[dtype]} {layout}".strip(),
            lambda device, dtype=dtype, layout=layout: (
                _tensor((256, 128), dtype, device, layout=layout, grad=True), _tensor((128, 512), dtype, device, grad=True)),
            torch.matmul,
        )  # fmt: skip
        yield _trained(
            "conv1d of gpt2", f"{SHORT[dtype]} {layout}".strip(),
            lambda device, dtype=dtype, layout=layout: (
                _tensor((768,), dtype, device, grad=True), _tensor((512, 256), dtype, device, layout=layout, grad=True),
                _tensor((256, 768), dtype, device, grad=True)),
            torch.addmm,
        )  # fmt: skip


# ---- indexing --------------------------------------------------------------------------------------------------------


def _indexing() -> Iterator[Case]:
    def indices(device: torch.device, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=I64, device=device)

    for dtype, (rows, tokens, width) in product(
        (F32, BF16), ((512, 1024, 64), (6400, 5000, 512), (100, 20000, 32))
    ):
        name = f"{tokens} of {rows}x{width} {SHORT[dtype]}"
        make = lambda device, rows=rows, tokens=tokens, width=width, dtype=dtype: (  # noqa: E731
            _tensor((rows, width), dtype, device, grad=True),
            indices(device, tokens),
        )
        yield _trained("index", name, make, lambda x, i: x[i])
        yield _trained("index_select", name, make, lambda x, i: x.index_select(0, i))
        yield _trained("gather", name, lambda device, make=make, width=width, tokens=tokens: (
            make(device)[0], indices(device, tokens, width)[: make(device)[0].shape[0]]), lambda x, i: x.gather(0, i))  # fmt: skip
        yield _trained("index_add", name, lambda device, make=make, tokens=tokens, width=width, dtype=dtype: (
            *make(device), _tensor((tokens, width), dtype, device, grad=True)), lambda x, i, y: x.index_add(0, i, y))  # fmt: skip
        yield _trained("scatter_add", name, lambda device, make=make, tokens=tokens, width=width, dtype=dtype: (
            make(device)[0], indices(device, tokens, width), _tensor((tokens, width), dtype, device, grad=True)),
            lambda x, i, y: x.scatter_add(0, i, y))  # fmt: skip
        plain = lambda device, make=make, tokens=tokens, width=width, dtype=dtype: (  # noqa: E731
            make(device)[0].detach(),
            make(device)[1],
            _tensor((tokens, width), dtype, device),
        )
        yield _plain("index_add_", name, plain, lambda x, i, y: x.index_add_(0, i, y))
        yield _plain(
            "index_put accumulate",
            name,
            plain,
            lambda x, i, y: x.index_put_((i,), y, accumulate=True),
        )
        yield _plain("index_put", name, plain, lambda x, i, y: x.index_put_((i,), y))
    for size, dtype in product((100, 4096, 50000, 1000000), (F32, BF16, I64)):
        flat = lambda device, size=size, dtype=dtype: (
            torch.zeros(size, dtype=dtype, device=device),
        )  # noqa: E731
        yield _plain("cumsum flat", f"{size} {SHORT[dtype]}", flat, lambda x: x.cumsum(0))
        yield _plain("sort", f"{size} {SHORT[dtype]}", flat, torch.sort)
        yield _plain("argsort", f"{size} {SHORT[dtype]}", flat, torch.argsort)
        yield _plain(
            "argsort stable",
            f"{size} {SHORT[dtype]}",
            flat,
            lambda x: torch.argsort(x, stable=True),
        )
        yield _plain("topk", f"{size} {SHORT[dtype]}", flat, lambda x: x.topk(8))
    for (rows, width), dtype in product(
        ((512, 8), (4096, 64), (4096, 128), (20, 50257)), (F32, BF16)
    ):
        wide = lambda device, rows=rows, width=width, dtype=dtype: (
            _tensor((rows, width), dtype, device, grad=True),
        )  # noqa: E731
        yield _trained(
            "topk of rows", f"{rows}x{width} {SHORT[dtype]}", wide, lambda x: x.topk(2, -1)[0]
        )
        yield _plain(
            "sort of rows",
            f"{rows}x{width} {SHORT[dtype]}",
            wide,
            lambda x: torch.sort(x.detach(), -1),
        )
        yield _trained(
            "masked_fill",
            f"{rows}x{width} {SHORT[dtype]}",
            wide,
            lambda x: x.masked_fill(x > 0, 0.0),
        )
    for tokens, experts in product((512, 4096, 20000), (8, 64)):
        make = lambda device, tokens=tokens: (indices(device, tokens),)  # noqa: E731
        yield _plain(
            "one_hot",
            f"{tokens} of {experts}",
            make,
            lambda i, experts=experts: F.one_hot(i, experts),
        )
        yield _plain(
            "bincount",
            f"{tokens} of {experts}",
            make,
            lambda i, experts=experts: torch.bincount(i, minlength=experts),
        )
        yield _plain("histc", f"{tokens} of {experts}", make,
                     lambda i, experts=experts: torch.histc(i.float(), bins=experts, min=0, max=experts - 1))  # fmt: skip
    for dtype, (tokens, experts, width, out) in product(
        (BF16, F32), ((512, 8, 256, 512), (4096, 8, 768, 768))
    ):
        yield _trained(
            "grouped_mm", f"{tokens} of {experts} {width} to {out} {SHORT[dtype]}",
            lambda device, tokens=tokens, experts=experts, width=width, out=out, dtype=dtype: (
                _tensor((tokens, width), dtype, device, grad=True), _tensor((experts, width, out), dtype, device, grad=True),
                torch.full((experts,), tokens, dtype=torch.int32, device=device)),
            lambda x, w, offs: F.grouped_mm(x, w, offs=offs) if hasattr(F, "grouped_mm") else torch._grouped_mm(x, w, offs=offs),
        )  # fmt: skip
    for number, dtype in product((2, 3, 20, 300), (F32, BF16)):
        parts = lambda device, number=number, dtype=dtype: tuple(  # noqa: E731
            _tensor((64, 32), dtype, device, grad=True) for _ in range(number)
        )
        yield _trained("cat", f"{number} {SHORT[dtype]}", parts, lambda *parts: torch.cat(parts))
        yield _trained(
            "stack", f"{number} {SHORT[dtype]}", parts, lambda *parts: torch.stack(parts)
        )


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def _optimizers() -> Iterator[Case]:
    sizes = ((1000, 1000), (64,), (333, 17), (3000, 768))

    def tensors(device: torch.device, dtype: torch.dtype, many: int = 1) -> list[Tensor]:
        return [_tensor(shape, dtype, device) for shape in sizes * many]

    for dtype, many in product((F32, BF16, F16), (1, 40)):
        name = f"{4 * many} tensors {SHORT[dtype]}"
        make = lambda device, dtype=dtype, many=many: (tensors(device, dtype, many),)  # noqa: E731
        yield _plain("foreach_norm", name, make, lambda tensors: torch._foreach_norm(tensors))
        yield _plain("foreach_mul", name, make, lambda tensors: torch._foreach_mul(tensors, 0.5))
        yield _plain("foreach_mul_", name, make, lambda tensors: torch._foreach_mul_(tensors, 0.5))
        yield _plain("foreach_sqrt", name, make, torch._foreach_sqrt)
        yield _plain(
            "foreach_addcdiv_",
            name,
            make,
            lambda tensors: torch._foreach_addcdiv_(tensors, tensors, tensors, 1.0),
        )
        yield _plain(
            "foreach_lerp_", name, make, lambda tensors: torch._foreach_lerp_(tensors, tensors, 0.1)
        )
        yield _plain(
            "foreach_abs_max",
            name,
            make,
            lambda tensors: torch._foreach_max(torch._foreach_abs(tensors)),
        )
        yield _plain(
            "foreach_copy_", name, make, lambda tensors: torch._foreach_copy_(tensors, tensors)
        )

        def parameters(
            device: torch.device, dtype: torch.dtype = dtype, many: int = many
        ) -> list[nn.Parameter]:
            made = [nn.Parameter(each) for each in tensors(device, dtype, many)]
            for each in made:
                each.grad = torch.zeros_like(each)
            return made

        yield _plain("clip_grad_norm_", name, lambda device, parameters=parameters: (parameters(device),),
                     lambda made: nn.utils.clip_grad_norm_(made, 1.0))  # fmt: skip
        for kind, more in (
            ("foreach", {"foreach": True}),
            ("fused", {"fused": True}),
            ("for-loop", {"foreach": False}),
        ):
            yield _plain(f"adamw {kind}", name, lambda device, parameters=parameters, more=more: (
                torch.optim.AdamW(parameters(device), **more),), lambda optimizer: optimizer.step())  # fmt: skip
        yield _plain("sgd", name, lambda device, parameters=parameters: (
            torch.optim.SGD(parameters(device), lr=0.1, momentum=0.9),), lambda optimizer: optimizer.step())  # fmt: skip
        yield _plain("adafactor", name, lambda device, parameters=parameters: (
            torch.optim.Adafactor(parameters(device)),), lambda optimizer: optimizer.step())  # fmt: skip
        if dtype == F32:
            yield _plain(
                "unscale", name, lambda device, tensors=tensors, many=many: (
                    tensors(device, F32, many), torch.zeros((), device=device), torch.ones((), device=device)),
                lambda grads, found, scale: torch._amp_foreach_non_finite_check_and_unscale_(grads, found, scale),
            )  # fmt: skip


CASES: list[Case] = [
    *_reductions(), *_attentions(), *_varlen(), *_layers(), *_indexing(), *_optimizers()
]  # fmt: skip
