"""Using the model: sessions, interactive and text-prompted segmentation, answers."""

from medvl_sam2.predictor.first_prompts import InteractiveConfig
from medvl_sam2.predictor.named import NamedConfig
from medvl_sam2.predictor.predictor import Predictor
from medvl_sam2.predictor.session import Session, SessionConfig

__all__ = ["InteractiveConfig", "NamedConfig", "Predictor", "Session", "SessionConfig"]
