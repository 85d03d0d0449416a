"""What the encoders see: windows for CT, percentiles for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medvl_sam2.errors import VolumeError
from medvl_sam2.intensity import IntensityRange, global_channel, guess_modality, replace_non_finite, slice_channels
from medvl_sam2.types import Modality


def ct(seed: int = 0) -> np.ndarray:
    """Air around soft tissue with bone and fat, HU."""
    rng = np.random.default_rng(seed)
    array = np.full((4, 20, 24), -1000, dtype=np.int16)
    array[:, 4:16, 4:20] = rng.normal(40, 15, (4, 12, 16))
    array[:, 5:7, 5:8] = -100
    array[:, 10:12, 10:12] = 700
    return array


def test_ct_windows_have_their_black_and_white() -> None:
    hu = np.array([-3024, -1250, -500, -160, 40, 240, 250, 400, 1300, 3000], dtype=np.int16).reshape(1, 1, -1)
    soft, lung, bone = slice_channels(hu, Modality.CT)[0, :, 0]
    np.testing.assert_allclose(soft, [-1, -1, -1, -1, 0, 1, 1, 1, 1, 1], atol=1e-6)
    assert lung[0] == lung[1] == -1
    assert lung[2] == pytest.approx(0)
    assert lung[6] == 1
    assert bone[2] == -1
    assert bone[7] == pytest.approx(0)
    assert bone[8] == bone[9] == 1


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_scanner_padding_changes_nothing_else(padding: int) -> None:
    plain, padded = ct(), ct()
    padded[:, :, :3] = padding
    for mapped in (slice_channels, global_channel):
        left, right = mapped(plain, Modality.CT), mapped(padded, Modality.CT)
        torch.testing.assert_close(left[..., 3:], right[..., 3:])
        assert (right[..., :3] <= left[..., :3]).all()  # as dark as air, or darker
    assert guess_modality(padded) is Modality.CT


def test_global_ct_channel_gives_soft_tissue_most_of_the_range() -> None:
    hu = np.array([-2000, -1000, -30, 85, 200, 1000, 3000], dtype=np.float32).reshape(1, 1, -1)
    np.testing.assert_allclose(global_channel(hu, Modality.CT).ravel(), [0, 0, 0.2, 0.55, 0.9, 1, 1], atol=1e-6)


def test_mr_is_indifferent_to_scale_and_spikes() -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((6, 30, 30), dtype=np.float32)
    array[:, 5:25, 5:25] = rng.uniform(100, 900, (6, 20, 20))
    first = slice_channels(array, Modality.MR)
    assert first.shape == (6, 3, 30, 30)
    assert torch.equal(first[:, 0], first[:, 2])
    assert first.min() == -1
    assert first.max() == 1
    assert first[:, :, 5:25, 5:25].std() > 0.4
    torch.testing.assert_close(slice_channels(array * 7, Modality.MR), first, atol=1e-5, rtol=0)
    array[0, 6, 6] = 1e7
    torch.testing.assert_close(slice_channels(array, Modality.MR)[1:], first[1:], atol=0.02, rtol=0)


def test_some_slices_look_as_in_the_whole() -> None:
    array = np.random.default_rng(2).gamma(2, 200, (8, 16, 16)).astype(np.float32)
    whole = slice_channels(array, Modality.OTHER)
    some = slice_channels(array[3:5], Modality.OTHER, IntensityRange.of(array))
    assert torch.equal(some, whole[3:5])


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_flat_images_stay_finite(value: float) -> None:
    array = np.full((2, 4, 4), value, dtype=np.float32)
    for modality in Modality:
        assert torch.isfinite(slice_channels(array, modality)).all()
        assert torch.isfinite(global_channel(array, modality)).all()


def test_flipped_views_and_half_precision_are_taken() -> None:
    array = ct()[::-1, :, ::-1]
    half = slice_channels(array, Modality.CT, dtype=torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), slice_channels(array.copy(), Modality.CT), atol=1e-3, rtol=0)


def test_modality_by_header_then_by_values() -> None:
    mr = np.random.default_rng(0).integers(0, 900, (4, 20, 20))
    assert guess_modality(mr, "CT") is Modality.CT
    assert guess_modality(ct(), "MR") is Modality.MR
    assert guess_modality(ct(), "PT") is Modality.OTHER
    assert guess_modality(ct()) is Modality.CT
    assert guess_modality(ct().astype(np.float64) + 0.25) is Modality.CT
    assert guess_modality(ct()[:, 5:15, 5:19]) is Modality.CT  # no air in sight
    assert guess_modality(mr) is Modality.OTHER
    assert guess_modality(np.clip(ct() + 160, 0, 400) // 2) is Modality.OTHER  # already windowed
    phase = np.random.default_rng(0).integers(-4096, 4096, (4, 20, 20))
    assert guess_modality(phase) is Modality.OTHER
    assert guess_modality(np.random.default_rng(0).normal(0, 1, (4, 20, 20))) is Modality.OTHER


def test_non_finite_voxels_become_air_or_zero() -> None:
    array = ct().astype(np.float32)
    array[0, 0, 0], array[0, 0, 1], array[0, 0, 2] = np.nan, np.inf, -np.inf
    assert replace_non_finite(array, Modality.CT)[0, 0, :3].tolist() == [-1024] * 3
    assert replace_non_finite(array, Modality.MR)[0, 0, :3].tolist() == [0] * 3
    assert np.isnan(array[0, 0, 0])
    assert torch.isfinite(slice_channels(array, Modality.CT)).all()
    assert guess_modality(array) is Modality.CT
    with pytest.raises(VolumeError, match="no finite voxel"):
        replace_non_finite(np.full((2, 2, 2), np.nan), Modality.MR)
