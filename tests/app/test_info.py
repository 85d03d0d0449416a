"""``/info/`` says what both clients can read."""

from __future__ import annotations

import pytest

from app.conftest import Running
from medvl_sam2.vocabulary import CLASSES


def test_info_suits_both_clients(running: Running) -> None:
    info = running.client.get("/info/").json()
    assert "config" not in info  # Slicer would ask for an upgrade of the server
    assert info["labels"] == [*CLASSES, "object"]  # OHIF pushes to a list; no background
    assert {name: model["type"] for name, model in info["models"].items()} == {
        "medvl_interactive": "deepgrow",
        "medvl_semantic": "segmentation",
        "medvl_referring": "segmentation",
        "medvl_vqa": "segmentation",
        "medvl_report": "segmentation",
        "medvl_scribbles": "scribbles",
    }
    assert list(info["trainers"]) == ["medvl_sam2"]
    assert next(iter(info["strategies"])) == "uncertainty"
    assert set(info["strategies"]) == {"random", "first", "uncertainty"}
    assert set(info["scoring"]) == {"dice", "uncertainty"}
    assert info["datastore"]["total"] == 2


def test_label_values_are_contiguous_and_agree(running: Running) -> None:
    info = running.client.get("/info/").json()
    for name, model in info["models"].items():
        labels = model["labels"]
        if labels:
            assert sorted(labels.values()) == list(range(1, len(labels) + 1)), name
            assert all(info["labels"][value - 1] == label for label, value in labels.items()), name
        assert model["dimension"] == 3


def test_options_never_overwrite_prompts(running: Running) -> None:
    """Slicer applies options after the prompts, under the same keys."""
    info = running.client.get("/info/").json()
    reserved = {"label", "foreground", "background", "roi", "slice", "image", "model", *info["labels"]}
    for model in info["models"].values():
        assert not reserved & set(model["config"])
    saving = {"save_label": False, "label_tag": ["original", "final"]}
    assert info["models"]["medvl_semantic"]["config"] == {"classes": "", **saving}
    assert info["models"]["medvl_referring"]["config"] == {"prompt": "", **saving}
    assert info["models"]["medvl_vqa"]["config"] == {"question": ""}


def test_info_needs_no_weights(running: Running) -> None:
    running.client.get("/info/")
    assert running.predictors == []


def test_info_survives_a_failing_part(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    before = running.client.get("/info/").json()

    def fail() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(running.app.datastore(), "status", fail)
    response = running.client.get("/info/")
    assert response.status_code == 200
    assert response.json() == before


def test_bad_conf_names_the_value(start: object) -> None:
    from medvl_sam2.errors import ConfigError

    with pytest.raises(ConfigError, match="max_sessions 'many'"):
        start(max_sessions="many")  # type: ignore[operator]
