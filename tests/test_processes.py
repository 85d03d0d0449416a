"""Sharing the tests among processes: what must run together does, and long files come first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import SERVERS, WholeFiles, longest_first


class _Item:
    def __init__(self, nodeid: str, slow: bool = False) -> None:
        self.nodeid, self.path, self.slow = nodeid, Path(nodeid.split("::")[0]), slow

    def get_closest_marker(self, name: str) -> Any:
        return name if name == "slow" and self.slow else None


def _scopes(*nodeids: str) -> list[str]:
    scheduler = WholeFiles.__new__(WholeFiles)  # the rest of it needs processes
    return [scheduler._split_scope(nodeid) for nodeid in nodeids]


def test_a_file_is_one_process_s_and_so_is_all_that_starts_servers() -> None:
    one, other = "tests/model/test_clicks.py", "tests/model/test_planes.py"
    assert _scopes(f"{one}::a[x::y]", f"{one}::b", f"{other}::a") == [one, one, other]
    panel, viewer, start = ("e2e/test_panel.py", "e2e/test_unmodified_viewer.py", "app/test_server_start.py")
    assert len(set(_scopes(*(f"tests/{file}::a" for file in (panel, viewer, start))))) == 1


def test_every_file_that_starts_a_server_is_among_them(repository: Path) -> None:
    folder = repository / "tests"
    starts = re.compile(r"\brunning_orthanc\(|\"scripts/serve\.py\"|\"scripts\" / \"orthanc\"")
    found = {
        str(path.relative_to(folder)) for path in folder.rglob("test_*.py") if starts.search(path.read_text("utf-8"))
    }
    assert found
    assert {file for file in found if not file.startswith(SERVERS)} == set()
    assert [name for name in SERVERS if not (folder / name).exists()] == []


def test_servers_come_first_then_the_slowest_and_files_stay_whole() -> None:
    quick = [_Item(f"tests/model/test_quick.py::{n}") for n in range(3)]
    slow = [_Item(f"tests/model/test_slow.py::{n}", slow=n > 0) for n in range(3)]
    slower = [_Item(f"tests/model/test_slower.py::{n}", slow=True) for n in range(3)]
    servers = [_Item("tests/app/test_orthanc.py::0"), _Item("tests/e2e/test_panel.py::0", slow=True)]
    items: list[Any] = [*quick, *slow, *servers[:1], *slower, *servers[1:]]
    longest_first(items)
    assert items == [*reversed(servers), *slower, *slow, *quick]


def test_every_process_has_one_thread() -> None:
    """A new one, as a program that a test has run in this one may have asked for more."""
    asked = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == "1"
