"""What the data of a pre-training costs in memory and time: tokenised once, then read in random order.

    python benchmarks/pretraining_data.py --tokenizer DIR [--tokens 1e8] [--output FILE.json]

Lines of this repository's pages (English and Chinese), drawn at random, are written to a file of texts until it has about
so many tokens. A fresh process tokenises it (data.wrapped, samples of 512 tokens), a second one opens the cache and reads
batches of 32 samples in the order of an epoch. Of each, the peak of its own memory (anonymous pages; mapped files are the
kernel's to give back) is sampled, less what it had before the data.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

LENGTH, ROWS_PER_STEP, STEPS = 512, 32, 2000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--tokens", type=float, default=1e8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", choices=["tokenise", "read"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure(arguments.tokenizer, reads=arguments.part == "read")))
        return
    with tempfile.TemporaryDirectory() as place:
        write_texts(Path(place, "texts.jsonl"), arguments.tokenizer, int(arguments.tokens))
        result = {
            part: json.loads(
                subprocess.run(
                    [
                        *(sys.executable, __file__),
                        "--tokenizer",
                        arguments.tokenizer,
                        "--part",
                        part,
                    ],
                    cwd=place,
                    env={**os.environ, "FITUNE_CACHE": place},
                    stdout=subprocess.PIPE,
                    check=True,
                ).stdout
            )
            for part in ("tokenise", "read")
        }
    for part, numbers in result.items():
        for name, value in numbers.items():
            print(f"{part:10}{name:32}{value:16,.6g}")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def write_texts(path: Path, tokenizer_directory: str, num_tokens: int) -> None:
    """Write texts of 1 to 20 drawn lines, of about so many tokens in all."""
    from fitune.config import ModelConfig
    from fitune.model.load import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(source="minimind2-small", tokenizer=tokenizer_directory))
    pages = sorted((ROOT / "docs").glob("*.md"))
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line) > 20]
    draw, left = random.Random(0), num_tokens
    counts = [len(ids) for ids in tokenizer(lines, verbose=False)["input_ids"]]
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            chosen = draw.choices(range(len(lines)), k=draw.randint(1, 20))
            text = "\n".join(lines[number] for number in chosen)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            left -= sum(counts[number] + 1 for number in chosen)


def measure(tokenizer_directory: str, *, reads: bool) -> dict[str, float]:
    from fitune.config import DataConfig, ModelConfig
    from fitune.data.batches import batches
    from fitune.data.examples import load_examples
    from fitune.model.load import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(source="minimind2-small", tokenizer=tokenizer_directory))
    tokenizer(["warm up"])
    data = DataConfig(train="texts.jsonl", max_length=LENGTH, wrapped=True)
    before, started, worked = own_bytes(), time.monotonic(), time.process_time()
    with Peak() as peak:
        examples = load_examples(data, tokenizer)
        seconds = time.monotonic() - started
        numbers: dict[str, float] = {
            "tokens": examples.num_tokens,
            "samples": len(examples),
            "tokens_per_second": examples.num_tokens / seconds,
            "seconds": seconds,
            "processor_seconds": time.process_time() - worked,
        }
        if reads:
            started, num_tokens = time.monotonic(), 0
            for _, batch in zip(
                range(STEPS),
                batches(examples, rows_per_step=ROWS_PER_STEP, seed=0),
                strict=False,
            ):
                num_tokens += batch.num_tokens
            numbers["read_tokens_per_second"] = num_tokens / (time.monotonic() - started)
    return {**numbers, "own_bytes_added": peak.highest - before}


def own_bytes() -> int:
    """Return the anonymous memory of this process, which no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


class Peak:
    """Samples this process's own memory in a thread; `highest` is the peak in bytes."""

    def __init__(self) -> None:
        self.highest = own_bytes()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._is_over.wait(0.02):
            self.highest = max(self.highest, own_bytes())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()


if __name__ == "__main__":
    main()
