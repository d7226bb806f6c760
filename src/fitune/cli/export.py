"""Implement `fitune export`, which writes a run's weights for other programs."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from fitune.cli.arguments import run_path
from fitune.cli.output import make_directory, print_text
from fitune.errors import RunDirectoryError, UsageError
from fitune.report.model_card import Exported, hub_id, model_card
from fitune.report.run_on_disk import read_fitune_run
from fitune.run.directory import check_run_files, open_run

_DEFAULTS = {"hf": "export-hf", "gguf": "export-gguf"}
INSTALL_GGUF = "pip install 'fitune[gguf]'"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Form:
    """What is written, as far as it is a choice."""

    quantise: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None,
        Parameter(
            name=("--quantise", "--quantize"),
            help="gguf: number format of the matrices; f16 where left out",
        ),
    ] = None
    adapter: Annotated[
        bool, Parameter(help="hf, gguf: the adapters alone instead of the merged model")
    ] = False
    exact: Annotated[
        bool, Parameter(help="keep the number format (minimind: float16 is usual)")
    ] = False


def export(
    run: Annotated[Path, Parameter(help="a run's directory or name")],
    *,
    to: Annotated[
        Literal["hf", "gguf", "minimind", "pth"],
        Parameter(
            help="hf: a transformers directory; gguf: for llama.cpp and Ollama; "
            "minimind, or pth: a .pth"
        ),
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
    form: Form = Form(),
) -> None:
    """Write a run's weights for other programs, with adapters merged, and a model card.

    hf and gguf are directories with a README.md of what the run measured; gguf also has a
    Modelfile for Ollama. A .pth is one file.
    """
    opened = open_run(run_path(run))
    check_run_files(opened, deep=True)
    _check_form(to, form)
    target = output or opened.path / _DEFAULTS.get(to, "export-minimind.pth")
    if target.exists():
        raise RunDirectoryError(
            f"{target} exists: give another place with -o, or remove it yourself"
        )
    from fitune.model.save import export_minimind, save_model
    from fitune.model.saved import learned_ends, load_run, saved_weights, source_license

    source = saved_weights(opened, weights)
    if form.adapter and not (source / "adapter_config.json").is_file():
        raise UsageError(f"{source} holds no adapters: drop --adapter")
    model, tokenizer = load_run(opened, source, trust_remote_code=trust_remote_code)
    make_directory(target.parent, flag="-o")
    recorded, ends = read_fitune_run(opened.path), learned_ends(opened)
    exported = Exported(
        kind="adapter" if form.adapter else "gguf" if to == "gguf" else "transformers",
        weights=source.name,
        license=source_license(str(recorded.settings.get("model.source", ""))),
    )
    if to == "hf":
        card = model_card(recorded, exported)
        save_model(model, target, tokenizer=tokenizer, merge=not form.adapter, ends=ends, card=card)
    elif to == "gguf":
        from fitune.model.gguf_write import GgufFacts, save_gguf, save_gguf_adapter

        kind = "lora" if form.adapter else form.quantise or "f16"
        exported = replace(exported, file_name=f"{recorded.name}-{kind}.gguf", quantisation=kind)
        card = model_card(recorded, exported)
        if form.adapter:
            save_gguf_adapter(model, target, name=recorded.name, card=card)
        else:
            facts = GgufFacts(
                name=recorded.name, base=hub_id(recorded), license=exported.license, ends=ends
            )
            save_gguf(
                model,
                target,
                tokenizer=tokenizer,
                quantisation=form.quantise or "f16",
                facts=facts,
                card=card,
            )
    elif form.exact:
        export_minimind(model, target, dtype=None)
    else:
        export_minimind(model, target)
    print_text(target)


def _check_form(to: str, form: Form) -> None:
    """Raise UsageError for a flag that this kind of export does not have, or a missing package."""
    if form.quantise is not None and (to != "gguf" or form.adapter):
        raise UsageError(
            "--quantise is of a whole model as GGUF: give --to gguf without --adapter, or drop it"
        )
    if form.adapter and to not in ("hf", "gguf"):
        raise UsageError(f"--to {to} merges adapters: drop --adapter, or use --to hf")
    if form.exact and to in ("hf", "gguf"):
        raise UsageError(f"--exact has no effect with --to {to}: drop it")
    if to == "gguf" and find_spec("gguf") is None:
        raise UsageError(f"--to gguf needs the package gguf: {INSTALL_GGUF}")
