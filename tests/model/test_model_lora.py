"""What applying adapters imports, and what it leaves behind."""

import copy
import subprocess
import sys
from importlib.util import find_spec

import pytest
from transformers import MambaConfig

from fitune.config import LoraConfig
from fitune.errors import ModelError
from fitune.model.load import build_model
from fitune.model.lora import apply_lora
from tiny_models import TINY_LLAMA

_ADAPT = """
import sys, torch
from fitune.config import LoraConfig, ModelConfig
from fitune.model.load import load_model
load_model(ModelConfig(source="minimind2-small", init="random", method="lora"), torch.device("meta"))
"""


def _after(line: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", _ADAPT + line], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_nor_for_a_checkpoint_or_an_export() -> None:
    code = "import sys, fitune.model.save, fitune.training.checkpoint.write; print('bitsandbytes' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        == "False"
    )


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_is_not_imported_for_adapters_and_still_there() -> None:
    line = (
        "compiler = 'torch._inductor.lowering' in sys.modules; "
        "from peft.import_utils import is_bnb_available; print(compiler, is_bnb_available())"
    )
    assert _after(line) == "False True"


@pytest.mark.parametrize(
    ("target", "tied", "sentence"),
    [
        (
            "lm_head",
            True,
            "names lm_head, the head, whose weight is also the embedding's: choose from down_proj",
        ),
        (
            "lm_head",
            False,
            "names lm_head, the head, which gets no adapter here: choose from down_proj",
        ),
        (
            "embed_tokens",
            True,
            "names embed_tokens, of the kind Embedding and no linear layer: choose",
        ),
        ("c_attn", True, "names c_attn, which this model does not have: choose"),
    ],
)
def test_a_target_without_adapters_is_refused_with_the_reason(
    target: str, tied: bool, sentence: str
) -> None:
    config = copy.deepcopy(TINY_LLAMA)
    config.tie_word_embeddings = tied
    model = build_model(config, seed=0)
    with pytest.raises(ModelError, match=sentence):
        apply_lora(model, LoraConfig(targets=(target, "q_proj")))


def test_more_directions_than_a_weight_has_are_refused() -> None:
    model = build_model(copy.deepcopy(TINY_LLAMA), seed=0)
    with pytest.raises(ModelError, match=r"lower model\.lora\.rank"):
        apply_lora(model, LoraConfig(rank=500, init="pissa"))


def test_layers_that_peft_refuses_are_not_among_all_linear() -> None:
    """A Mamba's out_proj is read by a kernel, past its adapter."""
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    adapted = apply_lora(build_model(config), LoraConfig(targets="all-linear"))
    assert sorted(adapted.peft_config["default"].target_modules) == ["dt_proj", "in_proj", "x_proj"]
