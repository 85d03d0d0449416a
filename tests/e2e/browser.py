"""OHIF in a headless Chromium: the browser, the viewer's voxels, and the panel as an annotator uses it."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, Request, Route, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeout

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]  # fmt: skip
"""WebGL 2 from software, and no traffic of the browser's own."""
PATIENCE_MS = 240_000
"""For a request to the model on a machine that others use too."""

_LONG_S = 2.0

_LABELMAP = """id => {
    const volume = window.services.segmentationService.getLabelmapVolume(id);
    const text = Array.from(volume.voxelManager.getCompleteScalarDataArray(), value => String.fromCharCode(value));
    return [volume.dimensions, text.join('')];
}"""
_SEGMENTS = """id => window.services.segmentationService.getSegmentations()
    .filter(one => one.segmentationId === id).flatMap(one => Object.values(one.segments))
    .map(one => [one.label, one.segmentIndex])"""
_COLOURS = """() => {
    const service = window.services.segmentationService;
    const [one] = service.getSegmentations().filter(one => one.segmentationId === '1');
    return Object.keys(one.segments).map(index => Array.from(service.getSegmentColor('mpr-axial', '1', Number(index))));
}"""
_PAINT = """([name, [i, j, k], id]) => {
    const service = window.services.segmentationService;
    const [one] = service.getSegmentations().filter(one => one.segmentationId === id);
    const { segmentIndex } = Object.values(one.segments).find(segment => segment.label === name);
    const volume = service.getLabelmapVolume(id);
    volume.voxelManager.setAtIJK(i, j, k, segmentIndex);
    window.cornerstone.triggerEvent(window.cornerstone.eventTarget,
        window.cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, { segmentationId: id });
}"""
_PLACE = """([id, voxel]) => {
    const viewport = window.services.cornerstoneViewportService.getCornerstoneViewport(id);
    const { imageData } = window.cornerstone.cache.getVolume(viewport.getVolumeId());
    const [x, y] = viewport.worldToCanvas(imageData.indexToWorld(voxel));
    const box = viewport.canvas.getBoundingClientRect();
    return [x + box.left, y + box.top];
}"""
_SHOW = """voxel => {
    for (const id of window.services.viewportGridService.getState().viewports.keys()) {
        const viewport = window.services.cornerstoneViewportService.getCornerstoneViewport(id);
        const { imageData } = window.cornerstone.cache.getVolume(viewport.getVolumeId());
        viewport.jumpToWorld(Array.from(imageData.indexToWorld(voxel)));
        viewport.render();
    }
}"""
_FOCUS = """id => {
    const viewport = window.services.cornerstoneViewportService.getCornerstoneViewport(id);
    const { imageData } = window.cornerstone.cache.getVolume(viewport.getVolumeId());
    return Array.from(imageData.worldToIndex(viewport.getCamera().focalPoint));
}"""


def chromium() -> str:
    """Path of the browser; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser is installed; apt-get install chromium")
    return found


@contextmanager
def open_page(profile: Path, problems: list[str]) -> Iterator[Page]:
    """A page of 1280 x 800 that reaches this machine only; what goes wrong in its scripts joins ``problems``."""

    def local_only(route: Route) -> None:
        if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            route.continue_()
        else:  # OHIF would like web fonts
            route.abort()

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=chromium(), args=FLAGS, viewport={"width": 1280, "height": 800}
        )
        context.route("**/*", local_only)
        page = context.pages[0]
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        yield page
        context.close()


class Requests:
    """What a page asked for and was refused, waits for or waited for long, and what its scripts complained of."""

    def __init__(self, page: Page) -> None:
        self._lines: deque[str] = deque(maxlen=40)
        self._waiting: dict[Request, float] = {}
        page.on("request", lambda request: self._waiting.update({request: time.monotonic()}))
        page.on("requestfinished", lambda request: self._ended(request, ""))
        page.on("requestfailed", lambda request: self._ended(request, str(request.failure)))
        page.on("response", lambda reply: reply.ok or self._lines.append(f"{reply.status}: {reply.url}"))
        page.on("console", lambda said: said.type == "error" and self._lines.append(f"said: {said.text}"))

    def _ended(self, request: Request, failure: str) -> None:
        took = time.monotonic() - self._waiting.pop(request, time.monotonic())
        if failure or took > _LONG_S:
            self._lines.append(f"{failure or 'answered'} after {took:.1f} s: {request.method} {request.url}")

    def __str__(self) -> str:
        now = time.monotonic()
        waiting = [f"for {now - since:.1f} s: {one.method} {one.url}" for one, since in self._waiting.items()]
        return "\n".join([*self._lines, *waiting])


@dataclass
class Viewer:
    """OHIF with the panel. ``pictures``: where :meth:`picture` puts what was on screen."""

    page: Page
    address: str
    pictures: Path
    requests: Requests

    # --- OHIF -------------------------------------------------------------------------------------------------------

    def open_from_list(self, study: str) -> None:
        """The study list, the study's row, MONAI Label's mode; then wait for the image."""
        self.page.goto(f"{self.address}/ohif/", wait_until="domcontentloaded")
        mode = self.page.locator(f'[data-cy="mode-monai-label-{study}"]')
        self.page.locator(f'[data-cy="studyRow-{study}"]').click()
        try:
            mode.wait_for(timeout=10_000)
        except PlaywrightTimeout:  # the list was drawn anew just then, and the row is closed again
            self.page.locator(f'[data-cy="studyRow-{study}"]').click()
        mode.click()
        self.wait_for_image()

    def wait_for_image(self) -> None:
        self.page.wait_for_selector('[data-cy="viewport-pane"]')
        self.page.locator("#medvl-target option").nth(5).wait_for(state="attached")
        self.wait()
        hide = self.page.get_by_text("Confirm and Hide")
        if hide.is_visible():
            hide.click()

    def turn_to(self, description: str) -> None:
        """Another series, from OHIF's own list of the study's series, until the panel has it."""
        self.page.locator('[data-cy="study-browser-thumbnail"]', has_text=description).dblclick()
        self.panel.locator(".case", has_text=description).wait_for()

    def labelmap(self, segmentation: str = "1") -> tuple[np.ndarray, dict[str, int]]:
        """Voxels (I, J, K) of a segmentation, and the value of each of its names."""
        shape, text = self.page.evaluate(_LABELMAP, segmentation)
        voxels = np.frombuffer(text.encode("latin-1"), np.uint8).reshape(shape, order="F")
        return voxels, dict(self.page.evaluate(_SEGMENTS, segmentation))

    def colours(self) -> list[list[int]]:
        """Red, green, blue and opacity of every structure of the label map, as the viewer draws them."""
        colours: list[list[int]] = self.page.evaluate(_COLOURS)
        return colours

    def mask(self, name: str, segmentation: str = "1") -> np.ndarray:
        voxels, names = self.labelmap(segmentation)
        return voxels == names[name] if name in names else np.zeros(voxels.shape, bool)

    def show(self, voxel: Any) -> None:
        """Bring a voxel into every viewport's plane."""
        self.page.evaluate(_SHOW, [int(n) for n in voxel])

    def shown(self, viewport: str = "mpr-axial") -> np.ndarray:
        """Voxel (i, j, k) a viewport's plane goes through."""
        return np.array(self.page.evaluate(_FOCUS, viewport))

    def place(self, voxel: Any, viewport: str = "mpr-axial") -> tuple[float, float]:
        """Where a voxel is on the page."""
        x, y = self.page.evaluate(_PLACE, [viewport, [int(n) for n in voxel]])
        return x, y

    def paint(self, name: str, voxel: Any, segmentation: str = "1") -> None:
        """Give a voxel to a structure, as a tool of the viewer does."""
        self.page.evaluate(_PAINT, [name, [int(n) for n in voxel], segmentation])

    def drag(self, start: Any, end: Any) -> None:
        """Press the mouse on one voxel of the axial viewport and let go on another."""
        x, y = self.place(start)
        self.page.mouse.move(x - 3, y)
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(100)
        self.page.mouse.down()
        self.page.wait_for_timeout(100)
        self.page.mouse.move(*self.place((np.array(start) + end) // 2))
        self.page.mouse.move(*self.place(end))
        self.page.mouse.up()

    def picture(self, name: str) -> None:
        self.page.wait_for_timeout(300)  # the viewer draws a frame later
        self.page.screenshot(path=self.pictures / f"{name}.png")

    # --- the panel --------------------------------------------------------------------------------------------------

    @property
    def panel(self) -> Locator:
        return self.page.locator("#medvl-panel")

    def tab(self, name: str) -> None:
        self.panel.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        """Press a button, and wait for what it started."""
        self.panel.get_by_role("button", name=name, exact=True).click()
        self.wait()

    def type(self, label: str, text: str) -> None:
        self.panel.get_by_label(label).fill(text)
        self.panel.get_by_label(label).dispatch_event("change")

    def choose(self, structure: str) -> None:
        self.panel.get_by_label("Structure", exact=True).select_option(structure)

    def click(self, voxel: Any) -> None:
        """Click on a voxel in the axial viewport, and wait for the mask."""
        self.page.mouse.click(*self.place(voxel))
        self.wait()

    def wait(self) -> None:
        """Until the panel does nothing."""
        self.page.wait_for_timeout(150)
        self.panel.locator(".job").first.wait_for(state="detached", timeout=PATIENCE_MS)

    def last_words(self) -> str:
        """For who cannot see the page a test failed on."""
        shown = self.page.inner_text("body", timeout=5_000)
        panel = self.panel.inner_text(timeout=5_000) if self.panel.count() else "no panel"
        return f"{self.page.url}\n{self.requests}\n{shown[-2000:]}\n{panel}"

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for what the browser does meanwhile."""
        end = time.monotonic() + PATIENCE_MS / 1000
        while not holds():
            assert time.monotonic() < end, "it never happened"
            self.page.wait_for_timeout(50)

    @property
    def status(self) -> str:
        return self.panel.get_by_role("status").inner_text()

    @property
    def alert(self) -> str:
        return self.panel.get_by_role("alert").inner_text()
