"""Serves the page to the browser of this machine."""

import errno
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fitune.board import planning, processes, runs
from fitune.board.access import HOSTS, AccessCheck
from fitune.board.page import SCRIPTS, STYLES, asset, board_page, plotly_gz
from fitune.board.planner import Planner
from fitune.board.processes import Launcher
from fitune.boundary import is_debugging
from fitune.errors import FituneError, UsageError
from fitune.language import say, translated

#: for the requests that are still answered when the server ends, such as runs that are followed
_PATIENCE_SECONDS = 1


@dataclass(frozen=True)
class Address:
    """Where the page is."""

    port: int
    token: str

    @property
    def url(self) -> str:
        """The address to open. Behind the '#' stands what a browser sends to nobody."""
        return f"http://{HOSTS[0]}:{self.port}/#token={self.token}"


def application(directory: Path, *, token: str, planner: Planner, launcher: Launcher) -> Starlette:
    """Return the application that answers for the runs in `directory`."""
    return Starlette(
        routes=[
            Route("/", _page),
            Route("/assets/{name}", _asset),
            *planning.routes(directory, planner),
            *processes.routes(directory, launcher),
            *runs.routes(directory),
        ],
        middleware=[Middleware(AccessCheck, token=token)],
        exception_handlers={FituneError: _refused},
    )


def serve(directory: Path, *, port: int, on_start: Callable[[Address], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    port: 0 for one that is free.
    on_start: called with the address as soon as it can be opened.
    Raises UsageError if the port is in use.
    """
    with (
        _listening(port) as listener,
        Planner() as planner,
        # a run that outlives the board goes on writing into its file, which has no name then
        TemporaryDirectory(prefix="fitune-board-", ignore_cleanup_errors=True) as logs,
    ):
        address = Address(listener.getsockname()[1], secrets.token_urlsafe(24))
        app = application(
            directory, token=address.token, planner=planner, launcher=Launcher(Path(logs))
        )
        config = uvicorn.Config(
            app,
            log_config=None,
            # it would show a traceback for each request that the end of the server cuts off
            log_level=None if is_debugging() else "critical",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE_SECONDS,
        )
        on_start(address)
        uvicorn.Server(config).run(sockets=[listener])


def _listening(port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port} is no port: give 1024 to 65535")
    try:
        return socket.create_server((HOSTS[0], port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} is in use, perhaps by another board: give another one with --port"
            ) from error
        raise UsageError(f"port {port} cannot be used: {error.strerror}; give another") from error


def _page(request: Request) -> Response:
    return HTMLResponse(board_page())


def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "plotly.js":
        headers = {"content-encoding": "gzip"}
        return Response(plotly_gz(), media_type="text/javascript", headers=headers)
    if name not in (*SCRIPTS, *STYLES):
        return JSONResponse({"error": say("there is no such file")}, status_code=404)
    kind = "text/css" if name.endswith(".css") else "text/javascript"
    return Response(asset(name), media_type=kind)


def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": translated(str(error))}, status_code=400)
