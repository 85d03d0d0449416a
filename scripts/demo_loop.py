#!/usr/bin/env python
"""The annotator's loop over HTTP with MONAI Label's own client; volumes with ground truth play the annotator.

1. Upload the volumes, with their patients.
2. Prompt every structure of the held-out volumes (a box, then clicks) and note the Dice after each prompt.
3. On the other volumes prompt, correct (the ground truth is the corrected label) and save the label.
4. Train, and wait.
5. Prompt the held-out volumes again with the same number of clicks. The server never sees a label of theirs.

FOLDER holds volumes <id>.nii.gz, masks labels/<id>.nii.gz, names by mask value in labels/labels.json and, where an id
does not tell the patient, patients.json. Patients, not volumes, are held out.

Exit status: 0 when the loop did what it should (published and better; with --poison: not published), else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from local_server import computing_of, own_server, said
from monailabel.client.client import MONAILabelClient, MONAILabelClientException
from tqdm import tqdm

from medvl_sam2.errors import DataError, MedVLError
from medvl_sam2.evaluation.pictures import draw
from medvl_sam2.evaluation.protocol import Setting, Step, run_object
from medvl_sam2.files import write_json_atomically
from medvl_sam2.training.finetune_samples import load_samples, samples_from_folder
from medvl_sam2.training.real_cases import TRAINABLE_REAL, UNSEEN_REAL, load_case
from medvl_sam2.types import Prompt, Volume
from medvl_sam2.volume_io import read_mask, write_mask

TRAINER = "medvl_sam2"
INTERACTIVE = "medvl_interactive"
_MAX_STRUCTURES = 250  # a label file has one byte a voxel

SHARED_SETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hippocampus": (tuple(f"msd_hippocampus_{n}" for n in ("001", "003", "004")), ("msd_hippocampus_006",)),
    "abdomen": (("ts_ct_wholeabdomen_3mm", "ts_mr_abdomen_slab_3mm"), ("ts_ct_dicom20", "msd_spleen2_crop")),
}
"""Real cases by name: annotated ones (trainable) and held-out ones, always of other patients."""


@dataclass(frozen=True, eq=False)
class Study:
    """A volume with its ground truth: bool masks (I, J, K) on the stored grid by structure name."""

    id: str
    patient: str
    volume: Volume
    masks: dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One structure of a held-out volume: Dice after the box and after each click, before and after training."""

    study: str
    structure: str
    voxels: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    seconds_before: float
    seconds_after: float

    @property
    def gain(self) -> float:
        """Dice gained at equal clicks (after the last one)."""
        return self.after[-1] - self.before[-1]


# --- studies ---------------------------------------------------------------------------------------------------------


def studies_of_folder(folder: Path, held_out: Sequence[str]) -> tuple[list[Study], list[Study]]:
    """Annotated and held-out studies; by default the last patient (in order of name) is held out."""
    loaded, skipped = load_samples(samples_from_folder(folder))
    for reason in skipped:
        print(f"left out: {reason}", file=sys.stderr)
    studies = [Study(one.sample.id, one.sample.patient, one.case.volume, dict(one.case.masks)) for one in loaded]
    unknown = sorted(set(held_out) - {study.id for study in studies})
    if unknown:
        raise DataError(f"--held-out {unknown[0]!r} is no volume of {folder}; there are {[s.id for s in studies]}")
    last = max(study.patient for study in studies)
    patients = {study.patient for study in studies if study.id in held_out} or {last}
    return [s for s in studies if s.patient not in patients], [s for s in studies if s.patient in patients]


def studies_of_shared(data: Path, name: str) -> tuple[list[Study], list[Study]]:
    """A named choice of real cases below ``data``; vocabulary classes where a case has them, else its own names."""
    sources = {source.name: source for source in (*TRAINABLE_REAL, *UNSEEN_REAL)}

    def read(case: str) -> Study:
        real = load_case(data, sources[case])
        return Study(case, sources[case].patient, real.volume, dict(real.classes() or real.masks))

    annotated, held_out = ([read(case) for case in tqdm(side, desc="reading")] for side in SHARED_SETS[name])
    return annotated, held_out


def large(study: Study, objects: int, least: int) -> list[str]:
    """Names of the largest ``objects`` structures of at least ``least`` voxels."""
    sizes = {name: int(mask.sum()) for name, mask in study.masks.items()}
    return sorted((n for n, size in sizes.items() if size >= least), key=lambda n: (-sizes[n], n))[:objects]


def label_map(study: Study) -> tuple[np.ndarray, list[str]]:
    """Mask values 1..N (I, J, K) and their names; smaller structures are painted over larger ones."""
    names = large(study, _MAX_STRUCTURES, 1)
    labels = np.zeros(study.volume.geometry.shape, dtype=np.uint8)
    for value, name in enumerate(names, start=1):
        labels[study.masks[name]] = value
    return labels, names


def poisoned(labels: np.ndarray, names: list[str], kind: str | None) -> tuple[np.ndarray, list[str]]:
    """Deliberately wrong labels: every mask beside its structure, or every name on another structure."""
    if kind == "displaced":
        steps = tuple(max(2, size // 5) * sign for size, sign in zip(labels.shape, (1, -1, 1), strict=True))
        return np.roll(labels, steps, axis=(0, 1, 2)), names
    if kind == "renamed":
        return labels, names[1:] + names[:1]
    return labels, names


# --- the loop --------------------------------------------------------------------------------------------------------


class HttpEngine:
    """The server's interactive model as the evaluation's engine; prompts travel as Slicer sends them."""

    name = "server"

    def __init__(self, client: Any, study: Study, structure: str) -> None:
        """``study`` must have been uploaded; one engine a structure."""
        self.client, self.study, self.structure = client, study, structure
        self._first = True

    def open(self, volume: Volume) -> str:
        """The server knows the volume by its id."""
        return self.study.id

    def segment(self, opened: str, prompt: Prompt, name: str = "object") -> np.ndarray:
        """One request; bool mask (I, J, K). The server is told the structure's own name."""
        points = np.rint(prompt.points).astype(int)
        request: dict[str, Any] = {
            "label": self.structure,
            "foreground": points[prompt.labels == 1].tolist(),
            "background": points[prompt.labels == 0].tolist(),
            "result_extension": ".nrrd",
            "result_dtype": "uint8",
        }
        if self._first:
            request["reset_state"] = True
            self._first = False
        if prompt.box is not None:
            low, high = np.rint(np.sort(prompt.box, axis=0)).astype(int).tolist()
            request["roi"] = [edge for pair in zip(low, high, strict=True) for edge in pair]
        file, _ = self.client.infer(INTERACTIVE, opened, request)
        if file is None:
            raise DataError(f"the server returned no mask for {self.structure!r} of {opened!r}; see its log")
        mask, _ = read_mask(Path(file))
        Path(file).unlink()
        return mask > 0


@dataclass(frozen=True)
class Training:
    """What the server says about a finished training."""

    seconds: float
    stats: dict[str, Any]

    @property
    def published(self) -> bool:
        """True when the new model is served."""
        return bool(self.stats.get("published")) or self.reason.startswith("published")

    @property
    def reason(self) -> str:
        """Why it was or was not published."""
        return str(self.stats.get("reason") or self.stats.get("message") or "the server gave no reason")


class Loop:
    """The loop against one server. ``pictures`` is a folder for PNG overlays, or None."""

    def __init__(self, client: Any, clicks: int, objects: int, least: int, pictures: Path | None) -> None:
        """``clicks`` after the box, on the ``objects`` largest structures of at least ``least`` voxels a volume."""
        self.client, self.clicks, self.objects, self.least, self.pictures = client, clicks, objects, least, pictures

    def upload(self, studies: Sequence[Study], folder: Path) -> None:
        """Send the images with their patients; an image that is there already stays."""
        for study in tqdm(studies, desc="uploading", unit="volume"):
            path = folder / f"{study.id}.nii.gz"
            nib.save(nib.Nifti1Image(study.volume.array, study.volume.geometry.affine), path)
            self.client.upload_image(path, study.id, {"PatientID": study.patient})

    def prompt(self, studies: Sequence[Study], stage: str) -> dict[tuple[str, str], tuple[tuple[float, ...], float]]:
        """Box and clicks on every structure: Dice after each prompt, and the seconds of all its requests."""
        found = {}
        jobs = [(study, name) for study in studies for name in large(study, self.objects, self.least)]
        for study, name in tqdm(jobs, desc=f"prompting {stage}", unit="structure"):
            engine = HttpEngine(self.client, study, name)
            last: list[tuple[Prompt, np.ndarray, Step]] = []
            curve = run_object(
                engine, study.id, study.volume, study.masks[name], name, Setting.BOX, self.clicks,
                watch=lambda prompt, mask, step, last=last: last.append((prompt, mask, step)),
            )  # fmt: skip
            seconds = sum(step.seconds or 0.0 for step in curve.steps)
            found[study.id, name] = (tuple(step.dice for step in curve.steps), seconds)
            if self.pictures is not None and stage in ("before", "after"):
                prompt, mask, step = last[-1]
                title = f"{study.id} {name}, {stage} training, {step.clicks} clicks: Dice {step.dice:.3f}"
                path = self.pictures / f"{study.id}_{name}_{stage}.png"
                draw(path, study.volume, mask, title, (name,), study.masks[name], prompt)
        return found

    def correct(self, studies: Sequence[Study], folder: Path, poison: str | None) -> int:
        """Save the corrected label (or a poisoned one) of every study; returns how many structures were saved."""
        saved = 0
        for study in tqdm(studies, desc="saving labels", unit="volume"):
            labels, names = poisoned(*label_map(study), poison)
            path = folder / f"{study.id}_label.nii.gz"
            write_mask(path, labels, study.volume.geometry)
            info = [{"name": name, "idx": value} for value, name in enumerate(names, start=1)]
            self.client.save_label(study.id, path, "final", {"label_info": info})
            saved += len(names)
        return saved

    def train(self, options: dict[str, Any], limit: float, pause: float = 2.0) -> Training:
        """Start a training and wait for its end.

        Raises:
            DataError: it fails, or takes longer than ``limit`` seconds.
        """
        started = time.monotonic()
        self.client.train_start(TRAINER, dict(options))
        with tqdm(desc="training", unit="epoch", total=None) as bar:
            while True:
                task = self.client.train_status()
                stats = self._stats()
                if stats.get("total_epochs"):
                    bar.total = int(stats["total_epochs"])
                bar.update(int(stats.get("epoch") or 0) - bar.n)
                if task["status"] not in ("SUBMITTED", "RUNNING"):
                    break
                if time.monotonic() - started > limit:
                    self.client.train_stop()
                    raise DataError(f"the training took longer than {limit:.0f} s and was stopped; see --train-limit")
                time.sleep(pause)
        if task["status"] != "DONE":
            lines = "\n".join(str(line) for line in task.get("details", [])[-8:])
            raise DataError(f"the training ended as {task['status']}; the end of its log:\n{lines}")
        return Training(time.monotonic() - started, stats)

    def _stats(self) -> dict[str, Any]:
        return dict(self.client.info().get("train_stats", {}).get(TRAINER, {}))


def rows_of(
    studies: Sequence[Study],
    before: dict[tuple[str, str], tuple[tuple[float, ...], float]],
    after: dict[tuple[str, str], tuple[tuple[float, ...], float]],
) -> list[Row]:
    """One row a structure that was prompted both times."""
    sizes = {(study.id, name): int(mask.sum()) for study in studies for name, mask in study.masks.items()}
    return [
        Row(study, name, sizes[study, name], dice, after[study, name][0], seconds, after[study, name][1])
        for (study, name), (dice, seconds) in before.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, with their mean."""
    clicks = len(rows[0].before) - 1
    head = f"{'volume':<26}{'structure':<26}{'box':>7}{f'{clicks} clicks':>10}{'box':>9}{f'{clicks} clicks':>10}"
    lines = [f"{'':<52}{'before':>17}{'after':>19}{'gain':>9}{'s/prompt':>10}", head]
    for row in rows:
        lines.append(
            f"{row.study[:25]:<26}{row.structure[:25]:<26}{row.before[0]:>7.3f}{row.before[-1]:>10.3f}"
            f"{row.after[0]:>9.3f}{row.after[-1]:>10.3f}{row.gain:>+9.3f}{row.seconds_after / (clicks + 1):>10.2f}"
        )
    means = [float(np.mean([getattr(row, side)[at] for row in rows])) for side in ("before", "after") for at in (0, -1)]
    gain = float(np.mean([row.gain for row in rows]))
    lines.append(f"{'mean':<52}{means[0]:>7.3f}{means[1]:>10.3f}{means[2]:>9.3f}{means[3]:>10.3f}{gain:>+9.3f}")
    return "\n".join(lines)


def outcome(rows: Sequence[Row], training: Training, poison: str | None) -> tuple[bool, str]:
    """Whether the loop did what it should, and one sentence."""
    reason = training.reason
    if poison:
        if training.published:
            return False, f"FAILED: a model trained on {poison} labels was published ({reason})"
        return True, f"as it should be, the model trained on {poison} labels is not served ({reason})"
    gain = float(np.mean([row.gain for row in rows]))
    if not training.published:
        return False, f"FAILED: the trained model was not published ({reason})"
    return gain > 0, f"published; mean gain {gain:+.3f} Dice at {len(rows[0].before) - 1} clicks ({reason})"


# --- command line -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="volumes with ground truth")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="folder of real volumes with a manifest")
    parser.add_argument("--cases", choices=sorted(SHARED_SETS), default="hippocampus", help="which of them")
    parser.add_argument("--held-out", default="", help="ids held out, comma separated (default: the last patient)")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="running server (default: %(default)s)")
    parser.add_argument("--start-server", action="store_true", help="start one for this run, with a store of its own")
    parser.add_argument("--poison", choices=("displaced", "renamed"), help="save deliberately wrong labels")
    parser.add_argument("--clicks", type=int, default=3, help="clicks after the box (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=6, help="largest structures a volume (default: %(default)s)")
    parser.add_argument("--min-voxels", type=int, default=200, help="smallest structure (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="training budget (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs (default: the trainer's)")
    parser.add_argument("--train-limit", type=float, default=3600.0, help="longest wait in s (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_loop"), help="folder for PNGs (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.shared is None):
        parser.error("give either a FOLDER of volumes or --shared DIR")
    return options


def run(options: argparse.Namespace, address: str, folder: Path) -> bool:
    """The loop on one server; True when it ended as it should."""
    if options.shared is not None:
        annotated, held_out = studies_of_shared(options.shared, options.cases)
    else:
        annotated, held_out = studies_of_folder(options.folder, [n for n in options.held_out.split(",") if n])
    if not annotated:
        raise DataError("all volumes belong to one patient; add a volume of another one, so that one can be held out")
    if not any(large(study, 1, options.min_voxels) for study in held_out):
        raise DataError(f"no held-out structure has {options.min_voxels} voxels; lower --min-voxels")
    client = MONAILabelClient(address, tmpdir=str(folder), client_id=f"demo-loop-{os.getpid()}")
    loop = Loop(client, options.clicks, options.objects, options.min_voxels, options.out)
    loop.upload([*annotated, *held_out], folder)
    before = loop.prompt(held_out, "before")
    work = loop.prompt(annotated, "to annotate")
    saved = loop.correct(annotated, folder, options.poison)
    request = {"minutes": options.minutes, **({"max_epochs": options.epochs} if options.epochs else {})}
    training = loop.train(request, options.train_limit)
    rows = rows_of(held_out, before, loop.prompt(held_out, "after"))
    computing = computing_of(address)
    good, sentence = outcome(rows, training, options.poison)
    print(table(rows))
    print(f"\n{len(work)} structures prompted and {saved} saved on {len(annotated)} volumes; training took")
    print(f"{training.seconds:.0f} s. {sentence}\n{said(computing)}\npictures: {options.out}")
    if options.json:
        record = {
            "rows": [{**asdict(row), "gain": row.gain} for row in rows],
            "mean_gain": float(np.mean([row.gain for row in rows])),
            "clicks": options.clicks,
            "computing": computing,
            "annotated": [study.id for study in annotated],
            "held_out": [study.id for study in held_out],
            "poison": options.poison,
            "published": training.published,
            "training_seconds": training.seconds,
            "train_stats": training.stats,
            "as_it_should": good,
        }
        write_json_atomically(options.json, record)
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="demo-loop-") as name:
        try:
            if options.start_server:
                with own_server(Path(name)) as server:
                    return 0 if run(options, server.address, Path(name)) else 1
            return 0 if run(options, options.server, Path(name)) else 1
        except ConnectionRefusedError:
            reason = f"no server answers at {options.server}; start scripts/quickstart or give --start-server"
        except (MedVLError, OSError) as error:
            reason = str(error)
        except MONAILabelClientException as error:
            reason = f"the server refused: {error.msg}"
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
