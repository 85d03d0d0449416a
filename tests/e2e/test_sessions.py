"""Requests that overlap, are stopped or come from two tabs: the panel and the server agree on what stands."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from playwright.sync_api import Page, Route

from e2e.browser import Requests, Viewer
from e2e.conftest import Site
from e2e.content import middle, organ

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.weights, pytest.mark.timeout(900)]


def test_what_happens_during_a_request(site: Site, viewer: Viewer) -> None:
    """Clicks placed while another is asked for count, each with a step of undo; hand edits are never pasted over."""
    study = site.studies["ann"]
    viewer.open_from_list(study.study)
    liver = organ(study, "liver") & (study.lesions == 0)
    inside = middle(liver)
    layer = np.argwhere(liver[:, :, inside[2]])
    other = np.array([*layer[np.abs(layer - inside[:2]).sum(1).argmax()], inside[2]])
    held: list[Route] = []
    address = re.compile("/infer/medvl_interactive")

    def sent(number: int) -> None:
        viewer.until(lambda: len(held) >= number)

    def release(number: int) -> None:
        sent(number)
        held[number - 1].continue_()

    viewer.choose("liver")
    viewer.show(inside)
    viewer.press("+ Inside")
    viewer.page.route(address, lambda route: held.append(route))
    viewer.page.mouse.click(*viewer.place(inside))
    viewer.page.mouse.click(*viewer.place(other))
    viewer.paint("spleen", [0, 0, 0])
    placed = viewer.panel.get_by_label("Placed prompts").get_by_role("listitem")
    placed.nth(1).wait_for()
    release(1)
    sent(2)
    clicked = viewer.mask("liver")
    release(2)
    viewer.wait()
    both = viewer.mask("liver")
    assert both[tuple(inside)]
    assert both[tuple(other)]
    assert viewer.mask("spleen")[0, 0, 0], "another structure was painted meanwhile"
    viewer.page.unroute(address)

    lost: list[int] = []
    viewer.page.route(address, lambda route: lost.append(route.fetch().status))  # the server answers, nobody hears it
    viewer.panel.get_by_role("button", name="Undo", exact=True).click()
    viewer.until(lambda: lost == [200])
    viewer.press("Stop waiting")
    np.testing.assert_array_equal(viewer.mask("liver"), both)
    viewer.page.unroute(address)
    for step, expected in (("Undo", clicked), ("Redo", both)):
        viewer.press(step)
        np.testing.assert_array_equal(viewer.mask("liver"), expected, err_msg="a step that was stopped counts nowhere")

    held.clear()
    viewer.page.route(address, lambda route: held.append(route))
    viewer.panel.get_by_role("button", name="Undo", exact=True).click()
    viewer.paint("liver", [1, 0, 0])
    painted = viewer.mask("liver")
    assert (painted & ~both).sum() == 1
    release(1)
    viewer.wait()
    assert "changed by hand meanwhile" in viewer.alert
    np.testing.assert_array_equal(viewer.mask("liver"), painted)
    assert placed.count() == 2, "no step back was shown, so none was taken"
    viewer.page.unroute(address)
    viewer.click(other)  # on the mark of the click before, which goes
    np.testing.assert_array_equal(viewer.mask("liver"), painted)
    viewer.click(other)
    assert viewer.mask("liver")[1, 0, 0], "the next click builds on what is on screen"
    before = viewer.labelmap()[0]
    viewer.press("Clear")
    assert set(np.unique(viewer.labelmap()[0])) == {0, viewer.labelmap()[1]["spleen"]}
    assert placed.count() == 0
    viewer.press("Undo")
    np.testing.assert_array_equal(viewer.labelmap()[0], before)
    assert placed.count() > 0
    viewer.picture("14-during-a-request")


def test_two_tabs(site: Site, viewer: Viewer) -> None:
    """Tabs share the annotator's name and never a session; one that is loaded again keeps its own."""

    def asked(page: Page, act: Callable[[], None]) -> str:
        with page.expect_request(lambda request: "/medvl/texts/ask" in request.url) as seen:
            act()
        return str(seen.value.post_data_json["client_id"])

    def client(tab: Viewer) -> str:
        tab.tab("Text")
        tab.type("Question", "Is the liver visible?")
        name = asked(tab.page, lambda: tab.panel.get_by_role("button", name="Ask", exact=True).click())
        tab.wait()
        return name

    viewer.open_from_list(site.studies["ben"].study)
    viewer.type("Your name", "Dr. Ada")
    first = client(viewer)
    with viewer.page.expect_popup() as opened:
        viewer.page.evaluate("window.open(location.href)")  # the browser copies this tab's storage
    other = Viewer(opened.value, viewer.address, viewer.pictures, Requests(opened.value))
    other.wait_for_image()
    assert other.panel.get_by_label("Your name").input_value() == "Dr. Ada"
    assert client(other) != first
    other.page.close()
    viewer.page.reload()
    viewer.wait_for_image()
    assert client(viewer) == first
