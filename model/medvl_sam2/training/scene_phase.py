"""Scene phase: the volume encoder and the scene's dense map, from labelled volumes.

Run ``python -m medvl_sam2.training.scene_phase --out RUN`` to write ``scene.safetensors``; it resumes by itself when
RUN already holds a state. The language phase reads the result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from medvl_sam2.config import ModelConfig
from medvl_sam2.files import write_json_atomically
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.scene import SceneReader
from medvl_sam2.modeling.scene_facts import lesion_parts
from medvl_sam2.partial_weights import load_encoder, load_part, read_weights
from medvl_sam2.training.language_heads import DenseHeads, cell_loss, dense_loss
from medvl_sam2.training.language_weights import LESION_PARTS
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.run_settings import plain_settings
from medvl_sam2.training.samples import LabelledVolume, volumes_digest
from medvl_sam2.training.scene_samples import SceneBatch, SceneSampler, ViewConfig
from medvl_sam2.training.stage import Draw, ParameterGroup, Run, Stage
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.training.trainer_state import write_tensors
from medvl_sam2.training.volume_sources import HELD_OUT_SEED, UNSEEN_SEED, SourceConfig, training_volumes

_LEAST_CLASSES = 3
"""Volumes with fewer vocabulary classes teach little of naming."""
_COARSE_WEIGHT = 0.5


@dataclass(frozen=True)
class ScenePhaseConfig:
    """Budget in wall minutes, because the machine decides how many steps that is; both are recorded."""

    minutes: float = 65.0
    batch: int = 3
    rows: int = 4
    """Rows of the stem (four planes each) that the fine level is trained on in one step."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 40
    bfloat16: bool = True
    """Autocast where the device has bfloat16 units: measured 2.4 times faster on CPUs with them, slower elsewhere."""
    device: str = "cpu"
    seed: int = 0


class SceneLearner(nn.Module):
    """Encoder and scene with the heads that only training needs."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.vision = DCFormer(model.vision)
        self.scene = SceneReader(model)
        self.dense = DenseHeads(model.vision, len(model.scene.kinds))

    def loss(self, batch: SceneBatch, rows: tuple[int, int]) -> tuple[Tensor, dict[str, float]]:
        """Loss of the coarse map, of the fine map on the stem's ``rows``, and of the encoder's coarser tokens."""
        organs = len(self.model.scene_organs)
        maps = self.vision(batch.views)
        coarse = self.scene.coarse(batch.views, maps)
        fine = self.scene.sharpen(batch.views, coarse, rows)
        wanted = batch.cells(self.scene.planes(rows))
        sharp = dense_loss(fine.flatten(2), wanted.flatten(2), batch.valid)
        stem = batch.stem_cells(self.scene.grids[0])
        rough = cell_loss(coarse.organs.flatten(2), stem[:, :organs].flatten(2), batch.valid[:, :organs], 4.0)
        auxiliary = self.dense(maps, stem, batch.valid)
        with torch.no_grad():
            known = batch.valid[..., None, None, None]
            found = (fine > 0) & known
            overlap = (found & (wanted > 0.5)).sum(dim=(0, 2, 3, 4))
            total = found.sum(dim=(0, 2, 3, 4)) + ((wanted > 0.5) & known).sum(dim=(0, 2, 3, 4))
            dice = 2 * overlap / total.clamp_min(1)
            seen = (wanted * known).amax(dim=(0, 2, 3, 4)) > 0.5
        figures = {"fine": sharp.item(), "coarse": rough.item()}
        if bool(seen[:organs].any()):
            figures["organs"] = float(dice[:organs][seen[:organs]].mean())
        if bool(seen[organs]):
            figures["lesions"] = float(dice[organs])
        return sharp + _COARSE_WEIGHT * rough + auxiliary, figures


class ScenePhase(Stage):
    """The stage and its run within a budget."""

    name, key, outdated = "scene phase", "scene", ("optimiser.pt",)

    def __init__(
        self,
        config: ScenePhaseConfig,
        volumes: Sequence[LabelledVolume],
        weights: Sequence[float],
        model: ModelConfig,
        out: Path,
        views: ViewConfig | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.out = config, out
        self.learner = SceneLearner(model).to(config.device)
        self.sampler = SceneSampler(volumes, weights, model, config.seed + 1, views)
        self._volumes = volumes_digest(volumes, weights)
        self.progress: dict[str, float] = {"steps": 0, "seconds": 0.0}

    def start_from(self, source: Path) -> None:
        """Begin with encoder and scene of a checkpoint folder, or with the encoder of an alignment stage's result.

        A resumed run goes on with its own. Raises :class:`CheckpointError` when ``source`` belongs to another
        configuration.
        """
        weights = read_weights(source)
        if any(name.startswith("language.scene.") for name in weights):
            load_part(self.learner, weights, source, "language.", ("vision.", "scene."), LESION_PARTS)
        else:
            load_encoder(self.learner.vision, source)

    def run(self) -> None:
        """From wherever the last run stopped to the end of the budget."""
        config = self.config
        self.learner.train()
        trainer = TrainerConfig(
            minutes=config.minutes, schedule="held_then_cosine", warmup=config.warmup_steps, seed=config.seed + 1,
            precision="auto" if config.bfloat16 else "float32", device=config.device,
        )  # fmt: skip
        progress = Trainer(self, trainer, self.out).run()
        self.progress = {"steps": progress.step, "seconds": progress.seconds}
        self.learner.eval()

    @property
    def module(self) -> SceneLearner:
        """Encoder, scene and auxiliary heads."""
        return self.learner

    def groups(self) -> list[ParameterGroup]:
        """Everything at one rate."""
        return [ParameterGroup(list(self.learner.parameters()), self.config.learning_rate, self.config.weight_decay)]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Loss of freshly drawn views."""
        self.sampler.rng = draw.rng()
        batch = self.sampler.batch(self.config.batch)
        rows = self._rows(batch)
        return self.learner.loss(batch.to(self.config.device), rows)

    def settings(self) -> dict[str, Any]:
        """The phase's numbers and its volumes."""
        return {**plain_settings(self.config, ("minutes", "device")), "volumes": self._volumes}

    def saved(self, run: Run) -> None:
        """Write ``scene.safetensors`` and ``progress.json``."""
        weights = run.weights()
        if run.ranks.first:
            write_tensors(self.out / "scene.safetensors", weights)
            done = {"steps": run.progress.step, "seconds": run.progress.seconds}
            record = {**done, "config": asdict(self.config), "threads": torch.get_num_threads()}
            write_json_atomically(self.out / "progress.json", record)

    def _rows(self, batch: SceneBatch) -> tuple[int, int]:
        """Rows of the stem to sharpen; two times in three round a lesion, where there is one."""
        rng, scene = self.sampler.rng, self.learner.scene
        whole, rows = scene.grids[0][0], min(self.config.rows, scene.grids[0][0])
        start = int(rng.integers(whole - rows + 1))
        lesion = batch.quarters[:, scene.organs].amax(dim=(0, 2, 3)) > 1
        if bool(lesion.any()) and rng.random() < 0.67:
            plane = int(rng.choice(np.flatnonzero(lesion.numpy())))
            row = plane * whole // scene.grid[0]
            start = int(np.clip(row - rng.integers(rows), 0, whole - rows))
        return start, start + rows


@torch.no_grad()
def scene_scores(learner: SceneLearner, sampler: SceneSampler) -> dict[str, float]:
    """Dice per organ channel on the scene's cells, and lesions found, missed and invented, over whole volumes."""
    learner.eval()
    names = learner.model.scene_organs
    overlap, total = np.zeros(len(names)), np.zeros(len(names))
    counts = {"lesions_found": 0.0, "lesions_missed": 0.0, "lesions_invented": 0.0}
    for number in tqdm(range(len(sampler.volumes)), desc="held-out volumes", mininterval=10):
        batch = sampler.plain(number)
        shares = torch.sigmoid(learner.scene(batch.views, learner.vision(batch.views)))[0].numpy()
        wanted = batch.cells()[0].numpy()
        for channel in np.flatnonzero(batch.valid[0, : len(names)].numpy()):
            found, true = shares[channel] > 0.5, wanted[channel] > 0.5
            overlap[channel] += 2 * (found & true).sum()
            total[channel] += found.sum() + true.sum()
        true_parts = lesion_parts(wanted[len(names)], 0.5, 99, least=0.0)
        parts = lesion_parts(shares[len(names)], learner.model.scene.threshold, 99)
        hits = sum(any((part & true).any() for part in parts) for true in true_parts)
        counts["lesions_found"] += hits
        counts["lesions_missed"] += len(true_parts) - hits
        counts["lesions_invented"] += sum(not any((part & true).any() for true in true_parts) for part in parts)
    dice = {name: float(o / t) for name, o, t in zip(names, overlap, total, strict=True) if t > 0}
    return {**dice, "mean": float(np.mean(list(dice.values()))), **counts}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=ScenePhaseConfig.minutes)
    parser.add_argument("--generated", type=int, default=UNSEEN_SEED, help="generated training cases")
    parser.add_argument("--lesion-rich", type=int, default=400, help="generated cases with many lesions")
    parser.add_argument("--real", type=Path, help="folder with the trainable real cases; none by default")
    parser.add_argument("--cache", type=Path, help="folder that keeps generated cases between runs")
    parser.add_argument("--held-out", type=int, default=24, help="generated cases measured at the end")
    parser.add_argument("--start", type=Path, metavar="WEIGHTS", help="checkpoint, or alignment.safetensors")
    parser.add_argument("--learning-rate", type=float, default=ScenePhaseConfig.learning_rate)
    parser.add_argument("--batch", type=int, default=ScenePhaseConfig.batch)
    parser.add_argument("--generated-share", type=float, default=0.7, help="of all draws, beside real volumes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    ranks = Ranks.join(options.device)
    source = SourceConfig(
        generated=options.generated, lesion_rich=options.lesion_rich, generated_share=options.generated_share,
        real=options.real, real_copies=20, label_copies=30, cache=options.cache, seed=options.seed,
    )  # fmt: skip
    volumes, weights = training_volumes(source)
    model = ModelConfig.tiny()
    taught = [n for n, v in enumerate(volumes) if sum(t.name in model.classes for t in v.targets) >= _LEAST_CLASSES]
    config = ScenePhaseConfig(
        minutes=options.minutes, batch=options.batch, learning_rate=options.learning_rate,
        seed=options.seed, device=options.device,
    )  # fmt: skip
    phase = ScenePhase(config, [volumes[n] for n in taught], [weights[n] for n in taught], model, options.out)
    if options.start is not None:
        phase.start_from(options.start)
    phase.run()
    if not (options.held_out and ranks.first):
        return
    held = SourceConfig(generated=options.held_out, cache=options.cache, seed=HELD_OUT_SEED)
    scores = scene_scores(phase.learner.cpu(), SceneSampler(*training_volumes(held), model, 0))
    write_json_atomically(options.out / "metrics.json", {**phase.progress, "held_out": scores})
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
