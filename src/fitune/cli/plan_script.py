"""Implement `fitune plan --gpu CARD -- python train.py ...`, which predicts a script as it is."""

import re
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from fitune.cli.output import Format, Screen, console, print_json, print_text, table
from fitune.cli.plan_trainer import show_prediction, whole_bytes
from fitune.errors import DoesNotFitError, UsageError
from fitune.importing import collections_paused
from fitune.language import say, translated
from fitune.units import format_bytes, format_gib

if TYPE_CHECKING:
    from fitune.allocator.prediction import Prediction
    from fitune.machine.cards import Device
    from fitune.planning.script import Variation

_SCRIPT = Group("The script", sort_key=2)


def plan_script(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    gpu: Annotated[
        str | None,
        Parameter(help="the card, like 'RTX 4090'; this machine's by default", metavar="CARD"),
    ] = None,
    vary: Annotated[
        str | None,
        Parameter(
            help="predict several values of an argument of the script: batch_size=4,6,8, or look "
            "for the largest that fits in a range: batch_size=1..64",
            metavar="ARGUMENT=VALUES",
            group=_SCRIPT,
        ),
    ] = None,
    steps: Annotated[int, Parameter(help="how many optimizer steps to record", group=_SCRIPT)] = 2,
    rows: Annotated[
        Literal["longest", "as-they-come"],
        Parameter(
            help="which samples data loaders begin with; by default the longest", group=_SCRIPT
        ),
    ] = "longest",
    cwd: Annotated[
        str | None,
        Parameter(help="the directory to run the command in", metavar="DIR", group=_SCRIPT),
    ] = None,
    python: Annotated[
        str | None,
        Parameter(
            help="the interpreter that runs the script; by default the one that the command names",
            metavar="PATH",
            group=_SCRIPT,
        ),
    ] = None,
    output_format: Format = "auto",
) -> None:
    """Predict the memory of a training script, unchanged: no card, no weights, no data.

    Raises DoesNotFitError (exit code 3) if it does not fit.
    """
    with collections_paused():
        from fitune.planning.script import card_of, predict_script, read_script_command, vary_script

    parsed = read_script_command(command)
    screen = Screen(stderr=True)

    def predict(words: list[str]) -> "Prediction":
        return predict_script(words, gpu=gpu, python=python, cwd=cwd, num_steps=steps, rows=rows)

    if vary is not None:
        name, values, is_range = read_values(vary)
        with screen.status(say("recording the script")) as status:

            def predict_value(value: int) -> "Prediction":
                status.update(f"{name}={value}")
                return predict(parsed.with_argument(name, str(value)).words())

            found = vary_script(predict_value, values, search=is_range)
        _show_variations(name, found, output_format)
        least = found[0]
        if all(each.prediction.fits is False for each in found):
            raise DoesNotFitError(
                f"{name}={least.value} does not fit: it needs "
                f"{format_bytes(whole_bytes(least.prediction))}; {_WAYS_OUT}"
            )
        return
    with screen.status(say("recording the script")):
        prediction = predict(list(command))
    if output_format == "json":
        print_json({"command": list(command), "prediction": asdict(prediction)})
    elif output_format == "quiet":
        print_text(prediction.peak_reserved_bytes)
    else:
        shown = console(output_format)
        shown.print(_verdict(prediction, card_of(gpu)), soft_wrap=True)
        show_prediction(prediction, shown)
    if prediction.fits is False:
        raise DoesNotFitError(
            f"{shlex.join(command)} does not fit: it needs "
            f"{format_bytes(whole_bytes(prediction))}; {_WAYS_OUT}"
        )


def _verdict(prediction: "Prediction", device: "Device") -> str:
    """Return the sentence that the answer begins with."""
    sentences = {
        True: "this script fits {card}: it needs {need} of {total}",
        False: "this script does not fit {card}: it needs {need} of {total}",
        None: "this script needs at most {need} of {total} on {card}: how much less is not known",
    }
    return say(
        sentences[prediction.fits],
        card=device.name,
        need=format_bytes(whole_bytes(prediction)),
        total=format_bytes(device.total_bytes),
    )


_WAYS_OUT = (
    "give it a smaller batch with more gradient accumulation, shorter samples or gradient "
    "checkpointing, or a larger card"
)


def read_values(text: str) -> tuple[str, list[int], bool]:
    """Parse 'batch_size=4,6,8' or 'batch_size=1..64' into (name, values, whether it is a range).

    Raises UsageError for other text.
    """
    name, _, values = text.partition("=")
    name = name.lstrip("-")
    if name and (found := re.fullmatch(r"(\d+)\.\.(\d+)", values)):
        low, high = int(found[1]), int(found[2])
        if 0 < low < high:
            return name, [low, high], True
    elif name and re.fullmatch(r"\d+(,\d+)*", values):
        numbers = sorted({int(each) for each in values.split(",")})
        if numbers[0] > 0:
            return name, numbers, False
    raise UsageError(
        f"--vary {text} names no values: write it like batch_size=4,6,8 or batch_size=1..64"
    )


def _show_variations(name: str, found: "list[Variation]", output_format: str) -> None:
    """Print one line for each value; the largest that fits is marked."""
    fitting = [each.value for each in found if each.prediction.fits]
    largest = max(fitting, default=None)
    if output_format == "json":
        print_json(
            {
                "argument": name,
                "largest": largest,
                "values": [
                    {"value": each.value, "prediction": asdict(each.prediction)} for each in found
                ],
            }
        )
        return
    if output_format == "quiet":
        print_text("none" if largest is None else largest)
        return
    verdicts = {True: say("fits"), False: say("does not fit"), None: say("not known")}
    rows = [
        (
            f"{'→ ' if each.value == largest else '  '}{each.value}",
            format_gib(each.prediction.peak_allocated_bytes, 2),
            format_gib(each.prediction.peak_reserved_bytes, 2),
            "–"
            if each.prediction.device_bytes is None
            else format_gib(each.prediction.device_bytes, 2),
            verdicts[each.prediction.fits],
        )
        for each in found
    ]
    columns = (
        name,
        f">{say('allocated')} GiB",
        f">{say('reserved')} GiB",
        f">{say('device used')} GiB",
        "",
    )
    screen = console(output_format)
    screen.print(table(columns, rows))
    if largest is not None:
        screen.print(say("largest {name} that fits: {value}", name=name, value=largest))
    for assumption in found[-1].prediction.assumptions:
        screen.print(translated(assumption), soft_wrap=True)
