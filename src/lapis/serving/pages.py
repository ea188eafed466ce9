"""The chat page: the files of serving/page/, under a policy that forbids every other origin.

Its colors are those of the reports, in a style sheet of their own. Only the files that were there at the start are ever
sent.
"""

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from lapis.report import theme
from lapis.report.page import variables
from lapis.serving.errors import ApiError

FOLDER = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

router = APIRouter(include_in_schema=False)


@cache
def files() -> dict[str, bytes]:
    """The files by their places below page/."""
    paths = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.rglob("*") if path.suffix in TYPES}
    colors = {"colors.css": variables(theme.shades()).encode()}
    return {name: path.read_bytes() for name, path in paths.items()} | colors


@router.get("/")
@router.get("/page/{name:path}")
async def page(name: str = "index.html") -> Response:
    """A file of the page. The page itself names its own as page/NAME."""
    if name not in files():
        raise ApiError(404, "there is no such file on the page")
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return Response(files()[name], media_type=TYPES[Path(name).suffix], headers=headers)
