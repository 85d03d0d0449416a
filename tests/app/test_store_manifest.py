"""What annotators submit over HTTP, labels and corrected texts, is what the training stages read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import dataset_folders as folders
from app.conftest import Running
from medvl_sam2.datasets.manifest import Question, Split, read_manifest
from medvl_sam2.datasets.stored_texts import image_folder
from medvl_sam2.datasets.volumes import read_case
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.training.holdout import assign_patients, patient_key
from medvl_sam2.training.taught_cases import taught_case
from medvl_sam2.training.taught_texts import task_samples
from medvl_sam2.training.trainer import Trainer
from script_modules import load_script
from small_model import SMALL
from taught_folder import SETTINGS, stage_on

PATIENTS = {"ann": "a", "ben": "b", "cay": "c"}


@pytest.fixture
def worked_on(running: Running) -> Running:
    """Three images: two with label and texts, one with a text alone; and a fourth that nobody touched."""
    affine = folders.axes_affine("LPS", turn=True)
    for number, (name, patient) in enumerate(PATIENTS.items()):
        case = folders.phantom(affine, seed=number)
        image = folders.save_nifti(running.studies.parent / "image.nii.gz", case.array, affine)
        running.app.datastore().add_image(name, str(image), {"PatientID": patient})
        folders.save_nifti(running.studies.parent / f"{name}.nii.gz", case.labels, affine)
        if name != "cay":
            # Slicer counts idx over all segments; the mask is numbered over those it saved.
            info = [{"name": text, "idx": n + 7} for n, text in enumerate(folders.NAMES, start=1)]
            assert running.submit(name, running.studies.parent / f"{name}.nii.gz", label_info=info).status_code == 200
        for text in ("A draft that was wrong.", f"The liver of {name} is normal."):
            store(running, name, kind="report", text=text)
    store(running, "ann", kind="answer", question="Is there a lesion?", text="yes")
    store(running, "ann", kind="answer", question="Is  there a lesion?", text="No.")
    store(running, "ann", kind="answer", question="Which organ is the largest?", text="the liver")
    return running


def store(running: Running, image: str, **fields: str) -> None:
    reply = running.client.post("/medvl/texts", params={"image": image}, json={"author": "x", **fields})
    assert reply.status_code == 200


def manifest_of(running: Running, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    script = load_script("make_manifest", monkeypatch)
    out = running.studies / "manifest.jsonl"
    assert script.main(["store", str(running.studies), "--out", str(out), "--check", *more]) == 0
    return out


def test_the_newest_texts_and_the_final_label_are_a_case(worked_on: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = read_manifest(manifest_of(worked_on, monkeypatch))
    records = {record.id: record for record in listed.records}
    assert set(records) == {"store/ann", "store/ben", "store/cay"}  # the untouched images are no cases
    ann = records["store/ann"]
    assert ann.report == "The liver of ann is normal."
    assert ann.questions == (
        Question("Is there a lesion?", "no", "corrected", ("yes", "no")),
        Question("Which organ is the largest?", "the liver", "corrected"),
    )
    assert ann.label_names == folders.NAMES
    assert records["store/cay"].labels == ()
    assert records["store/cay"].report == "The liver of cay is normal."
    loaded = read_case(ann, listed.root)
    truth = np.asarray(nib.load(worked_on.studies.parent / "ann.nii.gz").dataobj)
    assert loaded.labels is not None
    for value, name in enumerate(folders.NAMES, start=1):
        assert np.array_equal(loaded.labels.mask(name), truth == value)
    assert not any(patient in record.patient for record in listed.records for patient in ("id:", "ann"))


def test_sides_are_those_of_the_finetuning(worked_on: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {name: patient_key(name, {"PatientID": patient}) for name, patient in PATIENTS.items()}
    split = assign_patients(tmp_path / "holdout.json", keys.values())
    out = manifest_of(worked_on, monkeypatch, "--holdout", str(tmp_path / "holdout.json"))
    for record in read_manifest(out).records:
        held = keys[record.id.removeprefix("store/")] in split.holdout
        assert record.split is (Split.VALIDATION if held else Split.TRAIN)
    assert split.holdout


def test_a_damaged_text_is_named_and_leaves_its_case_out(
    worked_on: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = image_folder(worked_on.studies, "ben") / "version_2.json"
    file.write_text(file.read_text().replace("normal", "gone"))
    out = manifest_of(worked_on, monkeypatch, "--json", str(tmp_path / "report.json"))
    assert {record.id for record in read_manifest(out).records} == {"store/ann", "store/cay"}
    (problem,) = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert problem["case"] == "store/ben"
    assert "checksum" in problem["reason"]
    script = load_script("make_manifest", monkeypatch)
    assert script.main(["store", str(tmp_path), "--out", str(tmp_path / "m.jsonl")]) == 2  # no store at all


def test_the_joint_stage_learns_from_them(worked_on: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The corrected words are what is taught, and a few steps on them run and lower the loss of the language model."""
    out = manifest_of(worked_on, monkeypatch)
    listed = read_manifest(out)
    record = next(record for record in listed.records if record.id == "store/ann")
    case = taught_case(read_case(record, listed.root), SMALL.vision)
    words = Tokenizer.train(["The liver of ann is normal."], SMALL.language.vocab_size)
    rng = np.random.default_rng(0)
    assert task_samples("report", case, words, 100, rng)[0].reply == "The liver of ann is normal."
    assert {task_samples("vqa", case, words, 100, rng)[0].reply for _ in range(20)} == {"no", "the liver"}
    loop = replace(SETTINGS.trainer, steps=3)
    settings = replace(SETTINGS, trainer=loop)
    result = Trainer(stage_on(out, settings, out=tmp_path / "run"), loop, tmp_path / "run").run()
    assert result is not None
