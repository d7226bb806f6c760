"""A vocabulary that grows, and layers that are trained whole beside adapters."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fitune.config import LoraConfig, ModelConfig
from fitune.errors import ModelError
from fitune.model.head import Head, decoder_and_head
from fitune.model.load import build_model, load_config, load_model, load_tokenizer
from fitune.model.lora import apply_lora, load_adapters, not_adapted
from fitune.model.save import save_model
from fitune.model.saved import load_directory
from tiny_models import TINY_LLAMA
from tiny_run import save_tiny_model

CPU = torch.device("cpu")
#: the tokenizer has 53 tokens and the model 64 rows, so 13 more tokens need more rows
NEW = tuple(f"<new{number}>" for number in range(13))


def settings(
    directory: Path, *, tied: bool, new_tokens: tuple[str, ...] = NEW, whole: tuple[str, ...] = ()
) -> ModelConfig:
    config = copy.deepcopy(TINY_LLAMA)
    config.tie_word_embeddings = tied
    return ModelConfig(
        source=str(save_tiny_model(directory / "tiny", config)),
        method="lora",
        new_tokens=new_tokens,
        lora=LoraConfig(rank=4, modules_to_save=whole),
    )


def trained_beside(model: torch.nn.Module) -> list[str]:
    return [
        name.removeprefix("base_model.model.").removeprefix("model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_and_old_rows_are_as_they_were(
    tied: bool, tmp_path: Path
) -> None:
    model = settings(tmp_path, tied=tied).model_copy(update={"method": "full"})
    plain = load_model(model.model_copy(update={"new_tokens": ()}), CPU)
    grown = load_model(model, CPU)
    assert load_config(model).vocab_size == grown.config.vocab_size == 128
    assert load_tokenizer(model).convert_tokens_to_ids(list(NEW)) == list(range(53, 66))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(plain, table)().weight, getattr(grown, table)().weight
        assert torch.equal(new[:53], old[:53])
        assert torch.allclose(new[53:], old[:53].mean(0).expand(75, -1), atol=1e-6)
    head, embedding = grown.get_output_embeddings(), grown.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


@pytest.mark.parametrize(
    ("tied", "whole", "trained"),
    [
        (True, (), ["embed_tokens.token_adapter.trainable_tokens_delta.default"]),
        (
            False,
            (),
            [
                "embed_tokens.token_adapter.trainable_tokens_delta.default",
                "lm_head.token_adapter.trainable_tokens_delta.default",
            ],
        ),
        (True, ("lm_head",), ["embed_tokens.modules_to_save.default.weight"]),
        (
            False,
            ("lm_head",),
            [
                "embed_tokens.token_adapter.trainable_tokens_delta.default",
                "lm_head.modules_to_save.default.weight",
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_what_is_trained_beside_adapters_is_saved_with_them_and_merged(
    tied: bool, whole: tuple[str, ...], trained: list[str], tmp_path: Path
) -> None:
    model = settings(tmp_path, tied=tied, whole=whole)
    tokenizer = load_tokenizer(model)
    adapted = load_model(model, CPU).eval()
    assert trained_beside(adapted) == trained
    assert not_adapted(adapted) is None
    assert trained_beside(load_model(model, torch.device("meta"))) == trained
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.tensor([[3, 53, 60, 4, 65]])
    expected = adapted(ids).logits
    save_model(adapted, tmp_path / "adapters", tokenizer=tokenizer)
    save_model(adapted, tmp_path / "merged", tokenizer=tokenizer, merge=True)
    again, again_tokenizer = load_directory(tmp_path / "adapters", base=model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    grown = load_model(model.model_copy(update={"method": "full"}), CPU)
    by_peft = PeftModel.from_pretrained(grown, str(tmp_path / "adapters")).eval()
    for loaded in (again.eval(), merged, by_peft):
        assert torch.allclose(loaded(ids).logits, expected, atol=2e-5)
    assert len(again_tokenizer) == len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 66
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied


def test_trained_copies_are_float32_beside_frozen_weights_in_16_bits() -> None:
    base: PreTrainedModel = build_model(copy.deepcopy(TINY_LLAMA), dtype=torch.bfloat16)
    adapted = apply_lora(base, LoraConfig(modules_to_save=("lm_head", "norm")))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    hidden = adapted.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert hidden.dtype == torch.bfloat16
    assert adapted(torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16
    assert isinstance(decoder_and_head(adapted), Head)


@pytest.mark.parametrize(
    ("new_tokens", "whole", "sentence"),
    [
        (("w7",), (), "names w7, which the tokenizer of .* has already"),
        ((), ("wte",), "names wte, which this model does not have"),
        ((), ("mlp",), "names mlp, which this model has as a block of layers"),
    ],
)
def test_what_cannot_be_added_is_refused(
    new_tokens: tuple[str, ...], whole: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    model = settings(tmp_path, tied=True, new_tokens=new_tokens, whole=whole)
    with pytest.raises(ModelError, match=sentence):  # noqa: PT012
        load_tokenizer(model)
        load_model(model, CPU)


def test_names_of_foreign_adapters_are_no_patterns(tmp_path: Path) -> None:
    """peft takes them as regular expressions, which can take forever."""
    model = settings(tmp_path, tied=True, new_tokens=(), whole=("lm_head",))
    save_model(load_model(model, CPU), tmp_path / "adapters", tokenizer=load_tokenizer(model))
    path = tmp_path / "adapters" / "adapter_config.json"
    path.write_text(path.read_text().replace('"embed_tokens"', '"(a+)+$"'))
    base = load_model(model.model_copy(update={"method": "full"}), CPU)
    with pytest.raises(ModelError, match="sets modules_to_save"):
        load_adapters(base, tmp_path / "adapters")
