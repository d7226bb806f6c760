"""Lists every optimizer that fitune trains with: how it is built, and what fitune must know of it.

Nothing heavy is imported before an optimizer is built, because the configuration reads this table
too. Optimizers are fused if torch has a fused version. It computes the same without a temporary of
the parameters' size, which the `foreach` version needs and which can be the peak of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from fitune.errors import ConfigError

if TYPE_CHECKING:
    import torch

Group = dict[str, Any]
Groups = list[Group]


class OptimizerSettings(Protocol):
    """The part of the configuration that an optimizer is built from."""

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...


#: Builds an optimizer from parameter groups, settings and the learning rate. Raises ConfigError if
#: the optimizer's library is missing.
Builder = Callable[[Groups, OptimizerSettings, float], "torch.optim.Optimizer"]


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """The facts about an optimizer. The defaults are those of AdamW."""

    build: Builder
    #: how its result differs from that of `adamw`
    result: Literal["same", "close", "different"] = "same"
    #: bytes of its state per byte of the trained parameters, for the size of a checkpoint
    state_share: float = 2.0
    #: whether it averages gradients and their squares with `optim.betas`
    has_betas: bool = True
    #: whether it divides by the gradient's own size, as Adam does and SGD does not
    is_adaptive: bool = True
    #: whether it updates every element independently, so that a process can update its shard
    can_shard: bool = False
    #: why it cannot be used on a CPU, and what can be used, as the end of a sentence
    needs_card: str | None = None
    #: whether it updates the matrices of hidden layers in another way than embeddings, head and
    #: vectors; its groups then say `hidden_matrices`, true or false
    parts_matrices: bool = False
    #: whether its state is allocated in the first update and cannot be allocated before
    state_comes_late: bool = False
    #: whether state and update are in the host's memory
    is_on_host: bool = False
    #: whether a plan for AdamW proposes it to save memory
    is_proposed: bool = False
    #: builds an optimizer that allocates the same state in a recording, where the library may be
    #: missing
    stand_in: Builder | None = None


def _adamw(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from torch.optim import AdamW

    return AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, fused=True)


def _adamw_foreach(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from torch.optim import AdamW

    return AdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps, foreach=True)


def _adamw_host(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from fitune.optimizers.host_adamw import HostAdamW

    return HostAdamW(groups, lr=lr, betas=optim.betas, eps=optim.eps)


def _adamw_8bit(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    return _of_bitsandbytes("AdamW8bit", "adamw_8bit")(
        groups, lr=lr, betas=optim.betas, eps=optim.eps
    )


def _adamw_8bit_paged(
    groups: Groups, optim: OptimizerSettings, lr: float
) -> "torch.optim.Optimizer":
    return _of_bitsandbytes("PagedAdamW8bit", "adamw_8bit_paged")(
        groups, lr=lr, betas=optim.betas, eps=optim.eps
    )


def _of_bitsandbytes(kind: str, name: str) -> Callable[..., "torch.optim.Optimizer"]:
    try:
        from bitsandbytes import optim as bitsandbytes
    except ImportError as error:
        raise ConfigError(
            [
                f"optim.name={name} needs bitsandbytes, not installed here: pip install 'fitune[bnb]', or use adamw"
            ]
        ) from error
    return cast("Callable[..., torch.optim.Optimizer]", getattr(bitsandbytes, kind))


def _state_of_8bit(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from fitune.optimizers.state_of_8bit import StateOf8BitAdamW

    return StateOf8BitAdamW([{**group, "lr": lr} for group in groups])


def _state_of_8bit_paged(
    groups: Groups, optim: OptimizerSettings, lr: float
) -> "torch.optim.Optimizer":
    from fitune.optimizers.state_of_8bit import StateOf8BitAdamW

    return StateOf8BitAdamW([{**group, "lr": lr} for group in groups], paged=True)


def _adafactor(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from torch.optim import Adafactor

    # torch's Adafactor has no betas; its eps are (None, 1e-3) by design and not Adam's
    return Adafactor(groups, lr=lr)


def _sgd(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from torch.optim import SGD

    return SGD(groups, lr=lr, momentum=optim.betas[0], fused=True)


def _muon(groups: Groups, optim: OptimizerSettings, lr: float) -> "torch.optim.Optimizer":
    from torch.optim import Muon

    # Scaled to AdamW's updates (Liu et al. 2025, arXiv 2502.16982), it has AdamW's learning rate.
    return _with_adamw(
        groups, optim, lr, lambda matrices: Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
    )


def _apollo(
    groups: Groups, optim: OptimizerSettings, lr: float, *, mini: bool = False
) -> "torch.optim.Optimizer":
    from fitune.optimizers.apollo import APOLLO, APOLLO_MINI, Apollo

    variant = APOLLO_MINI if mini else APOLLO
    return _with_adamw(
        groups,
        optim,
        lr,
        lambda matrices: Apollo(matrices, variant, lr=lr, betas=optim.betas, eps=optim.eps),
    )


def _with_adamw(
    groups: Groups,
    optim: OptimizerSettings,
    lr: float,
    build: "Callable[[Groups], torch.optim.Optimizer]",
) -> "torch.optim.Optimizer":
    from fitune.optimizers.hidden_matrices import HiddenMatrices

    return HiddenMatrices(groups, build, lr=lr, betas=optim.betas, eps=optim.eps)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(build=_adamw, can_shard=True),
    "adamw_foreach": OptimizerKind(build=_adamw_foreach, can_shard=True),
    "adamw_host": OptimizerKind(
        build=_adamw_host,
        is_on_host=True,
        needs_card="keeps its state in the host's memory, where it is on a CPU anyway: use adamw",
    ),
    "adamw_8bit": OptimizerKind(
        build=_adamw_8bit,
        result="close",
        state_share=0.6,
        state_comes_late=True,
        is_proposed=True,
        stand_in=_state_of_8bit,
    ),
    "adamw_8bit_paged": OptimizerKind(
        build=_adamw_8bit_paged,
        result="close",
        state_share=0.6,
        state_comes_late=True,
        needs_card="moves its state between a card and the host, and here is no card: use adamw_8bit",
        stand_in=_state_of_8bit_paged,
    ),
    "adafactor": OptimizerKind(
        build=_adafactor, result="different", state_share=0.1, has_betas=False, is_proposed=True
    ),
    "muon": OptimizerKind(build=_muon, result="different", parts_matrices=True),
    "apollo": OptimizerKind(build=_apollo, result="different", parts_matrices=True),
    "apollo_mini": OptimizerKind(
        build=partial(_apollo, mini=True), result="different", parts_matrices=True
    ),
    "sgd": OptimizerKind(
        build=_sgd,
        result="different",
        state_share=1.0,
        has_betas=False,
        is_adaptive=False,
        can_shard=True,
    ),
}
