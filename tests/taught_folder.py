"""A small data set with everything the joint stage learns from: masks, reports, questions and sentences.

As a program it trains the joint stage of the tests' small model on such a folder::

    taught_folder.py MANIFEST OUT STEPS [ddp|fsdp ...]

Two ways of sharing take half of the steps each, the second from the state that the first left.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import dataset_folders as folders
from medvl_sam2.config import ModelConfig, SceneConfig
from medvl_sam2.datasets.manifest import (
    CaseRecord,
    ImageFile,
    LabelFile,
    Question,
    Reference,
    Split,
    read_manifest,
    write_manifest,
)
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.training.joint_learner import JointData, JointStage, JointStageConfig
from medvl_sam2.training.joint_stage import feed_of
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.taught_texts import corpus_of
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.types import Modality
from small_model import SMALL, SMALL_SLICES

SCENELESS = replace(SMALL, scene=SceneConfig(lesions=0), slices=replace(SMALL_SLICES, slice_scores=True))
SETTINGS = JointStageConfig(
    data=JointData(workers=0),
    tasks=3,
    pack_length=256,
    requests=2,
    slices=1,
    sheet=4,
    clip_length=2,
    seam_rate=3e-3,
    language_rate=1e-3,
    segmenter_rate=1e-3,
    trainer=TrainerConfig(steps=4, warmup=2, log_steps=1, save_steps=1, schedule="constant"),
)


def manifest(folder: Path, splits: str = "tttv") -> Path:
    """Cases in ``folder`` (t: training, v: validation) and their manifest; the last of each has no right kidney."""
    records = []
    for number, side in enumerate(splits):
        name, alone = f"case{number}", splits.rindex(side) == number
        case = folders.phantom(folders.axes_affine("LPS", turn=True), seed=number)
        labels = case.labels.copy()
        labels[(labels == 1) & alone] = 0
        folders.save_nifti(folder / f"{name}.nii.gz", case.array, case.affine)
        folders.save_nifti(folder / f"{name}_labels.nii.gz", labels, case.affine)
        kidneys = "left kidney" if alone else "both kidneys"
        records.append(
            CaseRecord(
                id=name,
                source="test",
                patient=f"patient{number}",
                split=Split.TRAIN if side == "t" else Split.VALIDATION,
                modality=Modality.CT,
                licence="CC0-1.0",
                image=ImageFile(f"{name}.nii.gz"),
                labels=(LabelFile(f"{name}_labels.nii.gz", dict(enumerate(folders.NAMES, start=1))),),
                report=f"The liver is normal. The scan shows {kidneys}.",
                questions=(
                    Question("Is the right kidney there?", "no" if alone else "yes", "presence", ("yes", "no")),
                    Question("Which organ is the largest?", "the liver", "size"),
                ),
                references=(
                    Reference("the organ under the right ribs", ("liver",), "It is the liver [SEG].", "referring"),
                    Reference("both of them", ("liver", "kidney_left"), "liver [SEG], kidney [SEG]", "referring"),
                ),
            )
        )
    write_manifest(folder / "manifest.jsonl", records)
    return folder / "manifest.jsonl"


def stage_on(
    path: Path,
    config: JointStageConfig,
    model: ModelConfig = SMALL,
    out: Path | None = None,
    split: Split = Split.TRAIN,
    world: int = 1,
) -> JointStage:
    """The stage on the cases of one side, with random weights from seed 0."""
    listed = read_manifest(path)
    tokenizer = Tokenizer.train((t for r in listed.records for t in corpus_of(r)), model.language.vocab_size)
    torch.manual_seed(0)
    begun = UnifiedModel(model, tokenizer)
    if out is not None and Ranks.join().first:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out / "tokenizer.json")
    return JointStage(config, begun, feed_of(listed, split, config, model, tokenizer), out, world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    parallels, ranks = sys.argv[4:] or ["ddp"], Ranks.join()
    for number, parallel in enumerate(parallels, start=1):
        share = steps * number // len(parallels)
        loop = replace(SETTINGS.trainer, steps=share, accumulate=2 // ranks.world, parallel=parallel)
        settings = replace(SETTINGS, trainer=loop)
        Trainer(stage_on(place, settings, SCENELESS, out, world=ranks.world), loop, out).run()
