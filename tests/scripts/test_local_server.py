"""The throw-away server goes with the script that started it, also when that is told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

_STAND_IN = """
import argparse, http.server
parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
args, _ = parser.parse_known_args()

class Info(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

http.server.HTTPServer((args.host, args.port), Info).serve_forever()
"""
_SCRIPT = """
import sys, time
from pathlib import Path
import local_server
folder = Path(sys.argv[1])
local_server.ROOT = folder
with local_server.own_server(folder) as server:
    print(server.process, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_script_that_is_told_to_end_takes_its_server_along(
    tmp_path: Path, repository: Path, number: signal.Signals
) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "serve.py").write_text(_STAND_IN)
    search = os.pathsep.join([str(repository / "scripts"), str(repository / "model")])
    script = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert script.stdout is not None
    with script, script.stdout as told:
        process = int(told.readline())
        os.kill(process, 0)
        script.send_signal(number)
        assert script.wait(30) == (-number if number == signal.SIGINT else 128 + number)
    end = time.monotonic() + 10
    while _alive(process):
        assert time.monotonic() < end, "the server is still there"
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
