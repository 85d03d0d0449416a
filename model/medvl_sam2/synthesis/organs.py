"""Abdominal organs as implicit shapes inside the trunk: liver, spleen, kidneys, stomach, pancreas, bowel, bladder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medvl_sam2.synthesis.anatomy import Patient, Trunk
from medvl_sam2.synthesis.shapes import Canvas, Region, smooth_path
from medvl_sam2.synthesis.tissues import Tissue

REMOVABLE: tuple[str, ...] = ("gallbladder", "spleen", "kidney_right", "kidney_left")
"""Organs a patient may have lost to surgery."""


@dataclass(frozen=True)
class Layout:
    """Where the organs of one patient lie: centre (z, y, x) and radii by class name, reference mm."""

    centres: dict[str, np.ndarray]
    radii: dict[str, np.ndarray]
    removed: frozenset[str]


def draw_layout(rng: np.random.Generator, patient: Patient, removed: frozenset[str]) -> Layout:
    """Random organ positions and sizes; what touches the diaphragm moves with the breath."""
    b = patient.breath
    means = {
        "liver": ([48 + b, -2, -76], [88, 82, 66], 5.0),
        "spleen": ([58 + b, 34, 98], [56, 44, 32], 6.0),
        "kidney_right": ([-18 + 0.5 * b, 34, -58], [55, 27, 28], 5.0),
        "kidney_left": ([-4 + 0.5 * b, 34, 60], [57, 27, 28], 5.0),
        "gallbladder": ([-6 + 0.8 * b, -50, -44], [34, 17, 17], 5.0),
        "urinary_bladder": ([-258, -22, 0], [34, 34, 40], 5.0),
        "stomach": ([60 + b, -20, 56], [1, 1, 1], 6.0),
        "pancreas": ([14 + 0.6 * b, 0, 0], [1, 1, 1], 4.0),
        "colon": ([0, 0, 0], [1, 1, 1], 5.0),
    }
    spread = {"urinary_bladder": (0.65, 1.35), "gallbladder": (0.75, 1.2), "spleen": (0.85, 1.25)}
    centres, radii = {}, {}
    for name, (centre, radius, jitter) in means.items():
        low, high = spread.get(name, (0.88, 1.13))
        centres[name] = np.array(centre) + np.clip(rng.standard_normal(3), -1.8, 1.8) * jitter
        radii[name] = np.array(radius) * rng.uniform(low, high) * rng.uniform(0.94, 1.06, 3)
    return Layout(centres, radii, removed)


def paint_organs(
    canvas: Canvas, trunk: Trunk, patient: Patient, layout: Layout, rng: np.random.Generator
) -> dict[str, int]:
    """Paint all abdominal organs. Returns, for each removed organ, the voxels it would have taken."""
    missing: dict[str, int] = {}
    _paint_small_bowel(canvas, trunk)
    _paint_spleen(canvas, trunk, layout, missing)
    _paint_liver(canvas, trunk, layout, rng)
    _paint_stomach(canvas, trunk, layout, rng)
    _paint_colon(canvas, trunk, patient, layout, rng)
    for side, sign in (("right", -1), ("left", 1)):
        _paint_kidney(canvas, layout, side, sign, missing)
    _paint_pancreas(canvas, layout, rng)
    _paint_gallbladder(canvas, layout, missing)
    bladder = canvas.ellipsoid(layout.centres["urinary_bladder"], layout.radii["urinary_bladder"] + 4, rough=0.03)
    canvas.paint(bladder, Tissue.SOFT)
    inner = canvas.ellipsoid(layout.centres["urinary_bladder"], layout.radii["urinary_bladder"], rough=0.03)
    canvas.paint(inner, Tissue.BLADDER)
    return missing


def _abdominal(canvas: Canvas, trunk: Trunk, region: Region, gap: float = 3.0) -> np.ndarray:
    """Voxels of the region's box below the diaphragm and within the body wall."""
    return (trunk.wall_distance[region.box] < -gap) & (trunk.above_diaphragm[region.box] < -1.5)


def _paint_small_bowel(canvas: Canvas, trunk: Trunk) -> None:
    """Loops in the middle of the abdomen, cut from a smooth noise field."""
    region = canvas.ellipsoid((-115, -28, 0), (105, 52, 84), rough=0.05, power=2.6)
    if region is None:
        return
    loops = _abdominal(canvas, trunk, region, 5) & (canvas.noises[5][region.box] > -0.15)
    free = canvas.tissue[region.box] == Tissue.VISCERAL_FAT
    canvas.paint(region, Tissue.BOWEL, loops & free)


def _paint_liver(canvas: Canvas, trunk: Trunk, layout: Layout, rng: np.random.Generator) -> None:
    """Right lobe under the right dome, left lobe as a wedge that thins out towards the left."""
    centre, radii = layout.centres["liver"], layout.radii["liver"]
    right = canvas.ellipsoid(centre, radii, tilt=(-0.10, 0.10), rough=0.03, power=2.5)
    if right is not None:
        # The visceral face rises towards the midline.
        x, z = canvas.x[right.box], canvas.z[right.box]
        face = z > centre[0] - radii[0] + np.clip((x - centre[2] + 8) * 1.0, 0, None) - 6
        inside = _abdominal(canvas, trunk, right) & face
        inside &= ~np.isin(canvas.tissue[right.box], _LIVER_YIELDS)
        canvas.paint(right, Tissue.LIVER, inside)
    reach = rng.uniform(0.8, 1.2)
    path = np.array([
        [centre[0] + 26, -34, -48], [centre[0] + 28, -46, -8], [centre[0] + 36, -50, 26 * reach],
        [centre[0] + 44, -44, 62 * reach],
    ])  # fmt: skip
    left = canvas.tube(path, np.array([42.0, 36, 25, 9]) * rng.uniform(0.9, 1.1), rough=1.5)
    if left is not None:
        free = ~np.isin(canvas.tissue[left.box], _LIVER_YIELDS)
        canvas.paint(left, Tissue.LIVER, _abdominal(canvas, trunk, left) & free)


_LIVER_YIELDS = (Tissue.SPLEEN, Tissue.CAVA, Tissue.AORTA, Tissue.MUSCLE)


def _paint_spleen(canvas: Canvas, trunk: Trunk, layout: Layout, missing: dict[str, int]) -> None:
    """A bean against the left posterior ribs, hollowed on its medial face."""
    centre, radii = layout.centres["spleen"], layout.radii["spleen"]
    region = canvas.ellipsoid(centre, radii, tilt=(0.2, -0.05), rough=0.04)
    if region is None:
        return
    x, y = canvas.x[region.box], canvas.y[region.box]
    hollow = ((x - centre[2] + 44) / 25) ** 2 + ((y - centre[1] + 22) / 34) ** 2 < 1
    inside = _abdominal(canvas, trunk, region) & ~hollow
    _paint_or_miss(canvas, region, inside, Tissue.SPLEEN, "spleen", layout, missing)


def _paint_kidney(canvas: Canvas, layout: Layout, side: str, sign: int, missing: dict[str, int]) -> None:
    """Cortex, medullary pyramids and the fatty sinus open to the midline, in a fat capsule."""
    name = f"kidney_{side}"
    centre, radii = layout.centres[name], layout.radii[name]
    tilt = (0.12, -0.22 * sign)
    capsule = canvas.ellipsoid(centre, radii + 7, tilt)
    region = canvas.ellipsoid(centre, radii, tilt, rough=0.03)
    if capsule is None or region is None:
        return
    # The kidney lies behind the liver, not in it: the liver keeps clear of its bed.
    bed = canvas.ellipsoid(centre + np.array([-6, 24, -14.0 * sign]), radii + np.array([10, 18, 20]))
    if bed is not None:
        canvas.paint(bed, Tissue.VISCERAL_FAT, canvas.tissue[bed.box] == Tissue.LIVER)
    soft = np.isin(canvas.tissue[capsule.box], _CAPSULE_REPLACES)
    canvas.paint(capsule, Tissue.VISCERAL_FAT, soft)
    sinus = canvas.ellipsoid(centre + np.array([0, -6, -16.0 * sign]), (22, 9, 17), rough=0.06)
    inside = region.mask
    if sinus is not None:
        hole = np.zeros(canvas.tissue.shape, dtype=bool)
        hole[sinus.box] = sinus.mask
        inside = inside & ~hole[region.box]
    cortex, medulla = (
        (Tissue.KIDNEY_RIGHT, Tissue.MEDULLA_RIGHT) if sign < 0 else (Tissue.KIDNEY_LEFT, Tissue.MEDULLA_LEFT)
    )
    _paint_or_miss(canvas, region, inside, cortex, name, layout, missing)
    if name not in layout.removed:
        pyramids = inside & (region.value < -0.30) & (canvas.noises[6][region.box] > -0.35)
        canvas.paint(region, medulla, pyramids)
        canvas.paint(sinus, Tissue.RENAL_SINUS)


def _paint_gallbladder(canvas: Canvas, layout: Layout, missing: dict[str, int]) -> None:
    """A pear below the liver."""
    region = canvas.ellipsoid(layout.centres["gallbladder"], layout.radii["gallbladder"], (-0.3, -0.15), rough=0.03)
    if region is not None:
        wall = canvas.ellipsoid(
            layout.centres["gallbladder"], layout.radii["gallbladder"] + 2, (-0.3, -0.15), rough=0.03
        )
        if wall is not None and "gallbladder" not in layout.removed:
            canvas.paint(wall, Tissue.SOFT, _soft_only(canvas, wall))
        _paint_or_miss(canvas, region, _soft_only(canvas, region), Tissue.GALLBLADDER, "gallbladder", layout, missing)


def _paint_or_miss(
    canvas: Canvas,
    region: Region,
    inside: np.ndarray,
    tissue: Tissue,
    name: str,
    layout: Layout,
    missing: dict[str, int],
) -> None:
    """Paint an organ, or only note how much of it the field of view would have shown."""
    if name in layout.removed:
        missing[name] = int(np.count_nonzero(region.mask & inside))
    else:
        canvas.paint(region, tissue, inside)


def _soft_only(canvas: Canvas, region: Region) -> np.ndarray:
    """Voxels that the gallbladder may displace."""
    return np.isin(canvas.tissue[region.box], _CAPSULE_REPLACES)


_CAPSULE_REPLACES = (
    Tissue.VISCERAL_FAT, Tissue.LIVER, Tissue.BOWEL, Tissue.SPLEEN, Tissue.COLON_WALL, Tissue.COLON_STOOL,
    Tissue.COLON_GAS, Tissue.STOMACH_WALL, Tissue.STOMACH_FLUID, Tissue.STOMACH_GAS, Tissue.MUSCLE, Tissue.SOFT,
)  # fmt: skip


def _paint_stomach(canvas: Canvas, trunk: Trunk, layout: Layout, rng: np.random.Generator) -> None:
    """From the fundus under the left dome to the antrum; gas collects in front because patients lie supine."""
    shift = layout.centres["stomach"]
    full = rng.uniform(0.75, 1.15)
    control = np.array([
        [38, 34, 8, 30], [14, 20, 12, 34], [-22, -6, 12, 28], [-48, -22, -6, 21], [-52, -24, -34, 15],
        [-42, -14, -62, 12],
    ])  # fmt: skip
    path = smooth_path(control + np.array([*shift, 0]), 2)
    region = canvas.tube(path[:, :3], path[:, 3] * full, rough=1.2)
    if region is None:
        return
    inside = _abdominal(canvas, trunk, region, 2) & ~np.isin(canvas.tissue[region.box], _STOMACH_YIELDS)
    canvas.paint(region, Tissue.STOMACH_WALL, inside)
    level = shift[1] - rng.uniform(-8, 26)
    lumen = inside & (region.value < -4)
    gas = lumen & (canvas.axes[1][region.box[1]][None, :, None] < level)
    canvas.paint(region, Tissue.STOMACH_FLUID, lumen)
    canvas.paint(region, Tissue.STOMACH_GAS, gas)


_STOMACH_YIELDS = (Tissue.SPLEEN, Tissue.MUSCLE, Tissue.AORTA, Tissue.CAVA)


def _paint_pancreas(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> None:
    """A curved tube from the duodenal loop over the spine to the splenic hilum."""
    shift = layout.centres["pancreas"]
    s = rng.uniform(0.85, 1.15)
    control = np.array([
        [-34, -8, -34, 13], [-14, -16, -28, 15], [0, -24, -6, 11], [8, -24, 20, 10.5], [16, -6, 48, 10],
        [26, 16, 74, 8],
    ])  # fmt: skip
    path = smooth_path(control * np.array([1, 1, 1, s]) + np.array([*shift, 0]), 3)
    duodenum = smooth_path(np.array([[2, -20, -50, 12], [-20, -4, -58, 13], [-44, 6, -50, 12], [-52, 0, -14, 11]])
                           + np.array([*shift, 0]), 2)  # fmt: skip
    loop = canvas.tube(duodenum[:, :3], duodenum[:, 3], rough=0.8)
    if loop is not None:
        canvas.paint(loop, Tissue.BOWEL, np.isin(canvas.tissue[loop.box], _CAPSULE_REPLACES))
    gland = canvas.tube(path[:, :3], path[:, 3], rough=1.6)
    if gland is not None:
        canvas.paint(gland, Tissue.PANCREAS, np.isin(canvas.tissue[gland.box], _CAPSULE_REPLACES))
    vein = path[6:, :3] + np.array([0, 12, 0])
    splenic = canvas.tube(vein, np.full(len(vein), 4.5))
    if splenic is not None:
        canvas.paint(splenic, Tissue.VEIN, canvas.tissue[splenic.box] == Tissue.VISCERAL_FAT)


def _paint_colon(canvas: Canvas, trunk: Trunk, patient: Patient, layout: Layout, rng: np.random.Generator) -> None:
    """The frame of the abdomen with stool and gas, down to the rectum."""
    b = 0.5 * patient.breath
    sag = rng.uniform(-55, 0)
    width = rng.uniform(0.8, 1.12)
    control = np.array([
        [-140, -24, -84, 25], [-100, -10, -98, 25], [-50, 2, -98, 23], [-22 + b, -26, -92, 21],
        [-30 + 0.6 * sag, -62, -50, 20], [-34 + sag, -68, 0, 20], [-16 + 0.6 * sag, -62, 52, 19],
        [22 + b, -16, 96, 18], [-30, 16, 102, 16], [-110, 8, 98, 15], [-165, -8, 78, 15], [-190, -20, 34, 16],
        [-178, 0, -6, 16], [-212, 38, -2, 17], [-255, 48, 0, 20], [-292, 38, 0, 18],
    ])  # fmt: skip
    control[:, :3] += np.clip(rng.standard_normal((len(control), 3)), -1.5, 1.5) * 5
    path = smooth_path(control + np.array([*layout.centres["colon"], 0]), 3)
    region = canvas.tube(path[:, :3], path[:, 3] * width, rough=2.6)
    if region is None:
        return
    free = np.isin(canvas.tissue[region.box], (Tissue.VISCERAL_FAT, Tissue.BOWEL, Tissue.STOMACH_WALL, Tissue.MUSCLE))
    inside = (trunk.wall_distance[region.box] < -1.5) & (trunk.above_diaphragm[region.box] < -2) & free
    canvas.paint(region, Tissue.COLON_WALL, inside)
    lumen = inside & (region.value < -3)
    canvas.paint(region, Tissue.COLON_STOOL, lumen)
    gassy = canvas.noises[7][region.box] - canvas.y[region.box] / 90 + canvas.noises[1][region.box] * 0.4
    canvas.paint(region, Tissue.COLON_GAS, lumen & (gassy > rng.uniform(0.2, 1.1)))
