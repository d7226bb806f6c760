"""What CUDA does otherwise, one fact a test. Expected bytes are worked out by hand from the named shapes."""

from typing import Any

import pytest
import torch
from tiny_loops import AMPERE, HOPPER, births, record_function
from torch import Tensor, nn
from torch.nn import functional

from fitune.errors import UsageError
from fitune.model.packed_attention import row_boundaries, rows_attention
from fitune.recorder import cuda_behaviour
from fitune.recorder.cuda_attention import choose_attention
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.record import RecordSettings, record_loop

B, H, S, D = 2, 4, 160, 64
BF16, F32 = torch.bfloat16, torch.float32


def attend(**call: Any) -> Any:
    """Self-attention of [B, H, S, D]."""
    return lambda x: functional.scaled_dot_product_attention(x, x, x, **call)


# ---- attention ----


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim", "kv_heads", "mask", "expected"),
    [
        (AMPERE, BF16, 64, 4, False, "flash"),
        (AMPERE, BF16, 64, 2, False, "flash"),
        (AMPERE, BF16, 64, 4, True, "efficient"),
        (AMPERE, BF16, 64, 2, True, "efficient"),
        (CudaTarget((8, 0), torch_version=(2, 13)), BF16, 64, 2, True, "math"),
        (AMPERE, BF16, 320, 4, False, "efficient"),
        (AMPERE, F32, 64, 4, False, "efficient"),
        (AMPERE, F32, 66, 4, False, "math"),
        (AMPERE, F32, 64, 2, False, "efficient"),
        (CudaTarget((8, 0), torch_version=(2, 13)), F32, 64, 2, False, "math"),
        (AMPERE, torch.float64, 64, 4, False, "math"),
        (HOPPER, BF16, 64, 4, False, "cudnn"),
        (HOPPER, F32, 64, 4, False, "efficient"),
        (CudaTarget((7, 5)), torch.float16, 64, 4, False, "efficient"),
        (CudaTarget((7, 5)), BF16, 64, 4, False, "math"),
        (CudaTarget((8, 6)), BF16, 200, 4, False, "efficient"),
        (CudaTarget((8, 6), "math"), BF16, 64, 4, False, "math"),
    ],
)
def test_the_kernel_follows_from_card_dtype_heads_and_mask(
    target: CudaTarget, dtype: torch.dtype, head_dim: int, kv_heads: int, mask: bool, expected: str
) -> None:
    query = torch.empty(B, H, S, head_dim, dtype=dtype, device="meta")
    key = torch.empty(B, kv_heads, S, head_dim, dtype=dtype, device="meta")
    bias = torch.empty(S, S, device="meta") if mask else None
    chosen = choose_attention(
        target, query, key, key, mask=bias, dropout=0.0, is_causal=not mask, needs_gradient=True,
        enable_gqa=kv_heads != H,
    )  # fmt: skip
    assert chosen == expected


def test_switching_a_kernel_off_moves_to_the_next() -> None:
    def without_flash(x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            return functional.scaled_dot_product_attention(x, x, x)

    assert births(record_function(without_flash, (B, H, S, D)), "efficient_attention.default")


def test_flash_cannot_be_forced_on_float32() -> None:
    with pytest.raises(UsageError, match="16 bits"):
        record_function(attend(), (B, H, S, D), dtype=F32, target=CudaTarget((8, 0), "flash"))


def test_flash_keeps_the_output_and_a_float32_log_sum_exp() -> None:
    events = record_function(attend(is_causal=True), (B, H, S, D))
    assert births(events, "flash_attention.default")[:2] == [B * H * S * D * 2, B * H * S * 4]


def test_flash_backward_accumulates_in_float32_over_rows_of_128() -> None:
    events = record_function(attend(is_causal=True), (B, H, S, D))
    rows = 256
    grad = B * H * S * D * 2
    assert births(events, "flash_attention_backward") == [
        *[grad] * 5,
        B * H * rows * 4,
        B * H * rows * D * 4,
    ]


def test_flash_backward_of_grouped_heads_expands_the_key_and_value_gradients() -> None:
    def grouped(x: Tensor) -> Tensor:
        key = x[:, :2]
        return functional.scaled_dot_product_attention(x, key, key, is_causal=True, enable_gqa=True)

    assert (
        births(record_function(grouped, (B, H, S, D)), "flash_attention_backward")[-2:]
        == [B * H * S * D * 2] * 2
    )


def test_heads_that_are_no_multiple_of_8_are_padded_for_flash() -> None:
    events = record_function(attend(), (B, H, S, 60), target=CudaTarget((8, 0), "flash"))
    assert births(events, "constant_pad_nd")[:3] == [B * H * S * 64 * 2] * 3


def test_attention_dropout_stays_fused() -> None:
    assert births(record_function(attend(dropout_p=0.1), (B, H, S, D)), "flash_attention.default")


def test_efficient_attention_turns_a_boolean_mask_into_a_bias_of_the_queries_dtype() -> None:
    mask_bytes = S * S * 2

    def masked(x: Tensor) -> Tensor:
        return attend(attn_mask=torch.ones(S, S, dtype=torch.bool, device=x.device))(x)

    assert mask_bytes in [event.num_bytes for event in record_function(masked, (B, H, S, D))]


def test_efficient_backward_in_16_bits_needs_delta_and_a_query_accumulator() -> None:
    events = record_function(attend(), (B, H, S, D), target=CudaTarget((8, 0), "efficient"))
    tiles = 3  # of 64 queries, with a lock of 16 bytes each
    assert births(events, "efficient_attention_backward")[-2:] == [
        B * H * S * 4,
        B * H * tiles * (64 * 64 + 4) * 4,
    ]


def test_math_attention_materialises_the_scores() -> None:
    events = record_function(attend(), (B, H, S, D), target=CudaTarget((8, 0), "math"))
    assert B * H * S * S * 4 in births(events, "softmax")


def test_packed_rows_are_one_variable_length_kernel() -> None:
    lengths = (100, 60)

    def packed(x: Tensor) -> Tensor:
        boundaries = row_boundaries(lengths, device=x.device)
        return rows_attention(nn.Identity(), x, x, x, None, row_boundaries=boundaries)[0]

    events = record_function(packed, (1, H, S, D))
    rows = S + 128 * len(lengths)
    assert births(events, "_varlen_attn.default")[:2] == [S * H * D * 2, H * S * 4]
    assert births(events, "_varlen_attn_backward")[-2:] == [H * rows * 4, rows * H * D * 4]


def test_the_variable_length_backward_copies_a_gradient_that_is_not_contiguous() -> None:
    def taken(*, turned: bool) -> list[int]:
        def packed(x: Tensor) -> Tensor:
            boundaries = row_boundaries((100, 60), device=x.device)
            attended = rows_attention(nn.Identity(), x, x, x, None, row_boundaries=boundaries)[0]
            return attended.transpose(1, 2).contiguous() if turned else attended

        return births(record_function(packed, (1, H, S, D)), "_varlen_attn_backward")

    assert taken(turned=True) == [S * H * D * 2, *taken(turned=False)]


def test_packed_rows_of_float32_are_attended_one_by_one() -> None:
    def packed(x: Tensor) -> Tensor:
        boundaries = row_boundaries((100, 60), device=x.device)
        return rows_attention(nn.Identity(), x, x, x, None, row_boundaries=boundaries)[0]

    assert (
        len(births(record_function(packed, (1, H, S, D), dtype=F32), "efficient_attention.default"))
        >= 2
    )


# ---- autocast ----


@pytest.mark.parametrize(
    "function", [lambda x: x.softmax(-1), lambda x: functional.layer_norm(x, (8,)), torch.exp]
)
def test_autocast_computes_cudas_float32_list_in_float32(function: Any) -> None:
    on_cuda = record_function(function, (16, 8), autocast=BF16)
    on_cpu = record_function(function, (16, 8), autocast=BF16, target=None)
    assert 16 * 8 * 4 in [event.num_bytes for event in on_cuda]
    assert 16 * 8 * 4 not in [
        event.num_bytes for event in on_cpu if event.module == "" and "_to_copy" not in event.op
    ]


def test_autocast_softmax_reads_16_bits_without_a_float32_copy() -> None:
    assert births(
        record_function(lambda x: x.softmax(-1), (16, 8), autocast=BF16), "_softmax.default"
    ) == [16 * 8 * 4]


def test_autocast_takes_the_cross_entropy_apart_into_a_16_bit_log_softmax_and_a_float32_loss() -> (
    None
):
    def loss(x: Tensor) -> Tensor:
        return functional.cross_entropy(x, torch.zeros(16, dtype=torch.int64, device=x.device))

    on_cuda = record_function(loss, (16, 8), autocast=BF16)
    on_cpu = record_function(loss, (16, 8), autocast=BF16, target=None)
    assert births(on_cuda, "_log_softmax.default") == [16 * 8 * 2]
    assert births(on_cpu, "_log_softmax.default") == [16 * 8 * 4]


@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_autocast_joins_tensors_of_two_dtypes_without_a_copy_of_either(join: Any) -> None:
    """The CPU's autocast casts all of them to the widest dtype first. Partial rotary embeddings do this."""
    on_cuda = record_function(lambda x: join((x, x.float())), (16, 8), autocast=BF16)
    assert births(on_cuda, "_to_copy").count(16 * 8 * 4) == 1  # the one of `x.float()`


def test_autocast_casts_the_last_argument_first() -> None:
    def normalised(x: Tensor) -> Tensor:
        weight, bias = torch.ones(8, device=x.device, dtype=BF16), torch.ones_like(x)[0]
        return functional.layer_norm(x, (8,), weight, bias)

    casts = births(record_function(normalised, (16, 8), autocast=BF16), "_to_copy")
    assert casts[:3] == [8 * 4, 8 * 4, 16 * 8 * 4]


def test_autocast_changes_no_operator_that_it_leaves_alone_on_cuda() -> None:
    names = cuda_behaviour.in_no_list_of_cuda()
    assert {"cat", "stack", "index_copy", "cross_entropy_loss"} <= {*names}
    assert not {"linear", "softmax.int", "einsum"} & {*names}


def test_autocast_of_the_cpu_is_as_before_after_a_recording() -> None:
    record_function(lambda x: x.softmax(-1), (16, 8), autocast=BF16)
    with torch.autocast("cpu", BF16):
        assert torch.ones(2, 2, dtype=BF16).softmax(-1).dtype == BF16
        assert (
            functional.cross_entropy(torch.ones(2, 2, dtype=BF16), torch.tensor([0, 1])).dtype
            == F32
        )


# ---- single kernels ----


@pytest.mark.parametrize(
    ("index", "dim"), [([1, 2], 0), ([-2], 1)], ids=["of the first dimension", "of another"]
)
def test_the_gradient_of_an_indexed_tensor_sorts_the_indices(index: list[int], dim: int) -> None:
    def taken(x: Tensor) -> Tensor:
        return x.view(4, 4, 8)[(slice(None),) * dim + (index,)]

    scratch = births(record_function(taken, (16, 8)), "index_put_")
    assert scratch[:5] == [len(index) * 8] * 5  # and then what the sort takes


def test_dropout_keeps_a_mask_of_one_byte() -> None:
    events = record_function(lambda x: functional.dropout(x, 0.1), (16, 8))
    assert births(events, "native_dropout.default") == [16 * 8, 16 * 8 * 2]


def test_dropout_of_zero_allocates_nothing() -> None:
    assert not births(record_function(lambda x: functional.dropout(x, 0.0), (16, 8)), "dropout")


@pytest.mark.parametrize(("target", "num_bytes"), [(AMPERE, 8_519_680), (HOPPER, 32 * 2**20)])
def test_the_first_product_of_each_thread_allocates_a_cublas_workspace(
    target: CudaTarget, num_bytes: int
) -> None:
    events = record_function(lambda x: (x @ x.T) @ (x @ x.T), (16, 8), target=target)
    workspaces = [
        (event.num_bytes, event.phase) for event in events if event.category == "workspace"
    ]
    assert workspaces == [(num_bytes, "forward"), (num_bytes, "backward")]


def test_the_output_of_a_product_is_allocated_before_the_workspace() -> None:
    born = [event for event in record_function(lambda x: x @ x.T, (16, 8)) if event.num_bytes > 0]
    (place,) = (
        number
        for number, event in enumerate(born)
        if (event.category, event.phase) == ("workspace", "forward")
    )
    assert (born[place - 1].op, born[place - 1].num_bytes) == ("aten.mm.default", 16 * 16 * 2)


def test_an_rms_norm_is_one_kernel_that_keeps_a_number_of_each_row() -> None:
    events = record_function(
        lambda x: functional.rms_norm(x, (8,), torch.ones(8, dtype=BF16)), (16, 8)
    )
    assert births(events, "_fused_rms_norm.default") == [16 * 8 * 2, 16 * 4]
    assert births(events, "_fused_rms_norm_backward.default") == [16 * 8 * 2]
    assert not births(events, "rsqrt")


@pytest.mark.parametrize(("target", "limit"), [(AMPERE, 3072), (HOPPER, 3072)])
def test_the_gradient_of_an_embedding_is_sorted_beyond_a_number_of_tokens(
    target: CudaTarget, limit: int
) -> None:
    def temporaries(tokens: int) -> list[int]:
        def look_up(x: Tensor) -> Tensor:
            return functional.embedding(torch.zeros(tokens, dtype=torch.int64, device=x.device), x)

        return births(
            record_function(look_up, (2000, 8), target=target), "embedding_dense_backward"
        )[1:]

    assert temporaries(limit) == []
    assert temporaries(limit + 1)[-1] == ((limit + 1) // 10 + 2000) * 8 * 4


@pytest.mark.parametrize(("target", "op"), [(AMPERE, "_foreach_sqrt"), (None, "aten.sqrt")])
def test_optimizers_are_foreach_by_default_on_cuda_only(target: CudaTarget | None, op: str) -> None:
    def loop(model: nn.Module, device: torch.device) -> Any:
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.ones(4, 8, device=device)

        def step() -> None:
            model(x).sum().backward()
            optimizer.step()

        return step

    events = record_loop(
        lambda: nn.Linear(8, 8), loop, RecordSettings(target=target, num_steps=1)
    ).events
    assert births(events, op)


def test_clipping_reduces_in_chunks_of_65536_elements() -> None:
    def loop(model: nn.Module, device: torch.device) -> Any:
        x = torch.ones(4, 300, device=device)

        def step() -> None:
            model(x).sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        return step

    build = lambda: nn.Linear(300, 300)  # noqa: E731
    events = record_loop(build, loop, RecordSettings(target=AMPERE, num_steps=1)).events
    assert births(events, "_foreach_norm") == [2 * 2 * 4, 4, 4]
