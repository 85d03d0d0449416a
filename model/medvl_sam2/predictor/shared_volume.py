"""What all sessions on one volume share: its canonical image, grey mapping and the global look."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.unified import GlobalLook
from medvl_sam2.types import Volume


class SharedVolume:
    """Filled lazily; the predictor serialises access."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.look: GlobalLook | None = None
        """Global view for the language model and the scene."""

    @cached_property
    def transform(self) -> CanonicalTransform:
        """Stored to canonical voxels and back."""
        return CanonicalTransform(self.volume.geometry)

    @cached_property
    def image(self) -> np.ndarray:
        """Canonical image (Z, Y, X), contiguous."""
        return np.ascontiguousarray(self.transform.forward_array(self.volume.array))

    @cached_property
    def intensity(self) -> SliceIntensity:
        """Grey mapping of the whole volume."""
        return SliceIntensity.of(self.image, self.volume.modality)

    @property
    def bytes(self) -> int:
        """Memory held: the volume, its canonical image, tokens and the scene's maps."""
        held = self.volume.array.nbytes + (self.image.nbytes if "image" in self.__dict__ else 0)
        if self.look is not None:
            held += self.look.tokens.nbytes
            held += self.look.elements.maps.nbytes if self.look.elements is not None else 0
        return held
