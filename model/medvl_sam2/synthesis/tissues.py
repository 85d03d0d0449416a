"""Tissues the generator paints, their vocabulary class and their attenuation by contrast phase."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from medvl_sam2.vocabulary import CLASSES

PHASES: tuple[str, ...] = ("non-contrast", "arterial", "portal venous")


class Tissue(IntEnum):
    """Values of the painted tissue map. Finer than the vocabulary: one class may consist of several tissues."""

    AIR = 0
    FAT = 1
    SKIN = 2
    MUSCLE = 3
    VISCERAL_FAT = 4
    BONE = 5
    MARROW = 6
    CARTILAGE = 7
    SPLEEN = 8
    KIDNEY_RIGHT = 9
    KIDNEY_LEFT = 10
    MEDULLA_RIGHT = 11
    MEDULLA_LEFT = 12
    GALLBLADDER = 13
    LIVER = 14
    STOMACH_WALL = 15
    STOMACH_FLUID = 16
    STOMACH_GAS = 17
    PANCREAS = 18
    LUNG_RIGHT = 19
    LUNG_LEFT = 20
    HEART_WALL = 21
    HEART_BLOOD = 22
    AORTA = 23
    CAVA = 24
    VERTEBRA_SHELL = 25
    VERTEBRA_CORE = 26
    CORD = 27
    COLON_WALL = 28
    COLON_STOOL = 29
    COLON_GAS = 30
    BLADDER = 31
    BOWEL = 32
    ARTERY = 33
    VEIN = 34
    SOFT = 35
    AIRWAY = 36
    TABLE = 37
    RENAL_SINUS = 38


_CLASS_TISSUES: dict[str, tuple[Tissue, ...]] = {
    "spleen": (Tissue.SPLEEN,),
    "kidney_right": (Tissue.KIDNEY_RIGHT, Tissue.MEDULLA_RIGHT),
    "kidney_left": (Tissue.KIDNEY_LEFT, Tissue.MEDULLA_LEFT),
    "gallbladder": (Tissue.GALLBLADDER,),
    "liver": (Tissue.LIVER,),
    "stomach": (Tissue.STOMACH_WALL, Tissue.STOMACH_FLUID, Tissue.STOMACH_GAS),
    "pancreas": (Tissue.PANCREAS,),
    "lung_right": (Tissue.LUNG_RIGHT,),
    "lung_left": (Tissue.LUNG_LEFT,),
    "heart": (Tissue.HEART_WALL, Tissue.HEART_BLOOD),
    "aorta": (Tissue.AORTA,),
    "inferior_vena_cava": (Tissue.CAVA,),
    "vertebrae": (Tissue.VERTEBRA_SHELL, Tissue.VERTEBRA_CORE),
    "spinal_cord": (Tissue.CORD,),
    "colon": (Tissue.COLON_WALL, Tissue.COLON_STOOL, Tissue.COLON_GAS),
    "urinary_bladder": (Tissue.BLADDER,),
}


def _class_table() -> np.ndarray:
    table = np.zeros(len(Tissue), dtype=np.uint8)
    for name, tissues in _CLASS_TISSUES.items():
        for tissue in tissues:
            table[tissue] = CLASSES.index(name) + 1
    return table


TISSUE_CLASS: np.ndarray = _class_table()
"""Vocabulary value (0: none) by tissue value."""

# Mean HU in the phases of PHASES, spread of that mean between patients, amplitude of the texture.
_ATTENUATION: dict[Tissue, tuple[float, float, float, float, float]] = {
    Tissue.AIR: (-1000, -1000, -1000, 0, 0),
    Tissue.FAT: (-105, -105, -102, 6, 8),
    Tissue.SKIN: (10, 15, 20, 10, 8),
    Tissue.MUSCLE: (52, 58, 64, 5, 10),
    Tissue.VISCERAL_FAT: (-100, -98, -95, 8, 14),
    Tissue.BONE: (480, 490, 500, 90, 90),
    Tissue.MARROW: (220, 225, 230, 40, 50),
    Tissue.CARTILAGE: (90, 90, 92, 12, 10),
    Tissue.SPLEEN: (46, 125, 120, 8, 7),
    Tissue.KIDNEY_RIGHT: (32, 190, 185, 12, 7),
    Tissue.KIDNEY_LEFT: (32, 190, 185, 12, 7),
    Tissue.MEDULLA_RIGHT: (30, 110, 160, 12, 7),
    Tissue.MEDULLA_LEFT: (30, 110, 160, 12, 7),
    Tissue.GALLBLADDER: (9, 9, 10, 5, 3),
    Tissue.LIVER: (56, 72, 112, 7, 7),
    Tissue.STOMACH_WALL: (42, 80, 75, 8, 10),
    Tissue.STOMACH_FLUID: (18, 18, 20, 12, 16),
    Tissue.STOMACH_GAS: (-960, -960, -960, 20, 10),
    Tissue.PANCREAS: (40, 105, 92, 8, 14),
    Tissue.LUNG_RIGHT: (-850, -845, -840, 30, 28),
    Tissue.LUNG_LEFT: (-850, -845, -840, 30, 28),
    Tissue.HEART_WALL: (46, 100, 105, 8, 8),
    Tissue.HEART_BLOOD: (42, 260, 160, 15, 8),
    Tissue.AORTA: (42, 305, 160, 20, 5),
    Tissue.CAVA: (40, 85, 150, 12, 8),
    Tissue.VERTEBRA_SHELL: (430, 435, 440, 70, 60),
    Tissue.VERTEBRA_CORE: (190, 195, 200, 45, 45),
    Tissue.CORD: (28, 30, 32, 6, 5),
    Tissue.COLON_WALL: (42, 70, 80, 8, 10),
    Tissue.COLON_STOOL: (20, 20, 22, 30, 60),
    Tissue.COLON_GAS: (-930, -930, -930, 30, 30),
    Tissue.BLADDER: (5, 5, 6, 4, 3),
    Tissue.BOWEL: (34, 65, 75, 10, 25),
    Tissue.ARTERY: (42, 290, 155, 20, 5),
    Tissue.VEIN: (42, 75, 165, 10, 5),
    Tissue.SOFT: (40, 60, 65, 8, 12),
    Tissue.AIRWAY: (-980, -980, -980, 5, 3),
    Tissue.TABLE: (-120, -120, -120, 60, 10),
    Tissue.RENAL_SINUS: (-60, -50, -45, 15, 15),
}
_TABLE: np.ndarray = np.array([_ATTENUATION[t] for t in Tissue], dtype=np.float32)

_PAIRS = (
    (Tissue.KIDNEY_RIGHT, Tissue.KIDNEY_LEFT),
    (Tissue.MEDULLA_RIGHT, Tissue.MEDULLA_LEFT),
    (Tissue.LUNG_RIGHT, Tissue.LUNG_LEFT),
)


def draw_attenuation(rng: np.random.Generator, phase: str) -> tuple[np.ndarray, np.ndarray]:
    """One patient's mean HU and texture amplitude (HU) by tissue value, float32. Paired organs share their mean."""
    means = _TABLE[:, PHASES.index(phase)] + np.clip(rng.standard_normal(len(Tissue)), -1.6, 1.6) * _TABLE[:, 3]
    if phase != "non-contrast":
        # Bolus timing moves all vessels of a patient together.
        strength = float(rng.uniform(0.8, 1.15))
        for tissue in (Tissue.AORTA, Tissue.ARTERY, Tissue.HEART_BLOOD):
            means[tissue] *= strength
    for right, left in _PAIRS:
        means[left] = means[right]
    means[Tissue.ARTERY] = means[Tissue.AORTA]
    return means.astype(np.float32), _TABLE[:, 4] * np.float32(rng.uniform(0.7, 1.3))
