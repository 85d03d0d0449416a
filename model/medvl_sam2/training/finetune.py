"""One finetuning from corrected labels: the only training entry of the app and of ``scripts/finetune.py``.

1. Read the labels; patients go to training or hold-out, for ever (:mod:`~medvl_sam2.training.holdout`).
2. Measure the served model on the hold-out and on generated cases.
3. Train on the corrected labels, at least half of every batch on generated cases; save a state after each epoch.
4. Measure the candidate in the same way; publish it if every gate lets it pass
   (:mod:`~medvl_sam2.training.finetune_gates`).

What a gradient step is belongs to the :class:`Learner`; this file only decides what it sees and what becomes of it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout

from medvl_sam2.checkpoint import CheckpointMeta, verify_checkpoint
from medvl_sam2.errors import Cancelled, CheckpointError, DataError
from medvl_sam2.publishing import publish, published_version
from medvl_sam2.synthesis.records import Case
from medvl_sam2.training.finetune_gates import (
    figures,
    forgetting_gate,
    holdout_gate,
    label_gate,
    naming_gate,
    verdict,
)
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneProgress, FinetuneResult, FinetuneSample, Gate
from medvl_sam2.training.finetune_run import FinetuneRun, RunState, fingerprint
from medvl_sam2.training.finetune_samples import LoadedSample, load_samples
from medvl_sam2.training.holdout import HoldoutSplit, assign_patients
from medvl_sam2.training.measure import LabelledCase, Measurement, ServedPredictor, measure
from medvl_sam2.training.samples import LabelledVolume
from medvl_sam2.vocabulary import CLASSES

logger = logging.getLogger(__name__)

REPLAY_SEED = 1_500_000
"""Generated cases for replay start here: apart from pretraining (below) and evaluation (from 2 000 000)."""
GATE_SEED = 1_900_000
"""Generated cases that forgetting is measured on start here; never trained on."""


class Learner(Protocol):
    """A model under training."""

    def begin(self, volumes: Sequence[LabelledVolume], weights: Sequence[float], seed: int) -> None:
        """Draw from ``volumes`` with these sampling weights from now on; called once an epoch."""

    def step(self) -> float:
        """One gradient step; its loss."""

    def save_state(self, folder: Path) -> None:
        """Write all that :meth:`load_state` needs into an empty folder."""

    def load_state(self, folder: Path) -> None:
        """Go on from :meth:`save_state`."""

    def export(self, directory: Path, meta: CheckpointMeta) -> None:
        """Write the model as a checkpoint directory, replacing an earlier one."""


@dataclass(frozen=True)
class FinetuneBackend:
    """The model code a finetuning runs on."""

    learner: Callable[[Path, FinetuneConfig], Learner]
    """From the base checkpoint and the settings."""
    predictor: Callable[[Path], ServedPredictor]
    """From a checkpoint directory."""
    generate: Callable[[int], Case]
    """Generated case of a seed."""
    replay_volume: Callable[[Case], LabelledVolume]
    """A generated case as the learner sees it."""


def run_finetune(
    config: FinetuneConfig,
    samples: Sequence[FinetuneSample],
    base: Path,
    store: Path,
    progress: Callable[[FinetuneProgress], None],
    should_stop: Callable[[], bool],
    backend: FinetuneBackend,
) -> FinetuneResult:
    """Finetune the served checkpoint ``base`` and publish the outcome into ``store`` if it is better.

    ``should_stop`` is asked between steps; a stopped or killed run is resumed by the next call on the same inputs.

    Raises:
        DataError: no label can be used, or another finetuning runs in this store.
        CheckpointError: ``base`` is damaged.
    """
    store = Path(store)
    store.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store / "finetune.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(f"a finetuning is running in {store} already; wait for it or stop it first") from error
    try:
        return _Finetuning(config, samples, Path(base), store, progress, should_stop, backend).run()
    finally:
        lock.release()


class _Finetuning:
    """The steps of one finetuning over what they share."""

    def __init__(
        self,
        config: FinetuneConfig,
        samples: Sequence[FinetuneSample],
        base: Path,
        store: Path,
        progress: Callable[[FinetuneProgress], None],
        should_stop: Callable[[], bool],
        backend: FinetuneBackend,
    ) -> None:
        self.config, self.base, self.store, self.backend = config, base, store, backend
        self._progress, self._should_stop = progress, should_stop
        self._started = time.monotonic()
        self.meta = verify_checkpoint(base)
        self.version = published_version(store)
        loaded, self.skipped = load_samples(samples)
        patients = [one.sample.patient for one in loaded]
        self.split = assign_patients(store / "holdout.json", patients, config.holdout_fraction)
        self.train, self.holdout = self._sides(loaded, self.split)
        mark, record = fingerprint(config, loaded, self.split, self.meta.sha256)
        self.run_folder = FinetuneRun.open(store, mark, record)
        self.resumed = self.run_folder.resumed
        self._best: float | None = None

    def run(self) -> FinetuneResult:
        """All steps; a stop in between ends in a result that says so."""
        try:
            served_holdout, served_generated = self._measure_served()
            learner = self._train()
            self._check()
            candidate = self.run_folder.path / "candidate"
            learner.export(candidate, self._candidate_meta())
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
        self._tell("done", self.run_folder.state().epoch, message=result.reason)
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
        known = self.run_folder.served()
        if known is None:
            known = self._measure(self.base, "served")
            self.run_folder.keep_served(*known)
        if known[0] is not None:
            self._best = known[0].overall
        return known

    def _measure(self, checkpoint: Path, who: str) -> tuple[Measurement | None, Measurement]:
        """Scores on the hold-out (None without one) and on generated cases."""
        self._tell("measure", self.run_folder.state().epoch, message=f"measuring the {who} model")
        predictor = self.backend.predictor(checkpoint)
        holdout = self._score(predictor, [one.case for one in self.holdout]) if self.holdout else None
        cases = [generated_case(self.backend.generate(GATE_SEED + n)) for n in range(self.config.gate_cases)]
        generated = self._score(predictor, cases)
        self.run_folder.log(measured=who, **figures(holdout, generated))
        return holdout, generated

    def _score(self, predictor: ServedPredictor, cases: Sequence[LabelledCase]) -> Measurement:
        config = self.config
        return measure(predictor, cases, config.clicks, config.objects, config.min_voxels, self._should_stop)

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

    def _train(self) -> Learner:
        """Train from wherever the last attempt stopped; returns the trained learner."""
        config, run = self.config, self.run_folder
        learner = self.backend.learner(self.base, config)
        state = run.state()
        if state.folder is not None:
            learner.load_state(run.path / state.folder)
        volumes, weights = self._training_set()
        while state.epoch < config.epochs and not self._over(state.seconds):
            begun = time.monotonic()
            learner.begin(volumes, weights, config.seed * 1000 + state.epoch)
            losses = []
            for _ in range(config.steps_per_epoch):
                self._check()
                losses.append(float(learner.step()))
                if self._over(state.seconds + time.monotonic() - begun):
                    break
            loss = float(np.mean(losses))
            if not np.isfinite(loss):
                raise DataError(
                    f"the loss is {loss} in epoch {state.epoch + 1}; lower learning_rate or check the labels"
                )
            epoch = state.epoch + 1
            folder = run.new_state_folder(epoch)
            learner.save_state(folder)
            seconds = state.seconds + time.monotonic() - begun
            state = RunState(epoch, folder.name, seconds, (*state.losses, loss))
            run.commit(state)
            run.log(epoch=epoch, loss=loss, seconds=seconds)
            self._tell("train", epoch, loss=loss)
        return learner

    def _over(self, seconds: float) -> bool:
        return self.config.minutes > 0 and seconds >= self.config.minutes * 60

    def _training_set(self) -> tuple[list[LabelledVolume], list[float]]:
        """Corrected volumes and replayed generated ones, with sampling weights that keep the replay share."""
        share, count = self.config.replay_share, self.config.replay_cases
        corrected = [one.volume() for one in self.train]
        replay: list[LabelledVolume] = []
        for number in range(count):
            self._check()
            replay.append(self.backend.replay_volume(self.backend.generate(REPLAY_SEED + number)))
        weights = [(1 - share) / len(corrected)] * len(corrected) + [share / count] * count
        return [*corrected, *replay], weights

    # --- telling ------------------------------------------------------------------------------------------------------

    def _candidate_meta(self) -> CheckpointMeta:
        patients = len({one.sample.patient for one in self.train})
        state = self.run_folder.state()
        note = f" Finetuned on corrected labels of {len(self.train)} images of {patients} patients."
        return CheckpointMeta(
            name=self.meta.name,
            version=f"candidate-{self.run_folder.path.name}",
            notice=self.meta.notice.split(" Finetuned on corrected labels")[0] + note,
            metrics={"epochs": float(state.epoch), "loss": state.losses[-1] if state.losses else 0.0},
            parent=self.meta.version,
        )

    def _result(self, reason: str, stopped: bool = False) -> FinetuneResult:
        return FinetuneResult(
            run=self.run_folder.path,
            reason=reason,
            stopped=stopped,
            resumed=self.resumed,
            epochs=self.run_folder.state().epoch,
            skipped=tuple(self.skipped),
            seconds=time.monotonic() - self._started,
        )

    def _tell(self, stage: str, epoch: int, loss: float | None = None, message: str = "") -> None:
        seconds = time.monotonic() - self._started
        logger.info("%s: epoch %d of %d, loss %s %s", stage, epoch, self.config.epochs, loss, message)
        self._progress(FinetuneProgress(stage, epoch, self.config.epochs, loss, self._best, seconds, message))

    def _check(self) -> None:
        if self._should_stop():
            raise Cancelled("stopped; the next finetuning on the same labels goes on after the last finished epoch")


def generated_case(case: Case) -> LabelledCase:
    """A generated case as one to measure on: every organ by name, and all its lesions as ``lesion``."""
    masks = {name: case.organs == value for value, name in enumerate(CLASSES, start=1) if name != "lesion"}
    masks["lesion"] = case.lesions > 0
    return LabelledCase(
        f"generated-{case.seed}", case.volume(), {name: mask for name, mask in masks.items() if mask.any()}
    )
