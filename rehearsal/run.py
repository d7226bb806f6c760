"""Runs a command as on a machine with a card.

    python -m rehearsal.run --card H100 fitune env
    python -m rehearsal.run python any_script.py

The command's torch has to be the CUDA build (`make rehearse` installs it in .venv-rehearsal, which is put first in
PATH). Further variables of the stand-in are listed in docs/rehearsal.md.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-rehearsal"
LIBRARIES = Path(__file__).parent / "driver" / "lib"
SHARED_MEMORY = Path("/dev/shm")


def card_environment(card: str = "4090") -> dict[str, str]:
    """Variables under which a process sees the card."""
    libraries = [str(LIBRARIES), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "PATH": os.pathsep.join([str(ENVIRONMENT / "bin"), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "LD_PRELOAD": str(LIBRARIES / "libfakecuda.so"),
        "FAKE_CARD": card,
        # one card for each checkout: rehearsals side by side do not take each other's memory
        "FAKE_SHARED": str(SHARED_MEMORY / f"rehearsal.{os.getuid()}.{_name_of_checkout()}.{card}"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _name_of_checkout() -> str:
    return ROOT.as_posix().strip("/").replace("/", ".")


def with_card(card: str = "4090", settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process' environment with the card's. settings: variables that are set already win."""
    return {**os.environ, **card_environment(card), **(settings or {})}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--card",
        default=os.environ.get("FAKE_CARD", "4090"),
        help="4090, 3090, A100, H100, T4, 5090",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("say which command to run")
    if not (LIBRARIES / "libfakecuda.so").exists():
        sys.exit("the stand-in for the driver is not built: run `make rehearse` once")
    variables = with_card(options.card)
    if "FAKE_SHARED" in os.environ:
        variables["FAKE_SHARED"] = os.environ["FAKE_SHARED"]
    try:
        os.execvpe(options.command[0], options.command, variables)
    except OSError as error:
        sys.exit(f"{options.command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main()
