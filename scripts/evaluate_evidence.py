#!/usr/bin/env python
"""How often the evidence of answers and reports is the structure that is really there, on unseen generated cases.

Example: scripts/evaluate_evidence.py --cases 40 --json FILE

Three texts a case: the model's own report, its answers to the closed questions, and the true report, whose sentences
say which lesion is meant. A mask counts as right when its Dice with the true structure is at least 0.5; of a lesion in
the model's own texts any true lesion of the organ it is said to lie in may be meant.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from computing import add_model_options, computing, exit_code, load_predictor, said
from tqdm import tqdm

from medvl_sam2.evaluation.cases import FIRST_SEED, generated_cases
from medvl_sam2.files import write_json_atomically
from medvl_sam2.predictor import Predictor
from medvl_sam2.synthesis import Case
from medvl_sam2.types import Evidence, Sentence
from medvl_sam2.vocabulary import CLASSES

_RIGHT = 0.5
_KINDS = ("right", "wrong place", "nothing there", "missed", "rightly not found")


class Tally:
    """Counts of one kind of text: organs and lesions apart."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_KINDS, 0))
        self.dice: dict[str, list[float]] = defaultdict(list)

    def add(self, what: str, mask: np.ndarray | None, truths: Sequence[np.ndarray]) -> None:
        """One evidence against what may be meant by it; of several the best counts."""
        truths = [truth for truth in truths if truth.any()]
        if mask is None:
            kind = "missed" if truths else "rightly not found"
        elif not truths:
            kind = "nothing there"
        else:
            best = max(2 * np.count_nonzero(mask & t) / (np.count_nonzero(mask) + np.count_nonzero(t)) for t in truths)
            self.dice[what].append(float(best))
            kind = "right" if best >= _RIGHT else "wrong place"
        self.counts[what][kind] += 1

    def figures(self) -> dict[str, dict[str, float]]:
        """Counts and the mean Dice of masks where there is something."""
        return {
            what: {**counts, "mean_dice": round(float(np.mean(self.dice[what] or [0.0])), 3)}
            for what, counts in self.counts.items()
        }


def judge(
    tally: Tally, predictor: Predictor, session: object, case: Case, sentence: Sentence, finding: int = 0
) -> None:
    """Judge the evidence of one sentence; ``finding`` is the lesion id that it means, 0 where that is not known."""
    named = [item.name for item in sentence.evidence if item.name in CLASSES]
    for item in sentence.evidence:
        mask = predictor.evidence_mask(session, item.name) if item.voxels else None  # type: ignore[arg-type]
        if item.name in CLASSES and item.name != "lesion":
            tally.add("organs", mask, [case.organs == CLASSES.index(item.name) + 1])
        else:
            tally.add("lesions", mask, _meant(item, named, case, finding))


def _meant(item: Evidence, named: Sequence[str], case: Case, finding: int) -> list[np.ndarray]:
    if finding:
        return [case.lesions == finding]
    hosts = [name for name in named if name != "lesion"]
    return [case.lesions == f.value for f in case.findings if not hosts or f.organ in hosts]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--cases", type=int, default=40, metavar="N")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def evaluate(options: argparse.Namespace) -> None:
    """Run, print, and write the figures."""
    predictor = load_predictor(options)
    tallies = {name: Tally() for name in ("own reports", "answers", "true reports")}
    for evaluated in tqdm(generated_cases(options.cases, options.first_seed), total=options.cases, unit="case"):
        case, session = evaluated.generated, predictor.open(evaluated.volume)
        assert case is not None
        for sentence in predictor.report(session).sentences:
            judge(tallies["own reports"], predictor, session, case, sentence)
        for question in (qa for qa in case.qa if qa.choices):
            for sentence in predictor.answer(session, question.prompt).sentences:
                judge(tallies["answers"], predictor, session, case, sentence)
        findings = iter(sorted(case.findings, key=lambda f: -f.diameter_mm))
        for sentence in predictor.ground_report(session, case.report):
            speaks = any(item.name.startswith("lesion") for item in sentence.evidence)
            if speaks and not sentence.text.startswith("Impression"):
                judge(tallies["true reports"], predictor, session, case, sentence, next(findings).value)
            elif not speaks:
                judge(tallies["true reports"], predictor, session, case, sentence)
    figures = {name: tally.figures() for name, tally in tallies.items()}
    for name, parts in figures.items():
        for what, counts in parts.items():
            print(f"{name}, {what}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))
    facts = computing(predictor)
    print(said(facts))
    if options.json is not None:
        head = {"cases": options.cases, "first_seed": options.first_seed, "computing": facts}
        write_json_atomically(options.json, head | figures)


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation; 0 on success, 2 with a message on a bad input."""
    return exit_code("evaluate_evidence", parse(arguments), evaluate)


if __name__ == "__main__":
    sys.exit(main())
