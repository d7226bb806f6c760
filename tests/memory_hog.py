"""A second process: reads lines of the bytes to hold and the bytes per second at which to take them, does so, and writes a
line when it holds them."""

import sys
import time

BLOCK_BYTES = 4 * 1024**2


def main() -> None:
    blocks: list[bytes] = []
    for line in sys.stdin:
        wanted, rate = (float(word) for word in line.split())
        start, before = time.perf_counter(), len(blocks)
        while len(blocks) * BLOCK_BYTES < wanted:
            blocks.append(b"\1" * BLOCK_BYTES)  # a zero would not be touched
            time.sleep(
                max(start + (len(blocks) - before) * BLOCK_BYTES / rate - time.perf_counter(), 0.0)
            )
        del blocks[int(wanted / BLOCK_BYTES) :]
        print("done", flush=True)


if __name__ == "__main__":
    main()
