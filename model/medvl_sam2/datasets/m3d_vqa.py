"""M3D-VQA (Bai et al. 2024): questions on M3D-Cap's images, one record an image. No longer freely downloadable.

``M3D_VQA_{train,val,test}.csv`` with ``Image Path, Text, Question Type, Question, Choice A..D, Answer, Answer Choice``
and ``M3D_VQA_yn_train.csv`` (yes or no); the images lie below the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from medvl_sam2.datasets.m3d_cap import LICENCE, image_file, located, patient
from medvl_sam2.datasets.manifest import CaseRecord, Question, Split
from medvl_sam2.datasets.source import Finding, Problem, first_file, missing, read_table
from medvl_sam2.errors import DataError
from medvl_sam2.types import Modality

_SPLITS = {"train": Split.TRAIN, "val": Split.VALIDATION, "test": Split.TEST}
_KINDS = {"1": "plane", "2": "phase", "3": "organ", "4": "abnormality", "5": "location"}
_LETTERS = "ABCD"
_YES_NO = ("Yes", "No")


def read(root: Path) -> Iterator[Finding]:
    """Images in the order the tables first name them; at least one table must be there."""
    tables = {split: sorted(root.glob(f"**/M3D_VQA_{name}.csv")) for name, split in _SPLITS.items()}
    tables[Split.TRAIN] += sorted(root.glob("**/M3D_VQA_yn_train.csv"))
    if not any(tables.values()):
        first_file(root, "**/M3D_VQA_*.csv")
    for split, paths in tables.items():
        questions: dict[str, list[Question]] = {}
        for path in paths:
            for line, row in read_table(path, ("Image Path", "Question", "Answer"), delimiter=","):
                try:
                    questions.setdefault(row["Image Path"], []).append(_question(row))
                except DataError as error:
                    yield Problem(f"{path.name}:{line}", f"{row['Image Path']}: {error}")
        for name, asked in questions.items():
            if asked:
                yield _finding(root, name, split, asked)


def _question(row: Mapping[str, str]) -> Question:
    """The question of a row; ``Answer`` must be the text of the choice ``Answer Choice`` names."""
    choices = tuple(row.get(f"Choice {letter}", "") for letter in _LETTERS)
    letter, answer = row.get("Answer Choice", ""), row["Answer"]
    if not any(choices):
        yes_no = answer.rstrip(".").capitalize()
        if yes_no in _YES_NO:
            return Question(row["Question"], yes_no, "yes_no", _YES_NO)
        raise DataError(f"answer {answer!r} is neither yes nor no, and the row has no choices")
    if letter not in tuple(_LETTERS) or choices[_LETTERS.index(letter)] != answer:
        raise DataError(f"answer {answer!r} is not choice {letter!r} of {list(choices)}")
    kind = row.get("Question Type", "").removesuffix(".0")
    if kind not in _KINDS:
        raise DataError(f"question type {kind!r} is none of {', '.join(_KINDS)}")
    return Question(row["Question"], answer, _KINDS[kind], choices)


def _finding(root: Path, name: str, split: Split, questions: list[Question]) -> Finding:
    image = located(name, root)
    reason = missing(image)
    if reason is not None or len(Path(name).parts) < 3:
        return Problem(name, reason or "its path names no case folder, so the patient is unknown")
    return CaseRecord(
        id=f"m3d_vqa/{split}/{name}",
        source="m3d_vqa",
        patient=patient(image),
        split=split,
        modality=Modality.OTHER,
        licence=LICENCE,
        image=image_file(image, root),
        questions=tuple(questions),
    )
