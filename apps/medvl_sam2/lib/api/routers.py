"""The routers of our own, in the order in which a request is offered to them."""

from fastapi import APIRouter

from lib.api import panel

ROUTERS: tuple[APIRouter, ...] = (panel.router,)
"""Included by :func:`lib.server.build_app`, before MONAI Label's own routes: one may stand in for one of those."""
