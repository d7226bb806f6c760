"""Define the keys that say what of a model is trained, where it is not all of it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fitune.config.values import (
    AdapterInit,
    BelowOne,
    Bool,
    ModuleName,
    Positive,
    Scale,
    WholeNumber,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Section):
    rank: Positive = Field(16, description="rank of the adapters")
    alpha: Scale = Field(32, description="the adapter's output is scaled by alpha / rank")
    dropout: BelowOne = Field(0.0, description="dropout before the adapters, in training")
    targets: str | tuple[str, ...] = Field("all-linear", description="module names, or all-linear")
    rslora: Bool = Field(
        False, description="rank-stabilised: scale by alpha / sqrt(rank) instead of alpha / rank"
    )
    dora: Bool = Field(False, description="DoRA: train the norm of each output's weights as well")
    init: AdapterInit = Field(
        "default",
        description=(
            "how the adapters start; pissa and olora move the weight's main directions into them"
        ),
    )
    modules_to_save: tuple[ModuleName, ...] = Field(
        (),
        description=(
            "layers that are trained whole beside the adapters and saved with them: embed_tokens, "
            "lm_head, norms"
        ),
    )

    @property
    def changes_base(self) -> bool:
        """Whether the adapters start with a part of the frozen weight, which is taken from it."""
        return self.init in ("pissa", "pissa_niter_16", "olora")


class FreezeConfig(Section):
    """Says which layers `method: freeze` trains; LLaMA-Factory's freeze has the same three."""

    trained_layers: Annotated[int, Field(strict=True, ge=-(10**4), le=10**4), WholeNumber] = Field(
        2, description="so many of the last layers are trained, or of the first if negative"
    )
    trained_modules: Literal["all"] | tuple[ModuleName, ...] = Field(
        "all", description="parts of these layers, such as mlp and self_attn, or all"
    )
    extra_modules: tuple[ModuleName, ...] = Field(
        (), description="parts outside the layers that are trained too: embed_tokens, norm, lm_head"
    )
