"""Keeps the progress of a step in a form that can be undone."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from fitune.batch_size.norms import NormRecorder
from fitune.distributed.shared_step import StepReport
from fitune.machine.out_of_memory import release_memory
from fitune.machine.process_memory import map_large_blocks
from fitune.recovery.failure import Failure
from fitune.recovery.protection import Protection
from fitune.step.gradients import CommitBuffer
from fitune.step.peers import ALONE, Alone
from fitune.step.progress import P, Progress
from fitune.step.random_state import micro_batch_seed, seed_streams


class Attempt(Progress[P]):
    """The progress of a step that can be undone after running out of memory.

    Each piece draws its random numbers from a seed of its own, and the buffers' values are saved.
    """

    peers: Alone

    def __init__(
        self,
        protection: Protection[P],
        pieces: Sequence[P],
        *,
        step: int,
        norms: NormRecorder | None = None,
        peers: Alone = ALONE,
    ) -> None:
        super().__init__(protection.work, pieces, peers=peers, norms=norms)
        self.protection, self._step = protection, step
        #: whether the failed size was tried once more
        self.repeated = False
        #: row ids of this step that an earlier step has left out
        self.known_left_out = protection.quarantined & {
            row for piece in pieces for row in piece.row_ids
        }
        self._leave_out(self.known_left_out)
        self.lost_weight = 0.0
        self.loss_weight = self.remaining_weight()
        self._at_start = self._at_piece = _Buffers(protection)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return self.protection.applied

    def begin(self) -> P:
        piece = super().begin()
        seed_streams(
            micro_batch_seed(self.protection.seed, step=self._step, first_row_id=piece.row_ids[0]),
            self.device,
        )
        return piece

    def finish(self, loss: torch.Tensor) -> None:
        super().finish(loss)
        self._at_start.narrow()
        if self.buffer is not None and self._at_start:
            self._at_piece = _Buffers(self.protection)

    def take(self, total: StepReport) -> None:
        super().take(total)
        self.protection.quarantined |= set(total.left_out)

    def take_back(self, *, again: bool) -> None:
        """Undo what the failed attempt did.

        That is only the failed piece if finished gradients are in a buffer of their own. Otherwise,
        or if `again`, it is the whole step; so is it where the batch is surveyed, since a replay
        surveys the pieces that the step ended with.
        """
        self.peers.take_back(self)
        if again:
            self._forget_scaling()
        if again or self.buffer is None or self.protection.work.survey is not None:
            self.restart()
        else:
            self._at_piece.put_back()
        if self.device.type == "cpu":
            map_large_blocks()
        release_memory(self.device)

    def restart(self) -> None:
        """Set the progress back to the beginning of the step."""
        self.pending = self.done + self.pending
        self.done, self.losses = [], []
        self.is_summed, self.total = False, None
        if self.norms is not None:
            self.norms.forget()
        self.buffer = CommitBuffer(self.model) if self.protection.work.commit else None
        self._at_start.put_back()
        self._at_piece = self._at_start

    def forget(self) -> None:
        """Drop gradients and restore buffers and the scaler.

        For a step that was a trial, or that another process's error ends.
        """
        self.drop_gradients()
        self._forget_scaling()
        self._at_start.put_back()

    def leave_out(self, row_id: int) -> None:
        """Leave this sample out of the step and of later ones."""
        self.protection.quarantined.add(row_id)
        self.left_out.add(row_id)
        self._leave_out({row_id})

    def with_free_bytes(self, failure: Failure) -> Failure:
        """Return the failure with the bytes that are free after everything was given back."""
        free_bytes = self.protection.free_bytes()
        if free_bytes is None:
            return failure
        kept_bytes = 0 if self.buffer is None else self.buffer.num_bytes
        return replace(failure, free_bytes=free_bytes, left_bytes=free_bytes + kept_bytes)

    def _leave_out(self, row_ids: Collection[int]) -> None:
        if not row_ids:
            return
        before = sum(piece.loss_weight for piece in self.pending)
        remaining = [self.protection.work.without(piece, row_ids) for piece in self.pending]
        self.pending = [piece for piece in remaining if piece is not None]
        self.lost_weight += before - sum(piece.loss_weight for piece in self.pending)
        self.loss_weight = self.remaining_weight()

    def _forget_scaling(self) -> None:
        """Reset the gradient scaler so that it may unscale again, without changing its scale."""
        if (scaler := self.protection.work.scaler) is not None:
            scaler.update(new_scale=scaler.get_scale())


class _Buffers:
    """A copy of the buffers that a forward changes, such as a batch norm's running mean.

    The first piece copies all buffers and shows which ones change. A change raises a tensor's
    version, but some kernels change a module's other buffers without that, so all buffers of a
    changed module count as changed.
    """

    def __init__(self, protection: Protection[P]) -> None:
        self._protection = protection
        slots = protection.changing_buffers
        if slots is None:
            slots = [
                (module, name)
                for module in protection.work.model.modules()
                for name in module._buffers
            ]
        self._copies = [
            (module, name, buffer, buffer._version, buffer.detach().clone())
            for module, name in slots
            if (buffer := module._buffers.get(name)) is not None
        ]

    def __bool__(self) -> bool:
        return bool(self._copies)

    def narrow(self) -> None:
        """Drop the copies of modules whose buffers the run's first piece did not change."""
        if self._protection.changing_buffers is None:
            moved = {
                module
                for module, name, buffer, version, _ in self._copies
                if module._buffers.get(name) is not buffer or buffer._version != version
            }
            self._copies = [copy for copy in self._copies if copy[0] in moved]
            self._protection.changing_buffers = [
                (module, name) for module, name, *_ in self._copies
            ]

    @torch.no_grad()
    def put_back(self) -> None:
        for module, name, buffer, _, values in self._copies:
            module._buffers[name] = buffer
            buffer.copy_(values)
