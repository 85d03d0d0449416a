"""From the first prompt to a mask: window, start slice, rough mask, and propagation through the volume.

A box or click that fits an element of the scene (an organ or lesion of the volume's map) starts from that element;
any other from a region grown by intensity.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from medvl_sam2.geometry import SliceCrop
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.scene_pointer import SceneElements
from medvl_sam2.modeling.slice_segmenter import SlicePrompt
from medvl_sam2.predictor.edits import CanonicalClick, Edit
from medvl_sam2.predictor.feature_cache import FeatureCache
from medvl_sam2.predictor.objects import OUTSIDE, ObjectState
from medvl_sam2.predictor.painting import Painted, grown_round_box, grown_round_click
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.places import (
    MatchRule,
    Part,
    agreement,
    element_in_box,
    element_on_plane,
    elements_at,
    place_on_slices,
)
from medvl_sam2.predictor.planes import completed, thickened, thin_axis
from medvl_sam2.predictor.propagation import MemoryRule, propagate
from medvl_sam2.predictor.slice_points import box_points, click_points
from medvl_sam2.predictor.stack import SliceStack, planned_slices
from medvl_sam2.region_assist import GROW_BRUSH, IntensityRule
from medvl_sam2.strokes import StrokeKind


@dataclass(frozen=True)
class InteractiveConfig:
    """Choices of the interactive engine, all lengths in mm."""

    window_factor: float = 1.7
    """Window edge over the longer box edge."""
    click_windows_mm: tuple[float, ...] = (32.0, 60.0, 110.0, 200.0, 330.0)
    """Windows tried for a click that comes without any hint of scale."""
    slice_step_mm: float = 2.0
    """Propagate in steps of about this; thinner slices are interpolated."""
    reach_mm: float = 12.0
    """A correction fades out over this distance in z."""
    edit_reach_mm: float = 30.0
    """A correction changes nothing farther away than this, or than ``edit_share`` of the object's diagonal."""
    edit_share: float = 0.5
    min_window_mm: float = 12.0
    carry_clicks: bool = True
    """Carry a correction through the memory to further slices, as far as they change with it."""
    assist: bool = True
    """Start from an intensity-grown region as rough mask, and let every click paint an intensity-limited ball."""
    rough_weight: float = 0.25
    """Share of the intensity-grown rough mask in the first logits."""
    scene_weight: float = 0.25
    """Share of the scene's map in the first logits, where the first prompt means an element of the scene."""
    memory: MemoryRule = field(default_factory=MemoryRule)
    match: MatchRule = field(default_factory=MatchRule)
    assist_rule: IntensityRule = field(
        default_factory=lambda: IntensityRule(brush=replace(GROW_BRUSH, depth_share=1.5))
    )


class FirstPrompts:
    """Stateless over volumes: what it makes lies in :class:`ObjectState`."""

    def __init__(
        self, segmenter: PlacedSegmenter, config: InteractiveConfig, cache: FeatureCache | None = None
    ) -> None:
        self.segmenter, self.cache = segmenter, cache or FeatureCache()
        self.config = config

    def from_box(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: SliceIntensity,
        box: np.ndarray,
        elements: SceneElements | None = None,
    ) -> ObjectState:
        """Start from a canonical 3D box (2, 3), which may reach beyond the volume; the box bounds the object in z.

        With the scene's ``elements`` a box round one of them starts from that element's map. A box one voxel thick
        along one axis bounds the object on that plane alone (:meth:`_from_plane`).
        """
        across = thin_axis(box, image.shape)
        box = np.clip(box, 0, np.array(image.shape) - 1)
        if across is None:
            return self._from_extent(image, spacing, intensity, box, elements)
        return replace(self._from_plane(image, spacing, intensity, box, across, elements), across=across)

    def _from_extent(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: SliceIntensity,
        box: np.ndarray,
        elements: SceneElements | None,
    ) -> ObjectState:
        """Start from a box that bounds the object in z."""
        low, high = (round(float(v)) for v in box[:, 0])
        crop = self._window(box[:, 1:], spacing)
        stack = SliceStack(self.segmenter, image, intensity, crop, self.cache)
        start = (low + high + 1) // 2
        state = ObjectState(stack, low, high, box=box, start=start)
        points, labels = box_points(crop, box)
        prompt = SlicePrompt(points, labels)
        if self.config.assist:
            self._lay_down(state, grown_round_box(image, spacing, box, self.config.assist_rule))
        part = None if elements is None else element_in_box(elements, box, image.shape, self.config.match)
        if part is not None and self._box_agrees(state, part, prompt, spacing):
            return self._from_part(ObjectState(stack, low, high, box=box, start=start), part, spacing)
        prompt = self._with_rough(prompt, state, start)
        self._seed(state, start, prompt)
        self._propagate(state, spacing, open_ended=False)
        return state

    def _from_plane(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: SliceIntensity,
        box: np.ndarray,
        axis: int,
        elements: SceneElements | None,
    ) -> ObjectState:
        """Start from the box of the object's outline on one plane across ``axis``.

        An element of the scene with such a section there says how far it goes across the plane. Else, on a slice the
        outline is decoded and carried both ways until the object ends; on the other planes the decoder's mask of the
        middle slice, or the intensities there, tell the extent across.
        """
        part = None
        if elements is not None:
            part = element_on_plane(elements, box, axis, image.shape, self.config.match)
        if part is not None:
            found = box.astype(np.float64)
            span = part.box(image.shape)[:, axis]
            found[:, axis] = min(span[0], box[0, axis]), max(span[1], box[1, axis])
            return replace(self._from_extent(image, spacing, intensity, found, elements), box=box)
        guess = thickened(box, axis, image.shape, spacing)
        grown = grown_round_box(image, spacing, guess, self.config.assist_rule)
        crop = self._window(guess[:, 1:], spacing)
        z = round(float(box[:, 0].mean()))
        stack = SliceStack(self.segmenter, image, intensity, crop, self.cache)
        state = ObjectState(stack, z, z, box=box, start=z)
        if self.config.assist:
            self._lay_down(state, grown)
        if axis == 0:
            points, labels = box_points(crop, box)
            self._seed(state, z, self._with_rough(SlicePrompt(points, labels), state, z))
            state.low, state.high = 0, image.shape[0] - 1
            self._propagate(state, spacing, open_ended=True)
            return state
        middle = CanonicalClick((float(z), float(box[:, 1].mean()), float(box[:, 2].mean())), 1)
        points, labels = click_points(crop, [middle])
        self._seed(state, z, self._with_rough(SlicePrompt(points, labels), state, z))
        drawn = crop.paste(state.logits[z][None], stack.plane, OUTSIDE)[0] > 0
        found = completed(box, drawn.numpy(), grown.planes([z], stack.plane)[0] > 0)
        return replace(self._from_extent(image, spacing, intensity, found, elements), box=box)

    def from_edit(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: SliceIntensity,
        edit: Edit,
        elements: SceneElements | None = None,
    ) -> ObjectState:
        """Start from a foreground edit: a click, the middle of a scribble, or the outline that a lasso draws.

        Of a stroke this is only the start: it is still to be applied.
        """
        if isinstance(edit, CanonicalClick):
            return self.from_click(image, spacing, intensity, edit, elements)
        if edit.kind is StrokeKind.LASSO:
            voxels = np.clip(edit.voxels, 0, np.array(image.shape) - 1).astype(np.float64)
            box = np.stack([voxels.min(axis=0), voxels.max(axis=0)])
            return replace(self.from_box(image, spacing, intensity, box, elements), box=None, across=None)
        z, y, x = edit.anchors[len(edit.anchors) // 2].tolist()
        return replace(self.from_click(image, spacing, intensity, CanonicalClick((z, y, x), 1), elements), clicks=[])

    def from_click(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: SliceIntensity,
        click: CanonicalClick,
        elements: SceneElements | None = None,
    ) -> ObjectState:
        """Start from one foreground click: try several scales, keep the one the model believes in.

        With the scene's ``elements``, and where the slice decoder agrees with the element under the click, that
        element's map leads.
        """
        z = int(np.clip(click.z, 0, image.shape[0] - 1))
        crop = self._best_scale(image, spacing, intensity, click, z)
        points, labels = click_points(crop, [click])
        stack = SliceStack(self.segmenter, image, intensity, crop, self.cache)
        state = ObjectState(stack, z, z, start=z, clicks=[click])
        self._seed(state, z, SlicePrompt(points, labels))
        part = None if elements is None else self._part_meant(state, elements, click, spacing)
        if part is not None:
            box = part.box(image.shape)
            low, high = min(int(box[0, 0]), z), max(int(box[1, 0]), z)
            return self._from_part(ObjectState(stack, low, high, start=z, clicks=[click]), part, spacing)
        state.low, state.high = 0, image.shape[0] - 1
        if self.config.assist:
            self._lay_down(state, grown_round_click(image, spacing, np.array(click.position), self.config.assist_rule))
        self._propagate(state, spacing, open_ended=True)
        return state

    def from_mask(
        self, image: np.ndarray, spacing: tuple[float, float, float], intensity: SliceIntensity, mask: np.ndarray
    ) -> ObjectState:
        """Take over an earlier mask (Z, Y, X) bool, not empty, as it is; clicks then correct it."""
        where = np.argwhere(mask)
        low, high = where.min(axis=0), where.max(axis=0)
        crop = self._window(np.stack([low[1:], high[1:]]), spacing)
        stack = SliceStack(self.segmenter, image, intensity, crop, self.cache)
        state = ObjectState(stack, int(low[0]), int(high[0]), start=int(low[0] + high[0]) // 2)
        small = replace(crop, size=self.segmenter.mask_size)
        planes = torch.from_numpy(mask[low[0] : high[0] + 1].astype(np.float32))
        soft = small.sample(planes)[:, 0]
        state.logits = {int(low[0]) + n: plane * 12 - 6 for n, plane in enumerate(soft)}
        state.keep(mask)
        return state

    def _window(self, corners_yx: np.ndarray, spacing: tuple[float, float, float]) -> SliceCrop:
        """Window round canonical corners (2, 2), as wide as the objects of training filled theirs."""
        config, size = self.config, self.segmenter.config.image_size
        return SliceCrop.around(corners_yx, spacing[1:], config.window_factor, size, config.min_window_mm)

    def _box_agrees(
        self, state: ObjectState, part: Part, prompt: SlicePrompt, spacing: tuple[float, float, float]
    ) -> bool:
        """Whether the decoder's mask of the start slice or the intensity-grown one is much the same as the part.

        A part that fills the box well is not asked: of thin or branching organs the decoder sees little at first.
        """
        if part.fit >= self.config.match.clear:
            return True
        shape, z, crop = state.stack.image.shape, state.start, state.stack.crop
        masks = [self.segmenter.decode(state.stack.features([z]), prompt).logits[0, 0] > 0]
        if z in state.rough:
            masks.append(state.rough[z] > 0.5)
        least = self.config.match.agreement
        return any(agreement(part, mask.numpy(), crop, z, shape, spacing) >= least for mask in masks)

    def _part_meant(
        self, state: ObjectState, elements: SceneElements, click: CanonicalClick, spacing: tuple[float, float, float]
    ) -> Part | None:
        """Of what lies under the click, the part that the slice decoder's mask agrees with best, if well enough."""
        shape, rule, z = state.stack.image.shape, self.config.match, state.start
        mask, best, best_score = (state.logits[z] > 0).numpy(), None, rule.agreement
        for part in elements_at(elements, click.position, shape, rule):
            score = agreement(part, mask, state.stack.crop, z, shape, spacing)
            if score >= best_score:
                best, best_score = part, score
        return best

    def _from_part(self, state: ObjectState, part: Part, spacing: tuple[float, float, float]) -> ObjectState:
        """Start from an element of the scene, in a window that holds it and the box that was drawn, if any."""
        stack, shape = state.stack, state.stack.image.shape
        corners = part.box(shape) if state.box is None else np.concatenate([part.box(shape), state.box])
        crop = self._window(np.stack([corners[:, 1:].min(axis=0), corners[:, 1:].max(axis=0)]), spacing)
        state = replace(state, stack=SliceStack(self.segmenter, stack.image, stack.intensity, crop, self.cache))
        self._take_part(state, part, state.low, state.high)
        self._outline(state, spacing)
        return state

    def _outline(self, state: ObjectState, spacing: tuple[float, float, float]) -> None:
        """Decode every slice from the part's map on it, without memory: no slice hangs on another's mistakes.

        Neither box nor click is given to the decoder here; the part was chosen by them.
        """
        count = state.stack.image.shape[0]
        plan = planned_slices(state.low, state.high, state.start, spacing[0], self.config.slice_step_mm)
        rough = torch.stack([state.rough[z] for z in plan])
        prompt = replace(
            SlicePrompt.empty(len(plan)),
            mask_logits=torch.logit(rough, eps=3e-4)[:, None],
            mask_present=torch.ones(len(plan), dtype=torch.bool),
            height=torch.tensor(plan, dtype=torch.float32) / max(1, count - 1),
        )
        output = self.segmenter.decode(state.stack.features(plan), prompt)
        state.logits = {z: self.blended(state, z, logits) for z, logits in zip(plan, output.logits[:, 0], strict=True)}
        row = plan.index(state.start)
        state.score = float(output.iou[row])
        certain = output.presence[row : row + 1].clamp(min=1.0)
        features = state.stack.features([state.start])
        state.memory.conditioning[state.start] = self.segmenter.remember(
            features, output.logits[row : row + 1], certain, output.pointer[row : row + 1], prompted=True
        )

    def _take_part(self, state: ObjectState, part: Part, low: int, high: int) -> None:
        """The map of an element's part as rough mask of the slices low..high."""
        slices = list(range(low, high + 1))
        shape, size = state.stack.image.shape, self.segmenter.mask_size
        soft = place_on_slices(part.place[None], state.stack.crop, size, slices, shape)[0]
        state.rough = dict(zip(slices, torch.sigmoid(soft), strict=True))
        state.rough_weight, state.from_scene = self.config.scene_weight, True

    def _seed(self, state: ObjectState, z: int, prompt: SlicePrompt) -> None:
        """Decode the start slice and put it into the memory."""
        features = state.stack.features([z])
        output = self.segmenter.decode(features, prompt)
        state.logits[z] = self.blended(state, z, output.logits[0, 0])
        state.score = float(output.iou)
        certain = output.presence.clamp(min=1.0)  # the annotator pointed here: the object is on this slice
        state.memory.conditioning[z] = self.segmenter.remember(
            features, output.logits, certain, output.pointer, prompted=True
        )

    def _lay_down(self, state: ObjectState, grown: Painted) -> None:
        """Keep a region as soft values (h, h) in [0, 1] of the slices that hold it."""
        shown = grown.slices
        if not shown:
            return
        small = replace(state.stack.crop, size=self.segmenter.mask_size)
        soft = small.sample(torch.from_numpy(grown.planes(shown, state.stack.plane)))[:, 0]
        state.rough, state.rough_weight = dict(zip(shown, soft, strict=True)), self.config.rough_weight

    def _with_rough(self, prompt: SlicePrompt, state: ObjectState, z: int) -> SlicePrompt:
        """The rough mask of a slice as its mask prompt, if it has one."""
        soft = state.rough.get(z)
        if soft is None:
            return prompt
        present = torch.ones(1, dtype=torch.bool)
        return replace(prompt, mask_logits=soft[None, None] * 12 - 6, mask_present=present)

    def blended(self, state: ObjectState, z: int, logits: Tensor) -> Tensor:
        """Decoded logits pulled towards the rough mask, where there is one at all."""
        weight = state.rough_weight
        if not weight or not state.rough:
            return logits
        soft = state.rough.get(z)
        rough = torch.full_like(logits, -4.0) if soft is None else soft * 8 - 4
        return logits.clamp(-8, 8) * (1 - weight) + weight * rough

    def _propagate(self, state: ObjectState, spacing: tuple[float, float, float], open_ended: bool) -> None:
        plan = planned_slices(state.low, state.high, state.start, spacing[0], self.config.slice_step_mm)
        if not open_ended:
            state.stack.encode(plan)
        outputs = propagate(state.stack, state.memory, plan, spacing[0], self.config.memory, open_ended)
        for z, output in outputs.items():
            state.logits[z] = self.blended(state, z, output.logits[0, 0])
        if open_ended:
            state.trim()

    def _best_scale(
        self,
        image: np.ndarray,
        spacing: tuple[float, float, float],
        intensity: SliceIntensity,
        click: CanonicalClick,
        z: int,
    ) -> SliceCrop:
        """Window whose mask is believed most and fills it as training windows were filled."""
        size = self.segmenter.config.image_size
        center = (click.position[1] * spacing[1], click.position[2] * spacing[2])
        crops = [SliceCrop(center, mm, size, spacing[1:]) for mm in self.config.click_windows_mm]
        images = torch.cat([SliceStack(self.segmenter, image, intensity, c).pixels([z]) for c in crops])
        points = torch.cat([click_points(c, [click])[0] for c in crops])
        labels = torch.ones(len(crops), 1, dtype=torch.int32)
        output = self.segmenter.decode(self.segmenter.encode(images), SlicePrompt(points, labels))
        best, best_score = crops[-1], -1.0
        for row, crop in enumerate(crops):
            mask = output.logits[row, 0].numpy() > 0
            if not mask.any():
                continue
            ys, xs = np.nonzero(mask)
            edge = (max(np.ptp(ys), np.ptp(xs)) + 1) / mask.shape[0]
            fill = float(np.clip((edge - 0.15) / 0.2, 0, 1) * np.clip((0.95 - edge) / 0.15, 0, 1))
            score = float(output.iou[row]) * (0.2 + 0.8 * fill)
            if score > best_score:
                low = crop.inverse_points(np.array([[xs.min(), ys.min()]]) * 4.0)[0]
                high = crop.inverse_points(np.array([[xs.max(), ys.max()]]) * 4.0 + 3.0)[0]
                best = self._window(np.stack([low, high]), spacing)
                best_score = score
        return best
