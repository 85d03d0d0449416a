"""What belongs to one series of a study never reaches another, whenever it is answered or pressed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from playwright.sync_api import Locator, Route

from e2e.browser import Viewer
from e2e.conftest import SEEDS, Site, Study, store_case
from e2e.test_unsaved_work import asks_nothing, votes
from medvl_sam2.synthesis import generate_case

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.weights, pytest.mark.timeout(900)]

VERSION_BUTTON = re.compile("(Open|Restore) version|Compare with|Agreement|Consensus")


@pytest.fixture
def both(site: Site, viewer: Viewer, tmp_path: Path) -> tuple[Study, Study]:
    """Two series on one grid: one version of the first, two of the second, which is on screen with the tab Save."""
    case = generate_case(SEEDS["ben"])
    first = store_case(site.orthanc, tmp_path, "other", case)
    second = store_case(site.orthanc, tmp_path, "other", case, of=first)
    viewer.open_from_list(first.study)
    viewer.type("Your name", "Dr. Ada")
    viewer.page.locator('[data-cy="side-panel-header-left"]').click()
    viewer.tab("Save")
    viewer.turn_to("generated CT")
    viewer.wait()
    viewer.paint("liver", [1, 1, 1])
    viewer.press("Save")
    viewer.turn_to("later CT")
    viewer.wait()
    for voxel in ([2, 2, 2], [3, 3, 3]):
        viewer.paint("spleen", voxel, f"medvl-{second.series}")
        viewer.press("Save")
    assert [len(_stored(site, study)) for study in (first, second)] == [1, 2]
    return first, second


def _stored(site: Site, study: Study) -> list[dict[str, Any]]:
    reply = requests.get(f"{site.address}/medvl/labels", params={"image": study.series}, timeout=60).json()
    known: list[dict[str, Any]] = reply["versions"]
    return known


def _history(viewer: Viewer) -> Locator:
    return viewer.panel.get_by_label("Versions of this case").get_by_role("listitem")


def _titles(viewer: Viewer) -> list[str]:
    return [text.split("\n")[0] for text in _history(viewer).all_inner_texts()]


def _on_list(viewer: Viewer, study: Study, act: Any) -> str:
    """``act(route)`` when the versions of a series are read; returns what ``unroute`` needs."""

    def handle(route: Route) -> None:
        if route.request.method == "GET":
            act(route)
        else:
            route.fallback()

    address = f"**/medvl/labels?image={study.series}"
    viewer.page.route(address, handle)
    return address


def test_a_history_that_is_not_read(site: Site, viewer: Viewer, both: tuple[Study, Study]) -> None:
    """No button of the series before is left when the new list fails or hangs, and one that is kept does nothing."""
    first, second = both
    names = ("Open version 1", "Restore version 1", "Compare with 1")
    kept = [viewer.panel.get_by_role("button", name=name).first.element_handle() for name in names]
    stored = [_stored(site, study) for study in both]
    masks = [viewer.labelmap(one)[0] for one in ("1", f"medvl-{second.series}")]

    address = _on_list(viewer, first, lambda route: route.fulfill(status=500, json={"detail": "out of order"}))
    viewer.turn_to("generated CT")
    viewer.wait()
    assert "out of order" in viewer.alert
    assert _history(viewer).all_inner_texts() == ["not read yet", "Read the versions again"]
    assert viewer.panel.get_by_role("button", name=VERSION_BUTTON).count() == 0
    viewer.picture("18-history-not-read")
    for button in kept:
        button.evaluate("button => button.click()")
        viewer.wait()
        assert "no longer on screen" in viewer.alert
        viewer.press("Dismiss the message")
    assert [_stored(site, study) for study in both] == stored
    for one, mask in zip(("1", f"medvl-{second.series}"), masks, strict=True):
        np.testing.assert_array_equal(viewer.labelmap(one)[0], mask)
    viewer.page.unroute(address)
    viewer.press("Read the versions again")
    assert _titles(viewer) == ["Version 1 draft"]

    held: list[Route] = []
    _on_list(viewer, second, held.append)
    viewer.turn_to("later CT")
    viewer.until(lambda: len(held) == 1)
    assert _history(viewer).all_inner_texts() == ["not read yet"]
    assert viewer.panel.get_by_role("button", name=VERSION_BUTTON).count() == 0
    viewer.turn_to("generated CT")  # the panel follows the viewer whatever hangs
    viewer.wait()
    assert _history(viewer).count() == 1

    viewer.paint("liver", [2, 1, 1])
    address = _on_list(viewer, first, lambda route: route.fulfill(status=500, json={"detail": "out of order"}))
    viewer.press("Save")
    assert viewer.status == "Saved as version 2; the list of versions could not be read: out of order"
    assert viewer.alert == ""
    assert len(_stored(site, first)) == 2
    viewer.page.unroute(address)
    viewer.press("Read the versions again")
    assert _titles(viewer) == ["Version 2 draft", "Version 1 draft"]
    viewer.page.locator('[data-cy="return-to-work-list"]').click()
    viewer.page.locator(f'[data-cy="studyRow-{first.study}"]').wait_for()  # all is saved: nothing is asked


def test_a_consensus_that_is_shown_again(site: Site, viewer: Viewer, both: tuple[Study, Study]) -> None:
    """Another series on screen meanwhile makes it nobody's own work; an edit after that does."""
    _, second = both
    viewer.type("Your name", "Dr. Ben")
    viewer.paint("spleen", [4, 4, 4], f"medvl-{second.series}")
    viewer.press("Save")
    voted = votes(site, second.series)
    viewer.press("Consensus")
    consensus = viewer.labelmap(f"medvl-{second.series}")[0]
    for series in ("generated CT", "later CT"):
        viewer.turn_to(series)
        viewer.wait()
    np.testing.assert_array_equal(viewer.labelmap(f"medvl-{second.series}")[0], consensus)
    viewer.press("Submit")
    assert "The consensus is submitted" in viewer.status
    assert _stored(site, second)[-1]["source"] == "consensus-majority"
    assert votes(site, second.series) == voted
    viewer.paint("spleen", [5, 5, 5], f"medvl-{second.series}")
    viewer.press("Submit")
    own = _stored(site, second)[-1]
    assert (own["source"], votes(site, second.series)["Dr. Ben"]) == ("ohif", own["version"])


def test_a_history_that_comes_late(site: Site, viewer: Viewer, both: tuple[Study, Study]) -> None:
    """What a save reads of its own series leaves the list of the one on screen alone, also when nothing is found."""
    first, second = both
    address = _on_list(viewer, second, lambda route: held.append(route))
    held: list[Route] = []
    viewer.panel.get_by_role("button", name="Save", exact=True).click()
    viewer.until(lambda: len(held) == 1)
    assert len(_stored(site, second)) == 3
    viewer.turn_to("generated CT")
    _history(viewer).filter(has_text="Version 1").wait_for()
    held[0].fulfill(status=404, json={"detail": "no such image"})
    viewer.wait()
    assert _titles(viewer) == ["Version 1 draft"]
    viewer.page.unroute(address)
    assert viewer.status == "Saved as version 3 of later CT"
    viewer.press("Open version 1")
    assert asks_nothing(viewer), "it was saved before the other series was on screen"
    assert "Version 1 is on screen" in viewer.status
    assert viewer.labelmap()[0][1, 1, 1]
    assert not viewer.labelmap()[0][2, 2, 2]
    assert {item["name"] for item in _stored(site, first)[0]["structures"]} == {"liver"}


def test_what_is_painted_while_it_is_saved_stays(site: Site, viewer: Viewer, both: tuple[Study, Study]) -> None:
    """*Save first* leaves no study whose masks changed after they were sent."""
    _, second = both
    masks = f"medvl-{second.series}"
    viewer.paint("spleen", [4, 4, 4], masks)
    held: list[Route] = []
    address = _on_list(viewer, second, held.append)
    viewer.page.locator('[data-cy="return-to-work-list"]').click()
    viewer.panel.get_by_role("button", name="Save first").click()
    viewer.until(lambda: len(held) == 1)
    viewer.paint("spleen", [5, 5, 5], masks)
    held[0].continue_()
    viewer.page.unroute(address)
    viewer.wait()
    assert "changed while they were saved" in viewer.alert
    assert viewer.labelmap(masks)[0][5, 5, 5]
    viewer.press("Save")
    viewer.page.locator('[data-cy="return-to-work-list"]').click()
    viewer.page.locator(f'[data-cy="studyRow-{second.study}"]').wait_for()
    voxels = [sum(item["voxels"] for item in version["structures"]) for version in _stored(site, second)]
    assert voxels == [1, 2, 3, 4]
