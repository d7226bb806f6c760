"""Python code that comes with a model runs only where model.trust_remote_code says so."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import hub as transformers_hub

import fitune
from fitune.cli.app import main
from fitune.config import ModelConfig
from fitune.errors import ModelError
from fitune.model.load import build_model, load_config, load_model, load_tokenizer
from fitune.model.lora import load_adapters
from fitune.model.save import save_model
from fitune.planning.stated import code_note
from tiny_models import TINY_LLAMA, save_tokenizer

CPU, META = torch.device("cpu"), torch.device("meta")
MODEL_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    pass
class Evil(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
class EvilProcessor:
    pass
def generate(model, *args, **kwargs):
    return None
"""


def write_model(
    directory: Path, mark: Path, *, auto_map: dict[str, str] | None = None, weights: bool = True
) -> None:
    """A tiny llama whose every file names code of its own, which touches `mark` when it runs."""
    build_model(copy.deepcopy(TINY_LLAMA)).save_pretrained(directory)
    save_tokenizer(directory)
    _add(directory / "config.json", {"auto_map": MODEL_MAP if auto_map is None else auto_map})
    _add(
        directory / "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}},
    )
    _add(directory / "processor_config.json", {"auto_map": {"AutoProcessor": "evil.EvilProcessor"}})
    _add(
        directory / "preprocessor_config.json",
        {"auto_map": {"AutoImageProcessor": "evil.EvilProcessor"}},
    )
    _add(directory / "generation_config.json", {"custom_generate": str(directory)})
    (directory / "custom_generate").mkdir()
    for place in (directory / "evil.py", directory / "custom_generate" / "generate.py"):
        place.write_text(EVIL.format(mark=str(mark)))
    if not weights:
        (directory / "model.safetensors").unlink()


def _add(path: Path, keys: dict[str, object]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | keys))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """There once the model's code has run."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


@pytest.fixture
def model(tmp_path: Path, mark: Path) -> Path:
    write_model(tmp_path / "model", mark)
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)


def write_data(directory: Path) -> Path:
    row = {
        "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    }
    (directory / "data.jsonl").write_text(f"{json.dumps(row)}\n" * 6)
    return directory / "data.jsonl"


ONE_CANDIDATE = ("--gpu", "cpu", "data.max_length=32", "batch.micro=1", "batch.accumulation=1", "loss=full",
                 "model.recompute=off")  # fmt: skip
USES: dict[str, Callable[[Path], object]] = {
    "plan of config.json": lambda model: main(["plan", str(model / "config.json"), *ONE_CANDIDATE]),
    "dry run": lambda model: main(
        ["train", "--model", str(model), "--data", str(write_data(model.parent)), "--dry-run", "data.max_length=32",
         "data.eval_fraction=0", "batch.effective=2", "train.steps=1"]
    ),
    "random weights": lambda model: load_model(ModelConfig(source=str(model), init="random"), CPU),
    "weights": lambda model: load_model(ModelConfig(source=str(model)), CPU),
    "meta": lambda model: load_model(ModelConfig(source=str(model)), META),
    "tokenizer": lambda model: load_tokenizer(ModelConfig(source=str(model))),
    "predict": lambda model: fitune.predict(
        {"model": {"source": str(model)}, "data": {"train": "x.jsonl", "max_length": 32}, "batch": {"effective": 1}},
        gpu="RTX 4090",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("use", USES)
def test_no_code_of_a_model_of_a_known_type_runs(use: str, model: Path, mark: Path) -> None:
    assert USES[use](model) not in (1, 2, 3)
    assert not mark.exists()


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("use", ["random weights", "weights", "meta", "predict"])
def test_code_of_another_repository_is_neither_fetched_nor_run(
    use: str, tmp_path: Path, mark: Path
) -> None:
    write_model(
        tmp_path / "model",
        mark,
        auto_map={key: f"owner/repo--{name}" for key, name in MODEL_MAP.items()},
    )
    assert USES[use](tmp_path / "model") not in (1, 2, 3)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("use", ["random weights", "meta", "predict"])
def test_a_config_alone_that_names_missing_code_is_a_model_of_its_type(
    use: str, model: Path, mark: Path
) -> None:
    for file in model.iterdir():
        if file.name != "config.json":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert USES[use](model) not in (1, 2, 3)


@pytest.mark.usefixtures("no_network")
def test_a_hub_model_in_the_cache_runs_no_code(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--evil"
    write_model(repository / "snapshots" / commit, mark)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for module in (constants, transformers_hub):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "cache"))
    monkeypatch.setattr("fitune.model.load.hub_is_known", lambda: False)
    source = ModelConfig(source="someone/evil")
    assert type(load_model(source, CPU)) is LlamaForCausalLM
    assert type(load_model(source, META)) is LlamaForCausalLM
    load_tokenizer(source)
    assert not mark.exists()


def test_code_that_was_ignored_is_named_with_the_switch(model: Path) -> None:
    note = code_note(ModelConfig(source=str(model)))
    assert note is not None
    assert "evil.Evil" in note
    assert "model.trust_remote_code=true" in note
    assert code_note(ModelConfig(source=str(model), trust_remote_code=True)) is None
    assert code_note(ModelConfig(source="minimind2")) is None


def test_plan_and_dry_run_say_that_code_was_ignored(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", str(model), *ONE_CANDIDATE])
    assert "evil.Evil" in "".join(capsys.readouterr().out.split())
    USES["dry run"](model)
    assert "evil.Evil" in capsys.readouterr().err


@pytest.mark.parametrize("use", ["weights", "meta", "random weights", "tokenizer"])
def test_a_type_that_only_the_models_code_knows_names_the_switch(
    use: str, model: Path, mark: Path
) -> None:
    _add(model / "config.json", {"model_type": "mine"})
    _add(model / "tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"})
    with pytest.raises(ModelError, match=r"own code.*model\.trust_remote_code=true"):
        USES[use](model)
    assert not mark.exists()


def test_a_known_type_that_is_no_language_model_names_the_switch_where_code_would_make_it_one(
    model: Path,
) -> None:
    _add(model / "config.json", {"model_type": "clip"})
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load_config(ModelConfig(source=str(model)))


@pytest.mark.parametrize(
    "auto_map", [MODEL_MAP, {"AutoModelForCausalLM": "evil.Evil"}], ids=["both", "model alone"]
)
def test_plan_and_train_take_the_class_of_the_code_that_is_trusted(
    auto_map: dict[str, str], tmp_path: Path, mark: Path
) -> None:
    write_model(tmp_path / "model", mark, auto_map=auto_map)
    source = ModelConfig(source=str(tmp_path / "model"), trust_remote_code=True)
    names = {type(load_model(source.model_copy(update=change), device)).__name__
             for device, change in ((META, {}), (CPU, {}), (CPU, {"init": "random"}))}  # fmt: skip
    assert names == {"Evil"}
    assert mark.exists()
    mark.unlink()
    assert (
        type(load_model(source.model_copy(update={"trust_remote_code": False}), META))
        is LlamaForCausalLM
    )


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "reference", ["gone.Evil", "evil.Gone", "owner/repo--evil.Evil", "nonsense", 7]
)
def test_trusted_code_that_cannot_be_loaded_is_one_sentence(reference: object, model: Path) -> None:
    _add(model / "config.json", {"auto_map": {"AutoModelForCausalLM": reference}})
    for change in ({}, {"init": "random"}):
        with pytest.raises(ModelError) as caught:
            load_model(
                ModelConfig(source=str(model), trust_remote_code=True).model_copy(update=change),
                CPU,
            )
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        load_model(ModelConfig(source=str(model), trust_remote_code=True), META)


def test_adapters_that_name_a_library_to_import_are_refused(model: Path, tmp_path: Path) -> None:
    source = ModelConfig(source=str(model), method="lora")
    save_model(load_model(source, CPU), tmp_path / "adapters", tokenizer=load_tokenizer(source))
    _add(
        tmp_path / "adapters" / "adapter_config.json",
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    )
    base = load_model(ModelConfig(source=str(model)), CPU)
    with pytest.raises(ModelError, match="megatron_c"):
        load_adapters(base, tmp_path / "adapters")


@pytest.mark.usefixtures("no_network")
def test_adapters_without_weights_are_not_looked_for_at_the_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelConfig(source=str(model), method="lora")
    save_model(
        load_model(source, CPU), tmp_path / "someone" / "adapters", tokenizer=load_tokenizer(source)
    )
    (tmp_path / "someone" / "adapters" / "adapter_model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load_adapters(load_model(ModelConfig(source=str(model)), CPU), Path("someone/adapters"))


def test_a_saved_model_names_no_code_that_it_was_not_built_with(
    model: Path, tmp_path: Path, mark: Path
) -> None:
    source = ModelConfig(source=str(model))
    save_model(load_model(source, CPU), tmp_path / "saved", tokenizer=load_tokenizer(source))
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert not mark.exists()
