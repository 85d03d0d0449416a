"""The routers of our own, in the order in which a request is offered to them."""

from fastapi import APIRouter

from lib.api import cases, health, jobs, panel, proxy

ROUTERS: tuple[APIRouter, ...] = (health.router, jobs.router, cases.router, proxy.router, panel.router)
"""Included by :func:`lib.server.build_app`, before MONAI Label's own routes: one may stand in for one of those."""
