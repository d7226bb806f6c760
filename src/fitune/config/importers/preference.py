"""Translate LLaMA-Factory's training on preferences (stage: dpo) into our objective."""

from fitune.config.importers.draft import Draft, is_off

#: LLaMA-Factory's pref_loss -> our objective, and preference.loss_type of dpo
_LOSSES = {
    "sigmoid": ("dpo", "sigmoid"),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
    "orpo": ("orpo", None),
    "simpo": ("simpo", None),
}


def put_preference(draft: Draft) -> None:
    """Write objective and preference.

    Raises ConfigError for a loss that fitune does not have.
    """
    if draft.tool != "LLaMA-Factory" or draft.argument("stage") != "dpo":
        return
    name = draft.argument("pref_loss", "sigmoid")
    if name not in _LOSSES:
        *others, last = _LOSSES
        raise draft.refuse("pref_loss", f"fitune has the losses {', '.join(others)} and {last}")
    if not is_off(draft.argument("pref_ftx", 0)):
        raise draft.refuse("pref_ftx", "fitune adds no loss of imitating to one of preferences")
    objective, loss_type = _LOSSES[name]
    draft.write("objective", objective, draft.quoted("stage"))
    values: dict[str, tuple[str, float | str]] = {"beta": ("pref_beta", 0.1)}
    if loss_type is not None:
        values["loss_type"] = ("pref_loss", "sigmoid")
    if objective == "simpo":
        values["simpo_gamma"] = ("simpo_gamma", 0.5)
    if loss_type == "sigmoid":
        values["label_smoothing"] = ("dpo_label_smoothing", 0.0)
    for key, (argument, default) in values.items():
        value = draft.argument(argument, default)
        given = argument in draft.arguments.values
        comment = draft.origin(argument) if given else f"default of {draft.tool}"
        draft.write(f"preference.{key}", value, f"{comment} {argument}" if given else comment)
