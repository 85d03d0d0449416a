"""Reports in CT-RATE's layout beside masks in TotalSegmentator's, and the alignment stage of a small model on them.

As a program it trains on such a folder::

    alignment_folder.py MANIFEST OUT STEPS [ddp|fsdp ...]

Two ways of sharing take half of the steps each, the second from the state that the first left.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import dataset_folders as folders
from medvl_sam2.config import AlignmentConfig
from medvl_sam2.datasets.manifest import read_manifest, write_manifest
from medvl_sam2.training.alignment_learner import AlignmentData, AlignmentLearner, AlignmentStage, AlignmentStageConfig
from medvl_sam2.training.alignment_stage import manifest_sides
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from small_model import SMALL

HEAD = AlignmentConfig(vocab_size=400, hidden_size=16, intermediate_size=24, layers=1, heads=2, max_length=96, width=12)
SETTINGS = AlignmentStageConfig(
    head=HEAD,
    batch=4,
    regions=2,
    learning_rate=3e-3,
    data=AlignmentData(workers=0),
    trainer=TrainerConfig(steps=4, warmup=0, log_steps=1, save_steps=1, schedule="constant"),
)
SUPINE = "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]"
SAME = "The heart is large. The left lung is clear."


def manifest(folder: Path) -> Path:
    """Three training cases with a report (two of them word for word the same), one with masks, one that is torn."""
    learned = {"train_1_a_1.nii.gz": SAME, "train_2_a_1.nii.gz": "Nothing is found.", "train_3_a_1.nii.gz": SAME}
    unseen = {"valid_1_a_1.nii.gz": SAME, "valid_2_a_1.nii.gz": "Nothing is found."}
    folders.ct_rate(folder, learned, dict.fromkeys(learned, SUPINE))
    folders.ct_rate(folder, unseen, dict.fromkeys(unseen, SUPINE), "valid", "validation")
    folders.totalsegmentator(folder)
    records = [r for source in ("ct-rate", "totalsegmentator") for r in folders.found(source, folder).records]
    write_manifest(folder / "manifest.jsonl", records)
    return folder / "manifest.jsonl"


def stage_on(path: Path, config: AlignmentStageConfig, out: Path | None = None, world: int = 1) -> AlignmentStage:
    """The stage on the training side, from seed 0, without dropout and with fixed statistics of the norms.

    Those are each process's own; everything else is to be the same however many share the work.
    """
    sides = manifest_sides(config, read_manifest(path), SMALL.vision)
    torch.manual_seed(0)
    learner = AlignmentLearner(replace(SMALL, alignment=HEAD), sides.tokenizer(), 4, 8)
    stage = AlignmentStage(config, learner, sides.training, out, world)
    learner.eval()
    return stage


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    parallels, ranks = sys.argv[4:] or ["ddp"], Ranks.join()
    for number, parallel in enumerate(parallels, start=1):
        loop = replace(SETTINGS.trainer, steps=steps * number // len(parallels), parallel=parallel)
        settings = replace(SETTINGS, batch=SETTINGS.batch // ranks.world, trainer=loop)
        stage = stage_on(place, settings, out, ranks.world)
        Trainer(stage, loop, out).run()
