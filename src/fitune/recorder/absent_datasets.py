"""Make `datasets.Dataset` objects in place of data sets that are not here.

Trainers ask what columns their samples have. For those of TRL the columns follow from the trainer
that the script imports; for other scripts, from the keys that they read (`absent_data.AbsentRow`).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from fitune.errors import UsageError

#: More than a script keeps of a sample, so that it cuts each one to its own longest length
LONG_TEXT = "All samples are as long as the script lets them be. " * 2500
QUESTION = "How long is the longest answer?"
GENERATES = (
    "the script trains on text that its model generates, whose length depends on the weights: "
    "predict supervised fine-tuning with samples as long as a prompt and its longest answer"
)
#: Enough for some steps of a large batch
NUM_SAMPLES = 256
#: The text has more words than this, and so more tokens, of which fewer are different than in
#: other texts of that length
_UNCUT_TOKENS = 25_000
_MOST_DIFFERENT = 200

_USER = [{"role": "user", "content": QUESTION}]
_ANSWER = [{"role": "assistant", "content": LONG_TEXT}]
_PREFERENCE = {"prompt": _USER, "chosen": _ANSWER, "rejected": _ANSWER}
_UNPAIRED = {"prompt": _USER, "completion": _ANSWER, "label": True}
#: Modules of TRL -> a sample of the form that their trainers take. The first that is imported
#: counts, since some trainers build on those that stand below them.
_SAMPLES_OF_TRL: Mapping[str, Mapping[str, object]] = {
    "orpo_trainer": _PREFERENCE,
    "cpo_trainer": _PREFERENCE,
    "kto_trainer": _UNPAIRED,
    "bco_trainer": _UNPAIRED,
    "dpo_trainer": _PREFERENCE,
    "reward_trainer": {"chosen": _USER + _ANSWER, "rejected": _USER + _ANSWER},
    "gkd_trainer": {"messages": _USER + _ANSWER},
    # versions of TRL that do not know the messages take the text
    "sft_trainer": {"messages": _USER + _ANSWER, "text": LONG_TEXT},
}
#: Modules of TRL whose trainers generate the text that they train on
_GENERATING = {"grpo_trainer", "rloo_trainer", "online_dpo_trainer", "ppo_trainer"}


def sample_of_trainer() -> Mapping[str, object] | None:
    """Return a sample of the form that the trainer of TRL takes, None without such a trainer.

    Raises UsageError for a trainer that generates text.
    """
    imported = {name.rpartition(".")[2] for name in sys.modules if name.startswith("trl.")}
    if imported & _GENERATING:
        raise UsageError(GENERATES)
    return next((row for name, row in _SAMPLES_OF_TRL.items() if name in imported), None)


def equal_samples(datasets: Any, sample: Mapping[str, object]) -> Any:
    """Return a `datasets.Dataset` of samples that are all this one.

    datasets: the module.
    """
    columns = {name: [value] * NUM_SAMPLES for name, value in sample.items()}
    if isinstance(sample.get("label"), bool):
        # KTO and BCO need samples of both kinds
        columns["label"] = [place % 2 == 0 for place in range(NUM_SAMPLES)]
    return datasets.Dataset.from_dict(columns)


def refuse_uncut(tokens: Sequence[int]) -> None:
    """Raise UsageError if these are all tokens of `LONG_TEXT`: the script has cut nothing."""
    if len(tokens) >= _UNCUT_TOKENS and len(set(tokens)) < _MOST_DIFFERENT:
        raise UsageError(
            f"the script keeps samples whole that are not here, up to {len(tokens):,} tokens of "
            "them: give it a longest length, such as --max_length, or put a file with some of "
            "the samples there"
        )


def filters_keep_the_longest(datasets: Any) -> AbstractContextManager[object]:
    """Let a filter that drops all of `equal_samples`, as too long, cut them to what it keeps.

    datasets: the module.
    """
    call = datasets.Dataset.filter

    def filter_or_cut(self: Any, function: Any = None, *arguments: object, **options: Any) -> Any:
        kept = call(self, function, *arguments, **options)
        if len(kept) or not len(self) or arguments or options.get("with_indices"):
            return kept
        sample = self[0]
        if sample != self[len(self) - 1]:
            return kept
        given = options.get("fn_kwargs") or {}

        def keeps(length: int) -> bool:
            row = sample | _cut(sample, length)
            if not options.get("batched"):
                return bool(function(row, **given))
            return bool(next(iter(function({name: [row[name]] for name in row}, **given))))

        longest = _largest(max(map(len, _tokens(sample).values()), default=0), keeps)
        return self.map(lambda row: _cut(row, longest)) if longest else kept

    return patch.object(datasets.Dataset, "filter", filter_or_cut)


def _tokens(sample: Mapping[str, object]) -> dict[str, list[int]]:
    return {
        name: value
        for name, value in sample.items()
        if isinstance(value, list) and value and isinstance(value[0], int)
    }


def _cut(sample: Mapping[str, object], length: int) -> dict[str, list[int]]:
    return {name: value[:length] for name, value in _tokens(sample).items()}


def _largest(high: int, passes: Callable[[int], bool]) -> int:
    """Return the largest length up to `high` that passes, 0 if none does."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passes(middle) else (low, middle - 1)
    return low
