"""`fitune export`: a run's weights for use elsewhere."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from fitune.cli.output import make_directory, print_text
from fitune.config import ModelConfig, read_config
from fitune.errors import RunDirectoryError
from fitune.run.directory import RunDirectory, check_files, open_run


def export(
    run: Annotated[Path, Parameter(help="the directory of a run")],
    *,
    to: Annotated[Literal["hf", "minimind"], Parameter(help="hf: a whole transformers directory; minimind: a .pth")],
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), help="where to; must not exist yet")] = None,
    weights: Annotated[Literal["best", "last"] | None, Parameter(help="best where there is one, else last")] = None,
    exact: Annotated[bool, Parameter(help="keep the number format (minimind: float16 is usual)")] = False,
) -> None:
    """Write a run's weights as a transformers directory with adapters merged, or as minimind's .pth."""
    opened = open_run(run)
    check_files(opened, deep=True)
    source = opened.path / (weights or ("best" if opened.best.is_dir() else "last"))
    if not source.is_dir():
        raise RunDirectoryError(f"{opened.path} has no {source.name}/ yet: let the run save once")
    target = output or opened.path / ("export-hf" if to == "hf" else "export-minimind.pth")
    if target.exists():
        raise RunDirectoryError(f"{target} exists: give another place with -o, or remove it yourself")
    from fitune.model.save import export_minimind, save_model

    model, tokenizer = _load(opened, source)
    make_directory(target.parent, flag="-o")
    if to == "hf":
        save_model(model, target, tokenizer=tokenizer, merge=True)
    elif exact:
        export_minimind(model, target, dtype=None)
    else:
        export_minimind(model, target)
    print_text(target)


def _load(run: RunDirectory, weights: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of saved weights; adapters stand on the base model that the run was configured with."""
    import torch

    from fitune.model.load import load_model, load_tokenizer
    from fitune.model.lora import load_adapters

    base = read_config(run.config).config.model
    cpu = torch.device("cpu")
    if (weights / "adapter_config.json").is_file():
        return load_adapters(load_model(base.model_copy(update={"method": "full"}), cpu), weights), load_tokenizer(base)
    saved = ModelConfig(source=str(weights), trust_remote_code=base.trust_remote_code)
    return load_model(saved, cpu), load_tokenizer(saved)
