"""An annotator's day in OHIF with the companion panel: every step is asserted on voxels or on the DICOM server."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from e2e.browser import PATIENCE_MS, Viewer
from e2e.conftest import ORIGIN_Z, Site, Study, store_real_case
from e2e.content import dice, middle, newest, organ, segments, texts

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.weights, pytest.mark.timeout(900)]


def test_a_case_from_the_list_to_the_next(site: Site, viewer: Viewer) -> None:
    """Open, segment, prompt, correct, save, submit, look back, ask, report, go on."""
    study = site.studies["ann"]
    viewer.open_from_list(study.study)
    viewer.type("Your name", "Dr. Ada")
    viewer.picture("1-opened")

    _all_organs(viewer, study)
    _words(viewer, study)
    _clicks(viewer, study)
    _by_hand(viewer, study)
    _kept_by_all_organs(viewer)
    _save_and_submit(site, viewer, study)
    _look_back(site, viewer, study)
    _consensus(site, viewer, study)
    _ask(viewer, study)
    _report(site, viewer, study)
    _next_case(site, viewer)


def _all_organs(viewer: Viewer, study: Study) -> None:
    viewer.press("All organs")
    assert dice(viewer.mask("liver"), organ(study, "liver")) > 0.8
    assert dice(viewer.mask("spleen"), organ(study, "spleen")) > 0.8, "left and right, head and feet are in place"
    viewer.show(middle(organ(study, "liver")))
    viewer.picture("2-all-organs")
    made = viewer.labelmap()[0]
    viewer.press("Undo")
    assert not viewer.labelmap()[0].any()
    viewer.press("Redo")
    np.testing.assert_array_equal(viewer.labelmap()[0], made)


def _words(viewer: Viewer, study: Study) -> None:
    before = viewer.mask("spleen")
    viewer.choose("")
    viewer.type("In words", "segment the lesion in the liver")
    viewer.press("Segment")
    lesion = viewer.mask("lesion")
    assert dice(lesion, study.lesions > 0) > 0.7
    assert not (lesion & viewer.mask("liver")).any(), "the lesion lies on top of the liver"
    np.testing.assert_array_equal(viewer.mask("spleen"), before)
    assert abs(viewer.shown()[2] - middle(lesion)[2]) <= 1, "the viewer went there"
    viewer.type("In words", "the spleen")
    viewer.press("Segment")
    assert "Found spleen" in viewer.status
    np.testing.assert_array_equal(viewer.mask("lesion"), lesion, err_msg="nobody chose what the words before found")
    viewer.choose("lesion")
    assert viewer.panel.get_by_text("In words, for lesion").is_visible()
    viewer.picture("3-words")


def _clicks(viewer: Viewer, study: Study) -> None:
    """The second, smaller lesion becomes a structure of its own; undo and redo are exact."""
    inside = middle(study.lesions == 2)
    liver = organ(study, "liver") & (study.lesions == 0)
    liver[:, :, np.arange(liver.shape[2]) != inside[2]] = False
    outside = np.argwhere(liver)[np.abs(np.argwhere(liver) - inside).sum(1).argmax()]
    viewer.type("Name of another structure", "lesion 2")
    viewer.press("Add")
    before = viewer.labelmap()[0]
    viewer.show(inside)
    viewer.press("+ Inside")
    viewer.click(inside)
    clicked = viewer.labelmap()[0]
    assert viewer.mask("lesion 2")[tuple(inside)]
    viewer.press("− Outside")
    viewer.click(outside)
    corrected = viewer.labelmap()[0]
    assert not viewer.mask("lesion 2")[tuple(outside)]
    assert viewer.panel.get_by_label("Placed prompts").get_by_role("listitem").count() == 2
    viewer.picture("4-clicks")
    for step, expected in (("Undo", clicked), ("Undo", before), ("Redo", clicked), ("Redo", corrected)):
        viewer.press(step)
        np.testing.assert_array_equal(viewer.labelmap()[0], expected)
    viewer.paint("lesion 2", [1, 1, 1])
    painted = viewer.labelmap()[0]
    viewer.click(outside)
    np.testing.assert_array_equal(viewer.labelmap()[0], painted, err_msg="a mark from before goes alone")
    places = np.argwhere(liver)
    far = np.minimum(np.abs(places - inside).sum(1), np.abs(places - outside).sum(1))
    viewer.click(places[far.argmax()])
    again = viewer.labelmap()[0]
    steps = [("Undo", painted), ("Redo", again), ("Undo", painted), ("Undo", corrected)]
    for step, expected in steps:
        viewer.press(step)
        np.testing.assert_array_equal(viewer.labelmap()[0], expected, err_msg="what was painted between is a step too")
    viewer.press("− Outside")  # puts the tool away


def _by_hand(viewer: Viewer, study: Study) -> None:
    """The viewer's own brush paints the chosen structure, and the next click builds on what was painted."""
    viewer.choose("spleen")
    inside = middle(organ(study, "spleen"))
    viewer.show(inside)
    before = viewer.mask("spleen")
    spot = inside + np.array([0, 14, 0])
    viewer.press("Brush")
    viewer.drag(spot, spot + np.array([6, 0, 0]))
    viewer.wait()
    painted = viewer.mask("spleen")
    assert painted[tuple(spot)]
    assert (painted & ~before).sum() > 20
    assert not (before & ~painted).any()
    tools = {name: viewer.panel.get_by_role("button", name=name, exact=True) for name in ("Brush", "+ Inside")}
    viewer.page.locator('[data-cy="Zoom"]').first.click()
    assert tools["Brush"].get_attribute("aria-pressed") == "false", "OHIF's tool took its place"
    viewer.press("+ Inside")
    viewer.page.locator('[data-cy="Pan"]').first.click()
    assert tools["+ Inside"].get_attribute("aria-pressed") == "false", "no mark is placed where OHIF's tool is meant"
    viewer.page.locator('[data-cy="WindowLevel"]').first.click()
    viewer.press("+ Inside")
    viewer.click(inside)
    assert viewer.mask("spleen")[tuple(inside)]
    assert viewer.mask("spleen")[tuple(spot)], "what was painted by hand is not lost by a click elsewhere"
    viewer.press("+ Inside")
    viewer.picture("5-by-hand")


def _kept_by_all_organs(viewer: Viewer) -> None:
    """All organs asks before it replaces what was made since, in the panel; both answers do what they say."""
    by_hand, whole = viewer.mask("spleen"), viewer.labelmap()[0]
    viewer.press("All organs")
    question = viewer.panel.get_by_role("alertdialog", name="Replace masks")
    assert {"spleen", "lesion", "lesion 2"} <= set(re.split(r": |, |\. ", question.inner_text().split("\n")[0]))
    viewer.picture("5-asks-before-replacing")
    viewer.page.keyboard.press("Escape")
    assert not question.is_visible()
    np.testing.assert_array_equal(viewer.labelmap()[0], whole)
    made = {name: viewer.mask(name) for name in ("spleen", "lesion", "lesion 2")}
    viewer.press("All organs")
    viewer.press("Keep them")
    for name, mask in made.items():
        np.testing.assert_array_equal(viewer.mask(name), mask, err_msg=name)
    assert "kept" in viewer.status
    viewer.choose("spleen")
    whole, placed = viewer.labelmap()[0], viewer.panel.get_by_label("Placed prompts").get_by_role("listitem")
    assert placed.count() == 1
    viewer.press("This structure")
    viewer.press("Replace")
    assert (viewer.mask("spleen") != by_hand).any(), "the model's own again"
    assert placed.count() == 0, "it is no longer what the click made"
    assert not question.is_visible()
    viewer.press("Undo")
    np.testing.assert_array_equal(viewer.labelmap()[0], whole)
    assert placed.count() == 1


def _save_and_submit(site: Site, viewer: Viewer, study: Study) -> None:
    viewer.tab("Save")
    viewer.type("Note", "first look")
    before = site.orthanc.series("SEG")
    viewer.press("Save")
    assert "version 1" in viewer.status, viewer.alert
    assert site.orthanc.series("SEG") == before, "a draft does not leave this server"
    viewer.tab("Segment")
    viewer.choose("lesion 2")
    viewer.press("Clear")
    viewer.tab("Save")
    viewer.type("Note", "one lesion only, please check")
    viewer.press("Submit")
    assert "version 2" in viewer.status, viewer.alert
    _compare_with_dicom(site, viewer, study)
    newest_item = viewer.panel.get_by_label("Versions of this case").get_by_role("listitem").first
    assert "Version 2 submitted, final" in newest_item.inner_text()
    assert "Dr. Ada" in newest_item.inner_text()
    viewer.picture("6-submitted")


def _compare_with_dicom(site: Site, viewer: Viewer, study: Study) -> None:
    """The newest DICOM SEG holds what is on screen, voxel for voxel and name for name."""
    voxels, names = viewer.labelmap()
    seg = newest(site.orthanc, "SEG")
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == study.series
    stored = segments(seg, voxels.shape, ORIGIN_Z, study.spacing_z)
    assert set(stored) == {name for name, value in names.items() if (voxels == value).any()}
    for name, mask in stored.items():
        np.testing.assert_array_equal(mask, voxels == names[name], err_msg=name)


def _look_back(site: Site, viewer: Viewer, study: Study) -> None:
    second = viewer.labelmap()[0]
    viewer.press("Compare with 1")
    rows = viewer.panel.get_by_role("table").get_by_role("row").all_inner_texts()
    assert any(row.startswith("liver") and "1.000" in row for row in rows)
    assert any(row.startswith("lesion 2") and "0.000" in row for row in rows)
    viewer.press("Open version 1")
    assert viewer.mask("lesion 2").any()
    assert (viewer.labelmap()[0] != second).any()
    viewer.press("Restore version 1")
    known = requests.get(f"{site.address}/medvl/labels", params={"image": study.series}, timeout=60).json()
    assert known["final"] == 3
    assert known["versions"][2]["restored_from"] == 1
    assert known["versions"][1]["note"] == "one lesion only, please check"
    assert known["versions"][1]["prompts"], "what was clicked is on record"
    viewer.picture("7-history")
    viewer.type("Your name", "Dr. Ben")
    viewer.press("Submit")
    viewer.press("Agreement")
    table = viewer.panel.get_by_role("table", name="Agreement: Dr. Ada / Dr. Ben")
    rows = table.get_by_role("row").all_inner_texts()
    assert rows[1].startswith("lesion 2"), "what agrees least stands first"
    assert "0.000" in rows[1]
    assert any(row.startswith("liver") and "1.000" in row for row in rows)
    viewer.picture("7-agreement")
    viewer.type("Your name", "Dr. Ada")


def _consensus(site: Site, viewer: Viewer, study: Study) -> None:
    """Looked at, put back, looked at again and accepted: then it is a version, and not before."""

    def known() -> list[dict[str, Any]]:
        reply = requests.get(f"{site.address}/medvl/labels", params={"image": study.series}, timeout=60).json()
        versions: list[dict[str, Any]] = reply["versions"]
        return versions

    before, count = viewer.labelmap()[0], len(known())
    viewer.press("Consensus")
    rows = viewer.panel.get_by_role("table", name="Dr. Ada / Dr. Ben").get_by_role("row").all_inner_texts()
    assert any(row.startswith("liver") for row in rows)
    assert viewer.mask("liver").any()
    assert len(known()) == count, "nothing is stored by looking"
    viewer.picture("7-consensus")
    viewer.press("Put back what was here")
    np.testing.assert_array_equal(viewer.labelmap()[0], before)
    viewer.press("Consensus")
    shown, names = viewer.labelmap()
    viewer.press("Accept the consensus")
    made = known()[-1]
    assert (len(known()), made["source"], made["author"]) == (count + 1, "consensus-majority", "Dr. Ada")
    assert made["made_from"] == [2, 4]
    sizes = {one["name"]: one["voxels"] for one in made["structures"]}
    assert sizes == {name: int((shown == value).sum()) for name, value in names.items() if (shown == value).any()}
    viewer.picture("7-consensus-accepted")


def _ask(viewer: Viewer, study: Study) -> None:
    """Answers are a choice the question allows, the true one of the study, and rest on the true structures."""
    viewer.tab("Text")
    for question in ("Is the heart visible?", "is there a lesion in the liver?"):
        truth = next(item for item in study.questions if item.question.lower() == question.lower())
        viewer.type("Question", question)
        viewer.press("Ask")
        answer = viewer.panel.get_by_label("Answer").input_value().strip()
        assert answer in truth.choices
        assert answer == truth.answer.split(". ")[1]
    viewer.type("Answer", "cannot be said")
    viewer.press("Ask")
    assert "The answer was changed and not stored" in viewer.panel.get_by_role("alertdialog").inner_text()
    viewer.press("Replace it")
    assert viewer.panel.get_by_label("Answer").input_value().strip() == answer
    viewer.picture("8-answer")
    chips = viewer.panel.locator("[data-evidence]:not([disabled])")
    names = [str(chip.get_attribute("data-evidence")) for chip in chips.all()]
    assert "liver" in names
    for name in names:
        viewer.panel.locator(f'[data-evidence="{name}"]:not([disabled])').first.click()
        viewer.wait()
        shown = viewer.mask(name, "medvl-evidence")
        lesions = [study.lesions == number for number in range(1, study.lesions.max() + 1)]
        truly = [organ(study, "liver")] if name == "liver" else lesions
        assert max(dice(shown, mask) for mask in truly) > 0.5, name
        assert organ(study, "liver")[shown].mean() > 0.8, f"{name} lies in the liver"
    viewer.press("Hide the evidence")


def _report(site: Site, viewer: Viewer, study: Study) -> None:
    viewer.press("Draft a report")
    draft = viewer.panel.get_by_label("Text (correct").input_value()
    assert "liver" in draft
    label = viewer.labelmap()[0]
    chip = viewer.panel.get_by_label("Sentences and").locator('[data-evidence="liver"]:not([disabled])').first
    before = viewer.colours()
    chip.click()
    viewer.wait()
    evidence = viewer.mask("liver", "medvl-evidence")
    assert dice(evidence, organ(study, "liver")) > 0.7
    assert viewer.colours() == before, "no structure changed its colour"
    assert evidence[:, :, round(viewer.shown()[2])].any(), "the viewer went to it"
    np.testing.assert_array_equal(viewer.labelmap()[0], label)
    viewer.picture("9-evidence")
    chip.click()
    assert not viewer.panel.get_by_role("button", name="Hide the evidence").is_visible(), "a second click hides it"
    corrected = f"{draft} Corrected by the annotator."
    viewer.type("Text (correct", corrected)
    viewer.press("Draft a report")
    assert "changed and not stored" in viewer.panel.get_by_role("alertdialog").inner_text()
    viewer.press("Keep it")
    viewer.press("Store the report")
    assert "DICOM SR" in viewer.status, viewer.alert
    report = newest(site.orthanc, "SR")
    assert report.StudyInstanceUID == study.study
    assert "Corrected by the annotator." in texts(report)
    viewer.picture("10-report")


def _next_case(site: Site, viewer: Viewer) -> None:
    """The first by name without a final label: ``ben``, or what another test left, which is of the same size."""
    cases = requests.get(f"{site.address}/medvl/cases", timeout=60).json()
    first = min((case for case in cases if not case["labelled"]), key=lambda case: case["image"])
    viewer.panel.get_by_label("How the next case is chosen").select_option("first")
    viewer.panel.get_by_role("button", name="Next case", exact=True).click()
    viewer.page.wait_for_url(f"**StudyInstanceUIDs={first['StudyInstanceUID']}*", timeout=PATIENCE_MS)
    viewer.wait_for_image()
    assert viewer.labelmap()[0].shape == site.studies["ben"].organs.shape
    assert not viewer.labelmap()[0].any()
    viewer.picture("11-next-case")


def test_what_goes_wrong_is_said(site: Site, viewer: Viewer) -> None:
    """Reasons of the server reach the annotator, and the panel stays usable."""
    viewer.open_from_list(site.studies["ben"].study)
    viewer.tab("Save")
    viewer.press("Submit")
    assert "your name" in viewer.alert
    viewer.type("Your name", "Dr. Ben")
    viewer.press("Submit")
    assert "no mask yet" in viewer.alert
    viewer.tab("Segment")
    viewer.press("Segment")
    assert "Type what to segment" in viewer.alert
    _no_room(viewer)
    viewer.press("− Outside")
    viewer.show([30, 30, 12])
    viewer.click([30, 30, 12])
    assert "only background points" in viewer.alert, "the server's reason"
    viewer.page.mouse.click(*viewer.place([30, -8, 12]))
    assert "outside the image" in viewer.alert
    viewer.press("− Outside")
    with ThreadPoolExecutor() as others:
        address, image = f"{site.address}/infer/medvl_semantic", site.studies["ann"].series
        others.submit(requests.post, address, params={"image": image, "output": "json"}, timeout=300)
        end = time.monotonic() + PATIENCE_MS / 1000
        while not requests.get(f"{site.address}/medvl/jobs", timeout=60).json()["inference"]:
            assert time.monotonic() < end, "the other client's request never showed"
            time.sleep(0.05)
        viewer.panel.get_by_role("button", name="All organs", exact=True).click()
        viewer.panel.get_by_text("number 1 in the queue").wait_for()
        viewer.picture("12-queue")
        viewer.panel.get_by_role("button", name="Stop waiting").click()
        viewer.wait()
    assert viewer.panel.get_by_role("button", name="All organs", exact=True).is_enabled()
    assert not viewer.labelmap()[0].any()
    viewer.picture("12-reasons")
    viewer.panel.get_by_role("button", name="Close the MedVL-SAM2 panel").click()
    viewer.picture("13-collapsed")
    viewer.panel.get_by_role("button", name="Open the MedVL-SAM2 panel").click()


def _no_room(viewer: Viewer) -> None:
    """For one more structure in the label map."""
    segment = "window.services.segmentationService.addSegment('1', { segmentIndex: 254, label: 'the last' })"
    viewer.page.evaluate(segment)
    viewer.type("Name of another structure", "one more")
    viewer.press("Add")
    assert "one more was not added: the label map is full" in viewer.alert
    viewer.page.evaluate("window.services.segmentationService.removeSegment('1', 254)")


def test_a_study_that_does_not_load(site: Site, viewer: Viewer) -> None:
    """OHIF stays empty; the panel says why, and loads it once it can be had."""
    study = site.studies["ben"].study
    viewer.page.route("**/metadata", lambda route: route.fulfill(status=502, json={"detail": "it is away"}))
    viewer.page.goto(f"{site.address}/ohif/monai-label?StudyInstanceUIDs={study}", wait_until="domcontentloaded")
    viewer.panel.get_by_text("The DICOM server does not answer (502: it is away)").wait_for()
    viewer.picture("19-study-not-loaded")
    viewer.page.unroute("**/metadata")
    viewer.panel.get_by_role("button", name="Load again").click()
    viewer.wait_for_image()
    viewer.panel.locator(".case", has_text="generated CT").wait_for()
    assert viewer.panel.get_by_role("button", name="Load again").count() == 0


@pytest.mark.shared_data
def test_a_real_ct(site: Site, viewer: Viewer, shared_data: Path, tmp_path: Path) -> None:
    """A real abdomen, whose pictures stand in README; the masks beside it are another model's output."""
    study = store_real_case(site.orthanc, tmp_path, shared_data / "ts_ct_wholeabdomen_3mm")
    viewer.open_from_list(study.study)
    viewer.type("Your name", "Dr. Ada")
    viewer.choose("")
    viewer.type("In words", "the liver")
    viewer.press("Segment")
    assert dice(viewer.mask("liver"), study.organs == 5) > 0.85, "TotalSegmentator's liver is 5, as ours"
    kidney = middle(study.organs == 2)
    viewer.choose("kidney_right")
    viewer.show(kidney)
    viewer.press("▭ Box")
    there = np.argwhere((study.organs == 2)[:, :, kidney[2]])
    viewer.drag([*there.min(0) - 1, kidney[2]], [*there.max(0) + 1, kidney[2]])
    viewer.wait()
    viewer.press("+ Inside")
    viewer.click(kidney)
    assert dice(viewer.mask("kidney_right"), study.organs == 2) > 0.6
    viewer.press("+ Inside")
    viewer.picture("30-real-ct-segment")
    viewer.tab("Text")
    viewer.press("Draft a report")
    viewer.panel.get_by_label("Sentences and").locator('[data-evidence="liver"]:not([disabled])').first.click()
    viewer.wait()
    assert viewer.mask("liver", "medvl-evidence").any()
    viewer.picture("31-real-ct-report")
