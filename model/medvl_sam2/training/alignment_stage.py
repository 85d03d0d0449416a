"""Alignment stage: SigLIP pretraining of the volume encoder with a text tower, from volumes and reports.

Run ``python -m medvl_sam2.training.alignment_stage --config FILE --manifest MANIFEST --out RUN`` (under ``torchrun``
for several processes) to write ``alignment.safetensors`` (where later stages take the encoder from), ``metrics.json``
with held-out losses and retrieval before and after, and the folder ``alignment``: a copy of it in a checkpoint folder
gives that retrieval and :meth:`Predictor.embed_volume`. Without a manifest it learns from generated cases. An
interrupted run goes on when it is started again. ``training/stages/alignment.yaml`` explains the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, load_checkpoint, save_checkpoint
from medvl_sam2.config import VisionConfig
from medvl_sam2.datasets.manifest import Manifest, Split, read_manifest
from medvl_sam2.datasets.volumes import LoadedCase
from medvl_sam2.errors import DataError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.partial_weights import load_part, read_weights
from medvl_sam2.presets import preset
from medvl_sam2.training.alignment_learner import FINE_STAGE, AlignmentLearner, AlignmentStage, AlignmentStageConfig
from medvl_sam2.training.alignment_metrics import retrieval_scores
from medvl_sam2.training.alignment_records import AlignmentRecord, GeneratedRecords, record_of_taught
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.corpus import build_tokenizer
from medvl_sam2.training.language_data import CaseStore
from medvl_sam2.training.manifest_feed import held_out_draws, held_out_figures, manifest_feed, trained_tokenizer
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.stage_config import stage_command
from medvl_sam2.training.stage_start import image_text_config, image_text_tokenizer, load_image_text_starts
from medvl_sam2.training.taught_cases import reduced_case
from medvl_sam2.training.trainer import Trainer
from medvl_sam2.training.volume_sources import HELD_OUT_SEED

_WORDINGS = 6
_SURVEYED = 200
"""So many generated cases, from the first seed on, are read through for the tokenizer."""


@dataclass(frozen=True)
class Sides:
    """Cases to learn from and cases to measure on; ``tokenizer`` makes one of the texts of the first."""

    training: CaseFeed[AlignmentRecord]
    held_out: CaseFeed[AlignmentRecord] | None
    tokenizer: Callable[[], Tokenizer]


def manifest_sides(config: AlignmentStageConfig, manifest: Manifest, vision: VisionConfig) -> Sides:
    """Training and validation side of ``manifest``, as far as a loss that is switched on has a use for a case.

    Raises :class:`DataError` when one of them has no such case.
    """

    def reduced(case: LoadedCase) -> AlignmentRecord:
        return record_of_taught(reduced_case(case, vision), vision.grid(FINE_STAGE))

    def feed(split: Split) -> CaseFeed[AlignmentRecord]:
        records = [
            record
            for record in manifest.of(split).records
            if record.report or config.reconstruction_weight or (record.labels and config.organ_weight)
        ]
        if not records:
            raise DataError(
                f"{config.data.manifest} has no {split} case with a report or, where asked, masks; add some"
            )
        return manifest_feed(records, manifest.root, reduced, config.data, config.trainer.seed, config.batch)

    held_out = feed(Split.VALIDATION) if config.data.held_out else None
    return Sides(feed(Split.TRAIN), held_out, lambda: trained_tokenizer(manifest, config.head.vocab_size))


def generated_sides(config: AlignmentStageConfig, vision: VisionConfig, cache: Path) -> Sides:
    """Generated cases, made when they are first needed and kept in the folder ``cache``."""
    data = config.data
    cases = CaseStore(range(data.generated + data.without_report), vision, cache, wordings=_WORDINGS)
    unseen = range(HELD_OUT_SEED, HELD_OUT_SEED + data.held_out)

    def feed(records: GeneratedRecords) -> CaseFeed[AlignmentRecord]:
        keep = max(data.keep, 2 * config.batch)
        return CaseFeed(records.names, records.__getitem__, config.trainer.seed, keep, data.workers)

    return Sides(
        feed(GeneratedRecords(cases, data.generated)),
        feed(GeneratedRecords(CaseStore(unseen, vision, cache))) if unseen else None,
        lambda: build_tokenizer(cases[: min(_SURVEYED, data.generated)], config.head.vocab_size),
    )


def held_out_scores(
    config: AlignmentStageConfig, learner: AlignmentLearner, feed: CaseFeed[AlignmentRecord]
) -> dict[str, float]:
    """Losses of ``learner`` on the held-out cases of ``feed`` and, where some have a report, how well it is found."""
    stage, cases = AlignmentStage(config, learner, feed), min(config.data.held_out, len(feed))
    learner.eval()
    scores = held_out_figures(stage, config.trainer, held_out_draws(cases, config.batch))
    records = feed.readable(cases)
    return {**scores, **(retrieval_scores(learner, records) if any(record.reports for record in records) else {})}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on a manifest's training side or on generated cases, measure before and after on held-out ones."""
    shipped = Path(__file__).parent / "stages" / "alignment.yaml"
    config, out = stage_command(arguments, __doc__, AlignmentStageConfig, shipped)
    ranks = Ranks.join(config.trainer.device)
    model = image_text_config(preset(config.preset), config.head, config.start)
    data = config.data
    if data.manifest is None:
        sides = generated_sides(config, model.vision, data.cache or out / "cache")
    else:
        sides = manifest_sides(config, read_manifest(data.manifest, data.root), model.vision)
    tokenizer = image_text_tokenizer(config.start) or sides.tokenizer()
    assert model.alignment is not None
    model = replace(model, alignment=replace(model.alignment, vocab_size=len(tokenizer)))

    def begun() -> AlignmentLearner:
        torch.manual_seed(config.trainer.seed)
        batch = config.batch * ranks.world
        learner = AlignmentLearner(model, tokenizer, batch, batch * config.regions)
        load_image_text_starts(learner, config.start)
        return learner

    stage = AlignmentStage(config, begun(), sides.training, out, ranks.world)
    trainer = Trainer(stage, config.trainer, out)
    if ranks.first:
        tokenizer.save(out / "tokenizer.json")
    progress = trainer.run()
    weights = trainer.weights()  # in every process: under FSDP each has a part of them
    if not ranks.first:
        return
    history = trainer.history
    del trainer, stage  # room for the two that are compared
    trained = ImageTextModel(model, tokenizer)
    result, place = out / "alignment.safetensors", out / ALIGNMENT_FOLDER
    load_part(trained, read_weights(result), result)

    def save(scores: Mapping[str, float]) -> None:
        meta = CheckpointMeta("alignment", "0", f"Image-text model after {progress.step} steps.", metrics=dict(scores))
        save_checkpoint(place, trained.state_dict(), trained.config, out / "tokenizer.json", meta, overwrite=True)

    save({})
    metrics: dict[str, Any] = {"steps": progress.step, "seconds": progress.seconds, "held_out_cases": 0}
    skipped = dict(sides.training.skipped)
    if sides.held_out is not None:
        scores = {"before": held_out_scores(config, begun(), sides.held_out)}
        learner = begun()
        learner.load_state_dict(weights)
        stored = load_checkpoint(place).state  # what is scored is what is stored, in half precision
        load_part(learner, stored, place, parts=("vision.", "alignment."))
        scores["after"] = held_out_scores(config, learner, sides.held_out)
        save(scores["after"])
        metrics |= {"held_out_cases": min(data.held_out, len(sides.held_out)), "held_out": scores}
        skipped |= sides.held_out.skipped
    told = {"skipped_cases": skipped, "history": history, "config": json.loads(json.dumps(asdict(config), default=str))}
    write_json_atomically(out / "metrics.json", {**metrics, **told})
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
