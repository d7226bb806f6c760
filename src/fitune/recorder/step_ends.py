"""Find where the optimizer steps of somebody else's script begin and end.

A step ends with the last optimizer.step() before a forward, and the next one begins with this
forward. So gradient accumulation and several optimizers count as the script has them, and
evaluation belongs to the step that it precedes. A script that updates its parameters by hand has
no optimizer.step(): its step ends where it has cleared the gradients of a backward.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from fitune.recorder.phase_tracker import is_in_backward
from fitune.recorder.recorder import Recorder


class EnoughStepsError(BaseException):
    """Ends the script once its steps are recorded; no Exception, since a script may catch those."""


class StepEnds:
    """Tells the recorder where each step of a script begins and ends.

    done: is called once the wanted steps are recorded, before the script is ended.
    give_up: is called where the script goes on in spite of that.
    """

    def __init__(
        self,
        recorder: Recorder,
        num_wanted: int,
        *,
        done: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        self._recorder, self._num_wanted = recorder, num_wanted
        self._done, self._give_up = done, give_up
        self._number, self._has_updated, self._is_done = 0, False, False
        #: whether a step ended without an optimizer
        self.updates_by_hand = False
        #: the models of the script, such as the trained one and a reference, by their ids
        self.models: dict[int, nn.Module] = {}
        self.num_forwards = 0

    @property
    def num_steps(self) -> int:
        """The number of steps that have updated a model."""
        return self._number if self._has_updated else self._number - 1

    @property
    def next_step(self) -> int:
        """The number of the step that the next forward belongs to."""
        return self._number + (self._number == 0 or self._has_updated)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow all models and optimizers of this block."""
        forward = register_module_forward_pre_hook(self._before_forward)
        update = register_optimizer_step_post_hook(self._after_update)
        try:
            yield
        finally:
            forward.remove()
            update.remove()

    def assumptions(self) -> list[str]:
        """Return what was assumed of the ends of the steps."""
        if not self.updates_by_hand:
            return []
        return ["assumed: the script updates its parameters where it clears gradients"]

    def end(self) -> None:
        """End the step that runs, where the script has ended by itself."""
        if self._number and not self._is_done:
            self._end_step()

    def _before_forward(self, module: nn.Module, _: object) -> None:
        # a layer that gradient checkpointing runs again, or a part of a model
        if is_in_backward() or self._recorder.is_in_module:
            return
        if self._is_done:
            self._give_up()
        self.num_forwards += 1
        is_new = id(module) not in self.models and any(True for _ in module.parameters())
        if is_new:
            self.models[id(module)] = module
        if self._recorder.has_gradients and not self._has_updated and not self._have_gradients():
            self._has_updated = self.updates_by_hand = True
        if self._number == 0 or self._has_updated:
            self._begin_step()
        elif is_new:
            self._recorder.load(module)

    def _have_gradients(self) -> bool:
        return any(
            parameter.grad is not None
            for model in self.models.values()
            for parameter in model.parameters()
        )

    def _begin_step(self) -> None:
        if self._number:
            self._end_step()
        if self._number == self._num_wanted:
            self._is_done = True
            self._done()
            raise EnoughStepsError
        self._number, self._has_updated = self._number + 1, False
        gc.collect()
        for model in self.models.values():
            self._recorder.load(model)
        self._recorder.begin_step(self._number)

    def _end_step(self) -> None:
        for model in self.models.values():
            self._recorder.end_step(model)

    def _after_update(self, _: torch.optim.Optimizer, *__: object) -> None:
        self._has_updated = True
