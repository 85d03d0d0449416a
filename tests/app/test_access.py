"""Who may call which route where a login is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User, get_current_user

import lib.server
from app.conftest import Running

LogIn = Callable[[str], None]


def _roles(dependant: Dependant) -> list[Any]:
    """Roles that a route asks for, itself or through what it depends on."""
    own = [dependant.call.roles] if isinstance(dependant.call, RBAC) else []
    return own + [role for below in dependant.dependencies for role in _roles(below)]


def test_whatever_changes_something_wants_a_role() -> None:
    """The login itself aside. A route is listed where a request meets it first, so a stand-in before what it covers."""
    first: dict[tuple[str, str], list[Any]] = {}
    for context in iter_route_contexts(lib.server.app.routes):
        for method in set(context.methods or ()) - {"GET", "HEAD", "OPTIONS"}:
            first.setdefault((method, context.path), _roles(context.dependant))
    assert len(first) > 30
    assert [where for where, roles in first.items() if not roles and not where[1].startswith("/auth/")] == []


@pytest.fixture
def log_in(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[LogIn]:
    """A login is needed, and who is logged in has one role."""
    monkeypatch.setattr(settings, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setattr("lib.api.dicomweb_server.server_root", lambda: None)

    def begin(role: str) -> None:
        lib.server.app.dependency_overrides[get_current_user] = lambda: User(username="somebody", roles=[role])

    yield begin
    lib.server.app.dependency_overrides.clear()


@pytest.mark.parametrize(
    ("url", "least", "allowed"),
    [
        ("/reload", "admin", 200),
        ("/proxy/dicom/stow/studies", "annotator", 404),  # there is no DICOM server
        ("/proxy/dicom/qido/studies", "annotator", 404),
        ("/proxy/dicom/studies", "annotator", 404),
        ("/medvl/labels/restore?image=case_a&version=1", "annotator", 404),
        ("/medvl/labels/consensus?image=case_b", "annotator", 400),
    ],
)
def test_a_role_too_low_is_refused(running: Running, log_in: LogIn, url: str, least: str, allowed: int) -> None:
    roles = ["user", "annotator", "admin"]
    for role in roles[: roles.index(least)]:
        log_in(f"monailabel-{role}")
        assert running.client.post(url, json={}).status_code == 403, role
    log_in(f"monailabel-{least}")
    assert running.client.post(url, json={}).status_code == allowed
