"""What a prediction of a configured run says beside its numbers, one sentence each."""

from collections.abc import Iterator

from fitune.config import ModelConfig, RunConfig
from fitune.model.load import ignored_code
from fitune.plan.plan import CODE_IGNORED


def stated(config: RunConfig) -> Iterator[str]:
    if (note := code_note(config.model)) is not None:
        yield note


def code_note(model: ModelConfig) -> str | None:
    """None where the model comes without code, or with code that runs."""
    names = ignored_code(model)
    if not names:
        return None
    return (
        f"{CODE_IGNORED} {model.source} ({', '.join(names[:3])}) does not run: transformers' own classes are used, "
        "and model.trust_remote_code=true runs it"
    )
