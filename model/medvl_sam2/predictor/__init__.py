"""Using the model: sessions, interactive and text-prompted segmentation, answers."""

from medvl_sam2.predictor.feature_cache import CacheConfig
from medvl_sam2.predictor.first_prompts import InteractiveConfig
from medvl_sam2.predictor.named import NamedConfig
from medvl_sam2.predictor.predictor import Predictor
from medvl_sam2.predictor.session import Session, SessionConfig

__all__ = ["CacheConfig", "InteractiveConfig", "NamedConfig", "Predictor", "Session", "SessionConfig"]
