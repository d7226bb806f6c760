"""Control Python code that comes with a model: it runs only with model.trust_remote_code.

`auto_map` in config.json names that code. Without the switch, a model of a type that transformers
knows is built from transformers' class, and any other model is refused. With it, the same class of
the model's own code is used for a plan and for the run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

from fitune.data.hub import hub_is_known
from fitune.errors import ModelError

SWITCH = "model.trust_remote_code"
_MODEL = "AutoModelForCausalLM"


def drop_references(config: PretrainedConfig) -> None:
    """Remove the names of code from a configuration, so that nothing that gets it runs any."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        vars(part or config).pop("auto_map", None)


def own_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class in the model's own code, which runs here; None if none is named.

    The code of a local path is taken from that path and from the hub's cache, never from the
    network. Raises ModelError if there is no such class.
    """
    names = getattr(config, "auto_map", None)
    reference = names.get(_MODEL) if isinstance(names, Mapping) else None
    if reference is None:
        return None
    source = config.name_or_path
    try:
        found: Any = get_class_from_dynamic_module(
            reference, source, local_files_only=Path(source).exists() or not hub_is_known()
        )
        if not issubclass(found, PreTrainedModel):
            raise TypeError(f"{reference} is no model class of transformers")
        return add_generation_mixin_to_remote_model(found)  # type: ignore[no-any-return]
    # The model's code may raise anything.
    except Exception as error:
        first = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(
            f"{source} names {reference} as its own code, which cannot be loaded ({first}): set "
            f"{SWITCH}=false for "
            "the class of transformers, or get the whole repository"
        ) from error


def named_code(*contents: Mapping[str, object]) -> list[str]:
    """Return the classes of a model's own code that these JSON files name."""
    found: dict[str, None] = {}
    for content in contents:
        names = content.get("auto_map")
        for value in names.values() if isinstance(names, Mapping) else [names]:
            for name in value if isinstance(value, list | tuple) else [value]:
                if isinstance(name, str):
                    found[name] = None
    return list(found)
