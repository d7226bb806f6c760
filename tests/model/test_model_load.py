"""model/load.py, presets.py and minimind.py: every source becomes a model, or one clear sentence."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, PretrainedConfig

from fitune.config import ModelConfig, ShapeConfig
from fitune.errors import ModelError
from fitune.model.load import build_model, count_parameters, load_config, load_model, load_tokenizer
from fitune.model.source import PRESETS
from fitune.recorder.building import OnMeta
from tiny_models import TINY_LLAMA, TINY_MOE, TINY_QWEN3, save_tokenizer

CPU, META = torch.device("cpu"), torch.device("meta")


def write_pth(
    path: Path, config: PretrainedConfig, *, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """A minimind file with random weights, experts one by one as minimind names them."""
    model = build_model(copy.deepcopy(config), seed=1)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(tensor):
                gate, up = expert.to(dtype).chunk(2)
                stem = f"{name.removesuffix('gate_up_proj')}{number}"
                tensors |= {
                    f"{stem}.gate_proj.weight": gate.clone(),
                    f"{stem}.up_proj.weight": up.clone(),
                }
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            tensors |= {
                f"{stem}{i}.down_proj.weight": expert.to(dtype) for i, expert in enumerate(tensor)
            }
        else:
            tensors[name] = tensor.to(dtype)
    torch.save(tensors, path)
    return tensors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build_model(copy.deepcopy(TINY_QWEN3), seed=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("minimind-3", 63.9),
        ("minimind-3-moe", 198.4),
        ("minimind2", 104.0),
        ("minimind2-small", 25.8),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(preset: str, millions: float) -> None:
    total, trainable = count_parameters(load_model(ModelConfig(source=preset), META))
    assert round(total / 1e6, 1) == millions
    assert trainable == total


def test_one_expert_in_four_works_on_a_token_of_the_sparse_preset() -> None:
    model = load_model(ModelConfig(source="minimind-3-moe"), META)
    experts = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name
    )
    active = count_parameters(model)[0] - experts * 3 // 4
    assert round(active / 1e6) == 64


def test_a_preset_is_a_function_of_the_seed_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_model(copy.deepcopy(TINY_QWEN3), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("device", [META, CPU], ids=str)
def test_sixteen_bit_models_keep_their_rotary_frequencies_in_float32(device: torch.device) -> None:
    with device:
        model = build_model(copy.deepcopy(TINY_QWEN3), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_a_model_on_the_meta_device_reads_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    model = load_model(ModelConfig(source=str(directory)), META)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_directory_gives_back_its_weights(directory: Path) -> None:
    model = load_model(ModelConfig(source=str(directory)), CPU)
    assert torch.equal(
        model.lm_head.weight, build_model(copy.deepcopy(TINY_QWEN3), seed=1).lm_head.weight
    )
    assert model.training


def test_random_init_ignores_the_weights_of_a_directory(directory: Path) -> None:
    model = load_model(ModelConfig(source=str(directory), init="random"), CPU)
    assert torch.equal(
        model.lm_head.weight, build_model(copy.deepcopy(TINY_QWEN3), seed=0).lm_head.weight
    )


@pytest.mark.parametrize(
    "config", [TINY_QWEN3, TINY_LLAMA, TINY_MOE], ids=lambda config: config.model_type
)
def test_a_pth_file_computes_what_its_model_computed(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    write_pth(tmp_path / "sft.pth", config, dtype=torch.float32)
    source = ModelConfig(
        source=str(tmp_path / "sft.pth"), shape=ShapeConfig(num_heads=config.num_attention_heads)
    )
    tokens = torch.arange(12)[None]
    expected = build_model(copy.deepcopy(config), seed=1).eval()(tokens).logits
    assert torch.allclose(load_model(source, CPU).eval()(tokens).logits, expected, atol=1e-6)


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    tensors = write_pth(tmp_path / "sft.pth", TINY_QWEN3)
    model = load_model(ModelConfig(source=str(tmp_path / "sft.pth")), CPU)
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].float())


def test_names_of_compiled_and_distributed_models_are_understood(tmp_path: Path) -> None:
    tensors = write_pth(tmp_path / "sft.pth", TINY_QWEN3)
    torch.save(
        {"model": {f"module._orig_mod.{k}": v for k, v in tensors.items()}, "step": 3},
        tmp_path / "resume.pth",
    )
    model = load_model(ModelConfig(source=str(tmp_path / "resume.pth")), CPU)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"].float())


@pytest.mark.parametrize("preset", ["minimind2", "minimind2-small"])
def test_the_heads_of_a_published_llama_shape_need_no_flag(preset: str, tmp_path: Path) -> None:
    expected = load_config(ModelConfig(source=preset))
    with META:
        tensors = build_model(copy.deepcopy(expected)).state_dict()
    torch.save(
        {name: torch.zeros(1).expand(tensor.shape) for name, tensor in tensors.items()},
        tmp_path / "m.pth",
    )
    assert load_config(ModelConfig(source=str(tmp_path / "m.pth"))).to_dict() == expected.to_dict()


def test_an_unknown_number_of_heads_names_the_flag(tmp_path: Path) -> None:
    write_pth(tmp_path / "sft.pth", TINY_LLAMA)
    with pytest.raises(ModelError, match=r"model\.shape\.num_heads"):
        load_config(ModelConfig(source=str(tmp_path / "sft.pth")))


def test_a_shape_flag_against_the_tensors_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_pth(tmp_path / "sft.pth", TINY_QWEN3)
    source = ModelConfig(source=str(tmp_path / "sft.pth"), shape=ShapeConfig(hidden_size=512))
    with pytest.raises(ModelError, match=r"hidden_size 512, but .* have 32"):
        load_config(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            r"1 missing \(model.layers.1.mlp.up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}),
            r"1 unexpected \(model.extra.weight",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}),
            r"\[7\] in the file and \[32\]",
        ),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_a_pth_file_is_loaded_strictly(change, message: str, tmp_path: Path) -> None:
    tensors = write_pth(tmp_path / "sft.pth", TINY_QWEN3)
    change(tensors)
    torch.save(tensors, tmp_path / "sft.pth")
    with pytest.raises(ModelError, match=message):
        load_model(ModelConfig(source=str(tmp_path / "sft.pth")), CPU)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pth_file_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ModelError, match="pickled code"):
        load_config(ModelConfig(source=str(tmp_path / "bad.pth")))
    assert not (tmp_path / "pwned").exists()


def refused(source: str, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig.model_validate({"source": source} | options), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_pth_file_is_refused(tmp_path: Path) -> None:
    write_pth(tmp_path / "sft.pth", TINY_QWEN3)
    content = (tmp_path / "sft.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    assert "cut.pth" in refused(str(tmp_path / "cut.pth"))


def test_damaged_safetensors_are_refused(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged or incomplete" in refused(str(directory))


def test_a_directory_without_some_weights_is_refused(tmp_path: Path) -> None:
    build_model(copy.deepcopy(TINY_LLAMA)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    assert "missing (model.layers.2" in refused(str(tmp_path))


def test_a_config_that_contradicts_itself_is_refused(directory: Path) -> None:
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    assert "(3) must be equal to the number of `layer_types` (2)" in refused(str(directory))


def test_a_directory_without_weights_names_random_init(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "model.init=random" in refused(str(directory))


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refused(str(tmp_path))


def test_a_damaged_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    assert "cannot be read" in refused(str(tmp_path))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    assert "an encoder" in refused(str(tmp_path))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "somethingnew"}')
    assert "does not know" in refused(str(tmp_path))


def test_code_beside_the_weights_is_not_run_unless_asked(directory: Path) -> None:
    config = (directory / "config.json").read_text().replace('"qwen3"', '"mine"')
    config = config.replace(
        "{", '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},', 1
    )
    (directory / "config.json").write_text(config)
    (directory / "own.py").write_text("raise SystemExit('ran')")
    assert "model.trust_remote_code=true" in refused(str(directory))


@pytest.mark.parametrize(
    "source", ["./nowhere", "/no/such/model", "some/where/deep", "gone.gguf", "gone.pth"]
)
def test_a_path_that_does_not_exist_is_said_without_asking_the_hub(source: str) -> None:
    assert "does not exist" in refused(source)


def test_a_hub_model_that_is_not_cached_says_so_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not cached and the hub cannot be reached" in refused("someone/some-model")


@pytest.mark.parametrize("source", PRESETS)
def test_a_preset_without_tokenizer_names_the_key(source: str) -> None:
    with pytest.raises(ModelError, match=r"set model\.tokenizer"):
        load_tokenizer(ModelConfig(source=source))


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, num_extra=6400)
    with pytest.raises(
        ModelError, match=r"ids up to 6,\d\d\d, but minimind-3 has an embedding of 6,400 rows"
    ):
        load_tokenizer(ModelConfig(source="minimind-3", tokenizer=str(tmp_path)))


def test_a_tokenizer_without_padding_pads_with_a_token_that_it_has(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(source="minimind-3", tokenizer=str(tmp_path)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(ModelConfig(source="minimind-3", tokenizer=str(tmp_path)))


def test_a_directory_without_tokenizer_names_the_key(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"set model\.tokenizer"):
        load_tokenizer(ModelConfig(source=str(directory)))


MEASURE = """
import sys, torch
from fitune.config import ModelConfig
from fitune.model.load import load_model

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load_model(ModelConfig(source="minimind2-small"), torch.device("meta"))  # imports
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = load_model(ModelConfig(source=sys.argv[1]), torch.device("cpu"))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1)  # as an optimizer does: every page is really there
print((status("VmHWM") - before) / sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_loading_peaks_at_the_weights_and_not_at_twice_their_size(tmp_path: Path) -> None:
    build_model(load_config(ModelConfig(source="minimind2-small"))).save_pretrained(tmp_path)
    source = Path(__file__).parents[2] / "src"
    printed = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(re.findall(r"[\d.]+", printed.stdout)[-1]) < 1.3


def test_a_saved_model_is_loaded_by_plain_transformers(directory: Path) -> None:
    model = load_model(ModelConfig(source=str(directory)), CPU)
    model.save_pretrained(directory.parent / "again")
    plain = AutoModelForCausalLM.from_pretrained(directory.parent / "again")
    assert plain.config._attn_implementation == "sdpa"


def test_layers_that_the_configuration_leaves_out_are_refused(tmp_path: Path) -> None:
    build_model(copy.deepcopy(TINY_LLAMA)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    )
    assert "unexpected (model.layers.1" in refused(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.extra.weight"]
)
def test_a_part_of_a_layer_that_the_architecture_lacks_is_refused(
    name: str, directory: Path
) -> None:
    add_tensor(directory, name)
    assert f"1 unexpected ({name})" in refused(str(directory))


@pytest.mark.parametrize(
    "name", ["score.weight", "vision_tower.encoder.layers.0.weight", "mtp.fc.weight"]
)
def test_what_is_besides_the_layers_is_left_out_and_told(name: str, directory: Path) -> None:
    add_tensor(directory, name)
    told: list[str] = []
    load_model(ModelConfig(source=str(directory)), CPU, notify=told.append)
    (sentence,) = told
    assert f"1 tensors that its architecture has no place for ({name}): left out" in sentence


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attn.masked_bias"]
)
def test_tensors_that_a_model_computes_are_passed_over(name: str, directory: Path) -> None:
    add_tensor(directory, name)
    told: list[str] = []
    load_model(ModelConfig(source=str(directory)), CPU, notify=told.append)
    assert not told


def add_tensor(directory: Path, name: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(
        tensors | {name: torch.zeros(2)}, directory / "model.safetensors", metadata={"format": "pt"}
    )


def test_a_pth_is_read_while_a_step_is_recorded_on_the_meta_device(tmp_path: Path) -> None:
    write_pth(tmp_path / "sft.pth", TINY_QWEN3)
    source = ModelConfig(source=str(tmp_path / "sft.pth"))
    with torch.device("meta"), OnMeta():
        assert load_config(source).num_hidden_layers == TINY_QWEN3.num_hidden_layers
        model = load_model(source, torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
