"""Run a training script for a few optimizer steps on the rehearsed card, and print the allocator's own peaks.

    python -m rehearsal.run python -m rehearsal.script [--steps 2] -- train.py --batch_size 6
    python -m rehearsal.run python -m rehearsal.script [--selected 2046] [--explain] -- -m package.train

The script is run whole and unchanged, in this process. Its steps begin and end as in
`fitune.recorder.step_ends`. Prints JSON: for each step the peaks of allocated and reserved bytes. With
`--explain` the same command is predicted in this interpreter too, and what differs in the steps is printed.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from rehearsal.answers import answers

CARDS = {"4090": "RTX 4090", "3090": "RTX 3090", "A100": "A100 40GB", "H100": "H100 80GB"}
"""Cards of `rehearsal.run` -> their names in fitune's catalogue."""
MOST_ACTIONS = 4_000_000


class Steps:
    """Resets the peaks where a step begins and prints them where the wanted number has ended."""

    def __init__(self, num_wanted: int, explained: Sequence[str] = ()) -> None:
        self.num_wanted = num_wanted
        self.explained = explained
        self.peaks: list[tuple[int, int]] = []
        self.ends: list[int] = []
        self.has_updated, self.began, self.depth = False, False, 0
        self.highest = (0, 0)
        self.reset = torch.cuda.memory.reset_peak_memory_stats

    def reset_by_script(self, *arguments: torch.device) -> None:
        """Stand for the function of this name: a script may log the peaks of its own steps."""
        self.highest = self.highest_so_far()
        self.reset(*arguments)

    def highest_so_far(self) -> tuple[int, int]:
        now = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return max(now[0], self.highest[0]), max(now[1], self.highest[1])

    def before_forward(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        self.depth += 1
        if self.depth > 1 or (self.began and not self.has_updated):
            return
        if self.began:
            self.end()
        elif self.explained:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MOST_ACTIONS)
        self.began, self.has_updated, self.highest = True, False, (0, 0)
        self.reset()

    def after_forward(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.depth -= 1

    def after_update(self, *_: Any) -> None:
        self.has_updated = True

    def end(self) -> None:
        self.peaks.append(self.highest_so_far())
        if self.explained:
            self.ends.append(len(torch.cuda.memory._snapshot()["device_traces"][0]))
        if len(self.peaks) == self.num_wanted:
            self.show()
            os._exit(0)

    def show(self) -> None:
        print(json.dumps({"peaks": self.peaks}), flush=True)
        if self.explained:
            print("\n".join(_difference(self.explained, self.ends)), flush=True)


def _difference(words: Sequence[str], ends: Sequence[int]) -> list[str]:
    """Return the peaks that are predicted of the same command, and what differs from this card's record."""
    from fitune.allocator.prediction import PredictSettings, predict_trace
    from fitune.planning.script import Rows, card_of, read_script_command, record_command
    from fitune.recorder.events import MemoryTrace
    from rehearsal.difference import first_difference
    from rehearsal.explain import explain
    from rehearsal.history import _events

    measured = MemoryTrace(tuple(_events(torch.cuda.memory._snapshot(), ends)))
    device = card_of(CARDS[os.environ["FAKE_CARD"]])
    command = read_script_command([sys.executable, *words])
    # the longest samples are not those that the script has run on
    rows: Rows = "as-they-come"
    predicted = record_command(command, device, num_steps=len(ends), rows=rows)
    prediction = predict_trace(predicted, PredictSettings(device=device))
    return [
        f"predicted {prediction.peak_allocated_bytes:,} {prediction.peak_reserved_bytes:,}",
        *explain(tuple(predicted.events), measured.events),
        f"in all steps {first_difference(predicted, measured) or 'every allocation is equal'}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps to run")
    parser.add_argument(
        "--selected", type=int, default=-1, help="how many elements each mask selects"
    )
    parser.add_argument(
        "--truth", type=int, default=1, help="what a question about a mask is answered"
    )
    parser.add_argument(
        "--explain", action="store_true", help="predict it too, and print what differs"
    )
    cut = sys.argv.index("--")
    options, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    steps = Steps(options.steps, words if options.explain else ())
    register_module_forward_pre_hook(steps.before_forward)
    register_module_forward_hook(steps.after_forward, always_call=True)
    register_optimizer_step_post_hook(steps.after_update)
    for module in (torch.cuda, torch.cuda.memory):
        setattr(module, "reset_peak_memory_stats", steps.reset_by_script)  # noqa: B010
    with answers(truth=options.truth, selected=options.selected):
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [*words], str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    steps.end()
    steps.show()


if __name__ == "__main__":
    main()
