"""GET /: the playground, a static page that is read once and served from memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

router = APIRouter()

_PAGE = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' blob:",  # blob: previews of the user's own pictures
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # keep it, but ask whether it is still current
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
}


@dataclass(frozen=True)
class Asset:
    """A file of the page.

    Attributes:
        content: its bytes.
        media_type: for the Content-Type header.
        etag: strong entity tag, with its quotes.
    """

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """The files of the page by name."""
    found = {}
    for file in (files("text2weight_service") / "playground").iterdir():
        content = file.read_bytes()
        media_type = _MEDIA_TYPES["." + file.name.rpartition(".")[2]]
        found[file.name] = Asset(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page itself."""
    return _answer(request, assets()[_PAGE])


@router.get("/playground/{name}", include_in_schema=False)
async def part(request: Request, name: str) -> Response:
    """A script, style sheet or icon of the page."""
    if name not in assets():
        raise HTTPException(404)
    return _answer(request, assets()[name])


def _answer(request: Request, asset: Asset) -> Response:
    headers = {**_HEADERS, "ETag": asset.etag}
    tags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if asset.etag in tags or "*" in tags:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)
