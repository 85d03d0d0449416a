"""Records of a generated study: image, ground truth and the text derived from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvl_sam2.types import Geometry, Modality, Volume


@dataclass(frozen=True)
class Finding:
    """One lesion that is really in the image.

    ``organ`` is a class name, ``kind`` one of :data:`medvl_sam2.synthesis.findings.KINDS`, ``location`` the spoken
    place ("right lobe of the liver"), ``value`` its id in ``Case.lesions``, ``center_zyx`` a canonical voxel.
    """

    organ: str
    kind: str
    diameter_mm: float
    center_zyx: tuple[float, float, float]
    location: str
    value: int


@dataclass(frozen=True)
class QA:
    """A question with its answer. ``choices`` is empty for open questions, else ``answer`` is "<letter>. <text>"."""

    question: str
    choices: tuple[str, ...]
    answer: str
    kind: str

    @property
    def prompt(self) -> str:
        """The question as it is put to the model, with lettered choices when it is closed (M3D style)."""
        if not self.choices:
            return self.question
        listed = " ".join(f"{'ABCDEFGH'[n]}. {text}" for n, text in enumerate(self.choices))
        return f"{self.question} Choices: {listed}"


@dataclass(frozen=True)
class Referring:
    """A phrase or request and what it means.

    ``kind`` is ``"class"`` (``values`` are vocabulary values in ``Case.organs``) or ``"lesion"`` (``values`` are ids
    in ``Case.lesions``). ``name`` is a short label for the mask.
    """

    text: str
    kind: str
    values: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Case:
    """A generated study on a canonical grid (Z to Superior, Y to Posterior, X to patient Left).

    ``image`` int16 HU; ``labels`` uint8 vocabulary values, lesion voxels carry ``lesion``; ``organs`` the same without
    the lesion override, so an organ includes its lesions; ``lesions`` uint8 ids 1..n. ``spacing`` (sz, sy, sx) mm.
    """

    image: np.ndarray
    labels: np.ndarray
    organs: np.ndarray
    lesions: np.ndarray
    spacing: tuple[float, float, float]
    modality: Modality
    phase: str
    region: str
    removed: tuple[str, ...]
    """Organs lost to surgery although the field of view covers their place."""
    findings: tuple[Finding, ...]
    report: str
    qa: tuple[QA, ...]
    referring: tuple[Referring, ...]
    seed: int

    def target(self, referring: Referring) -> np.ndarray:
        """Bool (Z, Y, X) mask of what a referring sentence means."""
        source = self.organs if referring.kind == "class" else self.lesions
        wanted = np.zeros(256, dtype=bool)
        wanted[list(referring.values)] = True
        return wanted[source]

    def volume(self) -> Volume:
        """The image as a :class:`Volume` whose stored axes are the canonical (z, y, x)."""
        sz, sy, sx = self.spacing
        affine = np.array([[0, 0, -sx, 0], [0, -sy, 0, 0], [sz, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
        nz, ny, nx = self.image.shape
        return Volume(self.image, Geometry((nz, ny, nx), affine), self.modality)
