"""Joint stage: projector alignment, then language and segmentation together, from the cases of one manifest.

Run ``python -m medvl_sam2.training.joint_stage --config FILE --manifest MANIFEST --out RUN`` (under ``torchrun`` for
several processes) to write the checkpoint folder ``checkpoint``, which ``Predictor.load`` serves, and ``metrics.json``
with the held-out losses before and after. An interrupted run goes on when it is started again.
``training/stages/projector.yaml`` and ``joint.yaml`` explain the settings.

Phase ``projector`` trains what turns a volume into image tokens, on texts alone, as Med3DVLM begins. Phase ``joint``
mixes reports, questions, structures by name, sentences and clicks (:mod:`medvl_sam2.training.joint_learner`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from medvl_sam2.checkpoint import load_checkpoint, load_into
from medvl_sam2.config import ModelConfig
from medvl_sam2.datasets.manifest import Manifest, Split, read_manifest
from medvl_sam2.datasets.volumes import LoadedCase
from medvl_sam2.errors import DataError
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.presets import preset
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.joint_learner import JointStage, JointStageConfig
from medvl_sam2.training.manifest_feed import held_out_draws, held_out_figures, manifest_feed, trained_tokenizer
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.stage_config import stage_command
from medvl_sam2.training.stage_start import load_starts, start_config, start_tokenizer
from medvl_sam2.training.taught_cases import TaughtCase, record_offers, taught_case
from medvl_sam2.training.taught_texts import askable
from medvl_sam2.training.trainer import Trainer


def feed_of(
    manifest: Manifest, split: Split, config: JointStageConfig, model: ModelConfig, tokenizer: Tokenizer
) -> CaseFeed[TaughtCase]:
    """The cases of one side that offer a task with a share.

    Raises :class:`DataError` when there is none.
    """
    data, shares = config.data, config.asked.values
    records = [r for r in manifest.of(split).records if any(shares[kind] > 0 for kind in record_offers(r))]
    if not records:
        raise DataError(f"{data.manifest} has no {split} case with a task of the {config.phase} phase; add some")

    def reduced(case: LoadedCase) -> TaughtCase:
        return askable(taught_case(case, model.vision), tokenizer, model.language)

    return manifest_feed(records, manifest.root, reduced, data, config.trainer.seed, config.batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the manifest's training side, measure before and after on its validation side."""
    config, out = stage_command(arguments, __doc__, JointStageConfig)
    ranks = Ranks.join(config.trainer.device)
    manifest = read_manifest(config.data.manifest, config.data.root)
    model_config = start_config(preset(config.preset), config.start)
    tokenizer = start_tokenizer(config.start)
    if tokenizer is None:
        tokenizer = trained_tokenizer(manifest, model_config.language.vocab_size)

    def begun() -> UnifiedModel:
        torch.manual_seed(config.trainer.seed)
        model = UnifiedModel(model_config, tokenizer)
        load_starts(model, config.start)
        return model

    wanted = config.data.held_out
    held_out = feed_of(manifest, Split.VALIDATION, config, model_config, tokenizer) if wanted else None
    feed = feed_of(manifest, Split.TRAIN, config, model_config, tokenizer)
    stage = JointStage(config, begun(), feed, out, ranks.world)
    trainer = Trainer(stage, config.trainer, out)
    if ranks.first:
        tokenizer.save(out / "tokenizer.json")
    progress = trainer.run()
    if not ranks.first:
        return
    history = trainer.history
    del trainer, stage  # room for the two that are compared
    metrics: dict[str, Any] = {"steps": progress.step, "seconds": progress.seconds, "held_out_cases": 0}
    skipped = dict(feed.skipped)
    if held_out is not None:
        draws = held_out_draws(min(wanted, len(held_out)), config.batch)
        scores = {"before": held_out_figures(JointStage(config, begun(), held_out), config.trainer, draws)}
        trained = UnifiedModel(model_config, tokenizer)
        load_into(trained, load_checkpoint(out / "checkpoint").state)
        scores["after"] = held_out_figures(JointStage(config, trained, held_out), config.trainer, draws)
        metrics |= {"held_out_cases": min(draws * config.batch, len(held_out)), "held_out": scores}
        skipped |= held_out.skipped
    told = {"skipped_cases": skipped, "history": history, "config": json.loads(json.dumps(asdict(config), default=str))}
    write_json_atomically(out / "metrics.json", {**metrics, **told})
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
