"""model/packed_attention.py: packed rows compute what they compute alone, whatever the architecture."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BloomConfig, Lfm2Config, LlamaConfig

from fitune.config import LoraConfig, ModelConfig
from fitune.errors import ModelError
from fitune.model import packed_attention as attention
from fitune.model import varlen
from fitune.model.load import build_model, load_model
from fitune.model.lora import apply_lora
from fitune.model.packed_attention import (
    attention_name,
    can_pack,
    check_attention,
    row_boundaries,
)
from tiny_models import TINY

LENGTHS = (9, 1, 6, 12)


def build(name: str, kernel: Any = "auto") -> nn.Module:
    config = copy.deepcopy(TINY[name])
    model = build_model(config, attention=attention_name(config, kernel), seed=1)
    return model.train()


def rows(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (length,), generator=generator) for length in LENGTHS]


def packed_logits(model: nn.Module, ids: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    lengths = tuple(len(row) for row in ids)
    logits = model(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        use_cache=False,
        row_boundaries=row_boundaries(lengths, device=torch.device("cpu"), **options),
    ).logits
    return list(logits[0].split(list(lengths)))


def gradients(model: nn.Module, logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(row.float().pow(2).sum() for row in logits).backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        scale = (
            gradient.abs().max().clamp(min=1e-2 * largest)
        )  # a router of one expert has a gradient of zero
        assert (ours[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("name", TINY)
def test_packed_rows_equal_the_rows_alone_in_transformers_eager_attention(name: str) -> None:
    model, oracle = build(name), build(name, "eager")
    ids = rows()
    ours = packed_logits(model, ids)
    theirs = [oracle(input_ids=row[None], use_cache=False).logits[0] for row in ids]
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(gradients(model, ours), gradients(oracle, theirs))


@pytest.mark.parametrize("name", TINY)
def test_padded_rows_equal_the_rows_alone(name: str) -> None:
    model = build(name).eval()
    ids = rows()
    padded = torch.zeros((len(ids), max(LENGTHS)), dtype=torch.int64)
    for number, row in enumerate(ids):
        padded[number, : len(row)] = row
    positions = torch.arange(max(LENGTHS))[None].expand_as(padded)
    logits = model(input_ids=padded, position_ids=positions, use_cache=False).logits
    for row, mine in zip(ids, logits, strict=True):
        alone = model(input_ids=row[None], use_cache=False).logits[0]
        assert torch.allclose(mine[: len(row)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_a_row_does_not_see_what_is_in_another(name: str) -> None:
    model = build(name).eval()
    before = packed_logits(model, rows())
    after = packed_logits(model, [rows(seed=1)[0], *rows()[1:]])
    assert not torch.equal(before[0], after[0])
    # an expert multiplies the tokens of all rows at once, so another number of them may round otherwise
    tolerance = 1e-5 if "experts" in str(model) else 0.0
    for mine, other in zip(before[1:], after[1:], strict=True):
        assert torch.allclose(mine, other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_recomputed_layers_get_the_boundaries_too(name: str) -> None:
    plain, recomputed = build(name), build(name)
    recomputed.activation_checkpointing_enable({"use_reentrant": False})
    expected = gradients(plain, packed_logits(plain, rows()))
    assert_equal_gradients(gradients(recomputed, packed_logits(recomputed, rows())), expected)


@pytest.mark.parametrize("name", TINY)
def test_the_tested_architectures_can_be_packed(name: str) -> None:
    assert can_pack(build(name)) is None


def test_packing_is_decided_on_the_meta_device_and_with_adapters() -> None:
    model = load_model(ModelConfig(source="minimind2-small", method="lora"), torch.device("meta"))
    assert can_pack(model) is None


def test_adapters_do_not_hide_the_boundaries() -> None:
    model = apply_lora(build("qwen3"), LoraConfig()).eval()
    alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows()]
    for mine, reference in zip(packed_logits(model, rows()), alone, strict=True):
        assert torch.allclose(mine, reference, atol=1e-5)


def test_generation_with_a_cache_equals_the_whole_sequence() -> None:
    model = build("mistral_window").eval()
    ids = rows()[3][None]
    whole = model(input_ids=ids, use_cache=False).logits
    begun = model(input_ids=ids[:, :8], use_cache=True)
    rest = model(input_ids=ids[:, 8:11], past_key_values=begun.past_key_values, use_cache=True)
    last = model(input_ids=ids[:, 11:], past_key_values=rest.past_key_values, use_cache=True).logits
    assert torch.allclose(torch.cat([begun.logits, rest.logits, last], dim=1), whole, atol=1e-5)


def attended(lengths: tuple[int, ...], *, in_pieces: bool, **options: Any) -> list[torch.Tensor]:
    """Output and gradients of packed rows, computed in pieces or by torch's attention on each row."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(1, heads, sum(lengths), 8, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    ]
    if in_pieces:
        boundaries = row_boundaries(lengths, device=torch.device("cpu"))
        out_BSHD, _ = attention.rows_attention(
            nn.Identity(), *parts, None, row_boundaries=boundaries, **options
        )
    else:
        rows = zip(*(part.split(list(lengths), dim=2) for part in parts), strict=True)
        sdpa = nn.functional.scaled_dot_product_attention
        out_BSHD = torch.cat(
            [sdpa(*row, is_causal=True, enable_gqa=True) for row in rows], dim=2
        ).transpose(1, 2)
    out_BSHD.float().cos().sum().backward()
    return [out_BSHD, *(part.grad for part in parts)]


@pytest.mark.parametrize("lengths", [(200,), (191, 192, 193), (384, 5, 257), (700, 300)], ids=str)
def test_long_rows_in_pieces_compute_what_whole_rows_do(lengths: tuple[int, ...]) -> None:
    ours, theirs = attended(lengths, in_pieces=True), attended(lengths, in_pieces=False)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, atol=1e-5, rtol=1e-5)


def test_long_rows_in_pieces_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = attended((300, 20), in_pieces=True), attended((300, 20), in_pieces=False)
    assert ours[0].dtype == torch.bfloat16
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.float(), reference.float(), atol=3e-2, rtol=3e-2)


def test_a_long_row_under_a_window_sees_its_window_alone() -> None:
    cut = attended((300,), in_pieces=True, sliding_window=50)
    assert not torch.allclose(cut[0], attended((300,), in_pieces=True)[0], atol=1e-3)


def test_eager_attention_cannot_be_packed() -> None:
    assert "eager" in str(can_pack(build("llama", "eager")))


_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
            "does not take sample boundaries",
        ),
        (
            Lfm2Config(**_SMALL, intermediate_size=48, layer_types=["conv", "full_attention"]),
            "layers of kind conv",
        ),
        (
            LlamaConfig(**_SMALL, intermediate_size=48, use_bidirectional_attention=True),
            "not causal",
        ),
    ],
    ids=["bloom", "lfm2", "bidirectional"],
)
def test_what_mixes_rows_is_not_packed_and_says_why(config: Any, reason: str) -> None:
    with torch.device("meta"):
        model = build_model(config, attention=attention_name(config, "auto"))
    assert reason in str(can_pack(model))


def test_a_convolution_over_positions_is_noticed() -> None:
    model = build("qwen3")
    model.model.layers[0].mixer = nn.Conv1d(32, 32, 3)
    assert "Conv1d mixes neighbouring samples" in str(can_pack(model))


def test_a_layer_that_does_not_receive_the_boundaries_is_noticed() -> None:
    model = build("qwen3")
    layer = model.model.layers[1]
    forward = layer.self_attn.forward
    layer.self_attn.forward = lambda *a, row_boundaries=None, **k: forward(*a, **k)
    assert can_pack(model) == "sample boundaries reach 1 of its 2 layers"


@pytest.mark.parametrize("kernel", ["flash", "math"])
def test_a_forced_kernel_computes_the_same(kernel: str) -> None:
    for mine, reference in zip(
        packed_logits(build("llama", kernel), rows()),
        packed_logits(build("llama"), rows()),
        strict=True,
    ):
        assert torch.allclose(mine, reference, atol=1e-5)


def test_a_forced_kernel_is_the_one_that_runs() -> None:
    with torch.profiler.profile() as profile:
        packed_logits(build("llama", "math"), rows())
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" in names
    assert not any("flash" in name for name in names)


def test_a_kernel_that_this_machine_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match="efficient"):
        load_model(
            ModelConfig(source="minimind2-small", attention="efficient"), torch.device("cpu")
        )


def test_forced_flash_attention_in_float32_on_a_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"model\.precision=autocast_bfloat16"):
        check_attention("flash", device=torch.device("cuda"), dtype=torch.float32)


@pytest.mark.parametrize("window", [None, 4])
def test_the_variable_length_kernel_of_this_torch_takes_our_arguments(window: int | None) -> None:
    with FakeTensorMode():
        query_THD = torch.empty(sum(LENGTHS), 4, 8, dtype=torch.bfloat16, requires_grad=True)
        keys_TGD = torch.empty(sum(LENGTHS), 2, 8, dtype=torch.bfloat16, requires_grad=True)
        cumulative = row_boundaries(LENGTHS, device=torch.device("cpu")).cumulative
        samples = varlen.PackedSamples(cumulative, max(LENGTHS), None, window)
        out_THD = varlen.attend_packed(query_THD, keys_TGD, keys_TGD, samples)
        out_THD.sum().backward()
    assert out_THD.shape == query_THD.shape
    assert keys_TGD.grad is not None


def test_torch_before_windows_is_told_that_rows_are_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, is_causal=False, scale=None
    ):  # as in 2.10
        assert is_causal
        assert max_q == max(LENGTHS)
        assert key.shape == query.shape
        return query

    monkeypatch.setattr(varlen, "kernels", lambda: None)
    monkeypatch.setattr(varlen, "varlen_attn", lambda: varlen_attn)
    query_THD, keys_TGD = torch.zeros(28, 4, 8), torch.zeros(28, 2, 8)
    cumulative = row_boundaries(LENGTHS, device=torch.device("cpu")).cumulative
    samples = varlen.PackedSamples(cumulative, max(LENGTHS), None, 64)
    varlen.attend_packed(query_THD, keys_TGD, keys_TGD, samples)
    with pytest.raises(ModelError, match="sliding window"):
        varlen.attend_packed(query_THD, keys_TGD, keys_TGD, samples._replace(window=4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("name", TINY)
def test_the_variable_length_kernel_equals_the_loop_over_rows(name: str) -> None:
    cuda = torch.device("cuda")
    model = build(name).to(cuda, torch.bfloat16)
    ids = [row.to(cuda) for row in rows()]

    def logits(kernel: Any) -> torch.Tensor:
        return model(
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat([torch.arange(length, device=cuda) for length in LENGTHS])[None],
            use_cache=False,
            row_boundaries=row_boundaries(LENGTHS, device=cuda, kernel=kernel),
        ).logits

    assert torch.allclose(logits(None), logits("rows"), atol=3e-2, rtol=3e-2)
