"""Implement `fitune board`, the page in the browser."""

import os
import socket
import webbrowser
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fitune.board.server import Address, serve
from fitune.cli.arguments import RUNS
from fitune.cli.output import print_aside, print_text
from fitune.language import say

PORT = 8765


def board(
    directory: Annotated[Path, Parameter(help="where runs are kept")] = RUNS,
    /,
    *,
    port: Annotated[
        int, Parameter(help="of the page on 127.0.0.1; 0 for any that is free", metavar="PORT")
    ] = PORT,
    browse: Annotated[bool, Parameter(name="--open", help="open the page in a browser")] = False,
) -> None:
    """Serve a page on this machine that plans, starts, watches and compares runs, until Ctrl-C.

    Only the browser of this machine reaches it, at the address that is printed, which contains a
    secret of this start. From another machine, forward the port by ssh. Runs that it has started go
    on when it ends.
    """

    def show(address: Address) -> None:
        print_text(address.url)
        print_aside(say("from another machine, first: {command}", command=_forward(address.port)))
        print_aside(say("Ctrl-C ends the board; runs that it has started go on"))
        if browse:
            webbrowser.open(address.url)

    try:
        serve(directory, port=port, on_start=show)
    except KeyboardInterrupt:
        print_aside(say("the board has ended; 'fitune watch' follows the runs that go on"))


def _forward(port: int) -> str:
    """Return the command that forwards the port to this machine by ssh."""
    name = os.environ.get("USER") or os.environ.get("USERNAME") or "USER"
    return f"ssh -L {port}:127.0.0.1:{port} {name}@{socket.gethostname()}"
