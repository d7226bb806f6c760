"""Gives damaged inputs to everything that fitune reads; none may end in anything but a FituneError, or take long.

    python benchmarks/fuzz.py [--inputs 20000] [--seed 0] [--only PARSER] [--output FILE.json]

The inputs are a function of the seed (`tests/fuzzed.py`), so a fault is found again by the number that it is told with.
Exit code 1 where there is one.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from fuzzed import PARSERS, try_input  # noqa: E402

SLOW_SECONDS = 5.0
MOST_SHOWN = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARSERS)
    parser.add_argument("--output", type=lambda name: Path(name).resolve())
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(PARSERS)
    total = sum(PARSERS[name].share for name in names)
    results: dict[str, dict[str, int]] = {}
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        os.environ |= {"FITUNE_CACHE": f"{place}/cache", "HF_HUB_OFFLINE": "1"}
        for name in names:
            counts: Counter[str] = Counter()
            num_inputs = math.ceil(arguments.inputs * PARSERS[name].share / total)
            for seed in range(arguments.seed, arguments.seed + num_inputs):
                start = time.perf_counter()
                try:
                    counts[
                        "read" if try_input(name, seed, Path(place, "place")) is None else "refused"
                    ] += 1
                except Exception as error:
                    counts["fault"] += 1
                    faults.append(f"{name} {seed}: {type(error).__name__}: {str(error)[:200]}")
                    if counts["fault"] <= MOST_SHOWN:
                        print(f"WRONG  {faults[-1]}\n{''.join(traceback.format_exc()[-1500:])}")
                if (seconds := time.perf_counter() - start) > SLOW_SECONDS:
                    counts["slow"] += 1
                    faults.append(f"{name} {seed}: took {seconds:.1f} s")
            results[name] = dict(counts)
            print(
                f"{name}: {', '.join(f'{number:,} {what}' for what, number in counts.items())}",
                flush=True,
            )
        os.chdir("/")
    tried = sum(
        counts.get(what, 0) for counts in results.values() for what in ("read", "refused", "fault")
    )
    print(f"{tried:,} inputs, {len(faults)} faults")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"inputs": tried, "faults": faults, "parsers": results}, indent=2) + "\n"
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
