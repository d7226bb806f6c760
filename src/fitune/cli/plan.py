"""Implement `fitune plan`, which predicts memory and time of each setting and picks the fastest."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from fitune.cli.arguments import ConfigArguments, ConfigFlags, read_arguments
from fitune.cli.output import Format, Screen, console, print_json, print_text, warn
from fitune.cli.plan_snapshot import show_snapshot
from fitune.cli.plan_splits import compare_splits
from fitune.cli.plan_table import first_answer_text, show_measured, show_plan
from fitune.cli.plan_trainer import plan_trainer
from fitune.config import format_config
from fitune.errors import DoesNotFitError, UsageError
from fitune.language import say
from fitune.model.source import check_source, directory_of
from fitune.planning.choices import settings_of_candidate
from fitune.planning.limits import NO_DATA
from fitune.planning.optimizer_facts import unusual_rate
from fitune.planning.plan import Candidate, Plan, does_not_fit, plan_json
from fitune.planning.search import choose_plan

_MEMORY = Group("Memory", sort_key=2)
_SETTINGS = Group("Which settings", sort_key=3)


def plan(
    *words: ConfigArguments,
    flags: ConfigFlags = ConfigFlags(),  # noqa: B008 (frozen)
    gpu: Annotated[
        str | None,
        Parameter(
            help="a card to plan for, like 'RTX 4090', or cpu (memory.gpu)",
            metavar="CARD",
            group=_MEMORY,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        Parameter(
            help="memory limit: 20GiB, or 0.9 of what is free (memory.budget)",
            name=("--memory-limit", "--budget"),
            metavar="SIZE",
            group=_MEMORY,
        ),
    ] = None,
    gpus: Annotated[
        int,
        Parameter(
            help="so many cards, which share the samples of a step (torchrun)", group=_MEMORY
        ),
    ] = 1,
    every: Annotated[
        bool, Parameter(name="--all", help="predict every setting and show it", group=_SETTINGS)
    ] = False,
    apply: Annotated[
        int | None,
        Parameter(
            help=(
                "print the configuration with candidate N written into it, by its number in the table"
            ),
            metavar="N",
            group=_SETTINGS,
        ),
    ] = None,
    measure: Annotated[
        bool,
        Parameter(help="run real steps of the chosen candidate here, and compare", group=_SETTINGS),
    ] = False,
    splits: Annotated[
        str | None,
        Parameter(
            help="compare forced splits, micro-batch size x accumulation: 6x1,6x4,4x6",
            metavar="SPLITS",
            group=_SETTINGS,
        ),
    ] = None,
    trainer: Annotated[
        str | None,
        Parameter(
            help="predict the transformers Trainer that this function builds, in place of CONFIG",
            metavar="MODULE:FUNCTION",
            group=_SETTINGS,
        ),
    ] = None,
    snapshot: Annotated[
        str | None,
        Parameter(
            help="show what filled a card, from a file of torch.cuda.memory._dump_snapshot",
            metavar="FILE",
            group=_SETTINGS,
        ),
    ] = None,
    output_format: Format = "auto",
) -> None:
    """Predict memory and time of each setting, and pick the fastest that fits with the same result.

    Needs no card, no weights and no data: a preset, a model's directory or its config.json may
    replace the configuration. Raises DoesNotFitError (exit code 3) if nothing fits.
    """
    if gpus < 1:
        raise UsageError(f"--gpus {gpus} is no number of cards: give 1 or more")
    _check_flags(
        {
            "--gpus": gpus > 1,
            "--splits": splits is not None,
            "--measure": measure,
            "--trainer": trainer is not None,
            "--snapshot": snapshot is not None,
            "--gpu": gpu is not None,
            "--apply": apply is not None,
            "--all": every,
            "--memory-limit": budget is not None,
            "--format": output_format != "auto",
        }
    )
    if snapshot is not None:
        if words or flags != ConfigFlags():
            raise UsageError("--snapshot shows what has happened: give no configuration with it")
        show_snapshot(Path(snapshot), output_format)
        return
    if trainer is not None:
        if words or flags != ConfigFlags():
            raise UsageError("--trainer takes the place of a configuration: give one of them")
        plan_trainer(trainer, gpu=gpu, output_format=output_format)
        return
    given = [
        f"memory.{key}={value}"
        for key, value in (("gpu", gpu), ("budget", budget))
        if value is not None
    ]
    words, flags, given = _accept_model(words, flags, given)
    config = read_arguments(words, flags, overrides=given).config
    check_source(config.model.source)
    if (message := unusual_rate(config.optim)) is not None:
        warn(message)
    if splits is not None:
        compare_splits(config, splits, output_format)
        return
    screen = Screen(stderr=True)
    is_watched = screen.is_terminal and apply is None and output_format in ("auto", "human")
    with screen.status(say("planning")) as status:
        found = choose_plan(
            config,
            num_gpus=gpus,
            search="all" if every else "brief",
            on_stage=status.update,
            on_first=(lambda answer: screen.print(first_answer_text(answer), soft_wrap=True))
            if is_watched
            else None,
        )
    if apply is not None:
        wanted = _candidate(found, apply, every=every)
        chosen = read_arguments(
            words, flags, overrides=[*given, *settings_of_candidate(wanted, config)]
        )
        print_text(format_config(chosen), end="")
        if config.data.train == NO_DATA:
            warn(f"data.train is '{NO_DATA}' in it: put your data there before you train")
        return
    measured = None
    if measure and found.chosen is not None:
        from fitune.planning.measure import measure_candidate

        measured = measure_candidate(config, found)
    if output_format == "json":
        print_json(plan_json(found) | ({} if measured is None else {"measured": asdict(measured)}))
    elif output_format == "quiet":
        print_text(
            "none"
            if found.chosen is None
            else _settings_text(settings_of_candidate(found.candidates[found.chosen], config))
        )
    else:
        show_plan(found, console(output_format), every=every)
        if measured is not None:
            show_measured(found, measured, console(output_format))
    if found.chosen is None:
        raise DoesNotFitError(does_not_fit(found))


#: (a flag, other flags that would have no effect with it, the reason).
_EXCLUSIVE_FLAGS = (
    (
        "--snapshot",
        (
            "--trainer",
            "--gpu",
            "--gpus",
            "--splits",
            "--measure",
            "--apply",
            "--all",
            "--memory-limit",
        ),
        "shows what a card recorded",
    ),
    (
        "--trainer",
        ("--gpus", "--splits", "--measure", "--apply", "--all", "--memory-limit"),
        "predicts a Trainer as it is",
    ),
    (
        "--splits",
        ("--gpus", "--measure", "--apply", "--all"),
        "compares settings of one card side by side",
    ),
    ("--apply", ("--measure", "--format"), "prints a configuration and nothing else"),
    ("--measure", ("--gpus",), "runs on the one device that is here"),
)


def _check_flags(given: Mapping[str, bool]) -> None:
    for flag, others, why in _EXCLUSIVE_FLAGS:
        useless = [other for other in others if given[other]]
        if given[flag] and useless:
            raise UsageError(f"{flag} {why}: drop {' and '.join(useless)}")


def _settings_text(settings: Sequence[str]) -> str:
    """Format settings as overrides for `fitune train`."""
    return " ".join(settings) or "as configured"


def _candidate(plan: Plan, number: int, *, every: bool) -> Candidate:
    """Return a candidate by its number in the table, which counts from 0. Raises UsageError."""
    if not 0 <= number < len(plan.candidates):
        more = "" if every else ", or --all with the number of a table that --all has shown"
        raise UsageError(
            f"--apply {number} is none of the candidates: give 0 to {len(plan.candidates) - 1}{more}"
        )
    return plan.candidates[number]


def _accept_model(
    words: tuple[str, ...], flags: ConfigFlags, given: list[str]
) -> tuple[tuple[str, ...], ConfigFlags, list[str]]:
    """Return (words, flags, overrides) after accepting a model in place of the configuration file.

    No data is needed in that case.
    """
    named = {word.partition("=")[0] for word in words}
    if words and "=" not in words[0]:
        path = Path(words[0])
        is_model = path.name == "config.json" or path.suffix in (".gguf", ".pth") or path.is_dir()
        if not is_model and (path.is_file() or path.suffix in (".yaml", ".yml")):
            return words, flags, given
        if flags.model is not None:
            raise UsageError(
                f"{words[0]} and --model {flags.model} are two models: give one of them"
            )
        flags = replace(flags, model=directory_of(words[0]))
        words = words[1:]
    if not flags.data and "data.train" not in named:
        given = [*given, f"data.train={NO_DATA}"]
    return words, flags, given
