"""Reads the body of a request, and writes server-sent events."""

import json
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from fitune.boundary import parse_json
from fitune.errors import UsageError

MOST_BODY_BYTES = 1_000_000

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """Return the JSON of the request as this model. Raises UsageError if it is something else."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise UsageError("a request of this board is JSON: send content-type application/json")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MOST_BODY_BYTES:
            raise UsageError(f"a request of this board has at most {MOST_BODY_BYTES:,} bytes")
        parts.append(part)
    try:
        return kind.model_validate(parse_json(b"".join(parts)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"this board does not understand '{where}': {first['msg']}") from error
    except ValueError as error:
        raise UsageError(f"a request of this board is JSON: {error}") from error


def event(name: str, content: object) -> str:
    """Return a server-sent event with JSON as its data."""
    return f"event: {name}\ndata: {json.dumps(content, allow_nan=False, default=str)}\n\n"
