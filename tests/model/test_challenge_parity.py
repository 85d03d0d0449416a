"""Against the challenge's own code, run here and not copied: MEDVL_CHALLENGE_CODE names a checkout of it.

The repository is JunMa11/CVPR-MedSegFMCompetition on GitHub.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from challenge_reference import run_reference, write_case
from medvl_sam2.evaluation.challenge.case import case_from_npz, drawn_boxes
from medvl_sam2.evaluation.challenge.container import predict_file
from medvl_sam2.evaluation.challenge.loop import run_case
from medvl_sam2.evaluation.controls import ShapeControl
from medvl_sam2.training import clicks
from medvl_sam2.types import Prompt, Volume


@pytest.fixture(scope="module")
def code() -> Path:
    named = os.environ.get("MEDVL_CHALLENGE_CODE")
    if not named:
        pytest.skip("set MEDVL_CHALLENGE_CODE to a checkout of the challenge's repository to compare with its scripts")
    folder = Path(named)
    if not (folder / "CVPR25_iter_eval.py").is_file():
        pytest.fail(f"MEDVL_CHALLENGE_CODE={named} holds no CVPR25_iter_eval.py; point it at the checkout")
    return folder


class Rough(ShapeControl):
    """The shape control with holes and rims that follow from the prompt alone: many errors of many sizes."""

    def segment(self, opened: object, prompt: Prompt, name: str = "object") -> np.ndarray:
        assert isinstance(opened, Volume)
        base = super().segment(super().open(opened), prompt)
        rng = np.random.default_rng([int(name.split()[0]), *prompt.points.astype(int).ravel().tolist()])
        field = ndimage.gaussian_filter(rng.standard_normal(base.shape).astype(np.float32), 1.5)
        return base ^ (ndimage.binary_dilation(base, iterations=2) & (field > 0.12))

    def open(self, volume: Volume) -> Volume:  # type: ignore[override]
        return volume


def make_cases(folder: Path) -> None:
    folder.mkdir()
    for number, (shape, spacing) in enumerate(
        [((22, 40, 31), (3.0, 0.7, 0.8)), ((35, 24, 44), (0.5, 2.0, 1.25)), ((28, 33, 26), (1.0, 1.0, 5.0))]
    ):
        rng = np.random.default_rng(number)
        labels = np.zeros(shape, dtype=np.uint8)
        for value in range(1, number + 2):
            field = ndimage.gaussian_filter(rng.standard_normal(shape), 3)
            labels[field > np.quantile(field, 0.9)] = value
        image = np.clip(60.0 * labels + rng.normal(60, 20, shape), 0, 255).astype(np.uint8)
        boxes = None if number == 1 else drawn_boxes(labels, number + 1)
        write_case(folder / f"case{number}.npz", image, labels, spacing, boxes)


@pytest.mark.slow
@pytest.mark.parametrize("large", [None, 3000])
def test_clicks_and_scores_equal_the_script(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int | None
) -> None:
    make_cases(tmp_path / "cases")
    work, engine = tmp_path / "run", Rough()
    work.mkdir()
    reference = run_reference(code, tmp_path / "cases", work, lambda a, b: predict_file(engine, a, b), large)
    if large is not None:
        monkeypatch.setattr(clicks, "LARGE_CROP_VOXELS", large)
    assert sorted(reference.rows) == ["case0", "case1", "case2"]
    for name, row in reference.rows.items():
        curve = run_case(engine, case_from_npz(tmp_path / "cases" / f"{name}.npz"))
        for step in curve.steps:
            assert step.scores.mean_dsc == row[f"DSC_{step.number + 1}"]
            assert step.scores.mean_nsd == row[f"NSD_{step.number + 1}"]
        totals = (curve.dsc_auc, curve.nsd_auc, curve.final.mean_dsc, curve.final.mean_nsd)
        assert totals == (row["DSC_AUC"], row["NSD_AUC"], row["DSC_Final"], row["NSD_Final"])
        for ours, theirs in zip(curve.clicks, reference.requests[name][-1]["clicks"], strict=True):
            for kind, label in (("fg", 1), ("bg", 0)):
                assert [list(click.position) for click in ours if click.label == label] == theirs[kind]


def test_boxes_equal_the_script(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse((code / "get_boxes.py").read_text(encoding="utf-8"))
    wanted = {"mask2D_to_bbox", "mask3D_to_bbox"}
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    script: dict[str, object] = {"np": np}
    exec(compile(tree, "get_boxes.py", "exec"), script)
    draw = script["mask3D_to_bbox"]
    assert callable(draw)
    rng = np.random.default_rng(4)
    for shape in ((20, 300, 270), (14, 512, 640), (9, 700, 260)):
        field = ndimage.gaussian_filter(rng.standard_normal(shape), (2, 9, 9))
        labels = np.digitize(field, np.quantile(field, [0.9, 0.95, 0.98])).astype(np.uint8)
        monkeypatch.setattr(np.random, "randint", np.random.RandomState(2025).randint)
        for value, box in enumerate(drawn_boxes(labels, 3), start=1):
            theirs = draw(labels == value, "case")
            names = (("z_min", "z_mid_y_min", "z_mid_x_min"), ("z_max", "z_mid_y_max", "z_mid_x_max"))
            assert box.tolist() == [[int(theirs[name]) for name in corner] for corner in names]
