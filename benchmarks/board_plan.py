"""How long the Plan view waits for an answer when a slider is moved.

python benchmarks/board_plan.py            minimind2 for an RTX 4090, in about two minutes
python benchmarks/board_plan.py my-model   of a directory, a hub id or another preset

The planning process of the board is asked as the page asks it: a whole plan, then moves of each slider, first to stops
that it had time to record ahead, then to micro-batches that follow from the recordings. The time that a browser needs
to draw is not in it. Nothing is cached between calls: FITUNE_CACHE is a new directory.
"""

import argparse
import os
import time
from tempfile import TemporaryDirectory

from fitune.board.answer import Held
from fitune.board.commands import settings_text
from fitune.board.planner import Planner, Question
from fitune.board.planning import LENGTHS, SAMPLES, next_moves

#: time for the recordings ahead, at the end of which the process is silent
AHEAD_SECONDS = 90.0
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8)


def milliseconds(planner: Planner, settings: dict[str, str], held: Held) -> float:
    begin = time.perf_counter()
    *_, last = planner.ask(Question(settings=settings_text(settings), search=held.choice))
    assert last.kind == "plan", last
    return 1000 * (time.perf_counter() - begin)


def near(stops: tuple[int, ...], value: int) -> list[int]:
    place = stops.index(value)
    return [stop for stop in stops[max(0, place - 3) : place + 4] if stop != value]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="minimind2")
    arguments = parser.parse_args()
    settings = {
        "model.source": arguments.model, "memory.gpu": "RTX 4090", "batch.effective": "16", "data.max_length": "2048",
    }  # fmt: skip
    with TemporaryDirectory() as cache, Planner() as planner:
        os.environ["FITUNE_CACHE"] = cache
        begin = time.perf_counter()
        question = Question(
            settings=settings_text(settings), search="brief", ahead=next_moves(settings)
        )
        *_, last = planner.ask(question)
        assert last.kind == "plan", last
        content = last.content
        assert isinstance(content, dict)
        print(f"the first plan, with the start of the process: {time.perf_counter() - begin:.1f} s")
        held = Held.model_validate(content["rows"][content["shown"]]["held"])
        time.sleep(AHEAD_SECONDS)
        moves = {
            "batch.micro": MICRO_BATCHES,
            "data.max_length": near(LENGTHS, 2048),
            "batch.effective": near(SAMPLES, 16),
        }
        for key, values in moves.items():
            times = [milliseconds(planner, settings | {key: str(value)}, held) for value in values]
            print(f"{key}: {', '.join(f'{each:.0f}' for each in times)} ms for {list(values)}")


if __name__ == "__main__":
    main()
