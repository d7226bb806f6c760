"""Run a training script for a few optimizer steps on the rehearsed card, and print the allocator's own peaks.

    python -m rehearsal.run python -m rehearsal.script [--steps 2] -- train.py --batch_size 6

The script is run whole and unchanged, in this process. Its steps begin and end as in
`fitune.recorder.step_ends`. Prints JSON: for each step the peaks of allocated and reserved bytes.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook


class Steps:
    """Resets the peaks where a step begins and prints them where the wanted number has ended."""

    def __init__(self, num_wanted: int) -> None:
        self.num_wanted = num_wanted
        self.peaks: list[tuple[int, int]] = []
        self.has_updated, self.began, self.depth = False, False, 0

    def before_forward(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return
        self.depth += 1
        if self.depth > 1 or (self.began and not self.has_updated):
            return
        if self.began:
            self.end()
        self.began, self.has_updated = True, False
        torch.cuda.reset_peak_memory_stats()

    def after_forward(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.depth -= 1

    def after_update(self, *_: Any) -> None:
        self.has_updated = True

    def end(self) -> None:
        self.peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        if len(self.peaks) == self.num_wanted:
            print(json.dumps({"peaks": self.peaks}), flush=True)
            os._exit(0)


def main() -> None:
    cut = sys.argv.index("--")
    options, words = sys.argv[1:cut], sys.argv[cut + 1 :]
    steps = Steps(int(options[options.index("--steps") + 1]) if "--steps" in options else 2)
    register_module_forward_pre_hook(steps.before_forward)
    register_module_forward_hook(steps.after_forward, always_call=True)
    register_optimizer_step_post_hook(steps.after_update)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")
    steps.end()
    print(json.dumps({"peaks": steps.peaks}), flush=True)


if __name__ == "__main__":
    main()
