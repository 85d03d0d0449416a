"""When a finetuned model may replace the served one. Every gate is computed and reported, also after one has failed.

The hold-out is labelled by the same people as the training set, so a hold-out score alone cannot tell a better model
from one that learned the same mistake. Three gates do not rest on those labels alone: outlines must follow the image,
names must not contradict what the served model recognises, and generated cases must not get worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from medvl_sam2.training.finetune_records import FinetuneConfig, Gate
from medvl_sam2.training.finetune_samples import LoadedSample
from medvl_sam2.training.label_plausibility import judge_labels, suspicion
from medvl_sam2.training.measure import Measurement

KIND_LOSS = 0.02
"""A gain in one kind of prompt may not cost more than this in the other."""
WRONG_NAMES = 1 / 3
"""Share of recognised places under another name from which the names are suspect."""
_LISTED = 3


def label_gate(train: Sequence[LoadedSample], holdout: Sequence[LoadedSample], trusted: bool) -> Gate:
    """Outlines of either side, or of both together where one side is too small to judge, follow the image."""
    sides = {"training labels": list(train), "hold-out labels": list(holdout)}
    judged = {
        name: [judge_labels(one.case.volume, one.case.masks) for one in members] for name, members in sides.items()
    }
    judged["all labels"] = judged["training labels"] + judged["hold-out labels"]
    reasons = [f"{name}: {reason}" for name, found in judged.items() if (reason := suspicion(found))]
    ranked = [
        (one.mean, member.sample.id)
        for name, members in sides.items()
        for one, member in zip(judged[name], members, strict=True)
        if one.mean is not None
    ]
    if not reasons:
        return Gate("labels", True, f"outlines follow the image in {len(ranked)} volumes")
    worst = ", ".join(f"{image} ({mean:.2f})" for mean, image in sorted(ranked)[:_LISTED])
    detail = f"{reasons[0]}; look first at {worst}"
    if trusted:
        return Gate("labels", True, f"trusted by the operator although {detail}")
    return Gate("labels", False, f"{detail}. Correct them, or set trust_labels when they are right")


def naming_gate(served: Measurement, trusted: bool) -> Gate:
    """The labels' names agree with the served model's own names for the places it recognises."""
    naming = served.naming
    wrong = len(naming.wrong)
    # One disagreement is what corrections are made of; a pattern is not.
    if wrong < 2 or wrong / naming.placed < WRONG_NAMES:
        return Gate("names", True, f"{naming.placed - wrong} of {naming.placed} recognised structures are named alike")
    listed = ", ".join(f"{label!r} in {case} looks like {called!r}" for case, label, called in naming.wrong[:_LISTED])
    detail = f"{wrong} of {naming.placed} recognised structures carry another name: {listed}"
    if trusted:
        return Gate("names", True, f"trusted by the operator although {detail}")
    return Gate("names", False, f"{detail}. Rename them, or set trust_labels when they are right")


def holdout_gate(served: Measurement, candidate: Measurement, config: FinetuneConfig) -> Gate:
    """Better on the hold-out by the margin, and not bought with a loss in one kind of prompt."""
    gain = candidate.overall - served.overall
    numbers = f"hold-out {served.overall:.3f} -> {candidate.overall:.3f} over {len(served.scores)} scores"
    if gain < config.margin or gain <= 0:
        return Gate("holdout", False, f"{numbers}, less than the margin of {config.margin:.3f} better")
    for kind in ("interactive", "text"):
        before, after = served.mean(kind), candidate.mean(kind)
        if before is not None and after is not None and after < before - KIND_LOSS:
            return Gate("holdout", False, f"{numbers}, but {kind} fell from {before:.3f} to {after:.3f}")
    return Gate("holdout", True, numbers)


def forgetting_gate(served: Measurement, candidate: Measurement, config: FinetuneConfig) -> Gate:
    """Generated cases lose at most the allowed amount, in every kind of prompt."""
    parts: list[str] = []
    passed = True
    for kind in ("interactive", "text"):
        before, after = served.mean(kind), candidate.mean(kind)
        if before is not None and after is not None:
            parts.append(f"{kind} {before:.3f} -> {after:.3f}")
            passed = passed and after >= before - config.forgetting
    return Gate(
        "forgetting", passed, f"generated cases: {', '.join(parts)}; at most {config.forgetting:.3f} may be lost"
    )


def verdict(gates: Sequence[Gate]) -> str:
    """One sentence: published because, or not published because."""
    failed = [gate for gate in gates if not gate.passed]
    if not failed:
        holdout = next((gate.detail for gate in gates if gate.name == "holdout"), "")
        return f"published: {holdout}"
    return "not published: " + "; ".join(f"{gate.name}: {gate.detail}" for gate in failed)


def figures(holdout: Measurement | None, generated: Measurement | None) -> Mapping[str, float]:
    """Scores of one model as flat numbers: ``holdout``, ``generated``, each also ``.interactive`` and ``.text``."""
    numbers: dict[str, float] = {}
    for name, measured in (("holdout", holdout), ("generated", generated)):
        if measured is None:
            continue
        numbers[name] = measured.overall
        for kind in ("interactive", "text"):
            value = measured.mean(kind)
            if value is not None:
                numbers[f"{name}.{kind}"] = value
    return numbers
