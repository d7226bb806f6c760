"""Convert a row with an answer that is desirable or not, and pair prompts with other answers (KTO).

The rows are those of TRL (prompt, completion, label), LLaMA-Factory (kto_tag) and ms-swift (messages,
label): any row of one answer (data/formats.py) that has a label too. Only its last answer is judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fitune.data.formats import Conversation, Format, normalise, object_of, renamed
from fitune.data.keys import BAD_LABELS, LABEL_KEYS
from fitune.data.messages import RowError

#: what a label of a desirable answer may be
_GOOD_LABELS = (
    "true", "1", "1.0", "yes", "good", "positive", "desirable", "chosen", "right", "correct",
)  # fmt: skip
#: token ids and loss weights
Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


def normalise_labelled(
    row: object, *, columns: Mapping[str, str] | None = None, ignored: Sequence[str] = ()
) -> tuple[Format, tuple[Conversation]]:
    """Convert one row into a conversation whose last answer is judged, with its label.

    columns, ignored: as in `normalise`.

    Raises RowError with the reason if the row cannot be used.
    """
    row = object_of(row, ignored)
    if named := {ours: name for ours, name in (columns or {}).items() if ours != name}:
        row = renamed(row, named)
    key = next((key for key in LABEL_KEYS if row.get(key) not in (None, "")), None)
    if key is None:
        raise RowError(
            "it has no 'label' that says whether its answer is desirable; its keys are "
            f"{', '.join(map(str, row))}: data.columns.label=KEY names it"
        )
    word = str(row[key]).strip().lower()
    if word not in _GOOD_LABELS and word not in BAD_LABELS:
        raise RowError(f"its '{key}' is {str(row[key])[:40]}, not true or false")
    found, conversation = normalise({name: row[name] for name in row if name not in LABEL_KEYS})
    if found == "text":
        raise RowError("it is a text without a prompt, and an answer is judged by its prompt")
    answers = [
        place
        for place, message in enumerate(conversation.messages)
        if message["role"] == "assistant"
    ]
    weights = tuple(
        0.0 if place in answers[:-1] else weight
        for place, weight in enumerate(conversation.weights)
    )
    label = word in _GOOD_LABELS
    return "labelled", (replace(conversation, weights=weights, label=label),)


def mismatched(own: Tokens, other: Tokens, max_length: int) -> Tokens:
    """Return the prompt of one sample with the answer of another, cut to max_length.

    A prompt is what precedes the first target. TRL's KTOTrainer pairs each prompt with the answer of
    the sample before it in the same way.
    """
    (ids, weights), (other_ids, other_weights) = own, other
    prompt, start = np.flatnonzero(weights)[0], np.flatnonzero(other_weights)[0]
    return (
        np.concatenate((ids[:prompt], other_ids[start:]))[:max_length],
        np.concatenate((weights[:prompt], other_weights[start:]))[:max_length],
    )
