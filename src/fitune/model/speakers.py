"""Load what `fitune chat` talks with: a run's model, and its base model for comparison."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fitune.config import ModelConfig
from fitune.errors import UsageError
from fitune.machine.process_memory import choose_device
from fitune.model.answer import Speaker, chat_template
from fitune.model.load import load_model
from fitune.model.peft_parts import PeftModel
from fitune.model.precision import device_precision
from fitune.model.saved import load_directory, run_base, saved_weights
from fitune.run.directory import check_run_files, open_run

#: A directory with one of these is a model, not a run.
_MODEL_FILES = ("config.json", "adapter_config.json", "*.gguf")


def open_speakers(
    path: Path,
    *,
    weights: str | None,
    with_base: bool,
    template: str | None,
    trust_remote_code: bool,
) -> Sequence[tuple[str, Speaker]]:
    """Return the name of each model and the model: of a run, or of an exported directory or file.

    weights: best or last of a run.
    template: a Jinja chat template file, instead of the model's own.

    Raises UsageError or one of its kinds if something is missing.
    """
    is_run = path.is_dir() and not any(any(path.glob(name)) for name in _MODEL_FILES)
    if is_run:
        run = open_run(path)
        check_run_files(run, deep=True)
        base = run_base(run, trust_remote_code=trust_remote_code)
        directory = saved_weights(run, weights)
    else:
        if weights is not None:
            raise UsageError(f"{path} is a model and no run: drop --weights")
        base = ModelConfig(source=str(path), trust_remote_code=trust_remote_code)
        directory = path
    model, tokenizer = load_directory(directory, base=base)
    speaker = Speaker(
        _ready(model), tokenizer, chat_template(tokenizer, template, source=directory)
    )
    speakers = [("tuned", speaker)]
    if not with_base:
        return speakers
    if isinstance(model, PeftModel):
        other = Speaker(model, tokenizer, speaker.template, without_adapters=True)
    elif is_run:
        plain = load_model(base.model_copy(update={"method": "full"}), torch.device("cpu"))
        other = Speaker(_ready(plain), tokenizer, speaker.template)
    else:
        raise UsageError(f"{path} does not say which model it was made of: drop --base")
    return [("base", other), *speakers]


def _ready(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """Move the model to the card, if there is one, in bfloat16 where the card computes in it."""
    device = choose_device()
    if device.type == "cuda" and device_precision(device)[1]:
        # Not the buffers: rotary frequencies need float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(device).eval()
