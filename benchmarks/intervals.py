"""How often an interval of two runs that do not differ excludes zero: `python benchmarks/intervals.py [DRAWS]`."""

import json
import sys

import numpy as np

from fitune.run.interval import paired_interval


def false_alarms(num_rows: int, num_draws: int) -> float:
    """The share of pairs of equal runs that are called different. Rows of 1 to 200 tokens whose losses have a skewed
    spread; each run's own noise is skewed too."""
    draw = np.random.default_rng(1000 + num_rows)
    found = 0
    for _ in range(num_draws):
        weights = draw.integers(1, 200, num_rows).astype(float)
        rows = draw.gamma(4, 0.5, num_rows)
        one, two = (rows + 0.1 * draw.standard_exponential(num_rows) for _ in range(2))
        interval = paired_interval(one, two, weights)
        found += interval is not None and interval.excludes_zero
    return found / num_draws


def main() -> None:
    num_draws = int(sys.argv[1]) if len(sys.argv) > 1 else 1200
    shares = {num_rows: false_alarms(num_rows, num_draws) for num_rows in (12, 30, 100)}
    for num_rows, share in shares.items():
        print(f"{num_rows:4} rows: {share:.1%} called different")
    print(json.dumps({"draws": num_draws, "called_different": shares}))


if __name__ == "__main__":
    main()
