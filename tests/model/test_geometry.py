"""Frame changes: canonical axes, slice windows, placement by affine."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

from medvl_sam2.errors import GeometryError
from medvl_sam2.geometry import CanonicalTransform, SliceCrop, global_view, resample_to
from medvl_sam2.types import Geometry

SHAPE = (5, 7, 9)
CODES = [
    "".join(pair[sign] for pair, sign in zip(axes, signs))
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for signs in itertools.product((0, 1), repeat=3)
]


def rotation(degrees: tuple[float, float, float]) -> np.ndarray:
    out = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def grid(code: str, degrees: tuple[float, float, float] = (0, 0, 0), shape: tuple[int, int, int] = SHAPE) -> Geometry:
    """Stored axes grow towards the letters of ``code``, spacing (0.7, 1.3, 4) mm, turned by ``degrees``."""
    affine = np.eye(4)
    for axis, letter in enumerate(code):
        world, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        affine[:3, axis] = 0
        affine[world, axis] = sign * (0.7, 1.3, 4.0)[axis]
    affine[:3, :3] = rotation(degrees) @ affine[:3, :3]
    affine[:3, 3] = (11.0, -23.0, 37.0)
    return Geometry(shape, affine)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (12, -9, 17)], ids=["straight", "oblique"])
@pytest.mark.parametrize("code", CODES)
def test_canonical_axes_grow_to_superior_posterior_left(code: str, degrees: tuple[float, float, float]) -> None:
    geometry = grid(code, degrees)
    transform = CanonicalTransform(geometry)
    assert "".join(nib.aff2axcodes(transform.canonical_geometry.affine)) == "SPL"
    stored = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    canonical = transform.forward_array(stored)
    assert canonical.shape == transform.shape == transform.canonical_geometry.shape
    assert transform.spacing == pytest.approx(transform.canonical_geometry.spacing)
    assert np.shares_memory(canonical, stored)
    assert np.array_equal(transform.inverse_array(canonical), stored)

    clicks = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1).reshape(-1, 3)
    moved = transform.forward_points(clicks)
    assert np.array_equal(transform.inverse_points(moved), clicks)
    z, y, x = moved.astype(int).T
    assert np.array_equal(canonical[z, y, x], stored[tuple(clicks.T)])
    np.testing.assert_allclose(
        transform.canonical_geometry.voxel_to_world(moved), geometry.voxel_to_world(clicks), atol=1e-9
    )


def test_forty_eight_axis_orders() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "ASL"])
def test_box_keeps_its_voxels(code: str) -> None:
    transform = CanonicalTransform(grid(code))
    mask = np.zeros(SHAPE, dtype=bool)
    mask[1:4, 2:7, 3:5] = True
    low, high = transform.forward_box(np.array([[1, 2, 3], [3, 6, 4]])).astype(int)
    inside = np.zeros(transform.shape, dtype=bool)
    inside[low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1] = True
    assert np.array_equal(transform.inverse_array(inside), mask)
    assert np.array_equal(transform.inverse_box([high, low]), [[1, 2, 3], [3, 6, 4]])


def test_leading_axes_are_kept_and_wrong_grids_named() -> None:
    transform = CanonicalTransform(grid("PIR"))
    stack = np.random.default_rng(0).random((2, *SHAPE))
    assert np.array_equal(transform.inverse_array(transform.forward_array(stack)), stack)
    assert np.array_equal(transform.forward_array(stack)[1], transform.forward_array(stack[1]))
    with pytest.raises(GeometryError, match=r"\(5, 7, 8\)"):
        transform.forward_array(np.zeros((5, 7, 8)))


def test_oblique_beyond_45_degrees_uses_every_axis_once() -> None:
    for degrees in [(45, 45, 45), (50, 40, 60), (-45, 35, 44)]:
        transform = CanonicalTransform(grid("LPS", degrees))
        assert sorted(transform.shape) == sorted(SHAPE)
        back = transform.inverse_points(transform.forward_points([[4, 0, 8]]))
        assert back.tolist() == [[4, 0, 8]]


CROPS = [
    ((40, 61), (0.7, 0.7), 18.0, 32),
    ((40, 61), (0.7, 1.9), 40.0, 32),
    ((40, 61), (0.4, 0.9), 60.0, 32),  # downsampled in both axes
    ((97, 83), (0.5, 0.5), 60.0, 32),  # 3.75 voxels a pixel
    ((33, 45), (3.0, 3.0), 30.0, 64),  # upsampled
]


@pytest.mark.parametrize(("shape", "spacing", "extent", "size"), CROPS)
def test_points_agree_with_sampled_pixels(
    shape: tuple[int, int], spacing: tuple[float, float], extent: float, size: int
) -> None:
    for y, x in [(10, 12), (20, 31), (31, 17)]:
        image = torch.zeros(1, 1, *shape)
        image[0, 0, y, x] = 1.0
        crop = SliceCrop.around([[y - 3, x - 1], [y + 2, x + 4]], spacing, 1.0, size, extent)
        pixels = crop.sample(image)[0, 0].double().numpy()
        rows, columns = np.indices(pixels.shape)
        found = np.array([(columns * pixels).sum(), (rows * pixels).sum()]) / pixels.sum()
        expected = crop.forward_points([[y, x]])[0]
        assert np.abs(found - expected).max() < 0.5
        np.testing.assert_allclose(crop.inverse_points([expected]), [[y, x]], atol=1e-9)


def test_sample_of_a_matching_window_is_the_slice() -> None:
    image = torch.rand(3, 2, 24, 24)
    crop = SliceCrop.whole((24, 24), (0.8, 0.8), 24)
    torch.testing.assert_close(crop.sample(image), image)
    torch.testing.assert_close(crop.paste(crop.sample(image[:, 0]), (24, 24), -9.0), image[:, 0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(crop.forward_points([[5, 11]]), [[11, 5]])


@pytest.mark.parametrize("low_res", [False, True])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.8, 1.6)])
def test_paste_inverts_sample(low_res: bool, spacing: tuple[float, float]) -> None:
    shape = (70, 54)
    y, x = torch.meshgrid(torch.arange(70.0), torch.arange(54.0), indexing="ij")
    image = (torch.sin(y / 11) + torch.cos(x / 8))[None]
    for crop in (
        SliceCrop.whole(shape, spacing, 128),
        SliceCrop.around([[20, 20], [45, 33]], spacing, 1.5, 128, 10.0),
        SliceCrop.around([[0, 40], [20, 53]], spacing, 1.5, 128, 10.0),  # hangs over the border
    ):
        seen = crop.sample(image, pad=0.0)
        if low_res:
            seen = torch.nn.functional.avg_pool2d(seen, 2)
        values, (y0, y1, x0, x1) = crop.paste_region(seen, shape)
        inner = (values - image[:, y0:y1, x0:x1])[:, 2:-2, 2:-2].abs()
        assert inner.max() < 0.1
        full = crop.paste(seen, shape, outside=-7.0)
        assert torch.equal(full[:, y0:y1, x0:x1], values)
        beyond = torch.ones(shape, dtype=torch.bool)
        beyond[y0:y1, x0:x1] = False
        assert (full[0][beyond] == -7.0).all()


def test_bounds_are_the_voxels_inside_the_window() -> None:
    crop = SliceCrop((20.0, 30.0), 10.0, 64, (2.0, 1.0))
    assert crop.bounds((50, 50)) == (8, 13, 25, 36)
    for y, x in itertools.product(range(50), repeat=2):
        px, py = crop.forward_points([[y, x]])[0]
        inside = -0.5 <= px <= 63.5 and -0.5 <= py <= 63.5
        assert inside == (8 <= y < 13 and 25 <= x < 36)
    away = SliceCrop((500.0, 30.0), 10.0, 64, (2.0, 1.0))
    values, (y0, y1, _, _) = away.paste_region(torch.ones(2, 64, 64), (50, 50))
    assert y0 == y1
    assert values.shape[:2] == (2, 0)
    assert (away.sample(torch.ones(2, 1, 50, 50), pad=-3.0) == -3.0).all()
    assert (away.paste(torch.ones(2, 64, 64), (50, 50), -5.0) == -5.0).all()


def test_pad_fills_beyond_the_slice() -> None:
    crop = SliceCrop.whole((20, 60), (1.0, 1.0), 60)
    seen = crop.sample(torch.ones(1, 20, 60), pad=-1.0)[0, 0]
    assert (seen[:18] == -1.0).all()
    torch.testing.assert_close(seen[22:38], torch.ones(16, 60))


def test_downsampling_averages() -> None:
    stripes = (torch.arange(256) % 2).float().expand(1, 256, 256)
    seen = SliceCrop.whole((256, 256), (0.5, 0.5), 32).sample(stripes)
    assert (seen - 0.5).abs().max() < 0.01


@pytest.mark.parametrize("extent", [6.0, 20.0, 33.0, 50.0, 90.0])
def test_every_pixel_reads_the_place_its_point_names(extent: float) -> None:
    """A slice that holds its own coordinates, at zooms from 0.3 to 5 voxels a pixel."""
    rows, columns = torch.meshgrid(torch.arange(300.0), torch.arange(200.0), indexing="ij")
    crop = SliceCrop((77.3, 61.9), extent, 40, (0.5, 0.6))
    seen = crop.sample(torch.stack([rows, columns])[None])[0]
    pixels = np.stack(np.meshgrid(np.arange(40), np.arange(40), indexing="xy"), axis=-1).reshape(-1, 2)
    places = crop.inverse_points(pixels)
    y, x = seen.reshape(2, -1).numpy()
    np.testing.assert_allclose(np.stack([y, x], axis=1), places, atol=2e-3)


def test_nearest_keeps_labels() -> None:
    labels = torch.randint(0, 9, (2, 90, 90), dtype=torch.uint8)
    seen = SliceCrop.whole((90, 90), (1.0, 1.0), 32).sample(labels, mode="nearest")
    assert torch.equal(seen, seen.round())
    assert seen.shape == (2, 1, 32, 32)


def test_whole_does_not_blow_up_a_patch() -> None:
    crop = SliceCrop.whole((40, 40), (0.5, 0.5), 128, min_mm_per_px=1.0)
    assert crop.mm_per_px == 1.0
    np.testing.assert_allclose(crop.forward_points([[19.5, 19.5]]), [[63.5, 63.5]])


def test_impossible_window_is_refused() -> None:
    with pytest.raises(GeometryError, match="extent"):
        SliceCrop((0.0, 0.0), 0.0, 64, (1.0, 1.0))


@pytest.mark.parametrize("code", ["RAS", "PIR", "SPL"])
def test_resample_between_storage_orders_is_exact(code: str) -> None:
    canonical = np.random.default_rng(1).integers(0, 5, (4, 6, 8)).astype(np.uint8)
    home = CanonicalTransform(grid(code, (10, 5, -8)))
    canonical = np.random.default_rng(1).integers(0, 5, home.shape).astype(np.uint8)
    placed = resample_to(canonical, home.canonical_geometry, home.geometry)
    assert placed.dtype == np.uint8
    assert np.array_equal(placed, home.inverse_array(canonical))


def test_resample_to_a_larger_coarser_grid() -> None:
    fine = grid("RAS", shape=(12, 12, 12))
    mask = np.zeros(fine.shape, dtype=bool)
    mask[4:8, 2:6, 6:12] = True
    affine = fine.affine.copy()
    affine[:3, :3] *= 2
    affine[:3, 3] = fine.voxel_to_world([[-7.5, -3.5, -1.5]])[0]
    coarse = Geometry((14, 9, 8), affine)
    placed = resample_to(mask, fine, coarse)
    assert placed.dtype == np.bool_
    assert placed.sum() * 8 == mask.sum()
    want = fine.voxel_to_world([np.argwhere(mask).mean(axis=0)])
    np.testing.assert_allclose(coarse.voxel_to_world([np.argwhere(placed).mean(axis=0)]), want, atol=1e-6)
    with pytest.raises(GeometryError):
        resample_to(mask[:-1], fine, coarse)


def test_global_view_averages_down_and_interpolates_up() -> None:
    stripes = (torch.arange(64) % 2).float().expand(6, 32, 64)
    view = global_view(stripes, (12, 8, 16))
    assert view.shape == (1, 12, 8, 16)
    torch.testing.assert_close(view, torch.full_like(view, 0.5))
    ramp = torch.arange(4.0)[:, None, None].expand(4, 8, 8)
    assert (global_view(ramp, (8, 4, 4))[0, :, 0, 0].diff() >= 0).all()
