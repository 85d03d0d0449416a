"""The older phases of a small model, one after the other, for ``torchrun``: each process notes what it ended with.

::

    phases_together.py OUT
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medvl_sam2.config import SceneConfig
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.synthesis import generate_case
from medvl_sam2.training.corpus import build_tokenizer
from medvl_sam2.training.joint_phase import JointConfig, JointPhase, spoken_case
from medvl_sam2.training.language_data import prepare_case
from medvl_sam2.training.language_phase import LanguagePhaseConfig, train_language
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.run_settings import weights_digest
from medvl_sam2.training.samples import CONCEPTS
from medvl_sam2.training.scene_phase import ScenePhase, ScenePhaseConfig
from medvl_sam2.training.segmentation_phase import SegmentationPhase, SegmentationPhaseConfig
from medvl_sam2.training.volume_sources import from_case
from small_model import SMALL, SMALL_SLICES, small_model


def segmentation(out: Path) -> nn.Module:
    """Image phase, then memory phase."""
    config = SegmentationPhaseConfig(0.02, 0.02, whole_slices=1, windows=1, clips=1, clip_length=3, bfloat16=False)
    phase = SegmentationPhase(config, [from_case(generate_case(3))], [1.0], SMALL, out)
    phase.run()
    return phase.learner


def scene(out: Path) -> nn.Module:
    """Encoder and scene."""
    config = ScenePhaseConfig(minutes=0.02, batch=2, rows=2, bfloat16=False)
    phase = ScenePhase(config, [from_case(generate_case(3))], [1.0], SMALL, out)
    phase.run()
    return phase.learner


def language(out: Path) -> nn.Module:
    """Language model on top of a frozen encoder; without a scene, which no steps so few could make useful."""
    config = LanguagePhaseConfig(steps=2, batch=2, pack_length=256, questions=4, segments=1, bfloat16=False)
    cases = [prepare_case(generate_case(seed), SMALL.vision) for seed in (3, 4)]
    torch.manual_seed(0)
    plain = replace(SMALL, scene=SceneConfig(lesions=0))
    model = VisionLanguage(plain, build_tokenizer(cases, SMALL.language.vocab_size))
    return train_language(config, model, cases, out).model


def joint(out: Path) -> nn.Module:
    """The seam of both halves."""
    config = JointConfig(minutes=0.03, volumes=1, requests=2, slices=1, windows=1, clips=1, clip_length=3)
    model = small_model()
    JointPhase(config, model, torch.randn(len(CONCEPTS), SMALL_SLICES.d_model), [spoken_case(7)], [1.0]).run(out)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, ranks = Path(sys.argv[1]), Ranks.join()
    for phase in (segmentation, scene, language, joint):
        torch.manual_seed(0)
        module = phase(place / phase.__name__)
        ranks.wait()
        weights = dict(module.named_parameters())
        finite = bool(np.all([torch.isfinite(tensor).all() for tensor in weights.values()]))
        record = {"weights": weights_digest(weights), "finite": finite}
        write_json_atomically(place / f"{phase.__name__}{ranks.rank}.json", record)
