"""What PyTorch's own operators allocated on rehearsed cards (`rehearsal.operators --golden`), beside recordings."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from fitune.recorder.cuda_target import CudaTarget
from rehearsal.operator_cases import CASES
from rehearsal.operators import recorded

GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden/operators.json").read_text()
)


@pytest.mark.parametrize("card", GOLDEN)
def test_every_operator_is_recorded_as_it_allocates_on_the_card(card: str) -> None:
    row = GOLDEN[card]
    target = CudaTarget(
        tuple(row["compute_capability"]),
        multiprocessors=row["multiprocessors"],
        torch_version=tuple(row["torch"]),
    )
    cases = [case for case in CASES if case.name in row["cases"]]
    with warnings.catch_warnings(action="ignore"):
        found = dict(zip((case.name for case in cases), recorded(cases, target), strict=True))
    assert found == row["cases"]
