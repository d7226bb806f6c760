"""Implement `fitune export`, which writes a run's weights for other programs."""

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fitune.cli.arguments import run_path
from fitune.cli.output import make_directory, print_text
from fitune.config import ModelConfig, read_config
from fitune.errors import RunDirectoryError, UsageError
from fitune.run.directory import RunDirectory, check_run_files, open_run


def export(
    run: Annotated[Path, Parameter(help="a run's directory or name")],
    *,
    to: Annotated[
        Literal["hf", "minimind", "pth"],
        Parameter(help="hf: a whole transformers directory; minimind, or pth: a .pth"),
    ],
    output: Annotated[
        Path | None, Parameter(name=("--output", "-o"), help="where to; must not exist yet")
    ] = None,
    weights: Annotated[
        Literal["best", "last"] | None, Parameter(help="best where there is one, else last")
    ] = None,
    trust_remote_code: Annotated[
        bool, Parameter(help="run Python code that comes with the run's model")
    ] = False,
    exact: Annotated[
        bool, Parameter(help="keep the number format (minimind: float16 is usual)")
    ] = False,
) -> None:
    """Write a run's weights as a transformers directory with merged adapters, or as a .pth file."""
    opened = open_run(run_path(run))
    check_run_files(opened, deep=True)
    source = opened.path / (weights or ("best" if opened.best.is_dir() else "last"))
    if not source.is_dir():
        raise RunDirectoryError(f"{opened.path} has no {source.name}/ yet: let the run save once")
    target = output or opened.path / ("export-hf" if to == "hf" else "export-minimind.pth")
    if target.exists():
        raise RunDirectoryError(
            f"{target} exists: give another place with -o, or remove it yourself"
        )
    from fitune.model.save import export_minimind, save_model

    model, tokenizer = _load(opened, source, trust_remote_code=trust_remote_code)
    make_directory(target.parent, flag="-o")
    if to == "hf":
        save_model(model, target, tokenizer=tokenizer, merge=True, ends=_ends(opened))
    elif exact:
        export_minimind(model, target, dtype=None)
    else:
        export_minimind(model, target)
    print_text(target)


def _ends(run: RunDirectory) -> list[str]:
    """Return the tokens that end the run's answers; runs of earlier versions do not record them."""
    try:
        return [str(end) for end in json.loads(run.data.read_text(encoding="utf-8"))["ends"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _load(run: RunDirectory, weights: Path, *, trust_remote_code: bool) -> tuple[object, object]:
    """Load (model, tokenizer) from saved weights; adapters are loaded onto the run's base model.

    Somebody else may have made the directory, so its configuration alone must not allow Python
    code of the model to run: the user has to allow it too. Raises UsageError if the two differ.
    """
    import torch

    from fitune.model.adapted_model import check_adapted, read_adapted
    from fitune.model.load import ignored_code, load_model, load_tokenizer
    from fitune.model.lora import load_adapters

    base = read_config(run.config).config.model
    if base.trust_remote_code and not trust_remote_code:
        without = base.model_copy(update={"trust_remote_code": False})
        # Configurations of other tools often set the switch for models that need none.
        base = base if ignored_code(without) else without
    if base.trust_remote_code != trust_remote_code:
        raise UsageError(
            f"{run.path} asks to run the Python code that comes with {base.source}: read that "
            "code, then add --trust-remote-code"
            if base.trust_remote_code
            else f"{run.path} was trained without its model's own code: drop --trust-remote-code"
        )
    cpu = torch.device("cpu")
    if not (weights / "adapter_config.json").is_file():
        saved = ModelConfig(source=str(weights), trust_remote_code=base.trust_remote_code)
        return load_model(saved, cpu), load_tokenizer(saved)
    adapted = read_adapted(weights)
    if Path(adapted.source).is_absolute() and not Path(adapted.source).exists():
        raise RunDirectoryError(
            f"{adapted.source}, which {weights} adapts, is no longer there: put it back"
        )
    plain = base.model_copy(update={"source": adapted.source, "method": "full"})
    model = load_model(plain, cpu, seed=adapted.seed)
    check_adapted(adapted, model, adapters=weights)
    tokenizer = load_tokenizer(plain.model_copy(update={"tokenizer": str(weights)}))
    return load_adapters(model, weights), tokenizer
