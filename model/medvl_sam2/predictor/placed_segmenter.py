"""The slice segmenter on its device and in its number format, for an engine whose logits lie on the CPU.

Masks, prompts and everything an annotator's object consists of are worked on with NumPy, so they stay in the CPU's
memory; encoded slices, memories and object pointers, which only the network reads, stay on its device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medvl_sam2.config import SliceConfig
from medvl_sam2.errors import ConfigError
from medvl_sam2.modeling.compute import Precision, autocast, has_bfloat16_units
from medvl_sam2.modeling.slice_segmenter import SliceFeatures, SliceMemory, SliceOutput, SlicePrompt, SliceSegmenter

CPU_BFLOAT16_PIXELS = 256
"""Image size from which bfloat16 pays on a CPU that has units for it.

Measured with SAM 2.1 tiny on one thread of a processor with AMX, float32 over bfloat16: encoding 1.9 x at 256, 2.3 x at
512 and 2.2 x at 1024 pixels, memory attention 1.9, 3.2 and 3.9 x; the demo weights at 128 pixels only 0.9 and 0.7 x.
"""


class PlacedSegmenter:
    """A :class:`SliceSegmenter` in inference: the same steps, taking prompts from the CPU and giving logits to it.

    ``precision`` ``auto`` is bfloat16 on a GPU that has units for it and, from :data:`CPU_BFLOAT16_PIXELS` on, on such
    a CPU; encoded slices are then held in bfloat16, too, which halves the memory they take. The model must stay where
    it is.
    """

    def __init__(self, model: SliceSegmenter, precision: Precision = "auto") -> None:
        self.model, self.device = model, next(model.parameters()).device
        if precision == "auto":
            small = self.device.type == "cpu" and model.config.image_size < CPU_BFLOAT16_PIXELS
            precision = "bfloat16" if has_bfloat16_units(self.device) and not small else "float32"
        self.precision: Precision = precision

    @property
    def config(self) -> SliceConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def mask_size(self) -> int:
        """Side h of the low-resolution mask grid."""
        return self.model.mask_size

    def encode(self, images: Tensor) -> SliceFeatures:
        """Images (N, 3, S, S) in [-1, 1] -> features on the device."""
        images = images.to(self.device)
        if self.precision == "float32":
            return self.model.encode(images)
        with self._computing():
            found = self.model.encode(images.contiguous(memory_format=torch.channels_last))
        fine, middle, coarse = (
            part.to(torch.bfloat16).contiguous() for part in (found.fine, found.middle, found.coarse)
        )
        return SliceFeatures(fine, middle, coarse, found.position)

    def decode(self, features: SliceFeatures, prompt: SlicePrompt, fused: Tensor | None = None) -> SliceOutput:
        """Decode B rows; all but the pointer comes back on the CPU, in float32."""
        with self._computing():
            found = self.model.decode(features, prompt.to(self.device), fused)
        logits, iou, presence = (part.float().cpu() for part in (found.logits, found.iou, found.presence))
        return SliceOutput(logits, iou, presence, found.pointer)

    def remember(
        self, features: SliceFeatures, logits: Tensor, presence: Tensor, pointer: Tensor, prompted: bool = False
    ) -> SliceMemory:
        """Encode mask ``logits`` (B, 1, any, any) and ``presence`` (B,) from the CPU into memory on the device."""
        with self._computing():
            return self.model.remember(
                features, logits.to(self.device), presence.to(self.device), pointer, prompted=prompted
            )

    def attend(
        self,
        features: SliceFeatures,
        index: int,
        conditioning: dict[int, SliceMemory],
        tracked: dict[int, SliceMemory],
        count: int,
        reverse: bool,
    ) -> Tensor:
        """:meth:`SliceSegmenter.attend`: features (B, C, S/16, S/16) on the device, for :meth:`decode`."""
        with self._computing():
            return self.model.attend(features, index, conditioning, tracked, count, reverse)

    @property
    def scores_slices(self) -> bool:
        """Whether the model has a head for :meth:`chances`."""
        return self.model.scorer is not None

    def chances(self, tokens: Tensor, coarse: Tensor) -> Tensor:
        """Chances (K, n) on the CPU that language tokens (K, C) are met on slices of ``coarse`` features (n, C, g, g).

        Raises:
            ConfigError: the model has no head that scores slices.
        """
        if self.model.scorer is None:
            raise ConfigError("this model has no head that scores slices (SliceConfig.slice_scores is false)")
        with self._computing():
            return torch.softmax(self.model.scorer(tokens.to(self.device), coarse).float(), dim=1).cpu()

    def _computing(self) -> torch.autocast:
        return autocast(self.device, self.precision)
