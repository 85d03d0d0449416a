"""Who may call a route: MONAI Label's roles, as parameters of a handler."""

from typing import Annotated

from fastapi import Depends
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC, User

AsUser = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
AsAnnotator = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]
AsAdmin = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]


def author_of(user: User, said: str | None) -> str | None:
    """Who is logged in, else who the client says; without a login everybody is MONAI Label's ``admin``."""
    return str(user.username) if settings.MONAI_LABEL_AUTH_ENABLE else said
