"""The companion panel in the bundled OHIF: its files, and OHIF's page with two tags that load them.

OHIF itself stays as MONAI Label ships it. Its page is one file, whatever address inside ``/ohif/`` a link names; every
other file goes out untouched through MONAI Label's own route.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import monailabel.endpoints.ohif as ohif_endpoint
from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response

from lib.api.access import AsUser

PANEL = Path(__file__).resolve().parents[1] / "panel"
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_TAGS = (
    '<link href="/medvl/panel/page.css" rel="stylesheet"><script type="module" src="/medvl/panel/panel.js"></script>'
)
# Browsers ask whether a file changed before they use their copy: an upgraded server must not meet an old panel.
_FRESH = {"Cache-Control": "no-cache"}

router = APIRouter(tags=["MedVL panel"])


@router.get("/medvl/panel/{name}", include_in_schema=False)
def panel_file(name: str) -> Response:
    """A module or the style sheet of the panel."""
    path = PANEL / name
    if path.parent != PANEL or path.suffix not in _TYPES or not path.is_file():
        raise HTTPException(404, f"the panel has no file {name!r}")
    return FileResponse(path, media_type=_TYPES[path.suffix], headers=_FRESH)


@router.get("/ohif/{path:path}", include_in_schema=False)
def viewer_file(path: str, user: AsUser) -> Response:
    """A file of OHIF as MONAI Label serves it; in place of its page, the page with the panel."""
    found = ohif_endpoint.get_ohif(path)
    if Path(found.path).name != "index.html":
        return found
    return HTMLResponse(_page(Path(found.path)), headers=_FRESH)


@cache
def _page(index: Path) -> str:
    html = index.read_text(encoding="utf-8")
    if "</head>" not in html:
        raise HTTPException(500, f"{index} is not the page this panel was made for; reinstall monailabel 0.8.5")
    return html.replace("</head>", f"{_TAGS}</head>", 1)
