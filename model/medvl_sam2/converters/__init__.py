"""Published weights of the relatives to parts of the unified model: key by key, shape-checked, no pickle executed."""

from medvl_sam2.converters.convert import Conversion, ConvertedPart, convert
from medvl_sam2.converters.kinds import KINDS
from medvl_sam2.converters.load import LoadedParts, load_parts
from medvl_sam2.converters.parts import PARTS, config_from_parts, read_part_config
from medvl_sam2.converters.source import WeightSource, locate, open_source

__all__ = [
    "KINDS",
    "PARTS",
    "Conversion",
    "ConvertedPart",
    "LoadedParts",
    "WeightSource",
    "config_from_parts",
    "convert",
    "load_parts",
    "locate",
    "open_source",
    "read_part_config",
]
