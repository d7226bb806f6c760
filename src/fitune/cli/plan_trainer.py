"""Implement `fitune plan --trainer module:function`, which predicts a Trainer's memory."""

import importlib
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fitune.cli.output import Screen, console, html_block, print_json, print_text, table
from fitune.errors import DoesNotFitError, FituneError, UsageError
from fitune.language import say, translated
from fitune.units import format_bytes, format_gib

if TYPE_CHECKING:
    from fitune.allocator.prediction import Prediction


def plan_trainer(name: str, *, gpu: str | None, output_format: str) -> None:
    """Print the prediction for the Trainer that a function builds.

    name: 'module:function', importable from the current directory. The function takes no arguments
        and returns the Trainer.

    Raises UsageError if the function cannot be found, and DoesNotFitError.
    """
    from fitune.integrations.transformers import predict_trainer

    prediction = predict_trainer(_build(name), gpu=gpu)
    if output_format == "json":
        print_json({"prediction": asdict(prediction)})
    elif output_format == "quiet":
        print_text(prediction.peak_reserved_bytes)
    else:
        show_prediction(prediction, console(output_format))
    if prediction.fits is False:
        raise DoesNotFitError(
            f"the Trainer of {name} does not fit: it needs "
            f"{format_bytes(whole_bytes(prediction))}; lower per_device_train_batch_size and "
            "raise gradient_accumulation_steps, or set activation_checkpointing=True"
        )


def _build(name: str) -> Any:
    """Call the function. Raises UsageError with the exception that it raised."""
    function = find_function(name)
    try:
        return function()
    except FituneError:
        raise
    # A Trainer may refuse its arguments by any exception, such as bf16=True without a card.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--trainer {name} built no Trainer: {type(error).__name__}: {reason}"
        ) from error


def find_function(name: str) -> Any:
    """Import a function. Raises UsageError if the module does not exist or has no such function."""
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, "")
    try:
        function = (
            getattr(importlib.import_module(module_name), function_name, None)
            if module_name
            else None
        )
    except ModuleNotFoundError as error:
        raise UsageError(f"--trainer {name}: there is no module {error.name} here") from error
    finally:
        sys.path.remove("")
    if not callable(function):
        raise UsageError(
            f"--trainer {name} names no function: write module:function, which returns the Trainer"
        )
    return function


def whole_bytes(prediction: "Prediction") -> int:
    """Return what the card must have: the memory used on it, or what PyTorch reserves."""
    return (
        prediction.peak_reserved_bytes
        if prediction.device_bytes is None
        else prediction.device_bytes
    )


def html_prediction(prediction: "Prediction") -> str:
    """Return the prediction as an HTML block for a notebook."""
    return html_block(lambda screen: show_prediction(prediction, screen))


def show_prediction(prediction: "Prediction", screen: Screen) -> None:
    parts = [(name, format_gib(size, 2)) for name, size in prediction.categories.items() if size]
    rows = [
        *parts,
        (say("allocated"), format_gib(prediction.peak_allocated_bytes, 2)),
        (say("reserved"), format_gib(prediction.peak_reserved_bytes, 2)),
    ]
    if prediction.device_bytes is not None:
        rows.append((say("device used"), format_gib(prediction.device_bytes, 2)))
    screen.print(
        table((say("at the peak ({phase})", phase=say(prediction.peak_phase)), ">GiB"), rows)
    )
    for assumption in prediction.assumptions:
        screen.print(translated(assumption), soft_wrap=True)
