"""A finetuning publishes only what is better, loses nothing when interrupted, and is not fooled by poisoned labels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from finetune_fakes import AFFINE, ORGANS, SHAPE, FakeBackend, FakePredictor, make_samples, write_model
from medvl_sam2.checkpoint import load_checkpoint
from medvl_sam2.errors import ConfigError, DataError, TrainingError
from medvl_sam2.publishing import publish, read_published
from medvl_sam2.training import finetune
from medvl_sam2.training.finetune import run_finetune
from medvl_sam2.training.finetune_records import FinetuneConfig, FinetuneProgress, FinetuneResult, FinetuneSample
from medvl_sam2.training.finetune_samples import label_names, samples_from_folder
from medvl_sam2.training.holdout import assign_patients
from medvl_sam2.training.measure import LabelledCase, Measurement, ServedPredictor, measure
from medvl_sam2.vocabulary import CLASSES

QUICK = FinetuneConfig(epochs=3, steps_per_epoch=4, replay_cases=2, gate_cases=1, clicks=1, min_voxels=50)


def run(
    tmp_path: Path,
    samples: list[FinetuneSample],
    fake: FakeBackend,
    config: FinetuneConfig = QUICK,
    skill: float = 0.6,
    should_stop: Callable[[], bool] = lambda: False,
    told: list[FinetuneProgress] | None = None,
) -> FinetuneResult:
    base = tmp_path / "base"
    if not base.exists():
        write_model(base, skill)
    listen = (lambda _: None) if told is None else told.append
    return run_finetune(config, samples, base, tmp_path / "store", listen, should_stop, fake.backend(base))


def gates(result: FinetuneResult) -> dict[str, bool]:
    return {gate.name: gate.passed for gate in result.gates}


def test_a_better_model_is_published_and_the_run_documents_itself(tmp_path: Path) -> None:
    told: list[FinetuneProgress] = []
    result = run(tmp_path, make_samples(tmp_path, 5), FakeBackend(gain=0.02), told=told)
    assert result.published == read_published(tmp_path / "store")
    assert result.published is not None
    assert gates(result) == {"labels": True, "names": True, "holdout": True, "forgetting": True}
    assert result.served is not None
    assert result.candidate is not None
    assert result.candidate["holdout"] > result.served["holdout"] + 0.05
    meta = load_checkpoint(result.published).meta
    assert meta.parent == "base"
    assert "Finetuned on corrected labels" in meta.notice
    assert [p.epoch for p in told if p.stage == "train"] == [1, 2, 3]
    assert told[-1].stage == "done"
    assert told[-1].best_metric == pytest.approx(result.candidate["holdout"])
    assert told[0].total_epochs == 3
    record = json.loads((result.run / "config.json").read_text())
    assert {entry["side"] for entry in record["inputs"]} == {"train", "holdout"}
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert all(line["held_out_loss"] <= line["loss"] for line in lines if "loss" in line)
    assert [(line["measured"], line["device"], line["precision"]) for line in lines if "measured" in line] == [
        ("served", "cpu", "float32"),
        ("candidate", "cpu", "float32"),
    ]
    assert json.loads((result.run / "result.json").read_text())["published"] == "1"
    assert not list(result.run.glob("*.safetensors"))


def test_training_never_sees_a_held_out_patient_and_replays_half(tmp_path: Path) -> None:
    fake = FakeBackend()
    samples = make_samples(tmp_path, 6)
    run(tmp_path, samples, fake)
    split = assign_patients(tmp_path / "store" / "holdout.json", [sample.patient for sample in samples])
    data = fake.stages[0].data
    volumes, weights = data.volumes, data.weights
    patients = {volume.patient for volume in volumes}
    assert split.holdout
    assert not patients & set(split.holdout)
    assert set(split.train) <= patients
    assert {volume.patient for volume in data.held_out} == set(split.holdout)
    replayed = sum(w for v, w in zip(volumes, weights, strict=True) if v.patient.startswith("generated"))
    assert replayed == pytest.approx(QUICK.replay_share)
    assert sum(weights) == pytest.approx(1.0)


def test_no_gain_is_not_published(tmp_path: Path) -> None:
    result = run(tmp_path, make_samples(tmp_path, 5), FakeBackend(gain=0.0))
    assert result.published is None
    assert read_published(tmp_path / "store") is None
    assert gates(result)["holdout"] is False
    assert "less than the margin" in result.reason


def test_forgetting_is_not_published(tmp_path: Path) -> None:
    result = run(tmp_path, make_samples(tmp_path, 5), FakeBackend(gain=0.02, drift=-0.01))
    assert result.published is None
    assert gates(result)["holdout"] is True
    assert gates(result)["forgetting"] is False


def test_one_patient_is_trained_on_but_nothing_can_be_proven(tmp_path: Path) -> None:
    fake = FakeBackend(gain=0.02)
    result = run(tmp_path, make_samples(tmp_path, 1), fake)
    assert result.published is None
    assert result.epochs == 3
    assert "one patient only" in result.reason


def test_a_hold_out_with_nothing_to_measure_is_trained_beside_and_not_published(tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(one, names={value: f"region {value}" for value in one.names})  # nothing to ask for by name
        for one in make_samples(tmp_path, 5)
    ]
    result = run(tmp_path, samples, FakeBackend(gain=0.02), dataclasses.replace(QUICK, min_voxels=10**6))
    assert result.published is None
    assert result.epochs == 3
    assert gates(result)["holdout"] is False
    assert "no structure large enough" in result.reason


def displaced(labels: np.ndarray) -> np.ndarray:
    return np.roll(labels, (5, -4, 4), axis=(0, 1, 2))


def renamed(labels: np.ndarray) -> np.ndarray:
    values = [CLASSES.index(name) + 1 for name in ORGANS]
    table = np.zeros(256, dtype=np.uint8)
    table[values] = values[1:] + values[:1]
    return table[labels]


@pytest.mark.parametrize(("spoil", "gate"), [(displaced, "labels"), (renamed, "names")])
def test_poisoned_labels_are_trained_on_and_not_published(
    tmp_path: Path, spoil: Callable[[np.ndarray], np.ndarray], gate: str
) -> None:
    # The hold-out is poisoned as well, so the hold-out score alone must not decide.
    fake = FakeBackend(gain=0.02)
    samples = make_samples(tmp_path, 5, dict.fromkeys(range(5), spoil))
    result = run(tmp_path, samples, fake)
    assert fake.stages[0].steps == 12
    assert result.published is None
    assert gates(result)[gate] is False
    assert read_published(tmp_path / "store") is None


def test_an_operator_may_trust_the_labels(tmp_path: Path) -> None:
    config = FinetuneConfig(**{**QUICK.__dict__, "trust_labels": True})
    result = run(tmp_path, make_samples(tmp_path, 5, dict.fromkeys(range(5), displaced)), FakeBackend(0.02), config)
    assert gates(result)["labels"] is True
    assert "trusted by the operator" in next(gate.detail for gate in result.gates if gate.name == "labels")


def test_a_killed_run_goes_on_after_its_last_finished_epoch(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, samples, FakeBackend(gain=0.02, fail_at=10))
    whole = FakeBackend(gain=0.02)
    result = run(tmp_path, samples, whole)
    assert result.resumed
    assert result.epochs == 3
    assert whole.stages[0].steps == 4, "two of three epochs were already done"
    assert len(list((tmp_path / "store" / "runs").iterdir())) == 1
    assert result.published is not None
    assert load_checkpoint(result.published).state["skill"][0] == pytest.approx(0.6 + 12 * 0.02, abs=1e-3)


def test_a_loss_that_is_no_number_ends_the_run_at_once(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    with pytest.raises(TrainingError, match=r"not finite in step 6; lower the learning rate"):
        run(tmp_path, samples, FakeBackend(gain=0.02, broken_at=6))
    whole = FakeBackend(gain=0.02)
    assert run(tmp_path, samples, whole).published is not None
    assert whole.stages[0].steps == 8, "the state is the one before the broken step"


def test_a_stop_is_obeyed_after_the_step_and_resumed_there(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    fake = FakeBackend(gain=0.02)
    result = run(tmp_path, samples, fake, should_stop=lambda: bool(fake.stages) and fake.stages[0].steps >= 6)
    assert result.stopped
    assert result.published is None
    assert result.epochs == 2
    assert not (result.run / "result.json").exists()
    rest = FakeBackend(gain=0.02)
    again = run(tmp_path, samples, rest)
    assert fake.stages[0].steps + rest.stages[0].steps == 12
    assert again.resumed
    assert again.run == result.run
    assert again.published is not None


def test_other_labels_begin_another_run(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    first = run(tmp_path, samples, FakeBackend(), should_stop=lambda: True)
    second = run(tmp_path, samples[:4], FakeBackend(), should_stop=lambda: True)
    assert first.run != second.run


def test_the_time_budget_ends_training_after_the_step_that_passes_it(tmp_path: Path) -> None:
    config = FinetuneConfig(**{**QUICK.__dict__, "minutes": 1e-9})
    fake = FakeBackend()
    assert run(tmp_path, make_samples(tmp_path, 3), fake, config).epochs == 1
    assert fake.stages[0].steps == 1
    assert fake.stages[0].validations == 1


def test_a_model_published_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    fake = FakeBackend(gain=0.02)
    other = write_model(tmp_path / "other", 0.9)
    done: list[Path] = []

    def publish_in_between() -> bool:
        if fake.stages and not done:
            done.append(publish(tmp_path / "store", other))
        return False

    result = run(tmp_path, make_samples(tmp_path, 5), fake, should_stop=publish_in_between)
    assert result.published is None
    assert "compare again" in result.reason
    assert read_published(tmp_path / "store") == done[0]


def test_a_start_from_an_older_model_is_measured_against_the_served_one(tmp_path: Path) -> None:
    publish(tmp_path / "store", write_model(tmp_path / "served", 0.95))
    result = run(tmp_path, make_samples(tmp_path, 5), FakeBackend(gain=0.02), skill=0.6)
    assert result.published is None
    assert result.served is not None
    assert result.candidate is not None
    assert result.served["holdout"] > result.candidate["holdout"] > 0.6
    assert gates(result)["holdout"] is False


def test_the_served_model_is_measured_again_when_another_is_served_by_then(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, samples, FakeBackend(gain=0.02, fail_at=10))
    publish(tmp_path / "store", write_model(tmp_path / "better", 0.95))
    result = run(tmp_path, samples, FakeBackend(gain=0.02))
    assert result.resumed
    assert result.published is None
    assert gates(result)["holdout"] is False


def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of cases whenever a model is measured on some."""
    counts: list[int] = []

    def noted(predictor: ServedPredictor, cases: Sequence[LabelledCase], *args: Any, **settings: Any) -> Measurement:
        counts.append(len(cases))
        return measure(predictor, cases, *args, **settings)

    monkeypatch.setattr(finetune, "measure", noted)
    return counts


def test_the_served_model_is_measured_once_whichever_run_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, counts = make_samples(tmp_path, 5), measured(monkeypatch)
    first = run(tmp_path, samples, FakeBackend(gain=-0.01))
    assert first.published is None
    assert counts == [1, 1, 1, 1]  # hold-out and generated cases, served and candidate
    again = run(tmp_path, samples, FakeBackend(gain=0.02), dataclasses.replace(QUICK, seed=1))
    assert counts == [1, 1, 1, 1, 1, 1]
    assert again.served == first.served
    assert again.published is not None
    third = run(tmp_path, samples, FakeBackend(gain=-0.02), dataclasses.replace(QUICK, seed=2))
    assert third.served == again.candidate  # what is served now was measured as a candidate
    assert len(counts) == 8


@pytest.mark.parametrize("elsewhere", [{"device": "meta"}, {"precision": "bfloat16"}])
def test_a_run_resumed_on_another_device_or_in_another_precision_measures_the_served_model_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: dict[str, Any]
) -> None:
    samples, counts = make_samples(tmp_path, 5), measured(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, samples, FakeBackend(gain=0.02, fail_at=10))
    assert counts == [1, 1]
    (old,) = (tmp_path / "store" / "runs").iterdir()
    (old / "served.json").write_text("left by an earlier release")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, samples, FakeBackend(gain=0.02, fail_at=2))
    assert counts == [1, 1]  # as before: nothing to measure
    monkeypatch.setattr("finetune_fakes.FakePredictor", partial(FakePredictor, **elsewhere))
    result = run(tmp_path, samples, FakeBackend(gain=0.02))
    assert result.resumed
    assert counts == [1, 1, 1, 1, 1, 1]


def test_scores_that_cannot_be_read_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, counts = make_samples(tmp_path, 5), measured(monkeypatch)
    first = run(tmp_path, samples, FakeBackend(gain=-0.01))
    kept = sorted((tmp_path / "store" / "scores").iterdir())
    for path, junk in zip(kept, (b"{", b"{}", b"null", b"\xff"), strict=True):
        path.write_bytes(junk)
    again = run(tmp_path, samples, FakeBackend(gain=-0.01), dataclasses.replace(QUICK, seed=1))
    assert (again.served, again.candidate) == (first.served, first.candidate)
    assert len(counts) == 8


def test_unusable_labels_are_skipped_with_their_reason(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    samples[1].label.write_bytes(b"junk")
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype=np.uint8), AFFINE), samples[2].label)
    result = run(tmp_path, samples, FakeBackend(gain=0.02))
    assert len(result.skipped) == 2
    assert any(line.startswith("case2: the label is empty") for line in result.skipped)
    for sample in samples:
        sample.label.write_bytes(b"junk")
    with pytest.raises(DataError, match="no submitted label can be trained on"):
        run(tmp_path, samples, FakeBackend())


def test_the_same_image_under_two_patients_is_not_trained_on(tmp_path: Path) -> None:
    samples = make_samples(tmp_path, 5)
    split = assign_patients(tmp_path / "store" / "holdout.json", [sample.patient for sample in samples])
    held = next(sample for sample in samples if sample.patient in split.holdout)
    trained = [sample for sample in samples if sample.patient in split.train]
    copy = FinetuneSample(held.image, held.label, held.names, trained[0].patient, "copy")
    fake = FakeBackend()
    result = run(tmp_path, [*samples, copy], fake)
    assert any(line.startswith("copy: the same image is held out") for line in result.skipped)


def test_two_finetunings_in_one_store_are_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with FileLock(tmp_path / "store" / "finetune.lock"), pytest.raises(DataError, match="already"):
        run(tmp_path, make_samples(tmp_path, 2), FakeBackend())


@pytest.mark.parametrize("wrong", [{"replay_share": 0.4}, {"epochs": 0}, {"learning_rate": 0.0}, {"margin": -0.1}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)


def test_label_names_by_position_or_by_idx() -> None:
    saved = [{"name": "liver", "idx": 2}, {"name": "spleen", "idx": 3}]
    assert label_names(saved, [0, 1, 2]) == {1: "liver", 2: "spleen"}
    assert label_names(saved, [2, 3]) == {2: "liver", 3: "spleen"}
    with pytest.raises(DataError, match="mask value 7 has no name"):
        label_names(saved, [7])


def test_samples_of_a_monai_label_folder(tmp_path: Path) -> None:
    made = make_samples(tmp_path, 2)
    final = tmp_path / "labels" / "final"
    final.mkdir(parents=True)
    made[0].label.rename(final / "case0.nii.gz")
    info = {"label_info": [{"name": name, "idx": n} for n, name in enumerate(CLASSES, start=1)]}
    objects = {
        "case0": {
            "image": {"ext": ".nii.gz", "info": {"PatientID": "P"}},
            "labels": {"final": {"ext": ".nii.gz", "info": info}},
        },
        "case1": {"image": {"ext": ".nii.gz", "info": {}}, "labels": {}},
    }
    index = {"images_dir": ".", "labels_dir": "labels", "objects": objects}
    (tmp_path / "datastore_v2.json").write_text(json.dumps(index))
    (sample,) = samples_from_folder(tmp_path)
    assert (sample.id, sample.patient) == ("case0", "id:P")
    assert set(sample.names.values()) == set(ORGANS)


def test_samples_of_a_plain_folder(tmp_path: Path) -> None:
    made = make_samples(tmp_path, 2)
    (tmp_path / "labels").mkdir()
    for n, sample in enumerate(made):
        sample.label.rename(tmp_path / "labels" / f"case{n}.nii.gz")
    with pytest.raises(DataError, match=r"labels\.json is missing"):
        samples_from_folder(tmp_path)
    (tmp_path / "labels" / "labels.json").write_text(json.dumps(dict(enumerate(CLASSES, start=1))))
    (tmp_path / "patients.json").write_text(json.dumps({"case0": "same", "case1": "same"}))
    samples = samples_from_folder(tmp_path)
    assert [sample.patient for sample in samples] == ["id:same", "id:same"]
    assert samples[0].names[5] == "liver"
