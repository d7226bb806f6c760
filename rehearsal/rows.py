"""What a case came to, one row for each card: pure data, kept as JSON lines while the rehearsal runs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "rehearsal" / "rows.jsonl"
"""Rows of this checkout's rehearsals."""
_FOLLOWED = (
    "answers",
    "cases",
    "compare",
    "explain",
    "history",
    "loops",
    "models",
    "predicted",
    "steps",
    "trainers",
)
"""Modules of the rehearsal that a row follows from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRow:
    """Of the last step. measured and predicted are None where `failure` says why. explained: what differs, empty where
    every allocation is the predicted one. depends_on_data: why the peak does; `low` and `high` then bound it, as
    predicted with the tokens spread evenly and all at the same experts. source: fingerprint of the code."""

    name: str
    card: str
    setting: str
    predicted_allocated_bytes: int | None = None
    measured_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    measured_reserved_bytes: int | None = None
    num_allocations: int | None = None
    explained: tuple[str, ...] = ()
    depends_on_data: str = ""
    low_allocated_bytes: int | None = None
    high_allocated_bytes: int | None = None
    failure: str | None = None
    versions: str = ""
    source: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.card

    def error_bytes(self, metric: str) -> int | None:
        """predicted - measured. metric: allocated or reserved."""
        predicted, measured = (
            getattr(self, f"{side}_{metric}_bytes") for side in ("predicted", "measured")
        )
        return None if predicted is None or measured is None else predicted - measured

    def error_fraction(self, metric: str) -> float | None:
        error = self.error_bytes(metric)
        return None if error is None else error / getattr(self, f"measured_{metric}_bytes")


def read_rows(path: Path) -> list[ComparedRow]:
    """The newest of each case and card. A line that was cut short, since its writer was killed, is left out."""
    rows: dict[tuple[str, str], ComparedRow] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = row_from(json.loads(line))
        except ValueError:
            continue
        rows[row.key] = row
    return list(rows.values())


def row_from(fields: dict[str, object]) -> ComparedRow:
    explained = fields.get("explained", ())
    assert isinstance(explained, Sequence)
    return ComparedRow(**fields | {"explained": tuple(explained)})  # type: ignore[arg-type]


def append_row(row: ComparedRow, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def fingerprint() -> str:
    """Of what a row follows from in this checkout: the same code gives the same row."""
    here = Path(__file__).parent
    followed = [here / f"{name}.py" for name in _FOLLOWED] + [
        *here.glob("driver/*.cpp"),
        *here.glob("driver/*.h"),
    ]
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "src" / "fitune").rglob("*.py"), *followed]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def replace_section(page: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Writes the lines between two marks of the page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    assert rest, f"{page} has no place for the table"
    page.write_text("\n".join([before + begin, "", *lines, "", end + after]))
