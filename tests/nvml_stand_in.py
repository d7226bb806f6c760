"""NVIDIA's management library as a stand-in, compiled from stand_in/nvml.c, so that nvidia-ml-py itself is tested."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pynvml
import pytest

SOURCE = Path(__file__).parent / "stand_in" / "nvml.c"
COMPILER = shutil.which("cc")


@pytest.fixture(scope="session")
def stand_in_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a libnvidia-ml.so.1."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc) to build the stand-in with")
    path = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, SOURCE], check=True)
    return path


@pytest.fixture
def stand_in(stand_in_library: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """nvidia-ml-py finds the stand-in; what it answers is set with `setenv` on what this returns."""
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(stand_in_library)))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch
