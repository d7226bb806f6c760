"""Python code that comes with a model (`auto_map` in its config.json), which runs only where
model.trust_remote_code says so.

Where it does not, a model of a type that transformers knows is built from transformers' class, and one of another type
is refused. Where it does, the same class of the model's own is taken for a plan and for the run.
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
    """The configuration names no code any more, so that nothing that is given it runs any."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        vars(part or config).pop("auto_map", None)


def own_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The model class that the configuration names in code of its own, which runs here; None where it names none.

    Raises ModelError where there is no such class. A local path's code is taken from that path and from the hub's
    cache, never from the network.
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
    except Exception as error:  # code of somebody else, and every name in it
        first = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(
            f"{source} names {reference} as its own code, which cannot be loaded ({first}): set {SWITCH}=false for "
            "the class of transformers, or get the whole repository"
        ) from error


def named_code(*contents: Mapping[str, Any]) -> list[str]:
    """The classes of a model's own code that these JSON files name."""
    found: dict[str, None] = {}
    for content in contents:
        names = content.get("auto_map")
        for value in names.values() if isinstance(names, Mapping) else [names]:
            for name in value if isinstance(value, list | tuple) else [value]:
                if isinstance(name, str):
                    found[name] = None
    return list(found)
