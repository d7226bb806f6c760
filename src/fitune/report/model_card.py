"""Write the model card of exported weights: a README.md with the header that model hubs read.

It holds what the run's files say and nothing else. It is English, as all files of a run are, and
names local files by their last part alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import numpy as np
import yaml

from fitune.report.run_figures import effective_batch, last_split, peak_lr, run_peaks
from fitune.report.run_on_disk import RecordedRun
from fitune.units import format_bytes, format_seconds

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: settings that are shown if the run's configuration has a value of them -> their name in the card
_SETTINGS = {
    "model.method": "method",
    "model.lora.rank": "LoRA rank",
    "model.lora.alpha": "LoRA alpha",
    "model.lora.dropout": "LoRA dropout",
    "model.lora.targets": "LoRA targets",
    "model.lora.rslora": "rank-stabilised",
    "model.lora.dora": "DoRA",
    "model.lora.init": "LoRA initialisation",
    "model.lora.modules_to_save": "trained whole beside the adapters",
    "model.new_tokens": "new tokens",
    "model.freeze.trained_layers": "trained layers (negative: the first)",
    "model.freeze.trained_modules": "trained parts of them",
    "model.freeze.extra_modules": "trained beside the layers",
    "model.precision": "precision",
    "model.recompute": "gradient checkpointing",
    "optim.name": "optimizer",
    "optim.betas": "betas",
    "optim.weight_decay": "weight decay",
    "optim.clip": "gradient clipping",
    "optim.schedule": "schedule",
    "optim.warmup": "warmup (share of the run)",
    "data.max_length": "longest sample (tokens)",
    "data.mask": "learned",
    "train.epochs": "epochs",
    "train.seed": "seed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was exported."""

    kind: Literal["transformers", "adapter", "gguf"]
    #: which weights of the run
    weights: str
    #: of the base model, where it is known
    license: str | None = None
    #: the GGUF file
    file_name: str | None = None
    #: of the GGUF file
    quantisation: str | None = None


def model_card(run: RecordedRun, exported: Exported) -> str:
    """Return the text of the README.md."""
    header = yaml.safe_dump(_header(run, exported), sort_keys=False, allow_unicode=True)
    base = f"`{base_name(run)}`"
    version = (run.env or {}).get("fitune")
    parts = [
        f"---\n{header}---",
        f"# {run.name}",
        f"{_WHAT[exported.kind].format(base=base)}, trained by fitune {version or ''}".rstrip()
        + f"; the weights are those of the {_step(run, exported.weights)}.",
        *_use(exported),
        "## Data",
        _data(run),
        "## Settings",
        _table(("setting", "value"), _settings(run)),
        "## Measured",
        _table(("what", "value"), _measured(run, exported.weights)),
        *_evaluations(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_name(run: RecordedRun) -> str:
    """Return the hub id of the base model, or the name of its file or directory."""
    return hub_id(run) or PurePath(str(run.settings.get("model.source", "unknown"))).name


def hub_id(run: RecordedRun) -> str | None:
    """Return the hub id of the base model; None if it was read from this machine."""
    source = str(run.settings.get("model.source", ""))
    is_local = PurePath(source).suffix in (".gguf", ".pth", ".pt") or source.startswith(".")
    return source if _HUB_ID.fullmatch(source) and not is_local else None


_WHAT = {
    "transformers": "A fine-tune of {base}",
    "adapter": "Adapters for {base}",
    "gguf": "A fine-tune of {base} as GGUF, for llama.cpp and Ollama",
}


def _header(run: RecordedRun, exported: Exported) -> dict[str, object]:
    method = str(run.settings.get("model.method", "full"))
    header: dict[str, object] = {
        "license": exported.license,
        "library_name": {"adapter": "peft", "gguf": "gguf"}.get(exported.kind, "transformers"),
        "pipeline_tag": "text-generation",
        "base_model": hub_id(run),
    }
    if header["base_model"] is not None:
        header["base_model_relation"] = "adapter" if exported.kind == "adapter" else "finetune"
    header["datasets"] = [path for path in _sources(run) if _is_hub_data(path)] or None
    header["tags"] = ["fitune", "sft", *([method] if method != "full" else [])]
    return {key: value for key, value in header.items() if value is not None}


def _use(exported: Exported) -> Iterator[str]:
    if exported.file_name is None:
        return
    if exported.kind == "gguf":
        yield (
            f"`{exported.file_name}` holds its matrices as {exported.quantisation}: "
            f"`llama-cli -m {exported.file_name}`. `Modelfile` is for Ollama: "
            "`ollama create NAME -f Modelfile`."
        )
    else:
        yield (
            "The base model as GGUF is needed too: "
            f"`llama-cli -m BASE.gguf --lora {exported.file_name}`."
        )


def _step(run: RecordedRun, weights: str) -> str:
    index = _best(run) if weights == "best" else None
    if index is not None:
        return f"best evaluation, after step {run.evals['step'][index]:,.0f}"
    return f"last step, {run.summary.get('steps', run.num_steps):,}"


def _best(run: RecordedRun) -> int | None:
    """Return the index of the evaluation with the lowest loss after the first step."""
    losses = np.where(run.evals["step"] > 0, run.evals["eval_loss"], np.nan)
    return int(np.nanargmin(losses)) if np.isfinite(losses).any() else None


def _data(run: RecordedRun) -> str:
    data = run.data or {}
    lines = [
        f"- `{path if _is_hub_data(path) else PurePath(path).name}`: {source.get('num_rows', 0):,}"
        f" samples ({', '.join(source.get('formats') or ()) or 'unknown format'})"
        for path, source in zip(_sources(run), data.get("sources") or (), strict=False)
    ]
    rows = [
        (
            title,
            f"{split.get('num_rows', 0):,}",
            f"{split.get('num_tokens', 0):,}",
            f"{split.get('num_supervised_tokens', 0):,}",
        )
        for title, split in (("training", data.get("train")), ("held out", data.get("eval")))
        if isinstance(split, Mapping)
    ]
    counts = _table(("", "samples", "tokens", "of them learned"), rows) if rows else ""
    return "\n".join(lines) + ("\n\n" if lines and counts else "") + counts


def _sources(run: RecordedRun) -> list[str]:
    sources = (run.data or {}).get("sources") or ()
    return [str(source.get("path", "")) for source in sources]


def _is_hub_data(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and not PurePath(path).suffix


def _settings(run: RecordedRun) -> Iterator[tuple[str, str]]:
    for key, name in _SETTINGS.items():
        value = run.settings.get(key)
        method = run.settings.get("model.method", "full")
        is_other = (key.startswith("model.lora.") and method not in ("lora", "qlora")) or (
            key.startswith("model.freeze.") and method != "freeze"
        )
        if value in (None, "auto", "", (), []) or is_other:
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield name, shown
    if (rate := peak_lr(run)) is not None:
        yield "learning rate", f"{rate:g}"
    if (effective := effective_batch(run)) is not None:
        yield "effective batch (samples)", f"{effective:,}"
    micro, accumulation = last_split(run)
    if micro is not None and accumulation is not None:
        yield "micro-batch x accumulation", f"{micro:,} x {accumulation:,}"


def _measured(run: RecordedRun, weights: str) -> Iterator[tuple[str, str]]:
    summary = run.summary
    index = _best(run) if weights == "best" else len(run.evals["step"]) - 1
    if index is not None and index >= 0:
        yield "held-out loss", f"{run.evals['eval_loss'][index]:.4f}"
        if np.isfinite(run.evals["eval_accuracy"][index]):
            yield "held-out tokens predicted right", f"{run.evals['eval_accuracy'][index]:.1%}"
        if run.evals["step"][0] == 0:
            yield "held-out loss before training", f"{run.evals['eval_loss'][0]:.4f}"
    if summary.get("train_loss") is not None:
        yield "training loss of the last step", f"{summary['train_loss']:.4f}"
    for name, num_bytes in run_peaks(run).items():
        yield f"peak memory, {name}", format_bytes(num_bytes)
    yield "optimizer steps", f"{summary.get('steps', 0):,}"
    yield "tokens seen", f"{summary.get('tokens', 0):,}"
    if summary.get("seconds"):
        yield "time, with evaluations and saves", format_seconds(summary["seconds"])
    if summary.get("tokens_per_second"):
        yield "tokens per second", f"{summary['tokens_per_second']:,.0f}"
    env = run.env or {}
    cards = [str(card.get("name")) for card in env.get("cards") or () if isinstance(card, dict)]
    yield "device", ", ".join(cards) or str((env.get("cpu") or {}).get("name") or "a processor")
    packages = env.get("packages") or {}
    named = [f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name)]
    if named:
        yield "versions", ", ".join(named)


def _evaluations(run: RecordedRun) -> Iterator[str]:
    losses = [
        (f"{step:,.0f}", f"{tokens:,.0f}", f"{loss:.4f}")
        for step, tokens, loss in zip(
            run.evals["step"], run.evals["total_tokens"], run.evals["eval_loss"], strict=True
        )
    ]
    if len(losses) > 1:
        yield _table(("step", "tokens", "held-out loss"), losses)


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
