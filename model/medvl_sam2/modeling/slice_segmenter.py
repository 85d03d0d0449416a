"""Volumetric segmentation as SAM2 over axial slices: encode once, decode many, remember both ways.

Shape letters: N slices, B rows (an object on a slice), S image size, C ``d_model``, M ``memory_dim``, P points, L extra
tokens, h = S/4 low-resolution mask side.

Departures from published SAM 2.1, each switched by a field of :class:`SliceConfig` (the presets of
:mod:`medvl_sam2.presets` have them as published): one mask instead of the best of three (``multimask``), no gate on
the object score (``presence_gate``), nothing of what SAM 2's builders add (``apply_postprocessing``), inputs in
[-1, 1] (``rgb_statistics``), a limit of conditioning slices (``max_cond_slices``), a token of the slice's height for
rows with language (``slice_position``), a head that scores slices by text (``slice_scores``). A mask prompt always
passes the decoder; SAM 2's video predictor may put it out unchanged instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medvl_sam2.config import SliceConfig
from medvl_sam2.modeling.sam2_modules import build_sam2
from medvl_sam2.modeling.slice_scorer import SliceScorer

_RGB_MEAN, _RGB_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STABLE_MARGIN, _STABLE_SHARE = 0.05, 0.98
"""Logits round the threshold, and the share of a mask that must not lie between them (SAM 2's builders)."""
_ABSENT = -1024.0
"""Logit of every pixel of a gated row, as in SAM 2."""
MASK_PROMPT_LIMIT = 32.0
"""Previous logits are clamped to this before they are used as a mask prompt (as SAM2's own predictor does)."""


@dataclass(frozen=True)
class SliceFeatures:
    """Encoded slices: ``fine`` (N, C/8, S/4, S/4), ``middle`` (N, C/4, S/8, S/8), ``coarse`` (N, C, S/16, S/16).

    ``position`` (1, C, S/16, S/16) is the sine encoding of the coarse map.
    """

    fine: Tensor
    middle: Tensor
    coarse: Tensor
    position: Tensor

    def rows(self, index: Tensor | slice | list[int]) -> SliceFeatures:
        """Features of the chosen slices, one row each (a slice may be taken several times)."""
        return replace(self, fine=self.fine[index], middle=self.middle[index], coarse=self.coarse[index])

    def __len__(self) -> int:
        return int(self.coarse.shape[0])


@dataclass(frozen=True)
class SlicePrompt:
    """Prompts for B rows, in model pixels.

    ``points`` (B, P, 2) as (x, y); ``labels`` (B, P): 1 object, 0 background, 2/3 box corners, -1 padding.
    ``mask_logits`` (B, 1, h, w) with ``mask_present`` (B,); ``language`` (B, C) with ``language_present`` (B,);
    ``height`` (B,) relative height of the slice in the volume, 0 inferior to 1 superior.
    """

    points: Tensor
    labels: Tensor
    mask_logits: Tensor | None = None
    mask_present: Tensor | None = None
    language: Tensor | None = None
    language_present: Tensor | None = None
    height: Tensor | None = None

    @classmethod
    def empty(cls, rows: int, device: torch.device | str = "cpu") -> SlicePrompt:
        """No prompt at all, for rows that rely on memory or language."""
        labels = torch.full((rows, 1), -1, dtype=torch.int32, device=device)
        return cls(torch.zeros(rows, 1, 2, device=device), labels)

    def to(self, device: torch.device | str) -> SlicePrompt:
        """The same on ``device``."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class SliceOutput:
    """Decoder output for B rows.

    ``logits`` (B, 1, h, h); ``iou`` (B,) predicted IoU; ``presence`` (B,) logit that the object is on the slice;
    ``pointer`` (B, C) object pointer for the memory.
    """

    logits: Tensor
    iou: Tensor
    presence: Tensor
    pointer: Tensor


@dataclass(frozen=True)
class SliceMemory:
    """What one decoded slice leaves behind: ``features`` (B, M, S/16, S/16), its position code, ``pointer`` (B, C)."""

    features: Tensor
    position: Tensor
    pointer: Tensor


class SliceSegmenter(nn.Module):
    """SAM2 without its session logic: three pure steps (:meth:`encode`, :meth:`decode`, :meth:`remember`)."""

    def __init__(self, config: SliceConfig) -> None:
        super().__init__()
        self.config = config
        self.sam2: Any = build_sam2(config)
        self.height_frequencies = 4
        d = config.d_model
        self.height_token: nn.Module | None = None
        if config.slice_position:
            self.height_token = nn.Sequential(nn.Linear(2 * self.height_frequencies, d), nn.GELU(), nn.Linear(d, d))
        self.scorer = SliceScorer(d) if config.slice_scores else None

    @property
    def mask_size(self) -> int:
        """Side h of the low-resolution mask grid."""
        return self.config.image_size // 4

    def encode(self, images: Tensor) -> SliceFeatures:
        """Images (N, 3, S, S) in [-1, 1] -> features. The only expensive step; cache its result."""
        if self.config.rgb_statistics:
            mean, spread = (images.new_tensor(values)[:, None, None] for values in (_RGB_MEAN, _RGB_SPREAD))
            images = ((images + 1) / 2 - mean) / spread
        output = self.sam2.forward_image(images)
        fine, middle, coarse = output["backbone_fpn"]
        return SliceFeatures(fine, middle, coarse, output["vision_pos_enc"][-1][:1])

    def decode(self, features: SliceFeatures, prompt: SlicePrompt, fused: Tensor | None = None) -> SliceOutput:
        """Decode B rows. ``fused`` (B, C, S/16, S/16) are memory-conditioned features from :meth:`attend`.

        Without ``fused`` the rows are treated as first slices (no memory). Rows with language and training are never
        gated by the object score: they need the raw logits.
        """
        sam2 = self.sam2
        coarse = features.coarse + sam2.no_mem_embed.reshape(1, -1, 1, 1) if fused is None else fused
        extra, present = self._extra_tokens(prompt)
        previous = prompt.mask_logits
        if previous is not None:
            previous = previous.clamp(-MASK_PROMPT_LIMIT, MASK_PROMPT_LIMIT)
        sparse, dense = sam2.sam_prompt_encoder.encode(
            prompt.points, prompt.labels, previous, prompt.mask_present, extra, present
        )
        masks, ious, tokens, presence = sam2.sam_mask_decoder.predict_masks(
            image_embeddings=coarse,
            image_pe=sam2.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.expand(coarse.shape[0], -1, -1, -1),
            repeat_image=False,
            high_res_features=[features.fine, features.middle],
        )
        rows, best = torch.arange(len(ious), device=ious.device), self._best_mask(ious, prompt.labels)
        appears = (presence > 0).float()
        pointer = appears * sam2.obj_ptr_proj(tokens[rows, best]) + (1 - appears) * sam2.no_obj_ptr
        best = self._stable_mask(masks, ious, best)  # the pointer stays that of the single mask, as in SAM 2
        logits = masks[rows, best][:, None].float()
        if self.config.presence_gate and not self.training:
            kept = presence > 0
            if extra is not None:
                kept = kept | (torch.ones_like(kept) if present is None else present[:, None])
            logits = torch.where(kept[..., None, None], logits, _ABSENT)
        return SliceOutput(logits, ious[rows, best], presence[:, 0], pointer)

    def remember(
        self, features: SliceFeatures, logits: Tensor, presence: Tensor, pointer: Tensor, prompted: bool = False
    ) -> SliceMemory:
        """Encode mask ``logits`` (B, 1, any, any) of decoded rows into memory; ``prompted`` rows had prompts."""
        size = self.config.image_size
        logits = F.interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)
        binary = prompted and self.config.apply_postprocessing and not self.training
        mask = (logits > 0).float() if binary else torch.sigmoid(logits)
        sam2 = self.sam2
        encoded = sam2.memory_encoder(
            features.coarse,
            mask * sam2.sigmoid_scale_for_mem_enc + sam2.sigmoid_bias_for_mem_enc,
            skip_mask_sigmoid=True,
        )
        absent = (presence <= 0).float()[:, None, None, None]
        memory = encoded["vision_features"] + absent * sam2.no_obj_embed_spatial[..., None, None]
        return SliceMemory(memory, encoded["vision_pos_enc"][-1], pointer)

    def attend(
        self,
        features: SliceFeatures,
        index: int,
        conditioning: Mapping[int, SliceMemory],
        tracked: Mapping[int, SliceMemory],
        count: int,
        reverse: bool,
    ) -> Tensor:
        """Condition B rows of slice ``index`` on memory -> (B, C, S/16, S/16).

        ``conditioning``: prompted slices (any side). ``tracked``: slices already decoded in this direction.
        ``reverse`` when tracking towards lower indices. ``count``: number of slices in the stack.
        """
        rows = len(features)
        side = features.coarse.shape[-1]
        flat = features.coarse.flatten(2).permute(2, 0, 1)
        position = features.position.expand(rows, -1, -1, -1).flatten(2).permute(2, 0, 1)
        bank = {
            "cond_frame_outputs": {t: _as_sam2(m) for t, m in conditioning.items()},
            "non_cond_frame_outputs": {t: _as_sam2(m) for t, m in tracked.items()},
        }
        fused: Tensor = self.sam2._prepare_memory_conditioned_features(
            frame_idx=index,
            is_init_cond_frame=False,
            current_vision_feats=[flat],
            current_vision_pos_embeds=[position],
            feat_sizes=[(side, side)],
            output_dict=bank,
            num_frames=count,
            track_in_reverse=reverse,
        )
        return fused

    def _best_mask(self, ious: Tensor, labels: Tensor) -> Tensor:
        """Which of the four masks to keep: (B,) indices from predicted ``ious`` (B, 4) and point ``labels`` (B, P)."""
        single = torch.zeros(len(ious), dtype=torch.long, device=ious.device)
        if not self.config.multimask:
            return single
        return torch.where((labels >= 0).sum(dim=1) <= 1, 1 + ious[:, 1:].argmax(dim=1), single)

    def _stable_mask(self, masks: Tensor, ious: Tensor, best: Tensor) -> Tensor:
        """``best`` (B,), the single mask replaced by the best of three where ``masks`` (B, 4, h, h) is unstable.

        Stable is a mask that loses at most 2 % where the threshold rises from -0.05 to 0.05.
        """
        if not self.config.apply_postprocessing or self.training:
            return best
        single = masks[:, 0].flatten(1)
        core, hull = ((single > level).sum(dim=1).float() for level in (_STABLE_MARGIN, -_STABLE_MARGIN))
        stable = torch.where(hull > 0, core / hull, 1.0) >= _STABLE_SHARE
        return torch.where(stable | (best > 0), best, 1 + ious[:, 1:].argmax(dim=1))

    def _extra_tokens(self, prompt: SlicePrompt) -> tuple[Tensor | None, Tensor | None]:
        if prompt.language is None:
            return None, None
        tokens = [prompt.language]
        if self.height_token is not None:
            height = prompt.height if prompt.height is not None else prompt.language.new_full((len(tokens[0]),), 0.5)
            octaves = 2.0 ** torch.arange(self.height_frequencies, device=height.device) * math.pi
            angles = height[:, None] * octaves
            tokens.append(self.height_token(torch.cat([angles.sin(), angles.cos()], dim=1)))
        return torch.stack(tokens, dim=1), prompt.language_present


def _as_sam2(memory: SliceMemory) -> dict[str, Any]:
    return {
        "maskmem_features": memory.features,
        "maskmem_pos_enc": [memory.position],
        "obj_ptr": memory.pointer,
    }
