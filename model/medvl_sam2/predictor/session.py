"""Everything remembered about one volume for one annotator: encodings and the objects being worked on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.intensity import SliceIntensity
from medvl_sam2.modeling.unified import GlobalLook
from medvl_sam2.predictor.objects import ObjectState
from medvl_sam2.predictor.stack import SliceStack
from medvl_sam2.types import Volume


@dataclass
class Session:
    """Opened by ``Predictor.open``; not thread-safe by itself (the predictor serialises access).

    Caches fill lazily: opening costs nothing, the first use of each path pays for its encoding.
    """

    volume: Volume
    objects: dict[str, ObjectState] = field(default_factory=dict)
    """Interactive objects by the name the annotator gave them."""
    whole: SliceStack | None = None
    """Whole slices that text prompts are laid out on."""
    look: GlobalLook | None = None
    """Global view for the language model."""

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
    def spacing(self) -> tuple[float, float, float]:
        """Canonical spacing (sz, sy, sx) in mm."""
        return self.transform.spacing

    @property
    def bytes(self) -> int:
        """Approximate memory held: image, encoded and decoded slices, image tokens and the scene's maps."""
        states = [state for newest in self.objects.values() for state in newest.history()]
        stacks = {
            id(stack): stack for stack in [s.stack for s in states] + ([self.whole] if self.whole is not None else [])
        }
        logits = {id(values): values.nbytes for state in states for values in state.logits.values()}
        pasted = {id(plane): plane.inside.nbytes for state in states for plane in state.pasted.values()}
        held = self.volume.array.nbytes + sum(stack.bytes for stack in stacks.values())
        kept = {id(plane): plane.mask.nbytes + plane.logits.nbytes for state in states for plane in state.kept.values()}
        held += sum(logits.values()) + sum(pasted.values()) + sum(kept.values())
        if self.look is not None:
            held += self.look.tokens.nbytes
            held += self.look.elements.maps.nbytes if self.look.elements is not None else 0
        return held + (self.image.nbytes if "image" in self.__dict__ else 0)
