"""The routers of our own, in the order in which a request is offered to them."""

from fastapi import APIRouter

from lib.api import cases, health, jobs, labels, panel, proxy, texts

ROUTERS: tuple[APIRouter, ...] = (
    health.router,
    jobs.router,
    cases.router,
    labels.router,
    labels.upload_router,
    texts.router,
    proxy.router,
    panel.router,
)
"""Included by :func:`lib.server.build_app`, before MONAI Label's own routes: one may stand in for one of those."""
