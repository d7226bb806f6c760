"""What applying adapters imports, and what it leaves behind."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

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
    code = "import sys, fitune.model.save, fitune.train.checkpoint; print('bitsandbytes' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("print('torch._inductor.lowering' in sys.modules)", "False"),
        ("from peft.import_utils import is_bnb_available; print(is_bnb_available())", "True"),
    ],
    ids=["adapters_need_no_compiler", "afterwards_peft_finds_bitsandbytes"],
)
def test_bitsandbytes_is_not_imported_for_adapters_and_still_there(line: str, expected: str) -> None:
    assert _after(line) == expected
