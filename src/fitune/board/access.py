"""Answers requests of the page itself alone.

The server listens on 127.0.0.1, but every page that the browser shows can send requests there. So
a request is refused

- if its Host is another name, which is how a page rebinds its own name to 127.0.0.1 (DNS
  rebinding); the port may differ, because ssh forwards another one;
- if Origin or Sec-Fetch-Site says that another page sent it;
- below /api/ without the token, which is in the address that `fitune board` prints, behind the '#':
  a browser sends that part to nobody, the page reads it and sends it as a header. Another origin
  can neither read it nor send such a header, and no cookie is there to be sent along.

What needs no token are the page without data and its scripts, which are the same everywhere.
"""

import re
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fitune.language import Language, say, speaking

TOKEN_HEADER = "x-fitune-token"
LANGUAGE_HEADER = "x-fitune-language"
#: what the address may call this machine
HOSTS = ("127.0.0.1", "localhost")
_HOST = re.compile(rf"({'|'.join(map(re.escape, HOSTS))})(:\d+)?")
#: Nothing is asked of another place, and no script runs but those that the server sends. plotly
#: sets the style of the elements that it draws.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_LANGUAGES: Mapping[str, Language] = {"en": "en", "zh": "zh"}
_HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class AccessCheck:
    """An ASGI application that refuses requests of others, and answers in the page's language."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        with speaking(_LANGUAGES.get(headers.get(LANGUAGE_HEADER, ""))):
            reason = refusal(headers, is_api=scope["path"].startswith("/api/"), token=self._token)
            if reason is not None:
                refused = JSONResponse({"error": reason}, status_code=403)
                await refused(scope, receive, send_with_headers)
                return
            await self._app(scope, receive, send_with_headers)


def refusal(headers: Headers, *, is_api: bool, token: str) -> str | None:
    """Return why the request is refused, None if it is answered."""
    host = headers.get("host", "")
    if not _HOST.fullmatch(host):
        return say("this board answers to 127.0.0.1 and localhost alone")
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return say("this board answers to its own page alone")
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return say("this board answers to its own page alone")
    if is_api and not secrets.compare_digest(
        headers.get(TOKEN_HEADER, "").encode(), token.encode()
    ):
        return say("the token is missing or old: open the address that fitune board has printed")
    return None
