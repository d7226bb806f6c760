"""Correct the grammar of English messages after a count of one: '1 samples are' to '1 sample is'.

Messages are written once, in the plural, because their English text is the key of the Chinese
translation, which has no plural.
"""

import re

_SINGULARS = {
    "retries": "retry", "processes": "process", "micro-batches": "micro-batch",
    **{f"{noun}s": noun for noun in (
        "sample", "token", "step", "run", "day", "hour", "minute", "second", "card", "device",
        "candidate", "line", "dialogue", "thread", "core", "value", "gradient", "parameter",
    )},
}  # fmt: skip
_VERBS = {
    "are": "is", "were": "was", "have": "has", "hold": "holds", "weigh": "weighs", "end": "ends",
    "teach nothing and go": "teaches nothing and goes", "are copies": "is a copy",
    "are texts in which": "is a text in which",
}  # fmt: skip
_ADJECTIVES = ("training ", "optimizer ", "real ", "supervised ", "held-out ", "usable ")
# Quoted text comes from the data or from a file, so it is matched first and left as it is.
_COUNT_OF_ONE = re.compile(
    r"⟦.*?⟧|'[^']*'|"
    rf"(?<![\w.,/-])1 (?P<adjective>{'|'.join(_ADJECTIVES)})?"
    rf"(?P<noun>{'|'.join(_SINGULARS)})(?![\w/-]|\.\w)"
    rf"(?P<between> of [\w.]+)?"
    rf"(?: (?P<verb>{'|'.join(sorted(_VERBS, key=len, reverse=True))})\b)?",
    re.DOTALL,
)


def agree_with_counts(message: str) -> str:
    """Replace the plural after each count of one, and the verb that follows, by the singular."""
    return _COUNT_OF_ONE.sub(_singular, message)


def _singular(found: re.Match[str]) -> str:
    if found["noun"] is None:
        return found[0]
    words = f"1 {found['adjective'] or ''}{_SINGULARS[found['noun']]}{found['between'] or ''}"
    return words if found["verb"] is None else f"{words} {_VERBS[found['verb']]}"
