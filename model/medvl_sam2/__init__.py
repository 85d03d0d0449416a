"""MedVL-SAM2: one model for 3D medical reports, questions, and semantic, referring and interactive segmentation."""

from medvl_sam2.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DataError,
    GeometryError,
    MedVLError,
    PromptError,
    VolumeError,
)
from medvl_sam2.types import Answer, Geometry, Modality, Prompt, Segmentation, Volume

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "Cancelled",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Geometry",
    "GeometryError",
    "MedVLError",
    "Modality",
    "Prompt",
    "PromptError",
    "Segmentation",
    "Volume",
    "VolumeError",
    "__version__",
]
