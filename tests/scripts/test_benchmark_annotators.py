"""The benchmark of many annotators: a mask that reached somebody else is seen, and fails the run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from script_modules import load_script

ARGUMENTS = ["--annotators", "2", "--clicks", "2", "--shape", "24x20x12"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("benchmark_annotators", monkeypatch)


class Client:
    """Stands in for the HTTP client: the mask is the box, or everybody's the same where ``mixed``."""

    folder: Path
    mixed = False

    def __init__(self, address: str, client_id: str | None = None) -> None:
        self.client_id = client_id

    def upload_image(self, path: Path, image: str, params: dict[str, Any]) -> None:
        assert Path(path).is_file()

    def infer(self, model: str, image: str, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        mask = np.zeros((24, 20, 12), np.uint8)
        (i0, j0, k0), (i1, j1, k1) = request["box"]
        mask[i0 : i1 + 1, j0 : j1 + 1, k0 : k1 + 1] = 1
        if self.mixed and "alone" not in str(self.client_id):
            mask = 1 - mask
        path = self.folder / f"{self.client_id}.nii.gz".replace(" ", "_")
        nib.save(nib.Nifti1Image(mask, np.eye(4)), path)
        return str(path), {}


@pytest.mark.parametrize("mixed", [False, True])
def test_masks_are_compared_with_a_lone_annotators(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mixed: bool,
) -> None:
    @contextmanager
    def server(_: Path):  # type: ignore[no-untyped-def]
        yield SimpleNamespace(address="nowhere", peak_memory_mib=lambda: 100.0)

    monkeypatch.setattr(Client, "folder", tmp_path, raising=False)
    monkeypatch.setattr(Client, "mixed", mixed)
    monkeypatch.setattr(script, "MONAILabelClient", Client)
    monkeypatch.setattr(script, "own_server", server)
    computing = {"model_version": "demo", "device": "cpu", "precision": "float32"}
    monkeypatch.setattr(script, "computing_of", {"nowhere": computing}.__getitem__)
    figures = tmp_path / "figures.json"
    assert script.main([*ARGUMENTS, "--json", str(figures)]) == int(mixed)
    record = json.loads(figures.read_text())
    for name, masks in (("different images", 6), ("one image", 6)):
        result = record["rounds"][name]
        assert result["masks"] == masks
        assert result["differing_masks"] == (masks if mixed else 0)
        assert result["next_s"]["count"] == 4
    assert record["computing"] == {"model_version": "demo", "device": "cpu", "precision": "float32"}
    said = capsys.readouterr().out
    assert "differ from a lone annotator's" in said
    assert "the server computed on cpu in float32, weights demo" in said


def test_clicks_lie_in_the_box(script: ModuleType) -> None:
    volume = script.generated_volume((24, 20, 12), 0)
    task = script.job("a", "study", volume, 4, np.random.default_rng(1))
    assert len(task.requests) == 5
    last = task.requests[-1]
    low, high = np.array(last["box"])
    points = np.array(last["foreground"] + last["background"])
    assert len(points) == 4
    assert ((points >= low) & (points <= high)).all()
    assert (high < (24, 20, 12)).all()
