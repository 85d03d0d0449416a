"""How ``scripts/test`` shares the tests among processes (pytest-xdist)."""

from __future__ import annotations

from collections import Counter

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

SERVERS = (
    "e2e/",
    "app/test_orthanc.py",
    "app/test_server_start.py",
    "app/test_slicer_cycle.py",
    "app/test_upstream_suite.py",
    "scripts/test_orthanc_script.py",
)
"""Below tests/, what starts servers and browsers."""


class WholeFiles(LoadFileScheduling):
    """A file's tests stay together, so that its fixtures are made once; files are taken in the order of collection.

    What starts servers and browsers is one process's work: two of them at once would wait for each other, and the
    tests in ``e2e`` share one server.
    """

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "servers" if starts_servers(file) else file


def starts_servers(file: str) -> bool:
    """Whether a file's tests start servers or browsers; ``file`` as in a test's id."""
    return file.removeprefix("tests/").startswith(SERVERS)


def longest_first(items: list[pytest.Item]) -> None:
    """Sort by file: servers, then those with the most slow tests, so that no long file is the last to be taken."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (not starts_servers(item.nodeid), -slow[item.path]))
