"""One call makes one study: :func:`generate_case`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medvl_sam2.errors import ConfigError
from medvl_sam2.synthesis.anatomy import Patient, paint_trunk
from medvl_sam2.synthesis.fields import smooth_displacement, smooth_field
from medvl_sam2.synthesis.findings import LesionPlan, place_lesions
from medvl_sam2.synthesis.language import write_texts
from medvl_sam2.synthesis.organs import REMOVABLE, draw_layout, paint_organs
from medvl_sam2.synthesis.records import Case
from medvl_sam2.synthesis.shapes import Canvas
from medvl_sam2.synthesis.texture import Scanner, acquire, add_table, paint_hu
from medvl_sam2.synthesis.tissues import PHASES, TISSUE_CLASS, Tissue, draw_attenuation
from medvl_sam2.synthesis.view import draw_view
from medvl_sam2.types import Modality
from medvl_sam2.vocabulary import CLASSES

_BORDER_NOISE_MM = (45.0, 14.0, 60.0, 26.0, 26.0, 24.0, 16.0, 30.0)
"""Control distances of the noise fields that roughen borders and cut bowel loops."""
_REMOVED_LEAST_MM3 = {"gallbladder": 6e3, "spleen": 30e3, "kidney_right": 40e3, "kidney_left": 40e3}
"""So much of a removed organ's place must be in view before a text may call it absent."""
_ORGAN_TISSUE = {
    "liver": (Tissue.LIVER,), "spleen": (Tissue.SPLEEN,), "pancreas": (Tissue.PANCREAS,),
    "kidney_right": (Tissue.KIDNEY_RIGHT, Tissue.MEDULLA_RIGHT),
    "kidney_left": (Tissue.KIDNEY_LEFT, Tissue.MEDULLA_LEFT),
    "lung_right": (Tissue.LUNG_RIGHT,), "lung_left": (Tissue.LUNG_LEFT,),
}  # fmt: skip
"""Tissues an organ's lesions must stand out from: the darkest counts, as no bright lesion grows in a mixed organ
with contrast agent."""


@dataclass(frozen=True)
class GeneratorConfig:
    """What the generated population looks like. All lengths in mm."""

    lesion_counts: tuple[float, ...] = (0.26, 0.32, 0.26, 0.16)
    """Probability of 0, 1, 2, ... lesions."""
    lesion_diameter_mm: tuple[float, float] = (12.0, 45.0)
    removed_probability: float = 0.3
    slab_probability: float = 0.15
    crop_probability: float = 0.12
    arms_probability: float = 0.35
    deformation_mm: float = 3.0
    phases: tuple[str, ...] = field(default=PHASES)

    def __post_init__(self) -> None:
        if abs(sum(self.lesion_counts) - 1) > 1e-6 or min(self.lesion_counts) < 0:
            raise ConfigError(f"lesion_counts {self.lesion_counts} must be probabilities that sum to 1")
        if not set(self.phases) <= set(PHASES) or not self.phases:
            raise ConfigError(f"phases {self.phases} must be some of {PHASES}")
        low, high = self.lesion_diameter_mm
        if not 0 < low <= high:
            raise ConfigError(f"lesion_diameter_mm {self.lesion_diameter_mm} must be (least, largest), both positive")


def generate_case(seed: int, config: GeneratorConfig | None = None) -> Case:
    """Make study number ``seed``: image, ground truth, report, questions and referring sentences.

    The same seed and config give the same study in every process. Costs about 0.3 CPU seconds.
    """
    config = config or GeneratorConfig()
    rng = np.random.default_rng([seed, 0x5EED])
    patient = Patient.draw(rng, config.arms_probability)
    removed: frozenset[str] = frozenset()
    if rng.random() < config.removed_probability:
        removed = frozenset({str(rng.choice(REMOVABLE, p=(0.4, 0.2, 0.2, 0.2)))})
    layout = draw_layout(rng, patient, removed)
    view = draw_view(rng, patient, layout.centres, config.slab_probability, config.crop_probability)

    displacement = smooth_displacement(rng, view.shape, view.spacing, config.deformation_mm, 70.0)
    noises = [smooth_field(rng, view.shape, view.spacing, control) for control in _BORDER_NOISE_MM]
    canvas = Canvas(view.axes, displacement, noises)
    trunk = paint_trunk(canvas, patient, rng)
    missing = paint_organs(canvas, trunk, patient, layout, rng)
    scanner = Scanner.draw(rng)
    if scanner.table:
        add_table(canvas.tissue, view.axes[1], view.axes[2], 76 + patient.wall + 1.25 * patient.fat)

    phase = str(rng.choice(config.phases))
    means, amplitudes = draw_attenuation(rng, phase)
    hu = paint_hu(rng, canvas.tissue, means, amplitudes, view.spacing)
    organs = TISSUE_CLASS[canvas.tissue]
    plan = LesionPlan(int(rng.choice(len(config.lesion_counts), p=config.lesion_counts)), config.lesion_diameter_mm)
    organ_hu = {name: float(min(means[t] for t in tissues)) for name, tissues in _ORGAN_TISSUE.items()}
    lesions, findings = place_lesions(
        rng, plan, organs, hu, organ_hu, view.spacing, phase, view.axes, layout
    )  # fmt: skip
    image = acquire(rng, hu, scanner, view.spacing)
    labels = np.where(lesions > 0, np.uint8(CLASSES.index("lesion") + 1), organs)
    voxel = float(np.prod(view.spacing))
    gone = tuple(name for name, count in missing.items() if count * voxel >= _REMOVED_LEAST_MM3[name])
    report, qa, referring = write_texts(rng, organs, lesions, view.spacing, phase, view.region, gone, findings)
    return Case(
        image=image, labels=labels, organs=organs, lesions=lesions, spacing=view.spacing, modality=Modality.CT,
        phase=phase, region=view.region, removed=gone, findings=findings, report=report, qa=qa, referring=referring,
        seed=seed,
    )  # fmt: skip
