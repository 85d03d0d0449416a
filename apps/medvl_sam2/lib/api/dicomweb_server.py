"""The DICOMweb server behind the studies: its addresses, how to ask it, and whether it answers.

Concurrency: any thread may ask; credentials are given with each request (:mod:`lib.api.lent_connections`).
"""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import dataclass
from typing import IO
from urllib.parse import quote

import requests
from monailabel.config import settings

from lib.api.lent_connections import Answer, Connections

CONNECT_S = 5.0
READ_S = 120.0
"""Longest silence of the server; a busy one may think for a while before it sends a study."""
_FRESH_S = 30.0
_CONNECTIONS = Connections()


def server_root() -> str | None:
    """Address of the DICOMweb server without a final slash; None where the studies are a folder."""
    studies = settings.MONAI_LABEL_STUDIES.rstrip("/")
    return studies if studies.startswith(("http://", "https://")) else None


def resource_url(root: str, service: str, path: str) -> str:
    """Address of ``path`` (decoded) below the root, for ``service`` qido, wado, stow or empty for no prefix.

    Quoted anew, so that nothing the client encoded twice means something else there. Metadata is WADO, also where an
    OHIF asks QIDO for it.
    """
    if service == "qido" and path.endswith("metadata"):
        service = "wado"
    prefixes = {
        "qido": settings.MONAI_LABEL_QIDO_PREFIX,
        "wado": settings.MONAI_LABEL_WADO_PREFIX,
        "stow": settings.MONAI_LABEL_STOW_PREFIX,
    }
    prefix = prefixes.get(service)
    return "/".join([root, *([prefix.strip("/")] if prefix else []), quote(path, safe="/,;:=@&+$!*'()~")])


def send(
    method: str, url: str, query: str, headers: dict[str, str], body: IO[bytes] | None = None, read_s: float = READ_S
) -> Answer:
    """One request with the server's credentials; the answer's body is not read yet, and it is to be closed.

    Raises:
        requests.RequestException: the server cannot be reached or does not answer.
    """
    user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
    auth = (user, password) if user and password else None
    if "googleapis.com" in url:
        headers, auth = {**headers, "Authorization": f"Bearer {_google_token()}"}, None
    return _CONNECTIONS.request(
        method,
        f"{url}?{query}" if query else url,
        data=body,
        headers=headers,
        auth=auth,
        timeout=(CONNECT_S, read_s),
    )


def _google_token() -> str:
    import google.auth
    import google.auth.transport.requests

    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
    credentials.refresh(google.auth.transport.requests.Request())
    return str(credentials.token)


@dataclass(frozen=True)
class Reachability:
    """What is known of the server: ``reachable`` is None before it was asked for the first time."""

    reachable: bool | None = None
    reason: str = ""
    checked: float = float("-inf")
    """time.monotonic() of the last look."""


class Watch:
    """Asks the server in a thread of its own, at most every half minute and only when somebody wants to know."""

    def __init__(self) -> None:
        self._known = Reachability()
        self._asking = threading.Lock()

    def known(self, root: str) -> Reachability:
        """What is known now; never waits."""
        if time.monotonic() - self._known.checked > _FRESH_S and self._asking.acquire(blocking=False):
            threading.Thread(target=self._ask, args=(root,), name="dicomweb-watch", daemon=True).start()
        return self._known

    def _ask(self, root: str) -> None:
        reachable, reason = True, ""
        try:
            url = resource_url(root, "qido", "studies")
            asked = send("GET", url, "limit=1", {"Accept": "application/dicom+json"}, read_s=CONNECT_S)
            with closing(asked) as answer:
                if answer.status_code >= 400:
                    reachable, reason = False, f"it answers {answer.status_code} to a query"
        except requests.RequestException as error:
            reachable, reason = False, f"it cannot be reached ({type(error).__name__})"
        finally:
            self._known = Reachability(reachable, reason, time.monotonic())
            self._asking.release()
