"""How large a request may be: refused with a reason before its body is read, or where it grows past the limit."""

from __future__ import annotations

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from monailabel.interfaces.utils.app import app_instance
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON_BYTES = 1_000_000
"""Largest body of JSON or of form fields without files. The framework holds a field beside files to about the same."""
_SMALL = ("application/json", "application/x-www-form-urlencoded")


class BodyLimit:
    """ASGI middleware. Starlette's own answers without a reason and has one limit for all kinds of content."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit, reason = _limit(headers.get("content-type", ""))
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            await JSONResponse({"detail": f"{announced} bytes are too many: {reason}"}, 413)(scope, receive, send)
            return
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > limit:
                raise HTTPException(413, f"more than {limit} bytes are too many: {reason}")
            return message

        await self._app(scope, counted, send)


def _limit(content_type: str) -> tuple[int, str]:
    if content_type.partition(";")[0].strip().lower() in _SMALL:
        return JSON_BYTES, f"JSON and form fields may have {JSON_BYTES}"
    megabytes = app_instance().config.max_upload_megabytes
    return megabytes * 1_000_000, f"an upload may have {megabytes} MB (--conf max_upload_megabytes)"
