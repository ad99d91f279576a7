"""The chat page at `/`: a single self-contained response without external resources.

Its content security policy lists the style and the script by their hashes and allows requests to
this server only. Text from a model or a user could not be executed even if the page inserted it as
HTML.
"""

import base64
import hashlib
from pathlib import Path
from string import Template

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_FILES = Path(__file__).with_name("chat_page")
_SCRIPTS = ("stream.js", "text.js", "page.js")


def page_router() -> APIRouter:
    """Make the router of `GET` and `HEAD` of `/`."""
    router = APIRouter()
    style = _read("page.css")
    script = "\n".join(map(_read, _SCRIPTS))
    page = Template(_read("page.html")).substitute(style=style, script=script)
    headers = {
        "Content-Security-Policy": _policy(style, script),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # A cached page of another version may send requests that this server does not support.
        "Cache-Control": "no-cache",
    }

    @router.api_route("/", methods=["GET", "HEAD"])
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    return router


def _read(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    allowed = {
        "default-src": "'none'",
        "script-src": _hash_source(script),
        "style-src": _hash_source(style),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{kind} {source}" for kind, source in allowed.items())


def _hash_source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
