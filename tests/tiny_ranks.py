"""Processes that train together as torchrun would start them, forked from a server that has everything imported."""

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "fitune.cli.app",
        "fitune.training.prepare",
        "fitune.watch.monitor",
        "fitune.training.checkpoint.write",
        "torch.distributed",
    ]
)
MOST_SECONDS = 300


def run_ranks(target: Callable[..., int], *arguments: Any, size: int = 2) -> list[int]:
    """The exit codes of `target(*arguments)` in each process, by rank; negative after a signal. What rank R writes is
    in R.out and R.err of the current directory."""
    with mock.patch.dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    ):
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    shared |= {
        name: os.environ[name] for name in ("FITUNE_CACHE", "FITUNE_LANG") if name in os.environ
    }
    processes = [
        CONTEXT.Process(
            target=_be, args=(shared | {"RANK": str(rank)}, os.getcwd(), target, arguments)
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(MOST_SECONDS)
        return [
            -signal.SIGALRM if process.exitcode is None else process.exitcode
            for process in processes
        ]
    finally:
        for process in processes:
            process.kill()


def _be(
    variables: Mapping[str, str], place: str, target: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    gc.freeze()  # what the server has imported is not looked at in every garbage collection
    os.chdir(place)
    os.environ.update(variables)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(
            os.open(f"{variables['RANK']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
        )
    # a process that a signal ends says where, in its R.err
    faulthandler.enable()
    sys.exit(target(*arguments))
