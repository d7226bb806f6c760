"""Translate which tokens another tool computes the loss on into data.mask."""

from typing import get_args

from fitune.config.importers.draft import Draft
from fitune.config.sections import DataConfig

_LOSS_SCALES = {"default": "assistant", "last_round": "last", "all": "all"}


def put_mask(draft: Draft) -> None:
    name = draft.name("data.mask")
    if draft.tool in ("TRL", "transformers"):
        mask = _mask_of_trl(draft)
    elif draft.tool.startswith("ms-swift"):
        mask, name = _mask_of_swift(draft)
    else:
        everything = draft.argument("train_on_prompt") or draft.argument("train_on_inputs")
        is_text = draft.argument("stage") == "pt"
        mask, name = "all" if everything or is_text else "assistant", "stage" if is_text else name
        if draft.argument("mask_history"):
            mask, name = "last", "mask_history"
        if mask == "assistant" and name is None:
            return
    if mask == "last" and "last" not in get_args(DataConfig.model_fields["mask"].annotation):
        draft.differs.append(
            f"{draft.quoted(str(name))}: there the last answer alone is trained on; here every "
            "answer of a sample is"
        )
        mask, name = "assistant", None
    draft.write("data.mask", mask, draft.quoted(name) if name else None)


def _mask_of_trl(draft: Draft) -> str:
    answers, prompts = draft.argument("assistant_only_loss"), draft.argument("completion_only_loss")
    if draft.tool == "transformers":
        draft.differs.append(
            "transformers leaves the labels to the script: data.mask: all, or assistant?"
        )
    elif not answers and prompts is None:
        draft.differs.append(
            "TRL trains on every token of a conversation (data.mask: all), but of samples with "
            "prompt and "
            "completion on the completion alone: for those set data.mask to assistant"
        )
    return "assistant" if answers or prompts else "all"


def _mask_of_swift(draft: Draft) -> tuple[str, str | None]:
    """Return (data.mask, the name of the argument that it comes from) for ms-swift's loss_scale.

    ms-swift joins strategies with '+': one selects the tokens that are supervised, the others
    weight them.
    """
    name = draft.name("data.mask")
    asked = draft.value("data.mask") or "default"
    if draft.arguments.is_text and name is None:
        draft.differs.append("swift pt trains on every token of the samples' text")
        return "all", None
    parts = str(asked).split("+")
    others = [part for part in parts if part not in _LOSS_SCALES]
    if any(not part.startswith("ignore_") for part in others):
        raise draft.refuse(
            str(name), "fitune trains with the plain cross-entropy of all supervised tokens"
        )
    if others:
        draft.differs.append(f"{draft.quoted(str(name))}: here no part of an answer is left out")
    return _LOSS_SCALES[next((part for part in parts if part in _LOSS_SCALES), "default")], name
