"""The published runs of SFTTrainer again, through `fitune.predict_trainer` and a Trainer of the installed transformers.

python benchmarks/trainer_accuracy.py                     every row: about 6 minutes of one core
python benchmarks/trainer_accuracy.py --rows fms-main-8   these rows alone, separated by commas
python benchmarks/trainer_accuracy.py --missing           those without a result

Models are built without weights (`weightless`) and the Trainer with the row's arguments, on rows of the row's length.
What of the row's own software moves the peak, its loss and its fused kernels, is put in the place of the model's
forward, as those kernels were put there; the loop is the installed Trainer's. Rows without such kernels are also
predicted as TRL's SFTTrainer of today runs them, loss included. Writes benchmarks/results/trainer_accuracy.json and a
section of docs/accuracy.md.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import types
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import published_loops
from published_loops import NotExpressed, express

HERE = Path(__file__).parent
PUBLISHED = HERE / "data" / "published.json"
RESULTS = HERE / "results" / "trainer_accuracy.json"
BOUND = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """predicted_bytes: with the loss and kernels of the row's software. today_bytes: with those that are installed,
    None for a row of other kernels. assumed: why predicted_bytes may be off."""

    id: str
    model: str
    setting: str
    software: str
    measured_bytes: int
    predicted_bytes: int
    today_bytes: int | None
    installed: str
    assumed: tuple[str, ...] = ()

    @property
    def error_fraction(self) -> float:
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def today_fraction(self) -> float | None:
        return None if self.today_bytes is None else self.today_bytes / self.measured_bytes - 1


def published_rows() -> list[dict[str, Any]]:
    """Those of SFTTrainer whose loop can be expressed, without GPTQ's: a Trainer refuses float16 without a card."""
    rows: list[dict[str, Any]] = json.loads(PUBLISHED.read_text())
    return [
        row
        for row in rows
        if row["id"].startswith("fms")
        and not published_loops.is_gptq(row)
        and not isinstance(express(row), NotExpressed)
    ]


def compare_row(row: dict[str, Any], *, today: bool = True) -> Compared:
    fused = published_loops.has_fused_kernels(row)
    return Compared(
        id=row["id"],
        model=row["model"],
        setting=f"{row['method']}, {row['batch']} x {row['seq']}"
        + (", fused kernels" if fused else ""),
        software=next(
            part for part in row["software"].split(", ") if part.startswith("transformers")
        ),
        measured_bytes=row["measured_bytes"],
        predicted_bytes=_predict(row, today=False),
        today_bytes=_predict(row, today=True) if today and not fused else None,
        installed=f"transformers {version('transformers')}, TRL {version('trl')}",
        assumed=getattr(express(row), "assumed", ()),
    )


def _predict(row: dict[str, Any], *, today: bool) -> int:
    import fitune
    from fitune.integrations.transformers import weightless

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers 6 renames gradient checkpointing
        with weightless():
            trainer = build_trainer(row, directory, today=today)
        # two steps: the state of the optimizer is born in the first
        prediction = fitune.predict_trainer(
            trainer, gpu="A100 80GB", num_steps=2, attention="flash"
        )
    return prediction.peak_allocated_bytes


def build_trainer(row: dict[str, Any], directory: str, *, today: bool) -> Any:
    """today: TRL's SFTTrainer with its own loss; else transformers' Trainer around the forward of the row's software,
    to whose step the SFTTrainer of that time added nothing."""
    import datasets
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = {
        "output_dir": directory,
        "per_device_train_batch_size": row["batch"],
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
        "bf16": "bf16 autocast on" in row["precision"],
        "optim": "adamw_torch",
        "max_steps": 100,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,  # what stands for the card while it is recorded
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    ones = [[1] * row["seq"]] * row["batch"]
    data = datasets.Dataset.from_dict({"input_ids": ones, "labels": ones, "attention_mask": ones})
    model = published_loops.fms_model(row)
    if today:
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=model,
            args=SFTConfig(**arguments, max_length=row["seq"]),
            train_dataset=data,
            processing_class=_tokenizer(),
        )
    compute_loss = published_loops.fms_loss(row)

    def forward(
        self: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **_: Any
    ) -> dict[str, Any]:
        return {"loss": compute_loss(self, input_ids, labels)}

    causal_lm = published_loops.causal_lm(model)
    causal_lm.forward = types.MethodType(forward, causal_lm)
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=data,
        data_collator=default_data_collator,
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


# ---- the section of docs/accuracy.md ----


def section(path: Path = RESULTS) -> list[str]:
    rows = read_results(path)
    if not rows:
        return []
    errors = [row.error_fraction for row in rows]
    todays = [row.today_fraction for row in rows if row.today_fraction is not None]
    outside = [row for row in rows if abs(row.error_fraction) > BOUND]
    lines = [
        "# Through `predict_trainer`",
        "",
        "Generated by `python benchmarks/trainer_accuracy.py`: the rows of SFTTrainer again, but no loop is written",
        f"down. A real Trainer ({rows[0].installed}) is built with the row's arguments and a model without weights,",
        "and predicted. *the row's loss*: the loss and the fused kernels of the row's software stand in the place of",
        "the model's forward. *as installed*: TRL's SFTTrainer of today, whose loss computes log-probabilities for a",
        "chunk of positions at a time and never holds the logits: where they were the peak, it needs less.",
        "",
        f"- the row's loss: median error {statistics.median(map(abs, errors)):.3%}, worst "
        f"{max(errors, key=abs):+.3%} of {len(rows)}; {len(rows) - len(outside)} within {BOUND:.0%}",
    ]
    if todays:
        within = sum(abs(error) <= BOUND for error in todays)
        lines.append(
            f"- as installed: {within} of {len(todays)} within {BOUND:.0%} of what the old loss needed"
        )
    for reason, ids in _reasons(outside).items():
        lines.append(f"- beyond {BOUND:.0%}, since {reason}: {', '.join(ids)}")
    lines += [
        "",
        "| row | model | setting | software | measured bytes | the row's loss | error | as installed | difference |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        today = (
            ("", "")
            if row.today_bytes is None
            else (f"{row.today_bytes:,}", f"{row.today_fraction:+.3%}")
        )
        lines.append(
            f"| {row.id} | {row.model} | {row.setting} | {row.software} | {row.measured_bytes:,} | "
            f"{row.predicted_bytes:,} | {row.error_fraction:+.3%} | {' | '.join(today)} |"
        )
    return [*lines, ""]


def _reasons(rows: Sequence[Compared]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault("; ".join(row.assumed) or "the reason is not known", []).append(row.id)
    return reasons


def read_results(path: Path = RESULTS) -> list[Compared]:
    if not path.exists():
        return []
    return [
        Compared(**row | {"assumed": tuple(row["assumed"])}) for row in json.loads(path.read_text())
    ]


def write(rows: Sequence[Compared]) -> None:
    import accuracy

    RESULTS.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    accuracy.write(accuracy.read_results())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="only these row ids, separated by commas")
    parser.add_argument("--missing", action="store_true", help="only rows that have no result")
    options = parser.parse_args()
    wanted = {name for name in options.rows.split(",") if name}
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would send a ping
    logging.disable(logging.WARNING)
    published = published_rows()
    compared = {row.id: row for row in read_results()}
    for row in published:
        if (not wanted or row["id"] in wanted) and not (options.missing and row["id"] in compared):
            outcome = compared[row["id"]] = compare_row(row)
            today = outcome.today_fraction
            said = "" if today is None else f", as installed {today:+.3%}"
            print(f"{outcome.id}: {outcome.error_fraction:+.4%}{said}", file=sys.stderr, flush=True)
            write([compared[row["id"]] for row in published if row["id"] in compared])


if __name__ == "__main__":
    main()
