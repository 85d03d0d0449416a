"""MONAI Label's upload sessions: which files a request may name, and a clean-up that survives a broken folder."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from pathlib import Path

from monailabel.interfaces.datastore import Datastore
from monailabel.utils.sessions import Sessions

from lib.datastore import GuardedStore

logger = logging.getLogger(__name__)

_GRACE_S = 3600.0


def may_be_image(path: Path, datastore: Datastore, sessions: Sessions | None) -> bool:
    """Whether a request may name this file as image: a study, a session's file, or an upload on its way.

    MONAI Label opens any path of the server that a client names. It puts uploads straight into the temporary folder;
    what lies deeper there belongs to somebody else.
    """
    path = path.resolve()
    if path.parent == Path(tempfile.gettempdir()).resolve():
        return True
    roots: list[Path] = []
    if isinstance(datastore, GuardedStore):
        roots.append(datastore.folder)
    if sessions is not None:
        roots.append(Path(sessions.store_path))
    return any(path.is_relative_to(root.resolve()) for root in roots)


def clean_sessions(sessions: Sessions | None) -> None:
    """Remove expired sessions. One that is damaged, which would stop MONAI Label from starting, goes after an hour."""
    if sessions is None:
        return
    store = Path(sessions.store_path)
    for folder in store.iterdir() if store.is_dir() else ():
        if not folder.is_dir():
            continue
        try:
            session = sessions.get_session(folder.name, update_ts=False, fetch_cache=False)
        except (OSError, ValueError, TypeError, AttributeError):
            session = None
        if session is None:
            expired = folder.exists() and time.time() - folder.stat().st_mtime > _GRACE_S
        else:
            expired = 0 < session.expiry < time.time() - session.last_access_ts
        if expired:
            logger.info("Removing session %s", folder.name)
            sessions.pop(folder.name, None)
            shutil.rmtree(folder, ignore_errors=True)
