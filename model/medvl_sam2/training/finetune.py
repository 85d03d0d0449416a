"""One finetuning from corrected labels: the only training entry of the app and of ``scripts/finetune.py``.

1. Read the labels; patients go to training or hold-out, for ever (:mod:`~medvl_sam2.training.holdout`).
2. Measure the served model on the hold-out and on generated cases, if an earlier run has not done so.
3. Train on the corrected labels, at least half of every batch on generated cases; an epoch ends with a saved state
   and the loss on the hold-out.
4. Measure the candidate in the same way; publish it if every gate lets it pass
   (:mod:`~medvl_sam2.training.finetune_gates`).

What a gradient step is belongs to the :class:`FinetuneStage`, the loop to the
:class:`~medvl_sam2.training.trainer.Trainer`; this file only decides what the stage sees and what becomes of it. Under
``torchrun`` all processes train; the first one alone measures, tells and publishes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from medvl_sam2.checkpoint import CheckpointMeta, shipped_checkpoint, verify_checkpoint
from medvl_sam2.errors import Cancelled, CheckpointError, DataError
from medvl_sam2.publishing import SHIPPED_VERSION, publish, read_published
from medvl_sam2.synthesis.records import Case
from medvl_sam2.training.finetune_gates import (
    figures,
    forgetting_gate,
    holdout_gate,
    label_gate,
    naming_gate,
    verdict,
)
from medvl_sam2.training.finetune_records import (
    FREE_SETTINGS,
    FinetuneConfig,
    FinetuneProgress,
    FinetuneResult,
    FinetuneSample,
    Gate,
)
from medvl_sam2.training.finetune_run import FinetuneRun, fingerprint
from medvl_sam2.training.finetune_samples import LoadedSample, load_samples
from medvl_sam2.training.holdout import HoldoutSplit, assign_patients
from medvl_sam2.training.kept_scores import KeptScores, score_key
from medvl_sam2.training.measure import LabelledCase, Measurement, ServedPredictor, measure
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.run_settings import plain_settings
from medvl_sam2.training.samples import LabelledVolume, volumes_digest
from medvl_sam2.training.stage import Stage
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from medvl_sam2.vocabulary import CLASSES

logger = logging.getLogger(__name__)

REPLAY_SEED = 1_500_000
"""Generated cases for replay start here: apart from pretraining (below) and evaluation (from 2 000 000)."""
GATE_SEED = 1_900_000
"""Generated cases that forgetting is measured on start here; never trained on."""


_WARMUP = 10
"""Steps over which the learning rate rises."""


@dataclass(frozen=True, eq=False)
class FinetuneData:
    """Volumes to train on with their sampling weights, and volumes of held-out patients to validate on."""

    volumes: Sequence[LabelledVolume]
    weights: Sequence[float]
    held_out: Sequence[LabelledVolume] = ()


class FinetuneStage(Stage):
    """A model under finetuning."""

    name, key = "finetuning", "finetune"

    def __init__(self, config: FinetuneConfig, data: FinetuneData) -> None:
        self.config, self.data = config, data

    @abstractmethod
    def export(self, directory: Path, meta: CheckpointMeta, weights: Mapping[str, Tensor]) -> None:
        """Write the model with these :meth:`Trainer.weights` as a checkpoint directory, replacing an earlier one."""

    def settings(self) -> dict[str, Any]:
        """The finetuning's numbers and its volumes."""
        plain = plain_settings(self.config, FREE_SETTINGS)
        return {**plain, "volumes": volumes_digest(self.data.volumes, self.data.weights)}


@dataclass(frozen=True)
class FinetuneBackend:
    """The model code a finetuning runs on."""

    stage: Callable[[Path, FinetuneConfig, FinetuneData], FinetuneStage]
    """From the base checkpoint, the settings and the data."""
    predictor: Callable[[Path], ServedPredictor]
    """From a checkpoint directory."""
    generate: Callable[[int], Case]
    """Generated case of a seed."""
    replay_volume: Callable[[Case], LabelledVolume]
    """A generated case as the stage sees it."""
    shipped: Callable[[], Path] = shipped_checkpoint
    """The checkpoint that a store serves before anything is published."""


def run_finetune(
    config: FinetuneConfig,
    samples: Sequence[FinetuneSample],
    base: Path | None,
    store: Path,
    progress: Callable[[FinetuneProgress], None],
    should_stop: Callable[[], bool],
    backend: FinetuneBackend,
) -> FinetuneResult:
    """Finetune a checkpoint and publish the outcome into ``store`` if it is better than the one served there.

    ``base``: where training starts; None takes the served checkpoint. ``should_stop`` is asked between steps; a
    stopped run goes on after its last step, a killed one after its last saved state, by the next call on the same
    inputs.

    Raises:
        DataError: no label can be used, or another finetuning runs in this store.
        CheckpointError: the checkpoint is damaged, or the run to go on with was begun otherwise.
        ConfigError: this machine has no such device.
        TrainingError: the loss is not finite.
    """
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    with _alone(store, Ranks.join(config.place)):
        return _Finetuning(config, samples, base, store, progress, should_stop, backend).run()


@contextmanager
def _alone(store: Path, ranks: Ranks) -> Iterator[None]:
    """Keep other finetunings out of ``store``; the first process does so for all."""
    lock = FileLock(store / "finetune.lock")
    try:
        if ranks.first:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"a finetuning is running in {store} already; wait for it or stop it first") from error
    try:
        yield
    finally:
        lock.release()


class _Finetuning:
    """The steps of one finetuning over what they share."""

    def __init__(
        self,
        config: FinetuneConfig,
        samples: Sequence[FinetuneSample],
        base: Path | None,
        store: Path,
        progress: Callable[[FinetuneProgress], None],
        should_stop: Callable[[], bool],
        backend: FinetuneBackend,
    ) -> None:
        self.config, self.store, self.backend = config, store, backend
        self._progress, self._should_stop = progress, should_stop
        self._started = time.monotonic()
        self.ranks = Ranks.join(config.place)
        published = read_published(store)  # what the candidate is measured against, and nothing else, may be replaced
        self.version = SHIPPED_VERSION if published is None else int(published.name)
        self.served = published or backend.shipped()
        self.base = self.served if base is None else Path(base)
        self.meta = verify_checkpoint(self.base)
        verify_checkpoint(self.served)
        self.scores = KeptScores(store)
        loaded, self.skipped = load_samples(samples)
        patients = [one.sample.patient for one in loaded]
        self.split = assign_patients(store / "holdout.json", patients, config.holdout_fraction)
        self.train, self.holdout = self._sides(loaded, self.split)
        mark, record = fingerprint(config, loaded, self.split, self.meta.sha256)
        if not self.ranks.first:
            self.ranks.wait()  # for the folder that the first process makes
        self.run_folder = FinetuneRun.open(store, mark, record)
        if self.ranks.first:
            self.ranks.wait()
        self.trainer: Trainer | None = None
        self.resumed = False
        self._best: float | None = None

    def run(self) -> FinetuneResult:
        """All steps; a stop in between ends in a result that says so."""
        try:
            stage, trainer = self._prepare()
            if self.ranks.first:
                served_holdout, served_generated = self._measure_served()
            trainer.run()
            weights = trainer.weights()
            if not self.ranks.first:
                return self._result("trained along with the first process, which measures and publishes")
            candidate = self.run_folder.path / "candidate"
            stage.export(candidate, self._candidate_meta(), weights)
            holdout, generated = self._measure(candidate, "candidate")
        except Cancelled as stop:
            return self._result(str(stop), stopped=True)
        gates = self._gates(served_holdout, served_generated, holdout, generated)
        before, after = figures(served_holdout, served_generated), figures(holdout, generated)
        published = None
        if all(gate.passed for gate in gates):
            try:
                published = publish(self.store, candidate, expected_version=self.version)
            except CheckpointError as error:
                gates.append(Gate("publish", False, str(error)))
            else:
                self._best = after["holdout"]
        result = dataclasses.replace(
            self._result(verdict(gates)), published=published, gates=tuple(gates), served=before, candidate=after
        )
        self.run_folder.finish(result)
        self._tell("done", message=result.reason)
        return result

    def _sides(
        self, loaded: Sequence[LoadedSample], split: HoldoutSplit
    ) -> tuple[list[LoadedSample], list[LoadedSample]]:
        """Samples by side. An image that is on the hold-out side under another patient's name is not trained on."""
        holdout = [one for one in loaded if one.sample.patient in split.holdout]
        seen = {one.case.volume.array.tobytes() for one in holdout}
        train: list[LoadedSample] = []
        for one in loaded:
            if one.sample.patient in split.holdout:
                continue
            if one.case.volume.array.tobytes() in seen:
                self.skipped.append(f"{one.sample.id}: the same image is held out under another patient")
            else:
                train.append(one)
        if not train:
            raise DataError("every labelled image belongs to a held-out patient; label an image of another patient")
        return train, holdout

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _measure_served(self) -> tuple[Measurement | None, Measurement]:
        holdout, generated = self._measure(self.served, "served")
        if holdout is not None:
            self._best = holdout.overall
        return holdout, generated

    def _measure(self, checkpoint: Path, who: str) -> tuple[Measurement | None, Measurement]:
        """Scores on the hold-out (None without one) and on generated cases."""
        self._tell("measure", message=f"measuring the {who} model")
        predictor = self.backend.predictor(checkpoint)
        holdout = self._score(checkpoint, predictor, [one.case for one in self.holdout]) if self.holdout else None
        cases = [generated_case(self.backend.generate(GATE_SEED + n)) for n in range(self.config.gate_cases)]
        generated = self._score(checkpoint, predictor, cases)
        made = {"device": predictor.device, "precision": predictor.precision}
        self.run_folder.log(measured=who, **made, **figures(holdout, generated))
        return holdout, generated

    def _score(self, checkpoint: Path, predictor: ServedPredictor, cases: Sequence[LabelledCase]) -> Measurement:
        """Scores on ``cases``, measured only where the store has none of this model under these conditions."""
        config = self.config
        settings = {"clicks": config.clicks, "objects": config.objects, "min_voxels": config.min_voxels}
        key = score_key(checkpoint, predictor, cases, settings)
        found = self.scores.known(key)
        if found is None:
            found = measure(predictor, cases, **settings, should_stop=self._should_stop)
            self.scores.keep(key, found)
        else:
            logger.info("%d cases are not measured again: their scores stand in %s", len(cases), key)
        return found

    def _gates(
        self,
        served_holdout: Measurement | None,
        served_generated: Measurement,
        holdout: Measurement | None,
        generated: Measurement,
    ) -> list[Gate]:
        config = self.config
        gates = [label_gate(self.train, self.holdout, config.trust_labels)]
        if served_holdout is None or holdout is None:
            gates.append(
                Gate(
                    "holdout", False, "labels of one patient only, so nothing can be proven better; label a second one"
                )
            )
        elif not served_holdout.scores:
            gates.append(Gate("holdout", False, "the held-out labels hold no structure large enough to measure"))
        else:
            gates.append(naming_gate(served_holdout, config.trust_labels))
            gates.append(holdout_gate(served_holdout, holdout, config))
        gates.append(forgetting_gate(served_generated, generated, config))
        return gates

    # --- training -----------------------------------------------------------------------------------------------------

    def _prepare(self) -> tuple[FinetuneStage, Trainer]:
        """The stage and its loop, at wherever the last attempt stopped."""
        config = self.config
        stage = self.backend.stage(self.base, config, self._data())
        loop = TrainerConfig(
            steps=config.epochs * config.steps_per_epoch, minutes=config.minutes, schedule="constant", warmup=_WARMUP,
            accumulate=config.accumulate, betas=(0.9, 0.999), precision=config.precision,
            checkpointing=config.checkpointing, save_steps=config.steps_per_epoch, log_steps=config.steps_per_epoch,
            validate_steps=config.steps_per_epoch, most_skips=1, parallel=config.parallel, device=str(config.place),
            seed=config.seed, tensorboard=config.tensorboard, mlflow=config.mlflow,
        )  # fmt: skip
        self.trainer = Trainer(stage, loop, self.run_folder.path, self._watch, log=self.run_folder.METRICS)
        self.resumed = self.trainer.progress.step > 0
        return stage, self.trainer

    def _watch(self, share: float, line: str) -> None:
        """Called by the trainer after every step."""
        assert self.trainer is not None
        if self.trainer.over or self.trainer.progress.step % self.config.steps_per_epoch == 0:
            self._tell("train", loss=self._loss)
        self._check()

    def _data(self) -> FinetuneData:
        """Corrected volumes and replayed generated ones, with sampling weights that keep the replay share."""
        share, count = self.config.replay_share, self.config.replay_cases
        corrected = [one.volume() for one in self.train]
        replay: list[LabelledVolume] = []
        for number in range(count):
            self._check()
            replay.append(self.backend.replay_volume(self.backend.generate(REPLAY_SEED + number)))
        weights = [(1 - share) / len(corrected)] * len(corrected) + [share / count] * count
        return FinetuneData([*corrected, *replay], weights, [one.volume() for one in self.holdout])

    # --- telling ------------------------------------------------------------------------------------------------------

    def _candidate_meta(self) -> CheckpointMeta:
        patients = len({one.sample.patient for one in self.train})
        note = f" Finetuned on corrected labels of {len(self.train)} images of {patients} patients."
        return CheckpointMeta(
            name=self.meta.name,
            version=f"candidate-{self.run_folder.path.name}",
            notice=self.meta.notice.split(" Finetuned on corrected labels")[0] + note,
            metrics={"epochs": float(self._epoch), "loss": self._loss or 0.0},
            parent=self.meta.version,
        )

    def _result(self, reason: str, stopped: bool = False) -> FinetuneResult:
        return FinetuneResult(
            run=self.run_folder.path,
            reason=reason,
            stopped=stopped,
            resumed=self.resumed,
            epochs=self._epoch,
            skipped=tuple(self.skipped),
            seconds=time.monotonic() - self._started,
        )

    @property
    def _epoch(self) -> int:
        """Epochs begun."""
        return 0 if self.trainer is None else -(-self.trainer.progress.step // self.config.steps_per_epoch)

    @property
    def _loss(self) -> float | None:
        """Mean loss of the last epoch in the log."""
        return self.trainer.history[-1]["loss"] if self.trainer is not None and self.trainer.history else None

    def _tell(self, stage: str, loss: float | None = None, message: str = "") -> None:
        epoch, epochs, seconds = self._epoch, self.config.epochs, time.monotonic() - self._started
        logger.info("%s: epoch %d of %d, loss %s %s", stage, epoch, epochs, loss, message)
        self._progress(FinetuneProgress(stage, epoch, epochs, loss, self._best, seconds, message))

    def _check(self) -> None:
        if self._should_stop():
            raise Cancelled("stopped; the next finetuning on the same labels goes on after the last step")


def generated_case(case: Case) -> LabelledCase:
    """A generated case as one to measure on: every organ by name, and all its lesions as ``lesion``."""
    masks = {name: case.organs == value for value, name in enumerate(CLASSES, start=1) if name != "lesion"}
    masks["lesion"] = case.lesions > 0
    return LabelledCase(
        f"generated-{case.seed}", case.volume(), {name: mask for name, mask in masks.items() if mask.any()}
    )
