"""Scene alignment stage: a SigLIP head over the measured scene of a checkpoint, from volumes and reports.

Run ``python -m medvl_sam2.training.scene_alignment_stage --config FILE --manifest MANIFEST --out RUN`` to write the
folder ``RUN/alignment``: a copy of it in that checkpoint's folder gives retrieval and :meth:`Predictor.embed_volume`,
and ``metrics.json`` with held-out losses and retrieval before and after. Encoder and scene stay as they are, so every
volume is looked at once and batches are large. Without a manifest it learns from generated cases, whose scenes are
measured from their labels; held-out cases always are by the network. An interrupted run goes on when it is started
again. ``training/stages/scene_alignment.yaml`` explains the settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medvl_sam2.checkpoint import (
    ALIGNMENT_FOLDER,
    TOKENIZER_FILE,
    CheckpointMeta,
    load_checkpoint,
    save_checkpoint,
    shipped_checkpoint,
)
from medvl_sam2.config import ModelConfig
from medvl_sam2.datasets.manifest import read_manifest
from medvl_sam2.errors import ConfigError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.scene_measured import scene_sha256
from medvl_sam2.modeling.scene_text import SceneTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.partial_weights import load_image_text, load_part
from medvl_sam2.training.alignment_learner import AlignmentStageConfig
from medvl_sam2.training.alignment_records import GeneratedRecords
from medvl_sam2.training.alignment_stage import manifest_sides
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.labelled_scenes import labelled_scene
from medvl_sam2.training.language_data import CaseStore
from medvl_sam2.training.manifest_feed import held_out_draws, held_out_figures
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.scene_alignment import SceneAlignmentConfig, SceneAlignmentStage, begin_bias, scene_retrieval
from medvl_sam2.training.scene_records import SceneReading, SceneRecord, stack_scenes
from medvl_sam2.training.stage_config import stage_command
from medvl_sam2.training.trainer import Trainer
from medvl_sam2.training.volume_sources import HELD_OUT_SEED

_WORDINGS = 6


@dataclass(frozen=True)
class SceneSides:
    """Cases to learn from, and cases to measure on."""

    training: CaseFeed[SceneRecord]
    held_out: CaseFeed[SceneRecord] | None


def generated_scenes(config: SceneAlignmentConfig, language: VisionLanguage, out: Path) -> SceneSides:
    """Generated cases; what is measured of them lies in ``out``, and the cases themselves in the data's cache."""
    data, vision = config.data, language.config.vision
    cache = data.cache or out / "cache"
    seen, labelled = (SceneReading(language, out / name) for name in ("scenes", "labelled"))
    cases = CaseStore(range(data.generated), vision, cache, wordings=_WORDINGS)
    unseen = range(HELD_OUT_SEED, HELD_OUT_SEED + data.held_out)

    scene = language.config.scene
    told = GeneratedRecords(cases).names

    def learned(number: int) -> SceneRecord:
        return labelled.kept(told[number], lambda: labelled_scene(cases[number], scene))

    def feed(names: Sequence[str], read: Callable[[int], SceneRecord]) -> CaseFeed[SceneRecord]:
        return CaseFeed(names, read, config.trainer.seed, len(names), 0, scene_sha256(language))

    training = feed(told, learned)
    if not unseen:
        return SceneSides(training, None)
    records = GeneratedRecords(CaseStore(unseen, vision, cache))
    names = records.names
    return SceneSides(training, feed(names, lambda n: seen.measured(names[n], lambda: records[n])))


def manifest_scenes(config: SceneAlignmentConfig, language: VisionLanguage, out: Path) -> SceneSides:
    """Both sides of a manifest, measured by the network; raises :class:`DataError` when one has no report."""
    assert config.data.manifest is not None
    manifest = read_manifest(config.data.manifest, config.data.root)
    told = AlignmentStageConfig(data=config.data, organ_weight=0.0, reconstruction_weight=0.0, trainer=config.trainer)
    sides, seen = manifest_sides(told, manifest, language.config.vision), SceneReading(language, out / "scenes")
    known = scene_sha256(language)
    held_out = None if sides.held_out is None else sides.held_out.mapped(seen.measured, known)
    return SceneSides(sides.training.mapped(seen.measured, known), held_out)


def head_config(config: SceneAlignmentConfig, language: VisionLanguage) -> ModelConfig:
    """The model's configuration with the head beside it; raises :class:`ConfigError` when the model has no scene."""
    assert config.head.scene is not None
    side = replace(config.head.scene, weights_sha256=scene_sha256(language))
    head = replace(config.head, scene=side, vocab_size=len(language.tokenizer))
    return replace(language.config, alignment=head)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, train, measure before and after on held-out cases."""
    shipped = Path(__file__).parent / "stages" / "scene_alignment.yaml"
    config, out = stage_command(arguments, __doc__, SceneAlignmentConfig, shipped)
    ranks = Ranks.join(config.trainer.device)
    start = config.start or shipped_checkpoint()
    language = seeing_half(start).to(config.trainer.device)
    out.mkdir(parents=True, exist_ok=True)
    sides = (generated_scenes if config.data.manifest is None else manifest_scenes)(config, language, out)
    model = head_config(config, language)
    batch = config.batch * ranks.world
    looked_at = sides.training.readable(len(sides.training))

    def begun() -> SceneTextModel:
        torch.manual_seed(config.trainer.seed)
        head = SceneTextModel(model, language.tokenizer)
        head.alignment.scene.standardise(stack_scenes(looked_at))
        begin_bias(head, batch)
        return head

    stage = SceneAlignmentStage(config, begun(), sides.training, ranks.world)
    trainer = Trainer(stage, config.trainer, out)
    progress = trainer.run()
    weights = trainer.weights()  # in every process: under FSDP each has a part of them
    if not ranks.first:
        return
    place = out / ALIGNMENT_FOLDER

    def save(scores: Mapping[str, float]) -> None:
        notice = f"Head over the scene: {len(looked_at)} cases, {progress.step} steps."
        meta = CheckpointMeta("scene alignment", "0", notice, dict(scores))
        save_checkpoint(place, weights, model, start / TOKENIZER_FILE, meta, overwrite=True)

    save({})
    metrics: dict[str, Any] = {"steps": progress.step, "seconds": progress.seconds, "cases": len(looked_at)}
    skipped = dict(sides.training.skipped)
    if sides.held_out is not None:
        trained = load_image_text(place)  # what is scored is what is stored, in half precision
        assert isinstance(trained, SceneTextModel)
        heads = {"before": begun(), "after": trained}
        scores = {name: held_out_scores(config, head, sides.held_out) for name, head in heads.items()}
        save(scores["after"])
        metrics |= {"held_out_cases": min(config.data.held_out, len(sides.held_out)), "held_out": scores}
        skipped |= sides.held_out.skipped
    told = json.loads(json.dumps(asdict(config), default=str))
    write_json_atomically(
        out / "metrics.json", {**metrics, "skipped_cases": skipped, "history": trainer.history, "config": told}
    )
    print(json.dumps(metrics, indent=2))


def seeing_half(folder: Path) -> VisionLanguage:
    """Language half of the checkpoint in ``folder``, in evaluation mode; :class:`ConfigError` without a scene."""
    checkpoint = load_checkpoint(folder)
    if not checkpoint.config.scene.lesions:
        raise ConfigError(f"{folder} has no scene to read; train its own encoder with the alignment stage")
    language = VisionLanguage(checkpoint.config, Tokenizer.load(folder / TOKENIZER_FILE))
    load_part(language, checkpoint.state, folder, "language.")
    return language.eval()


def held_out_scores(
    config: SceneAlignmentConfig, head: SceneTextModel, feed: CaseFeed[SceneRecord]
) -> dict[str, float]:
    """Loss of ``head`` on the held-out cases of ``feed``, and how well their reports and volumes find one another."""
    cases = min(config.data.held_out, len(feed))
    batch = min(config.batch, cases)
    stage = SceneAlignmentStage(replace(config, batch=batch), head, feed)
    head.eval()
    return {
        **held_out_figures(stage, config.trainer, held_out_draws(cases, batch)),
        **scene_retrieval(head, feed.readable(cases)),
    }


if __name__ == "__main__":
    main()
