"""The chat page: the files of serving/page/, under a policy that forbids every other origin."""

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from lapis.serving.errors import ApiError

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml", ".json": "application/json",
}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@cache
def files() -> dict[str, bytes]:
    """The files by name; only these are ever sent."""
    return {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}


@router.get("/")
@router.get("/page/{name}")
async def page(name: str = "index.html") -> Response:
    """A file of the page. The page itself names its own as page/NAME."""
    if name not in files():
        raise ApiError(404, "there is no such file on the page")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Response(files()[name], media_type=TYPES[Path(name).suffix], headers=headers)
