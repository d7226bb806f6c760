"""What loops do that were written for a card and not for a recording."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fitune
from fitune.errors import UsageError
from fitune.recorder.cuda_target import CudaTarget
from fitune.recorder.events import MemoryTrace
from fitune.recorder.flash_package import flash_package
from fitune.recorder.record import RecordSettings, record_loop
from fitune.units import MIB

CARD = "A100 80GB"
WIDTH = 1024
Step = Callable[[], Any]


def embedding() -> nn.Module:
    return nn.Embedding(100, WIDTH)


def births(trace: MemoryTrace, op: str) -> list[int]:
    return [event.num_bytes for event in trace.events if op in event.op and event.num_bytes > 0]


def record(
    loop: Callable[[nn.Module, torch.device], Step], build: Callable[[], nn.Module] = embedding
) -> MemoryTrace:
    return record_loop(build, loop, RecordSettings(target=CudaTarget(), num_steps=1))


def test_rows_that_are_drawn_on_the_host_are_as_long_as_in_the_run() -> None:
    tokens = np.arange(5000) % 100

    def loop(model: nn.Module, device: torch.device) -> Step:
        def step() -> None:
            starts = torch.randint(len(tokens) - 64, (4,))
            rows = torch.stack([torch.from_numpy(tokens[start : start + 64]) for start in starts])
            model(rows.pin_memory().to(device, non_blocking=True))

        return step

    assert births(record(loop), "embedding") == [4 * 64 * WIDTH * 4]


def test_a_mask_that_is_made_on_the_host_selects_what_it_selects() -> None:
    def loop(model: nn.Module, device: torch.device) -> Step:
        def step() -> None:
            ids = torch.arange(100).repeat(2, 1)
            labels = ids.clone()
            labels[ids % 4 != 0] = -100
            keep = labels.to(device) != -100
            model(ids.to(device)[keep])

        return step

    assert births(record(loop), "embedding") == [50 * WIDTH * 4]


def test_what_is_written_into_a_host_tensor_is_seen_through_its_views() -> None:
    def loop(model: nn.Module, device: torch.device) -> Step:
        def step() -> None:
            lengths = torch.zeros(3, dtype=torch.int64)
            lengths[1] = 7
            lengths += 2
            model(torch.zeros(int(lengths.sum()), dtype=torch.int64, device=device))

        return step

    assert births(record(loop), "embedding") == [(7 + 3 * 2) * WIDTH * 4]


def test_what_comes_from_the_card_is_not_known_on_the_host() -> None:
    def loop(model: nn.Module, device: torch.device) -> Step:
        def step() -> None:
            total = torch.zeros(())
            total += model(torch.zeros(2, dtype=torch.int64, device=device)).sum().cpu()
            total.item()

        return step

    assert any("a number read from the device" in line for line in record(loop).source)


def test_drawing_rows_leaves_the_streams_of_random_numbers_as_they_are() -> None:
    def loop(model: nn.Module, device: torch.device) -> Step:
        return lambda: model(torch.randint(100, (8,)).to(device))

    torch.manual_seed(3)
    state = torch.get_rng_state()
    record(loop)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["fake", "real"])
def test_inference_mode_is_recorded_as_no_grad_is(mode: Literal["fake", "real"]) -> None:
    def evaluate(without: Callable[[], Any]) -> list[tuple[str, int]]:
        def loop(model: nn.Module, device: torch.device) -> Step:
            def step() -> None:
                with without():
                    hidden = model(torch.zeros(2, 16, dtype=torch.int64, device=device)).unsqueeze(
                        1
                    )
                    F.scaled_dot_product_attention(hidden, hidden, hidden)
                    bool((hidden > 0).all())

            return step

        trace = record_loop(embedding, loop, RecordSettings(mode=mode, num_steps=1))
        return [(event.op, event.num_bytes) for event in trace.events]

    assert evaluate(torch.inference_mode) == evaluate(torch.no_grad)


def cuda_only(model: nn.Module, device: torch.device) -> Step:
    assert torch.cuda.is_available()
    assert device.type == "cuda"
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    generator = torch.Generator(device=device)
    generator.manual_seed(0)

    def step() -> None:
        begin.record()
        ids = torch.zeros(64, dtype=torch.int64, pin_memory=True).cuda(non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = (model(ids) @ torch.randn(WIDTH, 8, device=device, generator=generator)).sum()
        loss.backward()
        end.record()
        torch.cuda.synchronize(device)
        total = torch.cuda.get_device_properties(0).total_memory
        assert torch.cuda.mem_get_info()[1] == total > 79 * 2**30
        assert torch.cuda.get_device_capability() == (8, 0)
        print(
            begin.elapsed_time(end),
            torch.cuda.memory_summary(),
            torch.cuda.memory_stats()["num_ooms"],
        )

    return step


def test_a_loop_that_asks_for_cuda_is_told_that_it_is_there() -> None:
    prediction = fitune.predict_loop(embedding, cuda_only, gpu=CARD, num_steps=1)
    assert prediction.categories["workspace"] == 2 * 8_519_680


@pytest.mark.parametrize(
    ("file", "expected"),
    [("/usr/lib/python3/site-packages/library.py", False), ("/home/me/train.py", True)],
)
def test_a_library_that_is_imported_meanwhile_is_told_the_truth_and_a_script_is_not(
    file: str, expected: bool
) -> None:
    def loop(model: nn.Module, device: torch.device) -> Step:
        found: dict[str, Any] = {}
        exec(compile("import torch\nfound = torch.cuda.is_available()", file, "exec"), found)
        assert found["found"] is expected
        return lambda: None

    fitune.predict_loop(embedding, loop, gpu=CARD)


def peak_bytes(step: Callable[[nn.Module, torch.device], Any]) -> int:
    def loop(model: nn.Module, device: torch.device) -> Step:
        return lambda: step(model, device)

    return fitune.predict_loop(
        lambda: nn.Linear(8, 8), loop, gpu=CARD, num_steps=1
    ).peak_allocated_bytes


KEPT = {
    "made there": "torch.empty(2**30, dtype=torch.uint8, device={device})",
    "moved there": "torch.empty(2**20, dtype=torch.uint8).to({device})",
    "under a context": "under({device})",
}


@pytest.mark.parametrize(
    "device", ["torch.device('cpu')", "torch.device(type='cpu')", "'cpu'", "torch.device('cpu', 0)"]
)
@pytest.mark.parametrize("kind", KEPT)
def test_a_device_object_of_the_host_means_the_host(kind: str, device: str) -> None:
    def under(place: Any) -> torch.Tensor:
        with torch.device(place):
            return torch.empty(2**20)

    def step(model: nn.Module, card: torch.device) -> None:
        kept = eval(KEPT[kind].format(device=device), {"torch": torch, "under": under})
        assert kept.device.type == "cpu"
        model(torch.ones(2, 8, device=card))

    plain = peak_bytes(lambda model, card: model(torch.ones(2, 8, device=card)))
    assert peak_bytes(step) == plain


@pytest.mark.parametrize(
    "device",
    ["card", "next(model.parameters()).device", "torch.device('cuda')", "model.weight.device"],
)
def test_the_device_of_a_tensor_on_the_card_means_the_card(device: str) -> None:
    def step(model: nn.Module, card: torch.device) -> None:
        found = eval(device, {"torch": torch, "model": model, "card": card})
        torch.empty(2**20, dtype=torch.uint8, device=found)
        torch.empty(2**20, dtype=torch.uint8).to(found)

    assert peak_bytes(step) >= 2**20


def test_a_device_is_still_a_device() -> None:
    def step(model: nn.Module, card: torch.device) -> None:
        assert isinstance(model.weight.device, torch.device)
        assert isinstance(card, torch.device)
        assert torch.device("cpu") == torch.device("cpu")
        assert torch.device("cuda:0").index == 0

    peak_bytes(step)


@pytest.mark.parametrize("gpu", [CARD, "cpu"])
def test_a_weight_that_is_a_slice_holds_the_whole_tensor(gpu: str) -> None:
    def build() -> nn.Module:
        model, whole = nn.Module(), torch.empty(16 * 2**20)
        model.first, model.second = nn.Parameter(whole[:1024]), nn.Parameter(whole[1024:2048])
        return model

    def loop(model: nn.Module, device: torch.device) -> Step:
        return lambda: None

    assert (
        fitune.predict_loop(build, loop, gpu=gpu, num_steps=1).categories["parameter"] == 64 * 2**20
    )


def test_a_model_may_be_built_on_the_card() -> None:
    def build() -> nn.Module:
        return (
            nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, device="cuda"), embedding())
            .to("cuda")
            .cuda()
        )

    def loop(model: nn.Module, device: torch.device) -> Step:
        return lambda: model.zero_grad()

    parameters = fitune.predict_loop(build, loop, gpu=CARD).categories["parameter"]
    assert parameters == 4 * MIB + 100 * WIDTH * 4


def llama(attention: str) -> Callable[[], nn.Module]:
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
    )
    return lambda: LlamaForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention
    )


def train(lengths: list[int] | None = None) -> Callable[[nn.Module, torch.device], Step]:
    def loop(model: nn.Module, device: torch.device) -> Step:
        ids = torch.zeros((2, 64), dtype=torch.int64)
        seen = torch.arange(64) < torch.tensor(lengths or [64, 64])[:, None]

        def step() -> None:
            model(
                input_ids=ids.to(device), attention_mask=seen.long().to(device)
            ).logits.sum().backward()

        return step

    return loop


def test_generation_ends_at_its_length() -> None:
    def loop(model: Any, device: torch.device) -> Step:
        ids = torch.ones((2, 4), dtype=torch.int64, device=device)
        return lambda: model.generate(
            ids, max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=0
        )

    token = 2 * 256 * 2  # of two rows
    assert births(record(loop, llama("sdpa")), "aten.embedding") == [4 * token, token, token]


def test_flash_attention_2_is_recorded_where_its_package_is_not_installed() -> None:
    whole = births(
        record(train(), llama("flash_attention_2")), "_scaled_dot_product_flash_attention_backward"
    )
    assert whole == births(
        record(train(), llama("sdpa")), "_scaled_dot_product_flash_attention_backward"
    )


def test_rows_with_padding_go_through_the_kernel_for_several_lengths() -> None:
    trace = record(train([10, 20]), llama("flash_attention_2"))
    assert 30 * 256 * 2 in births(trace, "_varlen_attn")


def test_what_a_recording_imports_stays_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second import costs its time again, and gives other classes."""
    (tmp_path / "needed_by_a_loop.py").write_text("import flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    with flash_package(CudaTarget()):
        needed = import_module("needed_by_a_loop")
    assert import_module("needed_by_a_loop") is needed
    assert "flash_attn" not in sys.modules


def test_flash_attn_on_a_card_before_ampere_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs compute capability 8\.0, but this card has 7\.5"):
        fitune.predict_loop(llama("flash_attention_2"), train(), gpu="T4")


def four_bits(double: bool) -> Callable[[], nn.Module]:
    layers = pytest.importorskip("bitsandbytes").nn
    return lambda: nn.Sequential(
        embedding(),
        layers.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4", compress_statistics=double),
    )


def backward(model: nn.Module, device: torch.device) -> Step:
    model.to(device)
    return lambda: model(torch.zeros(2, dtype=torch.int64, device=device)).sum().backward()


def test_layers_of_bitsandbytes_are_packed() -> None:
    packed, scales = WIDTH**2 // 2, WIDTH**2 // 64
    tables = 1024 + 3 * 512  # 256, 64 and 16 float32 and an offset, in blocks of 512 bytes
    parameters = fitune.predict_loop(four_bits(double=True), backward, gpu=CARD).categories[
        "parameter"
    ]
    assert parameters == 100 * WIDTH * 4 + packed + scales + tables


def test_another_4_bit_format_is_refused() -> None:
    with pytest.raises(UsageError, match="nf4 with double quantisation, but 1 has nf4, single"):
        fitune.predict_loop(four_bits(double=False), backward, gpu=CARD)
