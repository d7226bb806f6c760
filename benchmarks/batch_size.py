"""Which learning rate a larger batch wants, tried out: rates x batches at equal tokens, on real dialogues.

python benchmarks/batch_size.py --task tiny         a Llama of 0.2 M parameters from nothing, three seeds
python benchmarks/batch_size.py --task minimind     minimind2-small from nothing, short rows, one seed
python benchmarks/batch_size.py --task smollm2      SmolLM2-135M with LoRA, short rows, one seed
python benchmarks/batch_size.py                     all three, about 70 minutes of one free core; --quick: a few

For each batch the rate is doubled or halved until the best one has a worse one on both sides, so the grid's best is
inside. The best rate of the smallest batch and the noise that its run measured are all that a rule of optim.scaling
knows; each rule then trains batches k times as large with its own rate, betas, decay and clip. Three numbers judge it:
the loss above the grid's best at that batch, the doublings between its rate and the best one, and those between its
growth of the rate and that of the best one: a reference that lies beside the smallest batch's best rate shifts every
rule alike, but not their growth.

A larger batch needs more tokens for the same loss. How many is read off the smallest batch's own curve: its loss at
half the tokens gives a slope, and with it a difference of losses becomes a factor of tokens. The noise predicts it,
too: (k + rho) / (1 + rho). Last, the modes that grow the batch by themselves are set beside the run that does not, at
twice the tokens, since they grow no batch that would leave fewer than 100 steps.

Every outcome is written to benchmarks/results/batch_size.json at once: a stopped benchmark goes on where it was.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fitune.cli.demo import corpus_directory, smollm2_file, write_dialogues
from fitune.cli.progress import TrainingProgress
from fitune.config import RunConfig, read_config
from fitune.model.load import build_model, load_model, load_tokenizer
from fitune.model.presets import llama_config, preset_config
from fitune.run.directory import create_run
from fitune.run.metrics import StepMetrics, read_metrics
from fitune.step.assemble import assemble, choose_precision
from fitune.training.loop import TrainingLoop
from fitune.training.prepare import load_data
from fitune.training.train import train

RESULT = Path(__file__).parent / "results" / "batch_size.json"
PAGE = Path(__file__).parent.parent / "docs" / "batch_size.md"
PLACE = ("<!-- measured: python benchmarks/batch_size.py --page -->", "<!-- end of measured -->")
TASKS = {
    "tiny": "a Llama of 0.2 M parameters, from nothing",
    "minimind": "minimind2-small, from nothing",
    "smollm2": "SmolLM2-135M, LoRA",
}
RULES = ("none", "sqrt_gain", "sqrt", "linear", "sqrt_gain_weighted")
"""sqrt_gain_weighted: sqrt_gain with the noise scale of squares weighted as Adam weighs them."""
MODES = ("anneal", "follow")
EPOCHS = {"half": 0.5, "fixed": 2.0, "anneal": 2.0, "follow": 2.0}
"""Times the task's. fixed: the run that the modes are compared with."""
MOST_RATES = 7
_T_QUANTILE = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's, two-sided at 95 %, by the number of values."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """rows: of the smallest batch. lr: where the search of its best rate begins. factors: of the batch, 1 first.
    noise_factor: of the batch whose run, at the smallest one's best rate, measures the noise; 2 where the smallest is a
    single row, which has no two micro-batches to compare. drop_long: rows over max_length are left out, not cut.
    with_more: the rule with the weighted noise and the modes that grow the batch, too."""

    name: str
    model: Mapping[str, Any]
    rows: int
    lr: float
    factors: tuple[int, ...]
    seeds: tuple[int, ...]
    epochs: float
    max_rows: int
    max_length: int
    eval_rows: int
    noise_factor: int = 1
    drop_long: bool = False
    with_more: bool = False


@dataclass(frozen=True, kw_only=True)
class Trial:
    """kind: grid (the rule `none` too), another one of RULES, or one of EPOCHS."""

    kind: str
    factor: int
    lr: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome(Trial):
    """lr of a rule: the reference's; peak_lr: in use. rho, rho_weighted: noise over signal of a step, the median over
    the last three quarters of the run, of steps whose signal was above zero. overhead: of a batch 2, 4, 8 times the
    smallest, as the noise predicts it, on average over these steps."""

    peak_lr: float
    eval_loss: float
    steps: int
    tokens: int
    cpu_seconds: float
    rho: float | None
    rho_weighted: float | None
    overhead: Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, action="append")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rows, batches and seeds; nothing is written"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument(
        "--page", action="store_true", help="only write what was measured into docs/batch_size.md"
    )
    arguments = parser.parse_args()
    if arguments.page:
        write_page(json.loads(RESULT.read_text()))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        for name in arguments.task or TASKS:
            task = make_task(name, directory, quick=arguments.quick)
            output = directory / "quick.json" if arguments.quick else arguments.output
            found = measure(task, Runner(task, directory), output)
            print_summary(found)


def make_task(name: str, directory: Path, *, quick: bool = False) -> Task:
    data = directory / "english.jsonl"
    write_dialogues(corpus_directory("english"), data)
    (directory / "chat.jinja").write_text(TEMPLATE)
    if name == "tiny":
        shape = llama_config(
            vocab_size=1024, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        )  # fmt: skip
        model = {"source": str(save_model(directory / name, shape, data))}
        task = Task(
            name=name, model=model, rows=4, lr=4e-3, factors=(1, 2, 4, 8), seeds=(0, 1, 2), epochs=1.0, max_rows=1800,
            max_length=96, eval_rows=180, with_more=True,
        )  # fmt: skip
        return replace(task, max_rows=300, seeds=(0, 1), factors=(1, 4)) if quick else task
    if name == "minimind":
        shape = preset_config("minimind2-small")
        model = {"source": str(save_model(directory / name, shape, data))}
        task = Task(
            name=name, model=model, rows=1, lr=5e-4, factors=(1, 2, 4, 8), seeds=(0,), epochs=320 / 1295,
            max_rows=2025, max_length=28, eval_rows=50, noise_factor=2, drop_long=True,
        )  # fmt: skip
        return replace(task, epochs=48 / 1295, factors=(1, 2)) if quick else task
    model = {"source": str(smollm2_file()), "method": "lora"}
    task = Task(
        name=name, model=model, rows=1, lr=8e-4, factors=(1, 2, 4, 8), seeds=(0,), epochs=256 / 831,
        max_rows=2025, max_length=28, eval_rows=40, noise_factor=2, drop_long=True,
    )  # fmt: skip
    return replace(task, epochs=32 / 831, factors=(1, 2)) if quick else task


def save_model(path: Path, shape: Any, data: Path) -> Path:
    """Random weights of that shape and a tokenizer of its size, learned from the dialogues."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size, special_tokens=special, show_progress=False
    )
    tokenizer.train([str(data)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    build_model(shape, seed=0).save_pretrained(path)
    fast.save_pretrained(path)
    return path


class Runner:
    """Trains one trial after another: the run's own loop, without the plan and prediction that come before it."""

    def __init__(self, task: Task, directory: Path) -> None:
        self.task, self.directory = task, directory
        config = self.config(Trial(kind="grid", factor=1, lr=task.lr, seed=0))
        self.tokenizer = load_tokenizer(config.model)
        self.data = load_data(config, self.tokenizer)
        self.device = torch.device("cpu")
        self.precision = choose_precision(config.model, self.device)
        self.model = load_model(config.model, self.device, precision=self.precision)
        self.start = {name: value.detach().clone() for name, value in self.trained()}

    def trained(self) -> Iterable[tuple[str, torch.Tensor]]:
        return (
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        )

    def config(self, trial: Trial, rho: float | None = None) -> RunConfig:
        """rho: measured at the smallest batch, for the rules that want it."""
        task, rows = self.task, self.task.rows * trial.factor
        optim: dict[str, Any] = {"lr": trial.lr, "warmup": 0.05}
        if trial.kind in RULES:
            rule = trial.kind.removesuffix("_weighted")
            known = (
                {"noise_scale": rho * task.rows} if rho is not None and rule == "sqrt_gain" else {}
            )
            optim |= {"scaling": rule, "reference_batch": task.rows, **known}
        content = {
            "model": {**task.model, "recompute": "off"},
            "loss": "full",
            "data": {
                "train": [
                    {"path": str(self.directory / "english.jsonl"), "max_rows": task.max_rows}
                ],
                "eval_fraction": 0.1,
                "max_length": task.max_length,
                "too_long": "drop" if task.drop_long else "truncate",
                "template": str(self.directory / "chat.jinja"),
            },
            "batch": {"effective": rows, "micro": max(1, rows // 2)},
            "optim": optim,
            "train": {
                "epochs": task.epochs * EPOCHS.get(trial.kind, 1.0),
                "seed": trial.seed,
                "eval_every": 10**6,
                "batch_mode": trial.kind if trial.kind in MODES else "advise",
            },
            "eval": {"max_rows": task.eval_rows},
            "run": {"output": str(self.directory / "runs"), "name": "run"},
        }
        return read_config(content).config

    def __call__(self, trial: Trial, rho: float | None = None) -> Outcome:
        start = time.process_time()
        config = self.config(trial, rho)
        with torch.no_grad():
            for name, parameter in self.trained():
                parameter.copy_(self.start[name])
        setup = assemble(self.model, config, device=self.device, precision=self.precision)
        run = create_run(config.run.output, "run", overwrite=True)
        with TrainingProgress(quiet=True) as watcher:
            loop = TrainingLoop(
                config, setup, run, data=self.data, tokenizer=self.tokenizer, watcher=watcher
            )
            summary = train(loop)
        steps = read_metrics(run.metrics).steps
        later = steps[len(steps) // 4 :]
        rhos = [step.noise_ratio for step in later if step.noise_ratio is not None]
        weighted = [value for step in later if (value := weighted_ratio(step)) is not None]
        assert summary.eval_loss is not None
        return Outcome(
            **asdict(trial),
            peak_lr=setup.peak_lr,
            eval_loss=summary.eval_loss,
            steps=summary.steps,
            tokens=summary.tokens,
            cpu_seconds=time.process_time() - start,
            rho=statistics.median(rhos) if rhos else None,
            rho_weighted=statistics.median(weighted) if weighted else None,
            overhead={
                str(k): statistics.fmean(
                    token_overhead(times(step.noise_ratio, trial.factor), k) for step in later
                )
                for k in (2, 4, 8)
            },
        )


def weighted_ratio(step: StepMetrics) -> float | None:
    scale = step.noise_scale_preconditioned_tokens
    return None if scale is None else scale / step.supervised_tokens


def times(rho: float | None, factor: int) -> float | None:
    """rho of a batch a `factor`-th as large."""
    return None if rho is None else rho * factor


def token_overhead(rho: float | None, factor: int) -> float:
    """k / r(k). rho: None where no signal was seen, which is all noise: a larger batch then costs nothing."""
    return 1.0 if rho is None else (factor + rho) / (1 + rho)


class Ledger:
    """The outcomes so far, in a file: what is in it is not trained again."""

    def __init__(
        self, task: Task, run: Callable[[Trial, float | None], Outcome], path: Path
    ) -> None:
        self.task, self.run, self.path = task, run, path
        kept = self.content().get(task.name, {})
        same = known_by(kept.get("task", {})) == known_by(json.loads(json.dumps(shown(task))))
        self.outcomes = [Outcome(**each) for each in kept["outcomes"]] if same else []

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return content

    def write(self, **more: Any) -> dict[str, Any]:
        found = {
            "task": shown(self.task),
            **more,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }
        self.path.write_text(json.dumps(self.content() | {self.task.name: found}, indent=1) + "\n")
        return found

    def outcome(
        self, kind: str, factor: int, lr: float, *, seed: int, rho: float | None = None
    ) -> Outcome:
        for known in self.outcomes:
            if (known.kind, known.factor, known.seed) == (kind, factor, seed) and math.isclose(
                known.lr, lr
            ):
                return known
        outcome = self.run(Trial(kind=kind, factor=factor, lr=lr, seed=seed), rho)
        print(
            f"{self.task.name} {kind:18} x{factor} lr {outcome.peak_lr:.2e} seed {seed}: eval loss "
            f"{outcome.eval_loss:.4f}, {outcome.steps} steps, {outcome.cpu_seconds:.1f} s of CPU",
            flush=True,
        )
        self.outcomes.append(outcome)
        self.write()
        return outcome

    def over_seeds(self, kind: str, factor: int, lr: float) -> list[Outcome]:
        return [self.outcome(kind, factor, lr, seed=seed) for seed in self.task.seeds]


def shown(task: Task) -> dict[str, Any]:
    """Without paths of this machine."""
    content = asdict(task)
    content["model"] = {name: Path(value).name for name, value in task.model.items()}
    return content


def known_by(task: Mapping[str, Any]) -> dict[str, Any]:
    """What every outcome of a task shares: more seeds or batches train only what is new."""
    return {name: value for name, value in task.items() if name not in ("seeds", "factors")}


def measure(
    task: Task, run: Callable[[Trial, float | None], Outcome], output: Path
) -> dict[str, Any]:
    ledger = Ledger(task, run, output)
    grid: dict[int, dict[float, float]] = {}
    lr = task.lr
    for factor in task.factors:
        grid[factor] = best_inside(
            lambda rate, factor=factor: mean_loss(ledger.over_seeds("grid", factor, rate)), lr
        )
        lr = best_rate(grid[factor])
    base_lr = best_rate(grid[1])
    base = ledger.over_seeds("grid", 1, base_lr)
    noise = [
        of_smallest(each, task.noise_factor)
        for each in ledger.over_seeds("grid", task.noise_factor, base_lr)
    ]
    weighted = task.with_more and all(
        each.rho_weighted is not None for each in noise
    )  # None in a run too short
    known_rules = [rule for rule in RULES if weighted or rule != "sqrt_gain_weighted"]
    rules = []
    for rule in known_rules:
        for factor in task.factors[1:]:
            outcomes = [
                ledger.outcome(
                    "grid" if rule == "none" else rule,
                    factor,
                    base_lr,
                    seed=each.seed,
                    rho=known_rho(rule, each),
                )
                for each in noise
            ]
            best = ledger.over_seeds("grid", factor, best_rate(grid[factor]))
            rules.append(
                judge(rule, outcomes, grid[factor], best=best, reference=optimum(grid[1])[0])
            )
    found = {
        "reference_lr": base_lr,
        "rho": median_of(each.rho for each in noise),
        "rho_weighted": median_of(each.rho_weighted for each in noise),
        "rho_unpaired": median_of(each.rho for each in base) if task.noise_factor > 1 else None,
        "grid": {
            str(factor): {f"{rate:.3e}": loss for rate, loss in sorted(losses.items())}
            for factor, losses in grid.items()
        },
        "optimum": {str(factor): optimum(losses)[0] for factor, losses in grid.items()},
        "rules": rules,
        "closeness": {rule: closeness(rule, rules) for rule in known_rules},
        "overhead": overheads(ledger, grid, base=base, noise=noise),
        "modes": [mode_outcome(ledger, mode, base_lr) for mode in MODES] if task.with_more else [],
        "cpu_seconds": sum(outcome.cpu_seconds for outcome in ledger.outcomes),
    }  # fmt: skip
    return ledger.write(**found)


def of_smallest(outcome: Outcome, factor: int) -> Outcome:
    """What a run of `factor` times the smallest batch says of the noise of a step of the smallest."""
    return replace(
        outcome, rho=times(outcome.rho, factor), rho_weighted=times(outcome.rho_weighted, factor)
    )


def known_rho(rule: str, outcome: Outcome) -> float | None:
    return {"sqrt_gain": outcome.rho, "sqrt_gain_weighted": outcome.rho_weighted}.get(rule)


def best_inside(loss_of: Callable[[float], float], lr: float) -> dict[float, float]:
    """Rates a factor of two apart from `lr` on, and their losses, until the lowest has neighbours on both sides."""
    losses = {lr: loss_of(lr)}
    while len(losses) < MOST_RATES:
        best = best_rate(losses)
        wanted = [
            rate
            for rate in (best * 2, best / 2)
            if not any(math.isclose(rate, known) for known in losses)
        ]
        if not wanted:
            break
        losses[wanted[0]] = loss_of(wanted[0])
    return losses


def best_rate(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def optimum(losses: Mapping[float, float]) -> tuple[float, float]:
    """(rate, loss) at the bottom of the parabola through the best rate and its neighbours, in powers of two; the best
    rate itself where it has none on one side."""
    rates = sorted(losses)
    place = rates.index(best_rate(losses))
    if not 0 < place < len(rates) - 1:
        return rates[place], losses[rates[place]]
    left, middle, right = (losses[rates[i]] for i in (place - 1, place, place + 1))
    curve = left + right - 2 * middle
    if not math.isfinite(curve) or curve <= 0:
        return rates[place], middle
    shift = (left - right) / (2 * curve)
    return rates[place] * 2**shift, middle - (left - right) ** 2 / (8 * curve)


def judge(
    rule: str,
    outcomes: list[Outcome],
    losses: Mapping[float, float],
    *,
    best: list[Outcome],
    reference: float,
) -> dict[str, Any]:
    """best: at the grid's best rate, seed by seed. reference: the best rate of the smallest batch, between those of its
    grid. *_reach: half the 95 % interval, None for one seed."""
    lr, lowest = optimum(losses)
    rate, loss = statistics.geometric_mean(each.peak_lr for each in outcomes), mean_loss(outcomes)
    reach = half_width(
        [each.eval_loss - other.eval_loss for each, other in zip(outcomes, best, strict=True)]
    )
    return {
        "factor": outcomes[0].factor,
        "rule": rule,
        "lr": rate,
        "eval_loss": loss,
        "above_best_fraction": loss / mean_loss(best) - 1,
        "above_best_reach": None if reach is None else reach / mean_loss(best),
        "above_optimum_fraction": loss / lowest - 1,
        "doublings_from_optimum": math.log2(rate / lr),
        "doublings_from_growth": math.log2(rate / outcomes[0].lr) - math.log2(lr / reference),
    }


def closeness(rule: str, rules: list[dict[str, Any]]) -> dict[str, float]:
    """On average over the factors."""
    own = [each for each in rules if each["rule"] == rule]
    return {
        "doublings": statistics.fmean(abs(each["doublings_from_optimum"]) for each in own),
        "growth_doublings": statistics.fmean(abs(each["doublings_from_growth"]) for each in own),
        "above_best_fraction": statistics.fmean(each["above_best_fraction"] for each in own),
        "worst_above_best_fraction": max(each["above_best_fraction"] for each in own),
    }


def overheads(
    ledger: Ledger,
    grid: Mapping[int, Mapping[float, float]],
    *,
    base: list[Outcome],
    noise: list[Outcome],
) -> list[dict[str, Any]]:
    """By factor: times the tokens for the smallest batch's loss, measured in each seed and predicted by the noise."""
    half = ledger.over_seeds("half", 1, base[0].lr)
    slopes = [
        (less.eval_loss - each.eval_loss) / math.log(2)
        for less, each in zip(half, base, strict=True)
    ]
    slope = statistics.fmean(slopes)
    rows = []
    for factor in ledger.task.factors[1:]:
        larger = ledger.over_seeds("grid", factor, best_rate(grid[factor]))
        logs = [
            (k.eval_loss - each.eval_loss) / slope for k, each in zip(larger, base, strict=True)
        ]
        mean, reach = statistics.fmean(logs), half_width(logs)
        rows.append(
            {
                "factor": factor,
                "measured": math.exp(mean),
                "measured_low": None if reach is None else math.exp(mean - reach),
                "measured_high": None if reach is None else math.exp(mean + reach),
                "predicted": statistics.fmean(each.overhead[str(factor)] for each in noise),
                "predicted_weighted": None
                if any(each.rho_weighted is None for each in noise)
                else statistics.fmean(token_overhead(each.rho_weighted, factor) for each in noise),
            }
        )
    return rows


def mode_outcome(ledger: Ledger, mode: str, lr: float) -> dict[str, Any]:
    """Beside the run whose batch stays, in pairs of the same seed. fixed_spread: of the latter, largest - smallest."""
    fixed, own = ledger.over_seeds("fixed", 1, lr), ledger.over_seeds(mode, 1, lr)
    differences = [grown.eval_loss - each.eval_loss for grown, each in zip(own, fixed, strict=True)]
    reach = half_width(differences)
    mean = statistics.fmean(differences)
    losses = [each.eval_loss for each in fixed]
    return {
        "mode": mode,
        "fixed_eval_loss": statistics.fmean(losses),
        "eval_loss_difference": mean,
        "low": None if reach is None else mean - reach,
        "high": None if reach is None else mean + reach,
        "fixed_spread": max(losses) - min(losses),
        "steps": statistics.fmean(each.steps for each in own),
        "fixed_steps": statistics.fmean(each.steps for each in fixed),
    }


def half_width(values: list[float]) -> float | None:
    """Of the 95 % interval of their mean; None for a single value."""
    if len(values) < 2:
        return None
    return _T_QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def mean_loss(outcomes: list[Outcome]) -> float:
    return statistics.fmean(outcome.eval_loss for outcome in outcomes)


def median_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def write_page(results: Mapping[str, Any]) -> None:
    text = PAGE.read_text()
    (before, rest), after = text.split(PLACE[0]), text.split(PLACE[1])[1]
    assert PLACE[1] in rest
    PAGE.write_text(f"{before}{PLACE[0]}\n{page(results)}{PLACE[1]}{after}")


def page(results: Mapping[str, Any]) -> str:
    """What the page of the batch size says of the outcomes: a section for each task that is done."""
    return "".join(_section(results[name]) for name in TASKS if "rules" in results.get(name, {}))


def _section(found: Mapping[str, Any]) -> str:
    task, rules = found["task"], found["rules"]
    factors = sorted({each["factor"] for each in rules})
    seeds = f"{len(task['seeds'])} seeds" if len(task["seeds"]) > 1 else "one seed"
    lines = [
        f"### {TASKS[task['name']]}: {task['rows']} rows and {', '.join(f'{k} x' for k in factors)} as many, {seeds}",
        "",
        f"The best rate of {task['rows']} rows in the grid is {found['reference_lr']:.3g}; a step's noise is "
        f"{_number(found['rho'])} times its signal, or {_number(found['rho_weighted'])} times, weighted.",
        "",
        "| rule | "
        + " | ".join(f"rate, loss at {k} x (above the best)" for k in factors)
        + " | doublings from the best rate | from its growth | loss above the grid's best |",
        "|---|" + "---|" * (len(factors) + 3),
        "| best rate | "
        + " | ".join(
            f"{found['optimum'][str(k)]:.2e} (x {found['optimum'][str(k)] / found['optimum']['1']:.2f}), "
            f"{min(found['grid'][str(k)].values()):.3f}"
            for k in factors
        )
        + " | | | |",
    ]
    for rule, close in found["closeness"].items():
        cells = [_judged(each) for each in rules if each["rule"] == rule]
        lines.append(
            f"| `{rule}` | {' | '.join(cells)} | {close['doublings']:.2f} | {close['growth_doublings']:.2f} | "
            f"{close['above_best_fraction']:+.1%} |"
        )
    lines += [
        "",
        "| batch | tokens for the same loss | predicted by the noise | by the weighted noise |",
        "|---|---|---|---|",
    ]
    for each in found["overhead"]:
        low, high = each["measured_low"], each["measured_high"]
        interval = "" if low is None else f" (95 %: {low:.2f} to {high:.2f})"
        lines.append(
            f"| {each['factor']} x | x {each['measured']:.2f}{interval} | x {each['predicted']:.2f} | "
            f"x {_number(each['predicted_weighted'])} |"
        )
    if found["modes"]:
        lines += [
            "",
            "| mode | steps | loss beside the fixed run's | spread of the fixed runs |",
            "|---|---|---|---|",
        ]
    for each in found["modes"]:
        lines.append(
            f"| `{each['mode']}` | {each['steps']:.0f} instead of {each['fixed_steps']:.0f} | "
            f"{each['eval_loss_difference']:+.3f} (95 %: {each['low']:+.3f} to {each['high']:+.3f}) | "
            f"{each['fixed_spread']:.3f} |"
        )
    return "\n".join(lines) + "\n\n"


def _judged(rule: Mapping[str, Any]) -> str:
    reach = "" if rule["above_best_reach"] is None else f" ± {rule['above_best_reach']:.1%}"
    return f"{rule['lr']:.2e}, {rule['eval_loss']:.3f} ({rule['above_best_fraction']:+.1%}{reach})"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"


def print_summary(found: Mapping[str, Any]) -> None:
    task = found["task"]
    print(
        f"\n{task['name']}: {task['rows']} rows, {len(task['seeds'])} seeds, {found['cpu_seconds']:.0f} s of CPU"
    )
    print(
        f"noise over signal of a step: {found['rho']}, weighted as Adam weighs it {found['rho_weighted']}"
    )
    for factor, losses in found["grid"].items():
        print(f"x{factor:2} " + "  ".join(f"{lr} {loss:.4f}" for lr, loss in losses.items()))
    print(
        "factor rule                    rate   eval loss  above the grid's best  doublings from the best rate"
    )
    for each in found["rules"]:
        print(
            f"x{each['factor']:<5} {each['rule']:19} {each['lr']:.2e}  {each['eval_loss']:.4f}     "
            f"{each['above_best_fraction']:+.2%}                 {each['doublings_from_optimum']:+.2f}"
        )
    for rule, close in found["closeness"].items():
        print(
            f"on average {rule:19} {close['doublings']:.2f} doublings, {close['above_best_fraction']:+.2%}"
        )
    for each in found["overhead"]:
        interval = (
            ""
            if each["measured_low"] is None
            else f" ({each['measured_low']:.2f} to {each['measured_high']:.2f})"
        )
        print(
            f"x{each['factor']} costs {each['measured']:.2f}{interval} times the tokens; the noise predicts "
            f"{each['predicted']:.2f}, weighted {_number(each['predicted_weighted'])}"
        )  # fmt: skip
    for each in found["modes"]:
        print(
            f"{each['mode']}: loss {each['eval_loss_difference']:+.4f} ({each['low']:+.4f} to {each['high']:+.4f}; "
            f"spread of the fixed runs {each['fixed_spread']:.4f}), {each['steps']:.0f} steps instead of "
            f"{each['fixed_steps']:.0f}"
        )


if __name__ == "__main__":
    main()
