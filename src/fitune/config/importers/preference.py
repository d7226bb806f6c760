"""Translate another tool's training on preferences (DPO, SimPO, ORPO, KTO) into our objective.

The names and defaults are those of LLaMA-Factory 0.9.5 (hparams/finetuning_args.py), TRL 1.16
(DPOConfig, KTOConfig, ORPOConfig), axolotl 0.18 (core/builders/rl.py) and ms-swift 4.4
(rlhf_args.py). Whatever would be another loss is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

from fitune.config.importers.draft import Draft, is_off, preference_kind

#: LLaMA-Factory's pref_loss -> our objective, and preference.loss_type of dpo
_LOSSES = {
    "sigmoid": ("dpo", "sigmoid"),
    "hinge": ("dpo", "hinge"),
    "ipo": ("dpo", "ipo"),
    "orpo": ("orpo", None),
    "simpo": ("simpo", None),
}
_PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "robust")
#: the tool -> our key -> its names
_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "LLaMA-Factory": {
        "beta": ("pref_beta",),
        "label_smoothing": ("dpo_label_smoothing",),
        "simpo_gamma": ("simpo_gamma",),
        "desirable_weight": ("kto_chosen_weight",),
        "undesirable_weight": ("kto_rejected_weight",),
    },
    "axolotl": {
        "beta": ("rl_beta", "orpo_alpha"),
        "label_smoothing": ("dpo_label_smoothing",),
        "simpo_gamma": ("simpo_gamma",),
        "desirable_weight": ("kto_desirable_weight",),
        "undesirable_weight": ("kto_undesirable_weight",),
    },
}
_NAMES_OF_TRL: Mapping[str, tuple[str, ...]] = {
    key: (key,)
    for key in ("beta", "label_smoothing", "simpo_gamma", "desirable_weight", "undesirable_weight")
}
#: our key -> its value where nothing is given, by the tool where that differs
_DEFAULTS = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "simpo_gamma": 0.5,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
}
_DEFAULTS_OF_SWIFT = {("simpo", "beta"): 2.0, ("simpo", "simpo_gamma"): 1.0}
#: what each objective takes
_KEYS = {
    "dpo": ("beta", "label_smoothing"),
    "simpo": ("beta", "simpo_gamma", "label_smoothing"),
    "orpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}
#: arguments that make another loss -> the values with which they do not
_OTHER_LOSSES: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(
        (
            *("pref_ftx", "pref_bco_weight", "rpo_alpha", "cpo_alpha", "loss_weights"),
            *("dpo_loss_weights", "ld_alpha", "use_weighting", "dpo_use_weighting"),
            *("dpo_norm_loss", "reference_free", "sync_ref_model", "ref_model_adapters"),
        ),
        (),
    ),
    "f_divergence_type": ("reverse_kl",),
}
_KEPT = "the reference's log-probabilities are computed once, before the first step (preference.reference)"


def put_preference(draft: Draft) -> None:
    """Write objective and preference.

    Raises ConfigError for a loss that fitune does not have.
    """
    kind = preference_kind(draft.arguments)
    if kind is None:
        return
    objective, loss_type = _objective(draft, kind)
    _refuse_other_losses(draft, objective)
    if draft.name("data.mask") is None:
        # a default of supervised fine-tuning; here answers alone are judged
        draft.written.pop("data.mask", None)
    for name in ("precompute_ref_log_probs", "precompute_ref_batch_size"):
        draft.reasons[name] = _KEPT
    selector = next(
        (name for name in ("stage", "rl", "rlhf_type") if name in draft.arguments.values), None
    )
    if selector is not None:
        draft.argument(selector)
    draft.write("objective", objective, draft.quoted(selector) if selector else kind)
    if loss_type is not None:
        named = next((name for name in _loss_names(draft) if name in draft.arguments.values), None)
        draft.write(
            "preference.loss_type", loss_type, draft.quoted(named) if named else _default(draft)
        )
    _put_numbers(draft, objective, loss_type)
    _tell_differences(draft, objective)
    if draft.tool == "TRL":
        found = draft.arguments.table.defaults["optim.lr"]
        draft.own_defaults["optim.lr"] = replace(
            found, value=1e-6, source=f"TRL 1.16, {objective}_config.py"
        )


def _put_numbers(draft: Draft, objective: str, loss_type: str | None) -> None:
    """Write what the loss takes, as it is given or as the tool has it by default."""
    names = _NAMES.get(draft.tool, _NAMES_OF_TRL)
    for key in _KEYS[objective]:
        if key == "label_smoothing" and not _is_smoothed(draft, objective, loss_type):
            continue
        given = next((name for name in names[key] if name in draft.arguments.values), None)
        if given is not None:
            draft.write(
                f"preference.{key}", draft.argument(given), f"{draft.origin(given)} {given}"
            )
        elif key != "label_smoothing" or objective == "dpo":
            value = _DEFAULTS[key]
            if draft.tool.startswith("ms-swift"):
                value = _DEFAULTS_OF_SWIFT.get((objective, key), value)
            draft.write(f"preference.{key}", value, _default(draft))


def _is_smoothed(draft: Draft, objective: str, loss_type: str | None) -> bool:
    """Return whether the tool's loss reads the probability that a label is wrong."""
    if objective == "simpo":
        return draft.tool != "LLaMA-Factory"
    return loss_type in ("sigmoid", "robust")


def _default(draft: Draft) -> str:
    return f"default of {draft.tool}"


def _loss_names(draft: Draft) -> tuple[str, ...]:
    if draft.tool == "LLaMA-Factory":
        return ("pref_loss",)
    return ("dpo_loss_type",) if draft.tool == "axolotl" else ("loss_type",)


def _objective(draft: Draft, kind: str) -> tuple[str, str | None]:
    """Return our objective and, of dpo, its loss. Raises ConfigError if there is no such loss."""
    (name,) = _loss_names(draft)
    loss = draft.argument(name)
    if isinstance(loss, list) and len(loss) == 1:
        (loss,) = loss
    if draft.tool == "LLaMA-Factory" and kind == "dpo":
        loss = "sigmoid" if loss is None else loss
        if loss not in _LOSSES:
            *others, last = _LOSSES
            raise draft.refuse(name, f"fitune has the losses {', '.join(others)} and {last}")
        return _LOSSES[loss]
    if kind == "ipo":
        return "dpo", "ipo"
    if kind == "dpo":
        loss = "sigmoid" if loss is None else loss
        if loss not in _PAIR_LOSSES:
            *others, last = _PAIR_LOSSES
            raise draft.refuse(name, f"fitune has the losses {', '.join(others)} and {last}")
        return "dpo", str(loss)
    if draft.tool != "LLaMA-Factory" and loss not in (
        None,
        kind,
        "sigmoid" if kind == "orpo" else kind,
    ):
        raise draft.refuse(name, f"fitune has one loss of objective {kind}: take it out")
    return kind, None


def _refuse_other_losses(draft: Draft, objective: str) -> None:
    for name, plain in _OTHER_LOSSES.items():
        value = draft.argument(name)
        if value is not None and not is_off(value) and value not in plain:
            reason = (
                "fitune adds no loss of imitating to one of preferences"
                if name in ("pref_ftx", "rpo_alpha", "cpo_alpha")
                else "it makes another loss than fitune's: take it out"
            )
            raise draft.refuse(name, reason)
    if (
        objective == "simpo"
        and draft.tool != "LLaMA-Factory"
        and "cpo_alpha" not in draft.arguments.values
    ):
        draft.differs.append(
            f"SimPO: {draft.tool} adds cpo_alpha = 1 times a loss of imitating, which is not added "
            "here: cpo_alpha 0 is the same"
        )


def _tell_differences(draft: Draft, objective: str) -> None:
    if objective == "orpo" and draft.tool != "LLaMA-Factory":
        draft.differs.append(
            "ORPO: the loss of imitating is the mean over the chosen answer's tokens here; TRL, on "
            "which this is built, takes it over all tokens of a micro-batch, prompts too"
        )
    if objective == "kto":
        draft.differs.append(
            f"KTO: the KL estimate is one of the whole effective batch here; {draft.tool} takes it "
            "over a micro-batch"
        )
