"""Finds out which phase, micro-batch and module of a training step is running.

The loop itself need not report anything: global module hooks show that the forward runs,
autograd's graph task shows that the backward runs, and global optimizer hooks show that the
optimizer runs. In the backward, the module is that of the forward operator whose gradient is being
computed; autograd's sequence numbers connect the two.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fitune.recorder.events import Phase
from fitune.recorder.operator_cost import tensors_in
from fitune.recorder.recording import Where, split_iteration


def is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class PhaseTracker:
    """Tracks the phase, the step, the micro-batch and the module of the operator that runs now."""

    def __init__(self) -> None:
        #: The optimizer's step function is running.
        self.in_optimizer = False
        #: The optimizer's state is being created outside of its step function.
        self.creates_state = False
        self.begin("load", 0)
        self._names: dict[int, str] = {}
        #: The modules whose forward is running, outermost first.
        self._stack: list[str] = []
        #: Autograd's sequence numbers at which the running module changed, and the new module.
        self._sequence: tuple[list[int], list[str]] = ([], [])
        self._iterations: dict[str, tuple[int, str]] = {}

    def begin(self, phase: Phase, step: int) -> None:
        self.phase, self.step, self.micro_batch = phase, step, 0
        #: A module has run in the current forward.
        self.forward_began = False

    def begin_step(self, step: int) -> None:
        self.begin("forward", step)
        for items in self._sequence:
            items.clear()

    def begin_micro_batch(self) -> None:
        """Move on to the next micro-batch, unless its forward is running already."""
        if self.phase in ("backward", "optimizer"):
            self._next_micro_batch()

    def name_modules(self, model: torch.nn.Module) -> None:
        """Learn the dotted paths of the model's modules."""
        self._names |= {id(module): name for name, module in model.named_modules()}

    @property
    def in_module(self) -> bool:
        """Whether the forward of any module is running."""
        return bool(self._stack)

    def follow(self, args: tuple[object, ...]) -> None:
        """Update the phase before an operator is called with these arguments."""
        if is_in_backward():
            self.phase = "backward"
        elif self.in_optimizer or self.creates_state or self.phase == "backward":
            self.phase = "optimizer"
        elif self.phase == "optimizer" and not any(True for _ in tensors_in(args)):
            # a factory function after the update makes the next micro-batch's input
            self._next_micro_batch()

    def running_module(self) -> str:
        """Return the dotted path of the innermost module that runs, "" outside of all modules."""
        if self._stack:
            return self._stack[-1]
        if self.phase == "backward" and (node := torch._C._current_autograd_node()) is not None:
            numbers, names = self._sequence
            position = bisect_right(numbers, node._sequence_nr()) - 1
            return names[position] if position >= 0 else ""
        return ""

    def where(self, module: str | None = None) -> Where:
        """Return the current place in the step; None stands for the running module."""
        module = self.running_module() if module is None else module
        return Where(self.phase, self.step, self.micro_batch, module)

    def iteration_of(self, module: str) -> tuple[int, str]:
        """Return the iteration and the loop that a module belongs to, as `split_iteration`."""
        if module not in self._iterations:
            self._iterations[module] = split_iteration(module)[1:]
        return self._iterations[module]

    @contextmanager
    def running(self, module: str) -> Iterator[None]:
        """Attribute what happens inside to `module`, which need not be a module of the model."""
        self._stack.append(module)
        self._mark_sequence()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark_sequence()

    @contextmanager
    def module_hooks(self) -> Iterator[None]:
        """Follow the forward of every module inside."""
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
            leave = register_module_forward_hook(self._leave_module, always_call=True)
            stack.callback(leave.remove)
            yield

    def _next_micro_batch(self) -> None:
        self.phase, self.forward_began = "forward", False
        self.micro_batch += 1

    def _enter_module(self, module: torch.nn.Module, _: object) -> None:
        if not is_in_backward():
            if self.phase in ("backward", "optimizer") and not self._stack:
                self._next_micro_batch()
            self.forward_began = self.phase == "forward"
        self._stack.append(self._names.get(id(module), type(module).__name__))
        self._mark_sequence()

    def _leave_module(self, module: torch.nn.Module, *_: object) -> None:
        if self._stack:
            self._stack.pop()
            self._mark_sequence()

    def _mark_sequence(self) -> None:
        if not is_in_backward():
            numbers, names = self._sequence
            numbers.append(torch._C._autograd._get_sequence_nr())
            names.append(self._stack[-1] if self._stack else "")
