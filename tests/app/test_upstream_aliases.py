"""``--conf upstream_aliases true``: our tasks under the names of MONAI Label's radiology app."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from app.conftest import Running
from app.test_infer import _nrrd
from lib.configs.upstream_aliases import INFER_ALIASES, TRAIN_ALIASES
from medvl_sam2.vocabulary import CLASSES


def test_aliases_are_offered_on_request_only(start: Callable[..., Running]) -> None:
    info = start().client.get("/info/").json()
    assert not set(INFER_ALIASES) & set(info["models"])
    assert list(info["trainers"]) == ["medvl_sam2"]
    info = start(upstream_aliases="true").client.get("/info/").json()
    assert set(INFER_ALIASES) < set(info["models"])
    assert set(TRAIN_ALIASES) < set(info["trainers"])
    assert next(iter(info["models"])) == "medvl_interactive"  # ours stay first


def test_an_alias_answers_as_its_task(start: Callable[..., Running]) -> None:
    running = start(upstream_aliases="true")
    values, _ = _nrrd(running.infer("segmentation_spleen", output="image").content)
    assert set(np.unique(values)) == {0, CLASSES.index("spleen") + 1}
    values, _ = _nrrd(running.infer("segmentation_spleen", output="image", classes="liver").content)
    assert set(np.unique(values)) == {0, CLASSES.index("liver") + 1}
    values, _ = _nrrd(running.infer("deepgrow_pipeline", output="image", foreground=[[1, 2, 3]]).content)
    assert np.argwhere(values).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("alias", ["segmentation_spleen", "deepedit"])
def test_an_alias_that_is_off_is_unknown(running: Running, alias: str) -> None:
    assert running.infer(alias).status_code == 404
