"""A random trunk: body wall, lungs, heart, great vessels, spine and pelvis as implicit shapes.

:func:`paint_trunk` paints the frame; the abdominal organs of :mod:`medvl_sam2.synthesis.organs` go inside it.
All lengths are reference millimetres in the frame of :mod:`medvl_sam2.synthesis.shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvl_sam2.synthesis.shapes import Canvas, Region, smooth_path
from medvl_sam2.synthesis.tissues import Tissue


@dataclass(frozen=True)
class Patient:
    """Random build of one patient. Offsets and lengths in reference mm."""

    scale: tuple[float, float, float]
    """Real mm per reference mm along (z, y, x)."""
    fat: float
    wall: float
    squareness: float
    breath: float
    """Lowers (negative) or lifts the diaphragm and what hangs on it."""
    lordosis: float
    arms: bool
    cord_radius: float
    shift_x: float
    """Sideways shift of the spine and the great vessels."""

    @classmethod
    def draw(cls, rng: np.random.Generator, arms_probability: float = 0.35) -> Patient:
        """Random build."""
        size = rng.uniform(0.88, 1.12)
        z, y, x = (float(size * rng.uniform(0.93, 1.07)) for _ in range(3))
        return cls(
            scale=(z, y, x),
            fat=float(rng.choice([rng.uniform(4, 14), rng.uniform(10, 38)])),
            wall=float(rng.uniform(10, 16)),
            squareness=float(rng.uniform(2.1, 2.7)),
            breath=float(rng.uniform(-16, 14)),
            lordosis=float(rng.uniform(4, 13)),
            arms=bool(rng.random() < arms_probability),
            cord_radius=float(rng.uniform(6.5, 8.5)),
            shift_x=float(rng.normal(0, 2.5)),
        )

    def spine_y(self, z: np.ndarray | float) -> np.ndarray:
        """Posterior position of the vertebral body centre at height z (thoracic kyphosis, lumbar lordosis)."""
        return 44 - self.lordosis * np.cos((np.asarray(z, dtype=np.float32) + 60) / 75)


@dataclass(frozen=True)
class Trunk:
    """What the organ painters need to know of the trunk, arrays over the whole canvas."""

    wall_distance: np.ndarray
    """Signed mm to the inner surface of the body wall, negative inside the cavity."""
    above_diaphragm: np.ndarray
    """Signed mm above the diaphragm."""


def _cavity_radii(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half widths (x, y) of the inner cavity by height."""
    knots = [-300, -230, -150, -90, -30, 40, 110, 170, 220, 255, 280]
    half_x = [70, 92, 112, 120, 122, 126, 128, 120, 100, 66, 40]
    half_y = [74, 76, 76, 76, 78, 82, 86, 82, 66, 46, 34]
    return np.interp(z, knots, half_x).astype(np.float32), np.interp(z, knots, half_y).astype(np.float32)


def _outer_thickness(z: np.ndarray, patient: Patient) -> np.ndarray:
    """Thickness of muscle wall without the fat: shoulders and hips carry more of it."""
    knots = [-300, -230, -150, -90, 150, 200, 240, 280]
    return np.interp(z, knots, [54, 44, 26, 0, 0, 14, 58, 88]).astype(np.float32) + np.float32(patient.wall)


def _radial_distance(canvas: Canvas, rx: np.ndarray, ry: np.ndarray, centre_y: float, power: float) -> np.ndarray:
    """About the signed distance in mm to a superellipse cylinder whose radii vary with z (negative inside)."""
    dy = canvas.y - np.float32(centre_y)
    u = np.abs(canvas.x) / rx[:, None, None]
    v = np.abs(dy) / ry[:, None, None]
    if abs(power - 2.0) < 1e-3:
        r = np.sqrt(u * u + v * v)
    else:
        r = (u ** np.float32(power) + v ** np.float32(power)) ** np.float32(1 / power)
    rho = np.sqrt(canvas.x * canvas.x + dy * dy)
    return rho - rho / np.maximum(r, np.float32(1e-3))


def paint_trunk(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> Trunk:
    """Paint the body, thorax and spine on an empty canvas and return the surfaces the organs must respect."""
    heights = canvas.axes[0]
    rx, ry = _cavity_radii(heights)
    muscle = _outer_thickness(heights, patient)
    wall = _radial_distance(canvas, rx, ry, -6.0, patient.squareness)
    outside = wall - muscle[:, None, None]
    # Fat is thicker behind and at the flanks than over the sternum.
    fat = np.float32(patient.fat) * (1 + 0.25 * np.tanh(canvas.y / 60)) + 2.5 * canvas.noises[0]
    tissue = canvas.tissue
    tissue[outside < fat] = Tissue.SKIN
    tissue[outside < fat - 2.5] = Tissue.FAT
    tissue[outside < 0] = Tissue.MUSCLE
    tissue[wall < 0] = Tissue.VISCERAL_FAT
    _paint_muscle_fat(canvas, wall, outside)
    diaphragm = _diaphragm(canvas, patient, rx, ry)
    above = canvas.z - diaphragm
    trunk = Trunk(wall, above)
    _paint_ribs(canvas, wall, rng)
    _paint_lungs(canvas, trunk)
    _paint_mediastinum(canvas, patient, rng)
    _paint_pelvis(canvas)
    _paint_back(canvas, patient)
    if patient.arms:
        _paint_arms(canvas, patient, rng)
    return trunk


def _paint_muscle_fat(canvas: Canvas, wall: np.ndarray, outside: np.ndarray) -> None:
    """Fatty streaks between the muscle layers."""
    streak = (np.abs(canvas.noises[1]) < 0.10) & (wall > 3) & (outside < -2)
    canvas.tissue[streak] = Tissue.FAT


def _diaphragm(canvas: Canvas, patient: Patient, rx: np.ndarray, ry: np.ndarray) -> np.ndarray:
    """Height of the diaphragm at every voxel: two domes that fall towards the ribs, lowest behind."""
    x, y = canvas.x, canvas.y
    side = 1 / (1 + np.exp(-x / 14))
    centre_x = np.float32(118 + patient.breath) - np.float32(14) * side
    dx = (np.abs(x) - 58) / 72
    dy = (y + 14) / np.where(y > -14, np.float32(84), np.float32(105))
    r2 = dx * dx + dy * dy
    fall = np.where(y > -14, np.float32(92), np.float32(62))
    return centre_x - fall * r2 * np.sqrt(r2)


def _paint_ribs(canvas: Canvas, wall: np.ndarray, rng: np.random.Generator) -> None:
    """Oblique ribs in the wall of the chest and the sternum in front."""
    box = canvas.box(np.array([-20.0, -400, -400]), np.array([275.0, 400, 400]))
    if box is None:
        return
    z, y, x = canvas.z[box], canvas.y[box], canvas.x[box]
    near = (wall[box] > 1) & (wall[box] < 9)
    lowest = 8 + (60 - y) * np.float32(0.62)
    phase = (z - np.float32(0.42) * y + np.float32(rng.uniform(0, 24))) * np.float32(2 * np.pi / 25)
    rib = near & (np.cos(phase) > 0.35) & (z > lowest) & (z < 262)
    bony = rib & (y > -52 - 0.1 * np.abs(x))
    canvas.tissue[box][rib] = Tissue.CARTILAGE
    canvas.tissue[box][bony] = Tissue.BONE
    sternum = (wall[box] > 1) & (wall[box] < 10) & (np.abs(x) < 15) & (y < 0) & (z > 105) & (z < 235)
    canvas.tissue[box][sternum] = Tissue.MARROW


def _paint_lungs(canvas: Canvas, trunk: Trunk) -> None:
    """Both lungs; between them the mediastinum stays fat."""
    low = np.array([-30.0, -130, -140])
    box = canvas.box(low, np.array([290.0, 130, 140]))
    if box is None:
        return
    x, y = canvas.x[box], canvas.y[box]
    half = np.float32(30) + 3 * canvas.noises[2][box]
    depth = np.float32(78)
    mediastinum = (x / half) ** 2 + ((y + 18) / depth) ** 2 < 1
    chest = (trunk.wall_distance[box] < -2.5) & (trunk.above_diaphragm[box] > 1.5) & ~mediastinum
    tissue = canvas.tissue[box]
    # Vessels stay part of the lung, as in reference label maps; `texture.paint_hu` draws them as intensity.
    tissue[chest & (x < 0)] = Tissue.LUNG_RIGHT
    tissue[chest & (x >= 0)] = Tissue.LUNG_LEFT


def _paint_mediastinum(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Airways, oesophagus, heart, aorta with its arch, vena cava inferior and superior."""
    s = patient.shift_x
    lift = 0.6 * patient.breath
    heart = np.array([143 + lift, -32, 20]) + rng.normal(0, 4, 3)
    size = rng.uniform(0.9, 1.14)
    outer = canvas.ellipsoid(heart, np.array([50, 44, 56]) * size, tilt=(0.25, -0.35), rough=0.05)
    canvas.paint(outer, Tissue.VISCERAL_FAT)
    muscle = canvas.ellipsoid(heart, np.array([46, 40, 52]) * size, tilt=(0.25, -0.35), rough=0.05)
    canvas.paint(muscle, Tissue.HEART_WALL)
    for offset, radii in (((-6, -6, 22), (30, 19, 20)), ((2, -8, -20), (30, 22, 22)), ((14, 20, 2), (22, 14, 28))):
        chamber = canvas.ellipsoid(heart + np.array(offset) * size, np.array(radii) * size, rough=0.08)
        canvas.paint(chamber, Tissue.HEART_BLOOD)
    airway = smooth_path([[275, 4, s], [232, 8, s], [196, 10, s]])
    canvas.paint(canvas.tube(airway, np.full(len(airway), 11.0)), Tissue.SOFT)
    canvas.paint(canvas.tube(airway, np.full(len(airway), 9.0)), Tissue.AIRWAY)
    for end in ([172, 14, -34], [168, 18, 38]):
        bronchus = np.array([[197, 10, s], end], dtype=np.float64)
        canvas.paint(canvas.tube(bronchus, np.array([8.5, 7.0])), Tissue.SOFT)
        canvas.paint(canvas.tube(bronchus, np.array([6.5, 5.0])), Tissue.AIRWAY)
    gullet = np.array([[275.0, 22, 4 + s], [180, 22, 6 + s], [100, 12, 14 + s]])
    canvas.paint(canvas.tube(gullet, np.full(3, 7.5), rough=0.6), Tissue.SOFT)
    upper = np.array([[250.0, -10, -24 + s], [190, -8, -26 + s], [155, -10, -24 + s]])
    canvas.paint(canvas.tube(upper, np.full(3, 9.0)), Tissue.VEIN)
    trunk = np.array([[178.0, -26, 14], [186, -4, 24], [182, 6, 40]])
    canvas.paint(canvas.tube(trunk, np.full(3, 12.0)), Tissue.HEART_BLOOD)
    paint_great_vessels(canvas, patient, rng)


def paint_great_vessels(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Aorta from the root to the bifurcation, iliac arteries, vena cava inferior and iliac veins."""
    s = patient.shift_x
    wide = rng.uniform(0.85, 1.25)

    def front(z: float) -> float:
        """The vessel bed in front of the vertebral bodies."""
        return float(patient.spine_y(z)) - 28

    ascending = [[146, -24, -2 + s, 14], [176, -26, -10 + s, 14], [202, -16, -6 + s, 14], [210, 2, 8 + s, 13]]
    descending = [[200, 24, 20 + s, 12.5], [170, 32, 25 + s, 12], [120, front(120) + 8, 22 + s, 11.5]]
    abdominal = [[z, front(z), x + s, r] for z, x, r in ((70, 14, 11), (20, 11, 10), (-40, 9, 9.5), (-92, 6, 9))]
    path = smooth_path(ascending + descending + abdominal, 3)
    canvas.paint(canvas.tube(path[:, :3], path[:, 3] * wide, rough=0.4), Tissue.AORTA)
    cava = [[-100, front(-100), -16, 10], [-40, front(-40), -20, 11], [20, front(20) - 2, -22, 11.5]]
    cava += [[70, front(70) - 6, -24, 12], [118 + 0.6 * patient.breath, -8, -22, 12]]
    path = smooth_path(cava, 3) + np.array([0, 0, s, 0])
    canvas.paint(canvas.tube(path[:, :3], path[:, 3] * rng.uniform(0.85, 1.1), rough=0.5, flat=1.2), Tissue.CAVA)
    for side in (-1, 1):
        for start, tissue, back in ((6, Tissue.ARTERY, 0), (-16, Tissue.VEIN, 8)):
            limb = smooth_path(
                [[-96, front(-96), start + s], [-130, 22 + back, 30 * side], [-190, 12 + back, 58 * side],
                 [-250, -42 + back, 66 * side], [-300, -58 + back, 62 * side]], 2)  # fmt: skip
            canvas.paint(canvas.tube(limb, np.full(len(limb), 6.0 if tissue == Tissue.ARTERY else 7.0)), tissue)


def _paint_back(canvas: Canvas, patient: Patient) -> None:
    """Paraspinal and psoas muscles, vertebrae with posterior elements, discs, sacrum and the spinal canal."""
    for side in (-1, 1):
        path = np.array([[z, float(patient.spine_y(z)) + 34, 30 * side] for z in (275, 150, 60, -40, -140)])
        canvas.paint(canvas.tube(path, np.array([18.0, 18, 21, 24, 20]), rough=1.0, flat=1.15), Tissue.MUSCLE)
        psoas = smooth_path([[20, 44, 24 * side, 8], [-50, 38, 38 * side, 19], [-130, 24, 52 * side, 22],
                             [-200, 0, 66 * side, 20], [-280, -20, 86 * side, 18]], 2)  # fmt: skip
        canvas.paint(canvas.tube(psoas[:, :3], psoas[:, 3], rough=0.8), Tissue.MUSCLE)
    box = canvas.box(np.array([-320.0, 10, -60]), np.array([300.0, 120, 60]))
    if box is None:
        return
    z = canvas.z[box]
    x = canvas.x[box] - np.float32(patient.shift_x)
    y = canvas.y[box] - patient.spine_y(z)
    tissue = canvas.tissue[box]
    size = np.interp(z[:, :1, :1], [-130, 0, 270], [1.12, 1.0, 0.72]).astype(np.float32)
    pitch = np.float32(32)
    phase = np.abs(((z + 4) / pitch + 0.5) % 1 - 0.5)  # 0 in the middle of a vertebra, 0.5 in the disc
    spine = z > -132
    waist = 1 - 0.10 * (1 - np.minimum(phase / 0.4, 1))
    body = np.sqrt((x / (22 * size)) ** 2 + (y / (17 * size)) ** 2) / waist
    disc = phase > 0.41
    tissue[(body < 1) & spine] = Tissue.CARTILAGE
    tissue[(body < 1) & spine & ~disc] = Tissue.VERTEBRA_SHELL
    tissue[(body < 0.86) & spine & (phase < 0.36)] = Tissue.VERTEBRA_CORE
    canal_y = y - 25 * size
    ring = np.sqrt(x * x + canal_y * canal_y)
    wings = (np.abs(canal_y - 2) < 5) & (np.abs(x) < 34) & (phase < 0.17)
    spinous = (np.abs(x) < 3.8) & (canal_y > 8) & (canal_y < 36) & (phase < 0.30)
    arch = (ring < 15) & (phase < 0.42)
    tissue[(wings | spinous | arch) & spine & (body >= 1)] = Tissue.VERTEBRA_SHELL
    sacrum = ~spine & (np.abs(x) < 46 + (z + 132) * 0.25) & (np.abs(y - 4 + (z + 132) * 0.22) < 17) & (z > -255)
    tissue[sacrum] = Tissue.MARROW
    tissue[(ring < patient.cord_radius + 1.5) & (z > -132)] = Tissue.VISCERAL_FAT
    tissue[(ring < patient.cord_radius) & (z > -132)] = Tissue.CORD


def _paint_pelvis(canvas: Canvas) -> None:
    """Iliac wings as curved plates, hip joints, femora and gluteal muscles."""
    if canvas.axes[0][0] > -60:
        return
    for side in (-1, 1):
        wing = canvas.ellipsoid((-150, 22, 92 * side), (64, 58, 30), tilt=(-0.2, 0.15 * side), rough=0.03)
        inner = canvas.ellipsoid((-150, 10, 82 * side), (70, 60, 30), tilt=(-0.2, 0.15 * side), rough=0.03)
        if wing is not None and inner is not None:
            plate = wing.mask.copy()
            _subtract(plate, wing, inner)
            canvas.paint(wing, Tissue.MARROW, plate)
            shell = plate & (wing.value > -0.09)
            canvas.paint(wing, Tissue.BONE, shell)
        for centre, radius in (((-248, 4, 92 * side), 34), ((-292, -14, 40 * side), 22)):
            canvas.paint(canvas.ellipsoid(centre, (radius,) * 3, rough=0.05), Tissue.BONE)
            canvas.paint(canvas.ellipsoid(centre, (radius - 5,) * 3, rough=0.05), Tissue.MARROW)
        femur = np.array([[-252.0, 2, 100 * side], [-300, 6, 136 * side]])
        canvas.paint(canvas.tube(femur, np.array([22.0, 18])), Tissue.BONE)


def _subtract(mask: np.ndarray, region: Region, other: Region) -> None:
    """Clear ``mask`` (over ``region.box``) where ``other`` is inside."""
    own, cut = [], []
    for a, b in zip(region.box, other.box, strict=True):
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start >= stop:
            return
        own.append(slice(start - a.start, stop - a.start))
        cut.append(slice(start - b.start, stop - b.start))
    mask[tuple(own)] &= ~other.mask[tuple(cut)]


def _paint_arms(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    """Arms beside the trunk."""
    gap = patient.fat + patient.wall + rng.uniform(48, 60)
    for side in (-1, 1):
        path = np.array([[z, rng.uniform(0, 30), (124 + gap) * side] for z in (260, 60, -120, -300)])
        for radius, tissue in (
            (39, Tissue.SKIN),
            (36.5, Tissue.FAT),
            (30, Tissue.MUSCLE),
            (11, Tissue.BONE),
            (5, Tissue.MARROW),
        ):
            region = canvas.tube(path, np.full(4, float(radius)))
            if region is None:
                break
            free = np.isin(canvas.tissue[region.box], _ARM_MAY_REPLACE)
            canvas.paint(region, tissue, free)


_ARM_MAY_REPLACE = (Tissue.AIR, Tissue.SKIN, Tissue.FAT, Tissue.MUSCLE, Tissue.BONE)
