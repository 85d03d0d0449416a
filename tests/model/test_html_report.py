"""The HTML page: self-contained, escaped, complete, with the right pictures; and the table of M3D-Bench's tasks."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from medvl_sam2.evaluation.benchmark import COVERAGE, BenchTask
from medvl_sam2.evaluation.html_report import BEST, WORST, About, chosen_pictures, click_lines, html_report
from medvl_sam2.evaluation.language_report import answer_figures
from medvl_sam2.evaluation.language_tasks import AnswerScore
from medvl_sam2.evaluation.metrics import Overlap
from medvl_sam2.evaluation.protocol import Curve, ScoredCurve, Setting, Step
from medvl_sam2.evaluation.report import interactive_figures, mask_figures
from medvl_sam2.evaluation.runner import EXTRA_TASKS, TASKS, DrawnPicture
from medvl_sam2.evaluation.tasks import MaskScore

ABOUT = About("Evaluation of <demo>", {"checkpoint": "demo"}, {"generated": "2"})
VOID = {"meta", "img", "br", "line", "polyline", "input", "hr", "link"}


class Page(HTMLParser):
    """Collects tags and text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "action", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def figures() -> dict[str, Any]:
    steps = tuple(Step(n, 0.5 + 0.1 * n, 0.4, 0.1) for n in range(3))
    curves = [
        ScoredCurve("case", "patient", "generated", 900, Curve("liver", Setting.BOX, engine, steps))
        for engine in ("model", "grow control")
    ]
    scores = [
        MaskScore("case", "patient", "generated", "liver", 0.8, Overlap(8, 10, 10), "liver"),
        MaskScore("other", "other", "generated", "left <b>kidney</b>", 0.0, Overlap(0, 0, 5), "kidney"),
    ]
    answers = [AnswerScore("case", "patient", "phase", "Which phase?", "A. venous", "<script>x</script>", 3)]
    return {
        "left_out_below_voxel_limit": {"case": ["gallbladder"], "other": []},
        "skipped": {"retrieval": "the model has no image-text head"},
        "interactive": interactive_figures(curves, "model", ["grow control"]),
        "semantic": mask_figures(scores),
        "vqa": answer_figures(answers),
    }


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG not really")
    text = html_report(ABOUT, figures(), [DrawnPicture(picture, "a picture", 0.7)])
    page = Page(text)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == 1
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    for wanted in ("liver", "0.800", "grow control", "no image-text head", "gallbladder", "a picture", "Skipped"):
        assert wanted in text
    for task in BenchTask:
        assert task.value in text


def test_texts_are_escaped() -> None:
    text = html_report(ABOUT, figures())
    assert "<script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "left &lt;b&gt;kidney&lt;/b&gt;" in text
    assert "Evaluation of &lt;demo&gt;" in text


def test_sections_that_were_not_run_are_not_there() -> None:
    text = html_report(ABOUT, {"left_out_below_voxel_limit": {}, "skipped": {}})
    Page(text)
    assert 'id="bench"' in text
    for task in ("interactive", "semantic", "vqa", "report", "retrieval", "pictures"):
        assert f'id="{task}"' not in text


def test_curves_run_from_left_to_right_and_upwards() -> None:
    (model, _) = click_lines(figures()["interactive"][0])
    assert model["points"] == "0.0,80.0 180.0,64.0 360.0,48.0"


def test_worst_and_best_pictures_are_chosen() -> None:
    maps = [DrawnPicture(Path(f"m{n}"), "", None) for n in range(3)]
    scored = [DrawnPicture(Path(f"s{n}"), "", n / 20) for n in range(20)]
    chosen = chosen_pictures([*scored[::-1], *maps])
    assert chosen[:3] == maps
    assert chosen[3:] == [*scored[:WORST], *scored[-BEST:]]
    assert chosen_pictures(scored[:4]) == scored[:4]


@pytest.mark.parametrize("task", list(BenchTask))
def test_every_bench_task_is_covered_by_functions_and_a_task_of_the_runner(task: BenchTask) -> None:
    covered = COVERAGE[task]
    assert covered.scores
    assert all(callable(score) for score in covered.scores)
    assert covered.task in {*TASKS, *EXTRA_TASKS}
    assert covered.needs.startswith("M3D-")
