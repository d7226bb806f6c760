"""The state of a run: what a checkpoint stores besides tensors and random numbers."""

from dataclasses import dataclass, field, replace

from fitune.batch_size.growth import FLAT_EVALS, BatchState
from fitune.batch_size.noise import NoiseAverages
from fitune.machine.process_memory import MemoryPeak
from fitune.run.journal import CHAIN_START


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The state after an optimizer step, or after a batch that was skipped for want of targets."""

    #: optimizer steps
    step: int = 0
    #: samples consumed: the sampler's position
    position: int = 0
    #: seen so far
    tokens: int = 0
    supervised_tokens: int = 0
    #: steps in a row, up to this one, without an update
    bad_steps: int = 0
    #: of the last step
    train_loss: float | None = None
    #: of the last evaluation
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    #: the step of `best_eval_loss`, whose weights are in best/
    best_step: int | None = None
    #: evaluations in a row, up to the last one, that were not the best
    worse_evals: int = 0
    #: of the last evaluation; -1 before the first
    evaluated_step: int = -1
    num_ooms: int = 0
    num_retries: int = 0
    micro_batch_changes: int = 0
    #: of the whole run
    peak: MemoryPeak = field(default_factory=MemoryPeak)
    #: the measured memory of the step that the self-check predicts
    checked_allocated_bytes: int | None = None
    checked_reserved_bytes: int | None = None
    checked_device_bytes: int | None = None
    #: of training, evaluation and saving, over all sessions of the run
    seconds: float = 0.0
    #: of the journal's last line
    journal_hash: str = CHAIN_START
    #: averages of the gradient noise, without and with Adam's preconditioning
    noise: NoiseAverages = field(default_factory=NoiseAverages)
    preconditioned_noise: NoiseAverages = field(default_factory=NoiseAverages)
    #: how far the effective batch has grown
    batch: BatchState = field(default_factory=BatchState)
    #: the last ones since the effective batch has grown
    eval_losses: tuple[float, ...] = ()

    def evaluated(self, loss: float, *, is_best: bool) -> "RunState":
        """Return the state after an evaluation of its weights."""
        return replace(
            self,
            eval_loss=loss,
            evaluated_step=self.step,
            best_eval_loss=loss if is_best else self.best_eval_loss,
            best_step=self.step if is_best else self.best_step,
            worse_evals=0 if is_best or not self.step else self.worse_evals + 1,
            eval_losses=(*self.eval_losses, loss)[-FLAT_EVALS:] if self.step else (),
        )

    @property
    def commit(self) -> tuple[int, int]:
        """Identify the states worth a checkpoint: a step, before and after its evaluation."""
        return self.step, self.evaluated_step


def larger_peak(first: MemoryPeak, second: MemoryPeak) -> MemoryPeak:
    """Return the larger of each number; if one is unknown, the other."""

    def larger(a: int | None, b: int | None) -> int | None:
        return max((value for value in (a, b) if value is not None), default=None)

    return MemoryPeak(
        larger(first.allocated_bytes, second.allocated_bytes),
        larger(first.reserved_bytes, second.reserved_bytes),
        larger(first.device_bytes, second.device_bytes),
    )
