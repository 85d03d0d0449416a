"""The measurement of evidence counts what is right, wrong, invented and missed, organs and lesions apart."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from script_modules import load_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("evaluate_evidence", monkeypatch)


def test_each_outcome_is_counted_once(script: ModuleType) -> None:
    truth, other, nothing = (np.zeros((4, 5, 6), bool) for _ in range(3))
    truth[:2], other[3:] = True, True
    tally = script.Tally()
    tally.add("organs", truth, [truth])
    tally.add("organs", other, [truth])
    tally.add("organs", other, [nothing])
    tally.add("organs", None, [truth])
    tally.add("organs", None, [nothing])
    tally.add("lesions", truth, [other, truth])  # any of those that may be meant
    figures = tally.figures()
    assert figures["organs"] == {
        "right": 1,
        "wrong place": 1,
        "nothing there": 1,
        "missed": 1,
        "rightly not found": 1,
        "mean_dice": 0.5,
    }
    assert (figures["lesions"]["right"], figures["lesions"]["mean_dice"]) == (1, 1.0)
