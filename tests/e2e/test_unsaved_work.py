"""Work that no version holds yet: two series of a study, ways out of it, and a consensus on screen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from e2e.browser import PATIENCE_MS, Viewer
from e2e.conftest import SEEDS, Site, Study, store_case
from e2e.content import dice, middle, organ
from medvl_sam2.synthesis import generate_case

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.weights, pytest.mark.timeout(900)]


def versions(site: Site, series: str) -> list[dict[str, Any]]:
    reply = requests.get(f"{site.address}/medvl/labels", params={"image": series}, timeout=60).json()
    known: list[dict[str, Any]] = reply["versions"]
    return known


def votes(site: Site, series: str) -> dict[str, int]:
    """Every annotator's version that counts in the agreement."""
    reply = requests.get(f"{site.address}/medvl/labels/agreement", params={"image": series}, timeout=60).json()
    latest: dict[str, int] = reply["latest"]
    return latest


def question(viewer: Viewer) -> str:
    return viewer.panel.get_by_role("alertdialog").inner_text()


def asks_nothing(viewer: Viewer) -> bool:
    return viewer.panel.get_by_role("alertdialog").count() == 0


def show_series(viewer: Viewer, description: str) -> None:
    viewer.turn_to(description)
    viewer.wait()


def test_two_series_of_a_study(site: Site, viewer: Viewer, tmp_path: Path) -> None:
    """Masks, prompts, typed texts and what was automatic stay with their series; leaving asks, and saves them all."""
    case = generate_case(SEEDS["ben"])
    first = store_case(site.orthanc, tmp_path, "two", case)
    second = store_case(site.orthanc, tmp_path, "two", case, of=first)
    both = (first, second)
    viewer.open_from_list(first.study)
    viewer.type("Your name", "Dr. Ada")
    viewer.tab("Server")
    for study, name in ((first, "1 generated CT"), (second, "2 later CT")):
        assert name in viewer.panel.locator(f'[data-image="{study.series}"]').inner_text()
    viewer.tab("Segment")
    viewer.page.locator('[data-cy="side-panel-header-left"]').click()
    show_series(viewer, "generated CT")
    viewer.choose("spleen")
    viewer.press("This structure")
    spleen = viewer.mask("spleen")
    assert spleen.any()
    inside = middle(organ(first, "liver") & (first.lesions == 0))
    viewer.choose("liver")
    viewer.show(inside)
    viewer.press("+ Inside")
    viewer.click(inside)
    viewer.press("+ Inside")
    one = viewer.labelmap()[0]
    viewer.tab("Text")
    report = viewer.panel.get_by_label("Text (correct")
    viewer.type("Text (correct", "Typed, not stored.")
    viewer.tab("Save")
    viewer.type("Note", "about the first")
    viewer.tab("Segment")

    show_series(viewer, "later CT")
    viewer.tab("Text")
    assert report.input_value() == ""
    assert viewer.panel.get_by_text("Not stored either: generated CT").is_visible()
    viewer.tab("Save")
    assert viewer.panel.get_by_label("Note").input_value() == ""
    viewer.tab("Segment")
    other = f"medvl-{second.series}"
    assert not viewer.labelmap(other)[0].any()
    assert viewer.panel.get_by_label("Placed prompts").get_by_role("listitem").count() == 0
    kidney = middle(organ(second, "kidney_left"))
    viewer.choose("kidney_left")
    viewer.show(kidney)
    viewer.press("+ Inside")
    viewer.click(kidney)
    viewer.press("+ Inside")
    two = viewer.labelmap(other)[0]
    assert viewer.mask("kidney_left", other)[tuple(kidney)]
    np.testing.assert_array_equal(viewer.labelmap()[0], one)

    show_series(viewer, "generated CT")
    viewer.choose("spleen")
    viewer.press("This structure")
    assert asks_nothing(viewer), "nobody touched the automatic mask"
    np.testing.assert_array_equal(viewer.labelmap()[0], one, err_msg="the liver of a click is nobody's to take")
    viewer.choose("liver")
    viewer.press("Undo")
    assert not viewer.mask("liver").any()
    viewer.press("Redo")
    np.testing.assert_array_equal(viewer.labelmap()[0], one)
    viewer.tab("Text")
    assert report.input_value() == "Typed, not stored."

    show_series(viewer, "later CT")
    address = viewer.page.url
    viewer.page.locator('[data-cy="return-to-work-list"]').click()
    assert "generated CT, later CT" in question(viewer)
    assert "The text on generated CT is not stored" in question(viewer)
    viewer.press("Stay")
    viewer.page.evaluate("history.back()")
    assert "generated CT, later CT" in question(viewer)
    assert viewer.page.url == address
    viewer.picture("15-leaving")
    viewer.panel.get_by_role("button", name="Save first").click()
    viewer.page.locator(f'[data-cy="studyRow-{first.study}"]').wait_for(timeout=PATIENCE_MS)
    for study, mask, placed in ((first, one, "liver"), (second, two, "kidney_left")):
        (saved,) = versions(site, study.series)
        assert sum(item["voxels"] for item in saved["structures"]) == (mask > 0).sum()
        assert [item["structure"] for item in saved["prompts"]] == [placed]
        assert saved["note"] == ("about the first" if study is first else "")
    stored = [requests.get(f"{site.address}/medvl/texts", params={"image": one.series}, timeout=60) for one in both]
    assert [[item["text"] for item in reply.json()["versions"]] for reply in stored] == [["Typed, not stored."], []]
    viewer.open_from_list(first.study)
    assert not viewer.labelmap()[0].any()
    viewer.press("Open version 1")
    assert "Version 1 is on screen" in viewer.status
    assert viewer.panel.get_by_label("In words").is_visible(), "the tab is still Segment"
    assert (viewer.labelmap()[0] > 0).sum() in ((one > 0).sum(), (two > 0).sum())


def test_words_ask_before_they_replace(site: Site, viewer: Viewer) -> None:
    """What the annotator made is named and asked about, a second lesion joins the first, and undo brings all back."""
    study = site.studies["ann"]
    viewer.open_from_list(study.study)

    def say(words: str) -> None:
        viewer.choose("")
        viewer.type("In words", words)
        viewer.press("Segment")

    viewer.paint("lesion", [1, 1, 1])
    painted = viewer.labelmap()[0]
    say("the lesion in the liver")
    assert asks_nothing(viewer), "it lies elsewhere"
    second = viewer.mask("lesion 2")
    assert dice(second, study.lesions > 0) > 0.7, viewer.status
    assert viewer.mask("lesion")[1, 1, 1], "the first is as it was"
    viewer.press("Undo")
    np.testing.assert_array_equal(viewer.labelmap()[0], painted)
    viewer.press("Redo")
    np.testing.assert_array_equal(viewer.mask("lesion 2"), second)

    before = viewer.labelmap()[0]
    say("the liver")
    assert "Made or changed since the last automatic masks: lesion 2." in question(viewer)
    viewer.picture("17-words-ask")
    viewer.press("Cancel")
    np.testing.assert_array_equal(viewer.labelmap()[0], before)
    _words_for_a_chosen_structure(viewer, study)
    np.testing.assert_array_equal(viewer.labelmap()[0], before)
    say("the liver")
    viewer.press("Keep them")
    kept = viewer.labelmap()[0]
    np.testing.assert_array_equal(viewer.mask("lesion 2"), second)
    assert dice(viewer.mask("liver") | second, organ(study, "liver")) > 0.8
    assert "kept lesion 2" in viewer.status
    viewer.press("Undo")
    np.testing.assert_array_equal(viewer.labelmap()[0], before)
    say("the liver")
    viewer.press("Replace")
    assert viewer.mask("lesion 2").sum() < second.sum()
    viewer.press("Undo")
    np.testing.assert_array_equal(viewer.labelmap()[0], before)
    viewer.press("Redo")
    viewer.press("Undo")
    say("the liver")
    viewer.press("Keep them")
    np.testing.assert_array_equal(viewer.labelmap()[0], kept)
    say("the lesion in the liver")
    assert asks_nothing(viewer), "the lesion is the same, and the liver under it is not lost"

    hole = middle(viewer.mask("liver"))
    viewer.paint("spleen", hole)
    changed = viewer.labelmap()[0]
    viewer.choose("liver")
    viewer.press("Undo")
    assert "changed since the last step" in viewer.alert
    np.testing.assert_array_equal(viewer.labelmap()[0], changed)
    say("the liver")
    assert {"liver", "spleen"} <= set(re.split(r": |, |\. ", question(viewer).split("\n")[0]))
    viewer.press("Keep them")
    np.testing.assert_array_equal(viewer.labelmap()[0], changed)


def _words_for_a_chosen_structure(viewer: Viewer, study: Study) -> None:
    """They ask for the others, which a click on the answer leaves alone, too."""
    second = viewer.mask("lesion 2")
    viewer.choose("liver")
    viewer.type("In words", "the liver")
    viewer.press("Segment")
    assert "lesion 2" in question(viewer)
    viewer.press("Cancel")
    assert not viewer.mask("liver").any()
    viewer.press("Segment")
    viewer.press("Keep them")
    kept = viewer.labelmap()[0]
    assert dice(viewer.mask("liver"), organ(study, "liver") & ~second) > 0.8
    np.testing.assert_array_equal(viewer.mask("lesion 2"), second)
    inside = middle(viewer.mask("liver"))
    viewer.show(inside)
    viewer.press("+ Inside")
    viewer.click(inside)
    viewer.press("+ Inside")
    assert viewer.mask("liver")[tuple(inside)]
    np.testing.assert_array_equal(viewer.mask("lesion 2"), second)
    viewer.press("Undo")
    np.testing.assert_array_equal(viewer.labelmap()[0], kept)
    viewer.press("Undo")


def test_a_consensus_is_nobodys_own(site: Site, viewer: Viewer) -> None:
    """Whatever stores it unedited, it is a consensus; what is changed on it is asked about before it goes."""
    study = site.studies["ben"]
    viewer.open_from_list(study.study)
    viewer.tab("Save")
    for author, voxel in (("Dr. Ada", [1, 1, 1]), ("Dr. Ben", [2, 2, 2])):
        viewer.type("Your name", author)
        viewer.paint("liver", [0, 0, 0])
        viewer.paint("liver", voxel)
        viewer.press("Save")
    known = versions(site, study.series)
    viewer.press("Consensus")
    consensus = viewer.labelmap()[0]
    assert consensus[0, 0, 0] > 0
    viewer.press(f"Open version {known[-1]['version']}")
    assert asks_nothing(viewer), "what nobody made needs no saving"
    viewer.press("Consensus")
    viewer.paint("spleen", [5, 5, 5])
    changed = viewer.labelmap()[0]
    viewer.press("Put back what was here")
    assert "changed since the last version" in question(viewer)
    viewer.press("Stay")
    viewer.press("Accept the consensus")
    assert "The consensus was changed on screen" in question(viewer)
    viewer.press("Stay")
    np.testing.assert_array_equal(viewer.labelmap()[0], changed)
    assert versions(site, study.series) == known
    viewer.press("Accept the consensus")
    viewer.picture("16-changed-consensus")
    viewer.press("Drop and accept")
    np.testing.assert_array_equal(viewer.labelmap()[0], consensus)
    made = versions(site, study.series)
    assert [one["source"] for one in made[len(known) :]] == ["consensus-majority"]

    viewer.press("Consensus")
    viewer.paint("spleen", [5, 5, 5])
    viewer.press("Put back what was here")
    viewer.press("Without saving")
    np.testing.assert_array_equal(viewer.labelmap()[0], consensus)
    voted, made = votes(site, study.series), versions(site, study.series)
    viewer.press("Consensus")
    viewer.press("Save")
    assert viewer.panel.get_by_role("button", name="Accept the consensus").count() == 0
    viewer.press("Submit")
    viewer.press("Open version 1")
    viewer.press(f"Open version {made[-1]['version']}")
    viewer.press("Submit")
    stored = versions(site, study.series)[len(made) :]
    assert [one["status"] for one in stored] == ["draft", "submitted", "submitted"]
    assert {tuple(one["made_from"]) for one in stored} == {tuple(made[-1]["made_from"])}
    assert {one["source"] for one in stored} == {"consensus-majority"}
    assert votes(site, study.series) == voted, "Dr. Ben only looked at it"
    viewer.paint("spleen", [5, 5, 5])
    viewer.press("Submit")
    own = versions(site, study.series)[-1]
    assert (own["source"], own["made_from"]) == ("ohif", [])
    assert votes(site, study.series) == voted | {"Dr. Ben": own["version"]}, "edited by hand it is his own"
