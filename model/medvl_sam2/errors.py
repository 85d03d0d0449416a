"""One error tree. Every message names the bad value and the remedy.

The package knows nothing of HTTP: the app translates this tree in one place.
"""

from __future__ import annotations


class MedVLError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(MedVLError):
    """A configuration value is impossible or two values contradict each other."""


class CheckpointError(MedVLError):
    """A checkpoint is missing, torn, or does not fit the model it is loaded into."""


class VolumeError(MedVLError):
    """An image or mask file cannot be read as a 3D volume."""


class GeometryError(MedVLError):
    """Two grids do not match, or an affine is not invertible."""


class PromptError(MedVLError):
    """A prompt (point, box, mask, text, class name) cannot be honoured."""


class DataError(MedVLError):
    """A training or evaluation set is empty, leaking, or inconsistent."""


class TrainingError(MedVLError):
    """A training cannot go on: its loss stays not finite, or its processes disagree."""


class Cancelled(MedVLError):
    """The caller asked a long operation to stop."""
