"""What the OHIF viewer that ships with MONAI Label makes of our files: its own NRRD reader, run in Node.

The viewer pastes what its reader returns; where the reader fails, the labels on screen stay as they are.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from app.conftest import AFFINE, SHAPE
from lib.result_writing import write_label_map, write_untouched
from medvl_sam2.types import Geometry

_HARNESS = """
const fs = require('fs'), zlib = require('zlib');
const [source, file] = process.argv.slice(2);
// A browser has window.length, the number of frames; the reader stumbles over it.
globalThis.length = 0;
const module_ = {exports: {}};
const load = id => require('assert');
new Function('module', 'exports', '__webpack_require__', fs.readFileSync(source, 'utf8'))(module_, {}, load);
const bytes = fs.readFileSync(file);
const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength);
console.warn = () => {};
try {
    const image = module_.exports.parse(buffer);
    let data = Buffer.from(image.buffer);
    if (image.encoding === 'gzip') data = zlib.gunzipSync(data);
    const painted = [];
    data.forEach((value, index) => { if (value) painted.push([index, value]); });
    console.log(JSON.stringify({length: data.length, painted}));
} catch (error) {
    console.log(JSON.stringify({error: String(error.message)}));
}
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command that reads a file as OHIF does: the reader's source is cut out of the installed viewer."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed; the viewer's reader cannot be run")
    spec = find_spec("monailabel")
    assert spec is not None
    assert spec.origin is not None
    viewer = Path(spec.origin).parent / "endpoints" / "static" / "ohif"
    pattern = re.compile(r"\n/\*\*\*/ \d+:\n/\*\*\*/ \(\(module[^\n]*\n(.*?)\n/\*\*\*/ \}\)", re.DOTALL)
    folder = tmp_path_factory.mktemp("reader")
    for bundle in sorted(viewer.glob("*.bundle.*.js")):
        text = bundle.read_text(encoding="utf-8", errors="ignore")
        if "File is not an NRRD file!" not in text:
            continue
        for match in pattern.finditer(text):
            if "File is not an NRRD file!" in match.group(1):
                (folder / "reader.js").write_text(match.group(1), encoding="utf-8")
                (folder / "harness.js").write_text(_HARNESS, encoding="utf-8")
                return [node, str(folder / "harness.js"), str(folder / "reader.js")]
    pytest.skip("the installed viewer has no NRRD reader of the known form")


def read(reader: list[str], path: str) -> dict[str, object]:
    result = subprocess.run([*reader, path], capture_output=True, text=True, check=True, timeout=60)
    Path(path).unlink()
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


@pytest.mark.parametrize("compress", [True, False])
def test_masks_are_read_in_stored_order(reader: list[str], compress: bool) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2, 3] = 5
    mask[11, 0, 19] = 17
    answer = read(reader, write_label_map(mask, Geometry(SHAPE, AFFINE), ".nrrd", compress))
    i, j, _ = SHAPE
    assert answer == {"length": mask.size, "painted": [[1 + i * (2 + j * 3), 5], [11 + i * (0 + j * 19), 17]]}


def test_reply_to_a_question_leaves_the_labels_on_screen(reader: list[str]) -> None:
    answer = read(reader, write_untouched(Geometry(SHAPE, AFFINE)))
    assert "quoted string" in str(answer.get("error")), "the viewer would now replace its labels by an empty mask"
