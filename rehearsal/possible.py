"""Whether a rehearsal can be made here: exit code 0, or 1 and the sentence that says why not.

python -m rehearsal.possible           the machine
python -m rehearsal.possible --wheel   the torch of this interpreter
"""

import platform
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def why_not_here() -> str | None:
    system, processor = platform.system(), platform.machine()
    if (system, processor) != ("Linux", "x86_64"):
        return f"no rehearsal here: this is {system} on {processor}, and the stand-in for the driver needs Linux on x86_64"
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"no rehearsal here: {tool} is missing, with which the stand-in for the driver is built"
    return None


def why_not_with_wheel() -> str | None:
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return "no rehearsal here: torch is not installed in this environment"
    if not (Path(torch.origin).parent / "lib" / "libtorch_cuda.so").exists():
        return "no rehearsal here: the installed torch is not a CUDA build, whose host code is what is rehearsed"
    return None


def main() -> None:
    reason = why_not_with_wheel() if "--wheel" in sys.argv[1:] else why_not_here()
    if reason is not None:
        print(reason)
        sys.exit(1)


if __name__ == "__main__":
    main()
