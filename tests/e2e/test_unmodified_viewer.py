"""What MONAI Label's own panel in OHIF offers still works, with the companion panel closed and never used."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import requests

from e2e.browser import PATIENCE_MS, Viewer
from e2e.conftest import Site
from e2e.test_panel import dice, middle, newest, organ

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.weights, pytest.mark.timeout(900)]


def connect(viewer: Viewer) -> None:
    """Close the companion panel, open MONAI Label's, and connect it."""
    page = viewer.page
    viewer.panel.get_by_role("button", name="Close the MedVL-SAM2 panel").click()
    page.locator(
        '[data-cy="panelSegmentation-btn"], [data-cy="monailabel-btn"], [data-cy="undefined-btn"]'
    ).last.click()
    page.locator("#monailabelServerURL").fill(viewer.address)
    page.locator("#monailabelServerURL >> xpath=ancestor::tr >> button.actionButton").click()
    page.get_by_text("Options / Configurations").wait_for()


def set_options(viewer: Viewer, model: str, values: Mapping[str, str | bool]) -> None:
    """Through the Options dialog."""
    page = viewer.page
    page.get_by_text("Options / Configurations").click()
    page.locator('.optionsForm select[name="selectSection"]').select_option("infer")
    page.locator('.optionsForm select[name="selectName"]').select_option(model)
    for name, value in values.items():
        row = page.locator(".optionsForm tr", has_text=name).last
        if isinstance(value, bool):
            row.locator('input[type="checkbox"]').set_checked(value)
        elif row.locator("select").count():
            row.locator("select").select_option(value)
        else:
            row.locator("input").fill(value)
    page.get_by_role("button", name="Confirm", exact=True).click()


def run(viewer: Viewer, model: str) -> None:
    """Auto-Segmentation with a model."""
    page = viewer.page
    page.locator('label[for="tab-2"]').click()
    page.locator(".modelSelector select").first.select_option(model)
    with page.expect_response(lambda reply: f"/infer/{model}" in reply.url, timeout=PATIENCE_MS) as reply:
        page.locator('button[title="Run Segmentation"]').click()
    assert reply.value.ok
    page.wait_for_timeout(3000)  # the viewer pastes without telling anybody


def test_words_through_options_and_saving_by_an_option(site: Site, viewer: Viewer) -> None:
    study = site.studies["ann"]
    viewer.open_from_list(study.study)
    connect(viewer)
    set_options(viewer, "medvl_referring", {"prompt": "the liver", "save_label": True, "label_tag": "final"})
    run(viewer, "medvl_referring")
    liver = viewer.mask("liver")
    assert dice(liver, organ(study, "liver")) > 0.8
    known = requests.get(f"{site.address}/medvl/labels", params={"image": study.series}, timeout=60).json()
    saved = known["versions"][-1]
    assert known["final"] == saved["version"]
    assert [(one["name"], one["voxels"]) for one in saved["structures"]] == [("liver", int(liver.sum()))]
    seg = newest(site.orthanc, "SEG")
    assert [str(item.SegmentLabel) for item in seg.SegmentSequence] == ["liver"]
    viewer.picture("20-words-through-options")


def test_point_prompts(site: Site, viewer: Viewer) -> None:
    study = site.studies["ann"]
    inside = middle(organ(study, "spleen"))
    viewer.open_from_list(study.study)
    connect(viewer)
    page = viewer.page
    page.locator('label[for="tab-3"]').click()
    page.locator('.optionsTable tr.clickable-row:has-text("spleen")').last.click()
    viewer.show(inside)
    page.wait_for_timeout(500)
    viewer.drag(inside, inside)
    page.wait_for_timeout(1000)  # the viewer waits for a second click before it believes the first
    with page.expect_response(lambda reply: "/infer/medvl_interactive" in reply.url, timeout=PATIENCE_MS) as reply:
        page.locator('button[title="Run PointPrompts"]').click()
    assert reply.value.ok
    page.wait_for_timeout(3000)
    spleen = viewer.mask("spleen")
    assert spleen[tuple(inside)]
    assert dice(spleen, organ(study, "spleen")) > 0.6
    np.testing.assert_array_equal(viewer.labelmap()[0] > 0, spleen)
    viewer.picture("21-point-prompts")
