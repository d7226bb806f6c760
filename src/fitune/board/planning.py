"""Answers what the Plan view asks."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from fitune.board.answer import Held
from fitune.board.commands import plan_command, settings_text, settings_yaml, train_command
from fitune.board.planner import Planner, Question
from fitune.board.requests import event, read_body
from fitune.boundary import bounded
from fitune.config import Loss, Method, OutputConfig, Precision, Recompute
from fitune.errors import FituneError, UsageError
from fitune.language import translated
from fitune.machine.cards import CATALOGUE, Device
from fitune.machine.devices import cpu_device, this_machine
from fitune.model.source import PRESETS, directory_of
from fitune.optimizers.table import OPTIMIZERS

#: where the slider of the length stops, in tokens; recordings are made ahead at the next ones
LENGTHS = tuple(tokens for power in range(7, 17) for tokens in (2**power, 3 * 2 ** (power - 1)))
#: where the sliders of samples stop
SAMPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MOST_SETTINGS, _MOST_CHARS = 200, 4000
#: stops of each slider that are recorded ahead, about a second each for a small model
_NUM_AHEAD = 6
#: all other micro-batches follow from these
_MICRO_AHEAD = (1, 2, 4)
_DEFAULT_OUTPUT = Path(OutputConfig.model_fields["output"].default)

_Text = Annotated[str, Field(max_length=_MOST_CHARS)]
Settings = Annotated[dict[_Text, _Text], Field(max_length=_MOST_SETTINGS)]


class SettingsBody(BaseModel):
    """The settings of the page: configuration key -> value as text, empty where it is open."""

    model_config = ConfigDict(extra="forbid")

    settings: Settings


class PlanBody(SettingsBody):
    """What the page asks to be planned."""

    #: what an earlier plan chose: predicted alone, as far as `settings` leaves it open
    held: Held | None = None
    #: whether every candidate is predicted
    every: bool = False


def routes(directory: Path, planner: Planner) -> list[BaseRoute]:
    """Return the routes of the Plan view. directory: where runs are kept."""

    async def plan(request: Request) -> Response:
        wanted = await read_body(request, PlanBody)
        return StreamingResponse(_plan(directory, planner, wanted), media_type="text/event-stream")

    return [Route("/api/choices", choices), Route("/api/plan", plan, methods=["POST"])]


@bounded("fitune board")
def choices(request: Request) -> Response:
    """Answer what can be chosen: models, cards, and the values of keys."""
    here = [_card(device, here=True) for device in (*this_machine(), cpu_device())]
    return JSONResponse(
        {
            "models": PRESETS,
            "cards": [*here, *map(_card, sorted(CATALOGUE, key=lambda card: card.total_bytes))],
            "lengths": LENGTHS,
            "samples": SAMPLES,
            "values": {
                "model.method": get_args(Method),
                "model.precision": ("auto", *get_args(Precision)),
                "model.recompute": ("auto", *get_args(Recompute)),
                "loss": ("auto", *get_args(Loss)),
                "optim.name": tuple(OPTIMIZERS),
            },
        }
    )


def _card(device: Device, *, here: bool = False) -> dict[str, object]:
    return {
        "name": "cpu" if device.kind == "cpu" else device.name,
        "total_bytes": device.total_bytes,
        "here": here,
        "capability": device.compute_capability,
        "bandwidth": device.bandwidth_bytes_per_second,
    }


def _plan(directory: Path, planner: Planner, wanted: PlanBody) -> Iterator[str]:
    """Yield the parts of an answer as server-sent events, an error as the last one."""
    try:
        settings = plain_settings(wanted.settings)
        if wanted.held is None:
            yield event("commands", commands_of(settings, directory))
        question = Question(
            settings=settings_text(settings),
            search=wanted.held.choice if wanted.held else "all" if wanted.every else "brief",
            ahead=() if wanted.held else next_moves(settings),
        )
        for reply in planner.ask(question):
            yield event(reply.kind, reply.content)
    except FituneError as error:
        yield event("error", translated(str(error)))


def plain_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that are given. Raises UsageError where no model is among them."""
    given = {key: value.strip() for key, value in settings.items() if value.strip()}
    if "model.source" not in given:
        raise UsageError(
            "no model is chosen: give a preset, a directory, a config.json or a hub id"
        )
    return given | {"model.source": directory_of(given["model.source"])}


def commands_of(settings: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Return the commands and the YAML of the settings. Raises ConfigError if they are wrong.

    directory: where the run is kept.
    """
    output = {} if directory == _DEFAULT_OUTPUT else {"run.output": str(directory)}
    return {
        "yaml": settings_yaml(settings),
        "plan": plan_command(settings),
        "train": train_command({**settings, **output}),
    }


def next_moves(settings: Mapping[str, str]) -> tuple[str, ...]:
    """Return moves of the sliders to the stops around the present ones, the nearest first."""
    moves = [(-1, f"batch.micro={samples}") for samples in _MICRO_AHEAD]
    for key, values in (("data.max_length", LENGTHS), ("batch.effective", SAMPLES)):
        text = settings.get(key, "")
        if text.isdecimal() and int(text):
            near = sorted(values, key=lambda stop: abs(math.log(stop / int(text))))
            moves += [
                (place, f"{key}={stop}") for place, stop in enumerate(near[1 : 1 + _NUM_AHEAD])
            ]
    return tuple(move for _, move in sorted(moves))
