"""Reads and keeps answers.jsonl: the answers to `eval.prompts` at each evaluation."""

from dataclasses import dataclass
from pathlib import Path

from fitune.run.metrics import read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalAnswer:
    """The model's answer to one prompt, after `step` steps."""

    step: int
    total_tokens: int
    prompt: str
    answer: str
    #: tokens of the answer
    num_tokens: int


def read_answers(path: Path) -> tuple[EvalAnswer, ...]:
    """Read the answers by step; none if there is no such file, or it cannot be read.

    If a prompt was answered twice after a step, the last answer counts.
    """
    if not path.is_file():
        return ()
    found = {(line.step, line.prompt): line for line in read_records(path, EvalAnswer)}
    return tuple(sorted(found.values(), key=lambda line: line.step))
