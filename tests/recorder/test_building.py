"""What a model's constructor reads, and the weights it loads, neither end a prediction nor need memory; what cannot be
predicted is said with the way out."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import fitune
from fitune.errors import UsageError
from tiny_models import TINY_LLAMA

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # peft asks by that name
    "ignore:Failed to load the CUDA extension:UserWarning",  # BOFT's own, which it does without
    "ignore:Setting boft_n_butterfly_factor:UserWarning",
)
WIDTH = 64
Build = Callable[[], Any]


def llama() -> Any:
    return LlamaForCausalLM(TINY_LLAMA)


def loop(model: nn.Module, device: torch.device) -> Callable[[], Any]:
    model.to(device)
    optimizer = torch.optim.AdamW(each for each in model.parameters() if each.requires_grad)

    def step() -> None:
        ids = torch.randint(0, 8, (2, 16), device=device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak(build: Build, gpu: str = "RTX 4090") -> int:
    return fitune.predict_loop(build, loop, gpu=gpu).peak_allocated_bytes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The model's directory with a state dict and adapters beside."""
    directory = tmp_path
    llama().save_pretrained(directory)
    torch.save(llama().state_dict(), directory / "model.pt")
    peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(
        directory / "adapters"
    )
    return directory


@pytest.mark.parametrize(
    "options", [{}, {"device_map": "cuda"}, {"device_map": "auto"}, {"device_map": {"": 0}}]
)
def test_from_pretrained_needs_no_weights(options: dict[str, Any], saved: Path) -> None:
    assert peak(lambda: AutoModelForCausalLM.from_pretrained(saved, **options)) == peak(llama)


def test_weights_that_a_constructor_loads_are_shapes(saved: Path) -> None:
    def from_state_dict() -> Any:
        model = llama()
        model.load_state_dict(torch.load(saved / "model.pt"))
        return model

    def from_safetensors() -> Any:  # read straight to a card that is not there it ended the process
        model = llama()
        model.load_state_dict(load_file(saved / "model.safetensors", device="cuda"), strict=False)
        return model

    assert peak(from_state_dict) == peak(from_safetensors) == peak(llama)


def test_adapters_that_a_constructor_loads_are_those_that_it_would_make(saved: Path) -> None:
    made = peak(lambda: peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM")))
    assert (
        peak(lambda: peft.PeftModel.from_pretrained(llama(), saved / "adapters", is_trainable=True))
        == made
    )


def test_a_constructor_reads_what_it_computed_from_constants() -> None:
    read: list[Any] = []

    def build() -> Any:
        read[:] = [
            [rate.item() for rate in torch.linspace(0, 0.5, 3)],
            torch.arange(4)[torch.tensor([True, False, True, False])].tolist(),
            torch.ones(2, 2).triu().numpy().sum(),
            torch.as_tensor(np.arange(3)).max().item(),
        ]
        return llama()

    peak(build)
    assert read == [[0.0, 0.25, 0.5], [0, 2], 3.0, 2]


def test_the_programs_own_random_numbers_are_not_drawn() -> None:
    before = torch.get_rng_state()
    peak(llama)
    assert torch.equal(before, torch.get_rng_state())


Q = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
TUNERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "BOFT": lambda: peft.BOFTConfig(**Q),
    "UniLoRA": lambda: peft.UniLoraConfig(**Q),
    "LoHa": lambda: peft.LoHaConfig(**Q, r=4),
    "LoKr": lambda: peft.LoKrConfig(**Q, r=4),
    "PiSSA": lambda: peft.LoraConfig(**Q, init_lora_weights="pissa"),
}


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_tuners_that_read_values_are_predicted(tuner: str, gpu: str) -> None:
    """Their adapters and optimizer states come to what they hold."""

    def build() -> Any:
        return peft.get_peft_model(llama(), TUNERS[tuner]())

    frozen = sum(each.nbytes for each in llama().parameters())
    assert frozen < peak(build, gpu)


def imports_what_is_not_there() -> Any:
    import no_such_package_as_this  # type: ignore[import-not-found]

    return no_such_package_as_this


def opaque() -> Any:
    library = torch.library.Library("fitune_test", "FRAGMENT")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", torch.clone, "CPU")

    class Opaque(nn.Linear):
        kept = library

        def forward(self, **batch: Any) -> Any:
            return torch.ops.fitune_test.opaque(torch.zeros(2))

    return Opaque(2, 2)


def pointing() -> Any:
    class Pointing(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            self.lm_head.weight.untyped_storage().data_ptr()

    return Pointing(TINY_LLAMA)


def in_8_bits() -> Any:
    model = llama()
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model.model.layers[0].mlp.up_proj = bitsandbytes.nn.Linear8bitLt(
        64, 128, has_fp16_weights=False
    )
    return model


def tuned(config: Callable[[], peft.PeftConfig]) -> Build:
    return lambda: peft.get_peft_model(llama(), config())


SAID: dict[str, tuple[Build, str]] = {
    "import": (
        imports_what_is_not_there,
        r"building the model needs a package .*no_such_package_as_this.*: install",
    ),
    "targets": (
        tuned(lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["nope"])),
        r"fails in PEFT .*Target modules.*: mend the configuration of the adapters",
    ),
    "unknown": (
        tuned(lambda: peft.LoraConfig(**Q, init_lora_weights="nope")),
        r"fails in PEFT .*: mend the configuration of the adapters",
    ),
    "SHiRA": (
        tuned(lambda: peft.ShiraConfig(**Q, r=1)),
        r"PEFT's SHiRA is not predicted, because it trains sparse tensors. Predict LoRA",
    ),
    "FRoD": (
        tuned(lambda: peft.FrodConfig(**Q, progressbar=False)),
        r"PEFT's FRoD is not predicted, because it computes with sparse tensors. Predict LoRA",
    ),
    "AdaMSS": (
        tuned(lambda: peft.AdamssConfig(**Q)),
        r"PEFT's AdaMSS is not predicted, because the shapes of its adapters follow from the values",
    ),
    "operator": (opaque, r"the step calls the operator fitune_test.opaque.*: register them"),
    "pointer": (
        pointing,
        r"the step reads the memory of a tensor at test_building.py:\d+ .*: leave that out",
    ),
    "8 bits": (
        in_8_bits,
        r"up_proj is a Linear8bitLt of bitsandbytes, which is not predicted: use 4-bit layers",
    ),
}


@pytest.mark.filterwarnings("ignore:.*bitsandbytes|.*_check_is_size:")
@pytest.mark.parametrize("case", SAID)
def test_what_is_not_predicted_is_said_with_the_way_out(case: str) -> None:
    build, said = SAID[case]
    with pytest.raises(UsageError, match=said):
        peak(build)


def test_sparse_gradients_are_not_predicted_and_that_is_said() -> None:
    def sparse(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        model.to(device)
        return lambda: model(torch.arange(4, device=device)).sum().backward()

    with pytest.raises(UsageError, match="makes a sparse tensor"):
        fitune.predict_loop(lambda: nn.Embedding(8, 8, sparse=True), sparse, gpu="RTX 4090")


@torch.compile(fullgraph=True)
def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2


class Compiled(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.activation = nn.Linear(WIDTH, WIDTH), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.up(x))


@pytest.mark.parametrize("gpu", ["RTX 4090", "cpu"])
def test_a_function_that_was_compiled_where_it_is_defined_is_said_to_be(gpu: str) -> None:
    def run(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        model.to(device)
        return lambda: model(torch.randn(8, WIDTH, device=device)).sum().backward()

    plain: Callable[[torch.Tensor], torch.Tensor] = doubled._torchdynamo_orig_callable  # type: ignore[attr-defined]
    compiled, eager = (
        fitune.predict_loop(partial(Compiled, each), run, gpu=gpu) for each in (doubled, plain)
    )
    assert compiled.peak_allocated_bytes == eager.peak_allocated_bytes
    assert any("torch.compile is not predicted" in line for line in compiled.assumptions)
    assert not any("torch.compile" in line for line in eager.assumptions)


def test_files_that_a_loop_reads_are_read(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(WIDTH, WIDTH)}, tmp_path / "x.safetensors")
    torch.save({"weight": torch.zeros(WIDTH, WIDTH)}, tmp_path / "x.pt")

    def reading(
        model: nn.Module, device: torch.device, *, read: Callable[[], Any]
    ) -> Callable[[], Any]:
        model.to(device)
        kept = read()
        return lambda: (model(torch.randn(8, WIDTH, device=device)).sum().backward(), kept)

    def peak_of(read: Callable[[], Any]) -> int:
        return fitune.predict_loop(
            lambda: nn.Linear(WIDTH, WIDTH), partial(reading, read=read), gpu="RTX 4090"
        ).peak_allocated_bytes

    nothing = peak_of(lambda: None)
    assert peak_of(lambda: torch.load(tmp_path / "x.pt")) == nothing
    for on_card in (
        lambda: torch.load(tmp_path / "x.pt", map_location="cuda"),
        lambda: load_file(tmp_path / "x.safetensors", device="cuda"),
    ):
        assert peak_of(on_card) == nothing + 4 * WIDTH * WIDTH


def test_what_accelerate_found_out_ends_with_the_prediction() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests
    before = dict(PartialState._shared_state)

    def accelerated(model: nn.Module, device: torch.device) -> Callable[[], Any]:
        accelerator = Accelerator(mixed_precision="bf16")
        prepared = accelerator.prepare(model)
        return lambda: accelerator.backward(prepared(torch.randn(8, WIDTH, device=device)).sum())

    fitune.predict_loop(lambda: nn.Linear(WIDTH, WIDTH), accelerated, gpu="RTX 4090")
    assert PartialState._shared_state == before
    assert "accelerate.state" in sys.modules
