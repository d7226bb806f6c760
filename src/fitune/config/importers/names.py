"""Map the argument names of other trainers to our keys, to answer an unknown key with ours.

The names of the tools whose files can be imported come from their tables (`importers.tools`). The
names listed here come from the argument lists of Unsloth and torchtune, and of earlier versions of
the tools, as of 2026.
"""

import re

from fitune.config.importers.reasons import ANSWERS
from fitune.config.importers.tools import TOOLS
from fitune.config.schema import RunConfig

_MORE = {
    "Unsloth": {
        "local_dataset": "data.train",
        "model_name": "model.source",
        "eval_split": "data.eval_fraction",
        "train_on_completions": "data.mask",
        "use_gradient_checkpointing": "model.recompute",
    },
    "torchtune": {
        "enable_activation_checkpointing": "model.recompute",
        "max_steps_per_epoch": "train.steps",
        "checkpoint_dir": "model.source",
        "clip_grad_norm": "optim.clip",
    },
    "ms-swift": {"total_batch_size": "batch.effective"},
    "minimind": {
        "save_interval": "train.save_every",
        "num_hidden_layers": "model.shape.num_layers",
        "use_moe": "model.shape.preset",
    },
    "transformers": {
        "adam_beta1": "optim.betas",
        "adam_beta2": "optim.betas",
        "eval_strategy": "train.eval_every",
        "save_strategy": "train.save_every",
        "eval_steps": "train.eval_every",
        "save_steps": "train.save_every",
        "run_name": "run.name",
        "torch_dtype": "model.precision",
        "mixed_precision": "model.precision",
        "weight_decay": "optim.weight_decay",
    },
    "axolotl": {"chat_template": "data.template"},
}


def _keys_of_other_tools() -> dict[str, tuple[str, str]]:
    """Return {name: (the tools that have it, our key)}, without the names of our sections."""
    found: dict[str, tuple[list[str], str]] = {}
    tables = [
        (tool.name, {name: row[0] for rows in tool.rows.values() for name, row in rows.items()})
        for tool in TOOLS.values()
    ]
    for tool, names in [*tables, *_MORE.items()]:
        for name, key in names.items():
            if name not in RunConfig.model_fields and "." not in name:
                found.setdefault(name, ([], key))[0].append(re.sub(r" (v1|2)$", "", tool))
    return {name: (", ".join(dict.fromkeys(tools)), key) for name, (tools, key) in found.items()}


KEYS_OF_OTHER_TOOLS = _keys_of_other_tools()
NAMES_OF_OTHER_TOOLS = (*KEYS_OF_OTHER_TOOLS, *ANSWERS)


def hint_for_name(name: str) -> str | None:
    """Return what fitune offers for another tool's argument, or None if no tool has that name.

    For 'cutoff_len': "the name in LLaMA-Factory; here it is 'data.max_length'".
    """
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain not in KEYS_OF_OTHER_TOOLS:
        return ANSWERS.get(plain)
    tools, key = KEYS_OF_OTHER_TOOLS[plain]
    return f"the name in {tools}; here it is '{key}'"
