"""Does it fit? Random settings on a rehearsed card that is given between 0.8 and 1.2 times what is predicted to be
needed: what the prediction says, and whether the genuine allocator runs out.

    python -m rehearsal.run python -m rehearsal.fits --number 300   goes on behind the settings that are done
    python -m rehearsal.run python -m rehearsal.fits --seed 17      one setting again; nothing is written

Appends a JSON line a setting to benchmarks/results/fits.jsonl, and prints the rates; `python benchmarks/fits.py` writes
them to docs/accuracy.md. Each runs in a forked child with a small model, and takes seconds.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FAKE_COPY_MAX", str(1 << 16))
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # PyTorch's line for each allocation that fails

import torch
import transformers

from fitune.config import RunConfig
from fitune.errors import FituneError, RestartError
from fitune.machine.cards import context_prior
from fitune.machine.devices import this_machine
from fitune.planning.predict import predict_run
from fitune.units import MIB
from rehearsal import steps
from rehearsal.cases import CARDS, StepCase
from rehearsal.predicted import config_of, passes_of
from rehearsal.rows import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "fits.jsonl"
LIMIT_SECONDS = 180
LEAST, MOST = 0.8, 1.2
"""Of the predicted need, what the card is given."""
MODELS = ("llama", "llama-all-heads", "llama-tied", "qwen2", "mistral", "gpt2")
OPTIMIZERS = ("adamw", "adamw", "adamw", "adamw_foreach", "adamw_8bit", "adafactor", "sgd")
PRECISIONS = ("autocast_bfloat16", "autocast_bfloat16", "bfloat16", "autocast_float16", "float32")
PRECISIONS_WITHOUT_BFLOAT16 = ("autocast_float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """says_fits: the prediction. ran_out: the genuine allocator. Both None where `failure` says why."""

    seed: int
    card: str
    setting: str
    need_bytes: int | None = None
    total_bytes: int | None = None
    says_fits: bool | None = None
    ran_out: bool | None = None
    failure: str | None = None
    torch: str = torch.__version__
    seconds: float = 0.0


def random_case(seed: int) -> tuple[StepCase, str, float]:
    """A setting, its card, and the share of the predicted need that the card has. The same for a seed everywhere."""
    chosen = random.Random(seed)
    card = CARDS[seed % len(CARDS)]
    model = chosen.choice(MODELS)
    # GPT-2 has no linear layers that could be quantised
    method = chosen.choice(("full", "full", "lora", "lora" if model == "gpt2" else "qlora"))
    precision = chosen.choice(PRECISIONS_WITHOUT_BFLOAT16 if card == "T4" else PRECISIONS)
    options = [
        f"model.method={method}",
        f"model.precision={precision}",
        f"model.recompute={chosen.choice(('off', 'off', 'full', 'every_2', 'selective'))}",
        f"loss={chosen.choice(('chunked', 'chunked', 'full'))}",
        f"data.packing={chosen.choice(('true', 'true', 'false'))}",
    ]
    if method == "full":
        options.append(f"optim.name={chosen.choice(OPTIMIZERS)}")
    accumulation = chosen.choice((1, 1, 2, 3))
    longest = chosen.choice((256, 512, 1024))
    number = accumulation * chosen.choice((1, 2, 4, 6))
    equal = chosen.random() < 0.5
    lengths = [
        longest if equal else chosen.randrange(longest // 8, longest + 1) for _ in range(number - 1)
    ]
    case = StepCase(
        name=f"seed-{seed}",
        model=model,
        rows=tuple((length, chosen.randrange(1, length)) for length in (*lengths, longest)),
        options=tuple(options),
        accumulation=accumulation,
        kinds=("eval", "train", "train") if chosen.random() < 0.3 else ("train", "train", "train"),
    )
    return case, card, chosen.uniform(LEAST, MOST)


def try_case(seed: int) -> Tried:
    """In a process that has not used the card before."""
    case, card, share = random_case(seed)
    stand_in = ctypes.CDLL(None)
    stand_in.rehearsal_set_memory.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    device = this_machine()[0]
    # the context is as large as it is taken to be: whether that is so, only a card can tell
    context = device.context or context_prior(device.compute_capability or (8, 0))
    stand_in.rehearsal_set_memory(device.total_bytes, context.expected_bytes)
    torch.cuda.init()
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(case, Path(directory))
        passes = passes_of(case)
        unlimited = predict_run(config, device, passes=passes)
        need = max(
            each.peak_reserved_bytes
            for each in (unlimited.largest, unlimited.training, unlimited.evaluation)
            if each
        )
        need += context.expected_bytes
        total = int(need * share) // MIB * MIB
        limited = predict_run(config, device, passes=passes, limit_bytes=total)
        says_fits = all(each.fits for each in (limited.training, limited.evaluation) if each)
        stand_in.rehearsal_set_memory(total, context.expected_bytes)
        ran_out = _runs_out(case, config)
    return Tried(
        seed=seed,
        card=card,
        setting=_describe(case),
        need_bytes=need,
        total_bytes=total,
        says_fits=says_fits,
        ran_out=ran_out,
    )


def _runs_out(case: StepCase, config: RunConfig) -> bool:
    try:
        steps.measure(case, config)
    except (
        torch.OutOfMemoryError,
        RestartError,
    ):  # the second one: in the middle of the optimizer's update
        return True
    return False


def _describe(case: StepCase) -> str:
    lengths = [length for length, _ in case.rows]
    rows = f"{case.accumulation} x {len(lengths) // case.accumulation} rows of {min(lengths)} to {max(lengths)}"
    return ", ".join(
        [case.model, rows, *case.options, *(kind for kind in case.kinds if kind == "eval")]
    )


# ---- children and results --------------------------------------------------------------------------------------------


class _TooLongError(Exception):
    pass


def _too_long(*_: Any) -> None:
    raise _TooLongError(f"not done after {LIMIT_SECONDS} s")


def try_apart(seed: int) -> Tried:
    """In a forked child, which tells by a pipe."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        torch.cuda._is_in_bad_fork = lambda: False  # see compare.compare_apart
        os.environ["FAKE_SHARED"] = f"{os.environ['FAKE_SHARED']}.{os.getpid()}"
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LIMIT_SECONDS)
        try:
            tried = try_case(seed)
        except (Exception, FituneError) as error:
            tried = _failed(seed, f"{type(error).__name__}: {error}")
        with os.fdopen(writes, "w") as pipe:
            pipe.write(json.dumps(asdict(tried)))
        Path(os.environ["FAKE_SHARED"]).unlink(missing_ok=True)
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return (
        Tried(**json.loads(told))
        if told
        else _failed(seed, f"the process ended with status {status}")
    )


def _failed(seed: int, reason: str) -> Tried:
    case, card, _ = random_case(seed)
    return Tried(seed=seed, card=card, setting=_describe(case), failure=reason[:400])


def read_tried(path: Path = RESULTS) -> list[Tried]:
    """A line that was cut short, since its writer was killed, is left out."""
    tried: dict[int, Tried] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            each = Tried(**json.loads(line))
        except ValueError:
            continue
        tried[each.seed] = each
    return [tried[seed] for seed in sorted(tried)]


def rates(tried: Sequence[Tried]) -> list[str]:
    known = [each for each in tried if each.failure is None]
    fits = [each for each in known if each.says_fits]
    wrong_yes = [each.seed for each in fits if each.ran_out]
    wrong_no = [each.seed for each in known if not each.says_fits and not each.ran_out]
    return [
        f"{len(known)} settings, {len(tried) - len(known)} more failed",
        f"said to fit and ran out: {len(wrong_yes)} of {len(fits)} {wrong_yes[:10] or ''}".rstrip(),
        f"said not to fit and would have: {len(wrong_no)} of {len(known) - len(fits)} {wrong_no[:10] or ''}".rstrip(),
    ]


def _say(tried: Tried) -> str:
    if tried.failure is not None:
        return f"{tried.seed} on {tried.card}: failed: {tried.failure} ({tried.setting})"
    assert tried.need_bytes is not None
    assert tried.total_bytes is not None
    says = "fits" if tried.says_fits else "does not fit"
    did = "ran out" if tried.ran_out else "ran"
    share = tried.total_bytes / tried.need_bytes
    right = "" if tried.says_fits != tried.ran_out else " WRONG"
    return f"{tried.seed} on {tried.card}: {share:.3f} of the need: {says}, {did}{right} ({tried.setting})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--number", type=int, default=300, help="settings, with those that are done"
    )
    parser.add_argument("--seed", type=int, help="this setting alone")
    parser.add_argument("--seeds", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "FAKE_CARD" not in os.environ:
        sys.exit("the stand-in is not loaded: python -m rehearsal.run python -m rehearsal.fits")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    done = {each.seed for each in read_tried() if each.failure is None}
    wanted = [seed for seed in range(options.number) if seed not in done]
    if options.seed is not None or options.seeds:
        wanted = (
            [options.seed]
            if options.seed is not None
            else [int(word) for word in options.seeds.split(",")]
        )
    mine = [seed for seed in wanted if random_case(seed)[1] == os.environ["FAKE_CARD"]]
    if len(mine) < len(wanted):
        for (
            card
        ) in CARDS:  # PyTorch remembers the properties of the first card that a process asks for
            seeds = ",".join(str(seed) for seed in wanted if random_case(seed)[1] == card)
            flag = "--seed" if options.seed is not None else "--seeds"
            if seeds:
                command = [sys.executable, "-m", "rehearsal.fits", flag, seeds]
                subprocess.run(command, env=os.environ | {"FAKE_CARD": card}, check=True)
    else:
        for seed in mine:
            begin = time.monotonic()
            tried = try_apart(seed)
            print(_say(tried), flush=True)
            if options.seed is None:
                with RESULTS.open("a") as file:
                    line = asdict(tried) | {"seconds": round(time.monotonic() - begin, 1)}
                    file.write(json.dumps(line) + "\n")
    if options.seed is None and not options.seeds:
        print("\n".join(rates(read_tried())))


if __name__ == "__main__":
    main()
