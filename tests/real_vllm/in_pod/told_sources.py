"""Loaded into the server (`--middleware`): has it name other event sources than its own, for a relay in between.

While the file named by PICKER_TOLD_SOURCES exists, its content is what /kv_event_sources answers. Runs in vLLM's
environment, without picker's packages.
"""

import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


async def told_sources(request: Request, call_next):  # type: ignore[no-untyped-def]
    told = Path(os.environ["PICKER_TOLD_SOURCES"])
    if request.url.path == "/kv_event_sources" and told.exists():  # noqa: ASYNC240 - a small local file
        return Response(told.read_bytes(), media_type="application/json")  # noqa: ASYNC240
    return await call_next(request)
