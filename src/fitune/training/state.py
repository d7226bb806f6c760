"""What changes while a run goes on, in one noun: what a checkpoint holds beside tensors and random numbers."""

from dataclasses import dataclass, field

from fitune.batch_size.growth import BatchState
from fitune.batch_size.noise import NoiseAverages
from fitune.machine.process_memory import MemoryPeak
from fitune.run.journal import CHAIN_START


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """After a commit: a whole optimizer step, or a batch without targets that was passed over.

    step: optimizer steps. position: samples consumed, the sampler's cursor. tokens, supervised_tokens: seen.
    bad_steps: steps without an update in a row. train_loss: of the last step. best_step: the step of best_eval_loss,
    whose weights are best/. evaluated_step: of the last evaluation, -1 before the first. peak: of the whole
    run. checked_*: what the step took that the self-check looks at. seconds: at work, over all sessions. journal_hash:
    of the last line of the journal. noise,
    preconditioned_noise: averages of the gradient noise. batch: how far the effective batch has grown. eval_losses: the
    last ones since it did.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    bad_steps: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int = -1
    num_ooms: int = 0
    num_retries: int = 0
    micro_batch_changes: int = 0
    peak: MemoryPeak = field(default_factory=MemoryPeak)
    checked_allocated_bytes: int | None = None
    checked_reserved_bytes: int | None = None
    checked_device_bytes: int | None = None
    seconds: float = 0.0
    journal_hash: str = CHAIN_START
    noise: NoiseAverages = field(default_factory=NoiseAverages)
    preconditioned_noise: NoiseAverages = field(default_factory=NoiseAverages)
    batch: BatchState = field(default_factory=BatchState)
    eval_losses: tuple[float, ...] = ()


def larger_peak(first: MemoryPeak, second: MemoryPeak) -> MemoryPeak:
    """The larger of each number; of an unknown one the other."""

    def larger(a: int | None, b: int | None) -> int | None:
        return max((value for value in (a, b) if value is not None), default=None)

    return MemoryPeak(
        larger(first.allocated_bytes, second.allocated_bytes),
        larger(first.reserved_bytes, second.reserved_bytes),
        larger(first.device_bytes, second.device_bytes),
    )
