"""The web page at `/`: static files, and a content security policy that allows requests to this server only."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from service.errors import NotFound
from service.openapi.operation import HTML, Operation

STATIC = Path(__file__).parent.parent / "static"
FILES = {"app.js": "text/javascript", "style.css": "text/css", "docs.css": "text/css", "icon.svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(_: Request) -> Response:
    return FileResponse(STATIC / "index.html", media_type="text/html", headers=HEADERS)


async def static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        raise NotFound("there is no such file")
    return FileResponse(STATIC / name, media_type=FILES[name], headers=HEADERS)


ROUTES = [Route("/", page), Route("/static/{name}", static)]
OPERATIONS = [
    Operation(
        "get", "/", "A page to try the service", {200: HTML}, "Pages", key=None, refusals=(403,), request_id=None
    ),
    Operation(
        "get",
        "/static/{name}",
        "A file of the pages",
        {200: tuple(FILES.values())},
        "Pages",
        key=None,
        refusals=(403, 404),
        request_id=None,
        parameters={"name": "The file's name."},
    ),
]
