"""Which learning rate a larger batch wants, tried out: a grid of rates and batches at equal tokens, on real dialogues.

python benchmarks/batch_size.py                 a tiny model trained from nothing, two seeds
python benchmarks/batch_size.py --task lora     SmolLM2-135M with LoRA (long)

The best rate of the smallest batch and the noise that its run measured are what optim.scaling knows; each of its rules
says a rate for batches 2, 4 and 8 times as large, which is trained too. The loss that a rule reaches is compared with
the best of the grid at that batch. Rates are also compared by how far they are from the grid's best, in powers of two.
The result is printed and written to benchmarks/results/batch_size.json, whatever it is.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import fitune
from fitune.cli.demo import corpus_directory, smollm2_file, write_dialogues
from fitune.model.load import build_model
from fitune.model.presets import llama_config
from fitune.run.metrics import read_metrics

RESULT = Path(__file__).parent / "results" / "batch_size.json"
FACTORS = (1, 2, 4, 8)
RULES = ("none", "sqrt_gain", "sqrt", "linear")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Task:
    """rows: of the smallest batch. rates: the grid at that batch; larger batches take it, twice and four times it."""

    model: Mapping[str, Any]
    rows: int
    rates: tuple[float, ...]
    epochs: float
    max_rows: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    factor: int
    rule: str
    lr: float
    seed: int
    eval_loss: float
    noise_scale_rows: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("tiny", "lora"), default="tiny")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        data = directory / "english.jsonl"
        write_dialogues(corpus_directory("english"), data)
        task = make_task(arguments.task, directory, data, seeds=tuple(range(arguments.seeds)))
        outcomes = run_grid(task, directory, data)
        found = summarise(outcomes, task)
    print_table(found)
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    results[arguments.task] = found | {"outcomes": [asdict(outcome) for outcome in outcomes]}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def make_task(name: str, directory: Path, data: Path, *, seeds: tuple[int, ...]) -> Task:
    if name == "lora":
        model = {"source": str(smollm2_file()), "method": "lora"}
        return Task(model, 4, (1e-4, 2e-4, 4e-4), 1.0, 400, seeds)
    return Task({"source": str(save_tiny(directory / "tiny", data))}, 4, (5e-4, 1e-3, 2e-3, 4e-3), 2.0, 1600, seeds)


def save_tiny(path: Path, data: Path) -> Path:
    """A Llama of 0.7 M parameters and a tokenizer of 1,024 words learned from the dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False)
    tokenizer.train([str(data)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    config = llama_config(
        vocab_size=1024, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    build_model(config, seed=0).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def run_grid(task: Task, directory: Path, data: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []

    def run(factor: int, rule: str, lr: float, seed: int, **optim: Any) -> Outcome:
        outcome = train(task, directory, data, factor=factor, rule=rule, lr=lr, seed=seed, optim=optim)
        print(f"x{factor} {rule:10} lr {outcome.lr:.2e} seed {seed}: eval loss {outcome.eval_loss:.4f}", flush=True)
        outcomes.append(outcome)
        return outcome

    for seed in task.seeds:
        for factor in FACTORS:
            rates = [rate * scale for rate in task.rates for scale in (1.0, 2.0, 4.0)]
            highest = max(task.rates) * (1 if factor == 1 else 2 if factor == 2 else 4)
            for rate in sorted({rate for rate in rates if rate <= highest}):
                run(factor, "grid", rate, seed)
        base = [outcome for outcome in outcomes if outcome.factor == 1 and outcome.seed == seed]
        best = min(base, key=lambda outcome: outcome.eval_loss)
        for factor in FACTORS[1:]:
            for rule in RULES[1:]:
                known = {"noise_scale": best.noise_scale_rows} if rule == "sqrt_gain" else {}
                run(factor, rule, best.lr, seed, scaling=rule, reference_batch=task.rows, **known)
    return outcomes


def train(
    task: Task, directory: Path, data: Path, *, factor: int, rule: str, lr: float, seed: int, optim: Mapping[str, Any]
) -> Outcome:
    rows = task.rows * factor
    summary = fitune.train(
        {
            "model": {**task.model, "recompute": "off"},
            "loss": "chunked",
            "data": {
                "train": [{"path": str(data), "max_rows": task.max_rows}], "eval_fraction": 0.1, "max_length": 256,
            },
            "batch": {"effective": rows, "micro": max(1, task.rows // 2)},
            "optim": {"lr": lr, "warmup": 0.05, **optim},
            "train": {"epochs": task.epochs, "seed": seed, "eval_every": 10**6},
            "eval": {"max_rows": 400},
            "run": {"output": str(directory / "runs"), "name": "run"},
        },
        overwrite=True,
        quiet=True,
    )  # fmt: skip
    steps = read_metrics(directory / "runs" / "run" / "metrics.jsonl").steps
    scales = [step.noise_scale_tokens for step in steps[len(steps) // 4 :] if step.noise_scale_tokens is not None]
    tokens_per_row = summary.supervised_tokens / (summary.steps * rows)
    assert summary.eval_loss is not None
    return Outcome(
        factor=factor,
        rule=rule,
        lr=max(step.lr for step in steps) if optim else lr,
        seed=seed,
        eval_loss=summary.eval_loss,
        noise_scale_rows=statistics.median(scales) / tokens_per_row if scales else None,
    )


def summarise(outcomes: list[Outcome], task: Task) -> dict[str, Any]:
    """Means over the seeds, by factor and rule. above_best: by what share the loss exceeds the grid's best there."""

    def mean_loss(chosen: list[Outcome]) -> float:
        return statistics.fmean(outcome.eval_loss for outcome in chosen)

    grid = {}
    for factor in FACTORS:
        rates = sorted({o.lr for o in outcomes if o.factor == factor and o.rule == "grid"})
        grid[factor] = {lr: mean_loss([o for o in outcomes if (o.factor, o.rule, o.lr) == (factor, "grid", lr)])
                        for lr in rates}  # fmt: skip
    best = {factor: min(losses, key=lambda lr: losses[lr]) for factor, losses in grid.items()}
    rules = []
    for factor in FACTORS[1:]:
        for rule in RULES:
            chosen = [o for o in outcomes if o.factor == factor and o.rule == ("grid" if rule == "none" else rule)]
            if rule == "none":
                chosen = [o for o in chosen if o.lr == best[1]]
            loss, lr = mean_loss(chosen), statistics.geometric_mean(o.lr for o in chosen)
            rules.append(
                {
                    "factor": factor,
                    "rule": rule,
                    "lr": lr,
                    "eval_loss": loss,
                    "above_best": loss / grid[factor][best[factor]] - 1,
                    "doublings_from_best": math.log2(lr / best[factor]),
                }
            )
    scales = [o.noise_scale_rows for o in outcomes if (o.factor, o.lr) == (1, best[1]) and o.noise_scale_rows]
    return {
        "rows": task.rows,
        "seeds": len(task.seeds),
        "grid": {str(factor): {f"{lr:.2e}": loss for lr, loss in losses.items()} for factor, losses in grid.items()},
        "noise_scale_rows": statistics.fmean(scales) if scales else None,
        "rules": rules,
    }


def print_table(found: Mapping[str, Any]) -> None:
    print(f"\nnoise scale measured at the smallest batch of {found['rows']} rows: {found['noise_scale_rows']:.0f} rows")
    for factor, losses in found["grid"].items():
        print(f"x{factor:2} " + "  ".join(f"{lr} {loss:.4f}" for lr, loss in losses.items()))
    print("factor rule        rate      eval loss   above the grid's best   doublings from its rate")
    for each in found["rules"]:
        print(
            f"x{each['factor']:<5} {each['rule']:11} {each['lr']:.2e}  {each['eval_loss']:.4f}      "
            f"{each['above_best']:+.2%}                 {each['doublings_from_best']:+.1f}"
        )


if __name__ == "__main__":
    main()
