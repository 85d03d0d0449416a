"""Training rows, losses and the phases: what is drawn fits together, unlabelled is never background, loss goes down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medvl_sam2.errors import DataError
from medvl_sam2.modeling.scene_pointer import SceneElements, lesions_within, pointed_place, scene_elements
from medvl_sam2.modeling.slice_segmenter import SliceOutput, SliceSegmenter
from medvl_sam2.synthesis import generate_case
from medvl_sam2.training.batch_stream import BatchShape, batch_stream
from medvl_sam2.training.joint_phase import JointConfig, JointPhase, spoken_case
from medvl_sam2.training.losses import LossWeights, dice_score, mask_loss
from medvl_sam2.training.samples import CONCEPTS, LabelledVolume, Target, from_masks
from medvl_sam2.training.scene_looks import SceneLooks
from medvl_sam2.training.segmentation_phase import SegmentationPhase, SegmentationPhaseConfig
from medvl_sam2.training.segmentation_steps import SegmentationLearner, SegmentationSteps
from medvl_sam2.training.slice_batches import TRUTH_SIZE, SliceSampler, Window, _turned
from medvl_sam2.training.volume_sources import from_case
from medvl_sam2.types import Modality
from small_model import SMALL, SMALL_SLICES, small_model

SIZE = SMALL_SLICES.image_size


@pytest.fixture(scope="module")
def generated() -> LabelledVolume:
    return from_case(generate_case(7))


@pytest.fixture(scope="module")
def sampler(generated: LabelledVolume) -> SliceSampler:
    return SliceSampler([generated], [1.0], 5, SIZE)


def test_boxes_lie_round_the_truth_also_after_turns_and_flips(sampler: SliceSampler) -> None:
    for _ in range(30):
        window = sampler.window(3)
        for truth, box in zip(window.truth.numpy(), window.boxes, strict=True):
            ys, xs = np.nonzero(truth > 0.5)
            if len(ys) < 12 or np.isnan(box).any():
                continue
            scale = SIZE / TRUTH_SIZE
            box = box.clip(-0.5, SIZE - 0.5)  # a later slice may leave the window
            drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * scale - 0.5
            reach = max(np.ptp(xs), np.ptp(ys)) * scale
            assert np.abs(drawn - box).max() <= 0.1 * reach + 4  # jitter of 8 % and the edges of the window


def test_turning_eight_ways_moves_image_truth_and_box_alike() -> None:
    image = torch.zeros(1, 3, SIZE, SIZE)
    image[:, :, 10:20, 30:50] = 1
    truth = torch.zeros(1, TRUTH_SIZE, TRUTH_SIZE)
    step = SIZE // TRUTH_SIZE
    truth[:, 10 // step : 20 // step, 30 // step : 50 // step] = 1
    window = Window(image, truth, np.array([[30, 10, 49, 19]], np.float32), truth, 3, torch.zeros(1))
    for turn in range(8):
        turned = _turned(window, turn, SIZE)
        x0, y0, x1, y1 = turned.boxes[0].astype(int)
        assert turned.images[0, 0, y0 : y1 + 1, x0 : x1 + 1].mean() == 1
        assert turned.images[0, 0].sum() == (y1 + 1 - y0) * (x1 + 1 - x0)
        assert turned.concept is None


def share_map(volume: LabelledVolume, name: str) -> torch.Tensor:
    """A perfect scene's map of a target: logits on a grid of 24 x 32 x 32 cells."""
    target = volume.find(name)
    assert target is not None
    mask = torch.from_numpy(volume.mask(target, slice(None)).astype(np.float32))
    return (torch.nn.functional.adaptive_avg_pool3d(mask[None, None], (24, 32, 32))[0, 0] - 0.4) * 20


def test_located_slices_show_the_target_where_its_map_says(generated: LabelledVolume) -> None:
    sampler, target = SliceSampler([generated], [1.0], 5, SIZE), generated.find("liver")
    assert target is not None
    place = share_map(generated, "liver")
    rows = sampler.located(0, target, place, 12)
    assert len(rows) == 12
    overlap = total = 0.0
    for row in rows:
        assert row.image.shape == (3, SIZE, SIZE)
        assert row.rough.shape == (SIZE // 4, SIZE // 4)
        truth = torch.nn.functional.interpolate(row.truth[None, None], size=row.rough.shape, mode="area")[0, 0] > 0.5
        found = row.rough > 0
        overlap += 2 * float((found & truth).sum())
        total += float(found.sum() + truth.sum())
    assert overlap / total > 0.8  # cells of the map are some 10 mm wide
    assert sampler.located(0, target, torch.full_like(place, -8.0), 3) == []
    invented = sampler.located(0, None, place, 3)
    assert all(float(row.truth.max()) == 0 and float(row.rough.max()) > 0 for row in invented)


def test_half_of_the_guesses_come_from_the_scene(generated: LabelledVolume) -> None:
    nowhere = torch.full((8, 8, 8), -8.0)
    plain = SliceSampler([generated], [1.0], 5, SIZE)
    seeing = SliceSampler([generated], [1.0], 5, SIZE, places=lambda number, target: nowhere)
    from_scene = [float(seeing.window().guess.max()) < 0.01 for _ in range(60)]
    assert 15 <= sum(from_scene) <= 45
    assert sum(float(plain.window().guess.max()) < 0.01 for _ in range(60)) < 6  # a corrupted truth may end up empty


def test_unlabelled_concepts_are_marked_and_never_asked() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((6, 40, 40), bool)
    mask[1:5, 10:25, 12:30] = True
    volume = from_masks(
        rng.normal(0, 50, mask.shape).astype(np.int16), (3.0, 2.0, 2.0), Modality.CT, {"liver": mask}, "p1"
    )
    row = SliceSampler([volume], [1.0], 0, SIZE).whole_slice(4)
    assert row.concepts == (CONCEPTS.index("liver"),)
    assert (row.dense[CONCEPTS.index("spleen")] == -1).all()
    assert (row.dense[CONCEPTS.index("liver")] >= 0).all()


def test_overlapping_masks_get_maps_of_their_own() -> None:
    first = np.zeros((2, 8, 8), bool)
    first[:, :5] = True
    second = np.zeros_like(first)
    second[:, 3:] = True
    volume = from_masks(np.zeros(first.shape, np.int16), (1, 1, 1), Modality.CT, {"a": first, "b": second}, "p")
    assert len(volume.maps) == 2
    for name, mask in (("a", first), ("b", second)):
        target = volume.find(name)
        assert target is not None
        assert np.array_equal(volume.mask(target, slice(None)), mask)
        assert np.array_equal(volume.areas[name], mask.sum(axis=(1, 2)))
    with pytest.raises(DataError, match="no labelled voxel"):
        from_masks(np.zeros((2, 2, 2)), (1, 1, 1), Modality.CT, {"a": np.zeros((2, 2, 2), bool)}, "p")


def test_lesions_belong_to_their_organ_and_have_their_own_concept(generated: LabelledVolume) -> None:
    lesion = generated.find("lesion")
    assert lesion is not None
    inside = [t for t in generated.targets if t.name.startswith("lesion_in_")]
    together = np.zeros(generated.image.shape, bool)
    for target in inside:
        organ = generated.find(target.name.removeprefix("lesion_in_"))
        assert organ is not None
        lesions = generated.mask(target, slice(None))
        assert (generated.mask(organ, slice(None)) & lesions).sum() > 0.6 * lesions.sum()
        together |= lesions
    assert np.array_equal(together, generated.mask(lesion, slice(None)))


def test_a_perfect_mask_costs_less_than_a_wrong_one_and_absent_rows_are_trained() -> None:
    truth = torch.zeros(2, 64, 64)
    truth[0, 20:40, 20:40] = 1

    def output(logits: torch.Tensor) -> SliceOutput:
        return SliceOutput(logits, torch.tensor([1.0, 1.0]), torch.tensor([8.0, -8.0]), torch.zeros(2, 4))

    right = torch.nn.functional.interpolate(truth[:, None], size=(16, 16), mode="area") * 20 - 10
    leaking = right.clone()
    leaking[1] = 10
    weights = LossWeights()
    assert mask_loss(output(right), truth, weights) < 0.5
    assert mask_loss(output(leaking), truth, weights) > mask_loss(output(right), truth, weights) + 1
    assert dice_score(right, truth).min() > 0.95


def test_one_row_is_learned_by_heart(sampler: SliceSampler) -> None:
    torch.manual_seed(0)
    learner = SegmentationLearner(SliceSegmenter(SMALL_SLICES))
    steps = SegmentationSteps(learner, 0)
    windows = [sampler.window() for _ in range(2)]
    optimiser = torch.optim.AdamW(learner.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        steps.rng = np.random.default_rng(1)
        loss, _, _ = steps.window_loss(windows, 1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_workers_draw_the_same_kind_of_batch(generated: LabelledVolume) -> None:
    shape = BatchShape(whole_slices=2, concepts=3, windows=2, clips=1, clip_length=3)
    for workers in (0, 1):
        batch = next(batch_stream([generated], [1.0], shape, 7, SIZE, workers))
        assert [len(batch.whole), len(batch.windows), len(batch.clips)] == [2, 2, 1]
        assert batch.clips[0].images.shape == (3, 3, SIZE, SIZE)


def test_both_phases_run_stop_and_resume(tmp_path: Path, generated: LabelledVolume) -> None:
    config = SegmentationPhaseConfig(
        image_minutes=0.02, memory_minutes=0.02, whole_slices=1, windows=1, clips=1, clip_length=3, bfloat16=False
    )
    model = replace(SMALL, slices=SMALL_SLICES)
    first = SegmentationPhase(config, [generated], [1.0], model, tmp_path)
    first.run()
    assert first.progress["image_steps"] > 0
    assert first.progress["memory_steps"] > 0
    more = replace(config, memory_minutes=first.progress["memory_seconds"] / 60 + 0.01)
    second = SegmentationPhase(more, [generated], [1.0], model, tmp_path)
    second.run()
    assert second.progress["image_steps"] == first.progress["image_steps"]
    assert second.progress["memory_steps"] > first.progress["memory_steps"]


def test_pointing_at_nothing_is_nowhere_and_slots_follow_size() -> None:
    organs = len(SMALL.scene_organs)
    logits = torch.full((organs + 1 + len(SMALL.scene.kinds), 6, 6, 6), -6.0)
    logits[organs, 0, 0:2, 0:2] = 5
    logits[organs, 5, 0, 0] = 5  # a speck
    logits[organs, 3:5, 3:5, 3:5] = 5
    tokens = torch.zeros(organs + SMALL.scene.lesions, 8)
    elements = scene_elements(tokens, logits, SMALL)
    assert elements.maps.shape[0] == organs + SMALL.scene.lesions
    assert int((elements.maps[organs] > 0).sum()) == 8
    assert int((elements.maps[organs + 1] > 0).sum()) == 4
    assert not (elements.maps[organs + 2] > 0).any()
    scores = torch.full((2, len(elements.maps)), -9.0)
    scores[1, organs + 1] = 9
    place = pointed_place(scores, elements)
    assert not (place[0] > 0).any()
    assert torch.nonzero(place[1] > 0).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_a_lesion_said_to_lie_in_an_organ_is_not_looked_for_in_another() -> None:
    maps = torch.full((4, 4, 8, 8), -8.0)
    maps[0, :, :, :4] = 8.0
    maps[1, :, :, 4:] = 8.0
    maps[2, 1, 2:4, 1:3] = 8.0  # a lesion in organ 0
    maps[3, 1, 2:4, 5:7] = 8.0  # and one in organ 1
    elements = SceneElements(torch.zeros(4, 8), maps, organs=2)
    scores = torch.tensor([[-2.0, -2.0, 3.0, 1.0]])
    assert torch.equal(pointed_place(scores, elements)[0], maps[2:].amax(dim=0))
    assert torch.equal(pointed_place(scores, elements, single=True)[0], maps[2])
    within = lesions_within(scores, elements, {1})
    assert torch.equal(pointed_place(within, elements, single=True)[0], maps[3])
    assert scores[0, 2] == 3.0  # the caller's scores stand
    sure = torch.tensor([[-9.0, -9.0, 20.0, 15.0]])
    assert torch.equal(pointed_place(sure, elements, single=True)[0], maps[2])
    elements.maps[3] = -8.0  # an empty slot lies in no organ; nor is organ 1 itself the lesion
    nowhere = lesions_within(scores, elements, {1})
    assert not (pointed_place(nowhere, elements, single=True) > 0).any()


def test_requests_mean_their_organ_the_found_lesions_or_nothing(generated: LabelledVolume) -> None:
    model = small_model()
    looks = SceneLooks(model, lambda number: generated)
    seen, organs = looks.of(0), model.config.scene_organs
    lesion = generated.find("lesion")
    assert lesion is not None
    maps = torch.full_like(seen.maps, -8.0)
    cells = torch.from_numpy(generated.mask(lesion, slice(None)).astype(np.float32))[None, None]
    maps[len(organs)] = torch.where(
        torch.nn.functional.adaptive_max_pool3d(cells, maps.shape[1:])[0, 0] > 0.5, 8.0, -8.0
    )
    looks._looks[0] = replace(seen, maps=maps)
    liver = organs.index("liver")
    assert torch.nonzero(looks.wanted(0, "liver", generated.find("liver"))).flatten().tolist() == [liver]
    both = Target("liver and spleen", 0, (1, 2), members=("liver", "spleen"))
    meant = sorted([liver, organs.index("spleen")])
    assert torch.nonzero(looks.wanted(0, both.name, both)).flatten().tolist() == meant
    assert not looks.wanted(0, "liver", None).any()
    assert torch.nonzero(looks.wanted(0, "lesion", lesion)).flatten().tolist() == [len(organs)]
    place = looks.place(0, "lesion", lesion)
    assert place is not None
    assert torch.equal(place, maps[len(organs)].float())
    assert looks.place(0, "liver", None) is not None  # what the scene invents is to be refused by the decoder
    assert looks.place(0, "hippocampus", lesion) is None


def test_joint_phase_trains_the_seam_and_leaves_language_and_encoders_alone(tmp_path: Path) -> None:
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = JointConfig(minutes=0.06, volumes=1, requests=2, slices=1, windows=1, clips=1, clip_length=3)
    stand_ins = torch.randn(len(CONCEPTS), SMALL_SLICES.d_model)
    figures = JointPhase(config, model, stand_ins, [spoken_case(7)], [1.0]).run(tmp_path)
    assert figures["steps"] > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert any(name.startswith("language.pointer.") for name in moved)
    assert any(name.startswith("language.seg_projector.") for name in moved)
    assert any(name.startswith("segmenter.sam2.memory_attention.") for name in moved)
    frozen = ("language.lm.", "language.vision.", "language.scene.", "segmenter.sam2.image_encoder.")
    assert not {name for name in moved if name.startswith(frozen)}
