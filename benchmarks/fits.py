"""How often a prediction is wrong about what users ask: does it fit? From benchmarks/results/fits.jsonl, which
`python -m rehearsal.run python -m rehearsal.fits` writes (docs/rehearsal.md); this makes the section of
docs/accuracy.md.

python benchmarks/fits.py
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "fits.jsonl"


def read_tried(path: Path = RESULTS) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return list(
        {row["seed"]: row for row in map(json.loads, path.read_text().splitlines())}.values()
    )


def section(path: Path = RESULTS) -> list[str]:
    """Empty where none was tried."""
    tried = read_tried(path)
    known = [row for row in tried if row["failure"] is None]
    if not known:
        return []
    lines = [
        "# Does it fit?",
        "",
        f"{len(known)} random settings (`python -m rehearsal.run python -m rehearsal.fits`): small models, all",
        "methods, precisions, recompute settings and splits, on four rehearsed cards whose memory is 0.8 to 1.2 times",
        "what is predicted to be needed. The steps run under PyTorch's own allocator (docs/rehearsal.md), which",
        f"runs out or does not; the context is taken to be as large as predicted. With torch {known[0]['torch']}.",
        "",
        "| card | settings | said to fit | and ran out | said not to fit | and would have |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for card in [*sorted({row["card"] for row in known}), "all"]:
        counted = Counter(
            (row["says_fits"], row["ran_out"]) for row in known if card in (row["card"], "all")
        )
        yes, no = (
            sum(counted[said, ran_out] for ran_out in (True, False)) for said in (True, False)
        )
        lines.append(
            f"| {card} | {yes + no} | {yes} | {counted[True, True]} | {no} | {counted[False, False]} |"
        )
    failed = len(tried) - len(known)
    return [*lines, "", *([f"{failed} more could not be tried.", ""] if failed else [])]


def main() -> None:
    import accuracy

    accuracy.write(accuracy.read_results())
    print("\n".join(section()))


if __name__ == "__main__":
    main()
