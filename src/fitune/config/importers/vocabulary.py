"""Translate what other tools train besides adapters: new tokens, and layers that are not frozen."""

from fitune.config.importers.draft import Draft, is_off

_TABLES = ["embed_tokens", "lm_head"]


def put_vocabulary(draft: Draft) -> None:
    """Write model.new_tokens and model.lora.modules_to_save."""
    names = draft.names("model.new_tokens")
    if draft.tool == "axolotl" and "tokens" in draft.arguments.values:
        # Not in its table, since train.tokens is a key of ours.
        names.append("tokens")
    given = [name for name in names if not is_off(draft.argument(name))]
    tokens = [token for name in given for token in _listed(draft, name)]
    if tokens:
        draft.write("model.new_tokens", tokens, ", ".join(map(draft.quoted, given)))
        if any("special" in name for name in given):
            draft.differs.append("new special tokens: here they are shown in answers, as any other")
    draft.reasons["resize_vocab"] = "the vocabulary grows with model.new_tokens"
    if draft.method in ("full", "freeze"):
        return
    key = "model.lora.modules_to_save"
    names = [name for name in draft.names(key) if not is_off(draft.argument(name))]
    if names:
        modules = [module for name in names for module in _listed(draft, name)]
        draft.write(key, modules, ", ".join(map(draft.quoted, names)))
    elif tokens:
        draft.differs.append(
            "new tokens: beside the adapters their rows of embedding and head are trained; "
            f"model.lora.modules_to_save={_TABLES} trains these whole"
        )


def put_frozen(draft: Draft) -> None:
    """Write which layers LLaMA-Factory's `finetuning_type: freeze` trains."""
    draft.copy("model.freeze.trained_layers")
    for key in ("model.freeze.trained_modules", "model.freeze.extra_modules"):
        name = draft.name(key)
        if name is not None and (parts := _listed(draft, name)) not in ([], ["all"]):
            draft.write(key, parts)


def _listed(draft: Draft, name: str) -> list[str]:
    """Return a list, or the parts of a text between commas."""
    value = draft.argument(name)
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(map(str, value)) if isinstance(value, list) else []
