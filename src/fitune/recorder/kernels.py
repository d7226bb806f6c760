"""The interface between the recorder and the kernels of the device that is predicted."""

from collections.abc import Sequence
from typing import Any, Protocol

from fitune.recorder.allocation import Allocation
from fitune.recorder.events import Phase
from fitune.recorder.operator_cost import Operator
from fitune.recorder.shape_cache import Call


class Kernels(Protocol):
    """Carries operators out, and knows what the target's kernels allocate besides the outputs."""

    #: whether the kernels run on a card, so that host memory is separate from theirs
    of_card: bool

    def call(
        self, func: Operator, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Any, Call | None]:
        """Return the operator's result, and the memory of such calls, None without one."""

    def workspaces(self, func: Operator, phase: Phase) -> Sequence[int]:
        """Return the bytes of workspaces that the operator allocates after its outputs.

        They stay allocated, and are not needed again, until `forget_workspaces` is called.
        """

    def forget_workspaces(self) -> None:
        """Let the next operators allocate their workspaces again."""

    def allocations(
        self, func: Operator, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], Sequence[Allocation]] | None:
        """Return all arguments of the operator, and what its kernel allocates and frees, in order.

        Returns None for an operator without a rule.
        """
