"""Alignment on public layouts: what a case teaches, the command, where it begins, and sharing the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import alignment_folder
from alignment_folder import HEAD, SETTINGS, stage_on
from medvl_sam2.config import ModelConfig
from medvl_sam2.converters.parts import PartTarget, write_part_config
from medvl_sam2.datasets.manifest import CaseRecord, Manifest, read_manifest, write_manifest
from medvl_sam2.datasets.volumes import read_case
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.siglip import ImageTextModel, SiglipHead
from medvl_sam2.partial_weights import load_image_text
from medvl_sam2.training import alignment_learner, alignment_stage
from medvl_sam2.training.alignment_losses import Pairs
from medvl_sam2.training.alignment_records import AlignmentRecord, record_of_taught
from medvl_sam2.training.stage import Draw
from medvl_sam2.training.stage_start import image_text_config, image_text_tokenizer, load_image_text_starts
from medvl_sam2.training.taught_cases import reduced_case
from medvl_sam2.training.trainer import Trainer
from small_model import SMALL

STATE = "alignment_resume.safetensors"
GRID = SMALL.vision.grid(1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alignment_folder.manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def listed(manifest: Path) -> Manifest:
    return read_manifest(manifest)


def case_of(listed: Manifest, name: str) -> CaseRecord:
    return next(record for record in listed.records if record.id.endswith(name))


def read(record: CaseRecord, listed: Manifest) -> AlignmentRecord:
    return record_of_taught(reduced_case(read_case(record, listed.root), SMALL.vision), GRID)


def only(path: Path, listed: Manifest, *names: str) -> Path:
    """A manifest of some of the cases, and of those held out."""
    chosen = [r for r in listed.records if r.split != "train" or r.id.endswith(names)]
    place = path.with_name(f"{'_'.join(names)}.jsonl")
    write_manifest(place, chosen)
    return place


def test_a_report_a_mask_or_nothing_makes_a_record(listed: Manifest) -> None:
    told = read(case_of(listed, "train_1_a_1"), listed)
    assert told.reports == (alignment_folder.SAME,)
    assert told.regions == ()
    masked = read(case_of(listed, "s0000"), listed)
    assert masked.reports == ()
    regions = {region.sentence: region.cells for region in masked.regions}
    assert set(regions) == {"This is the right kidney.", "This is the left kidney.", "This is the liver."}
    labels = read_case(case_of(listed, "s0000"), listed.root).labels
    assert labels is not None
    right, left = regions["This is the right kidney."], regions["This is the left kidney."]
    assert right.shape == left.shape == GRID
    assert right.sum() == labels.mask("kidney_right").sum()
    x = [float((cells.sum(axis=(0, 1)) * np.arange(GRID[2])).sum() / cells.sum()) for cells in (right, left)]
    assert x[0] < x[1]  # canonical x grows to the left
    bare = read(replace(case_of(listed, "s0000"), labels=()), listed)
    assert (bare.reports, bare.regions) == ((), ())
    assert bare.view.shape == SMALL.vision.input_size


def test_masks_without_reports_teach_by_organs_and_by_reconstruction_in_turn(manifest: Path, listed: Manifest) -> None:
    place = only(manifest, listed, "s0000")
    stage = stage_on(place, SETTINGS)
    both = [stage.loss(Draw(0, step))[1] for step in range(3)]
    assert all(figures["report"] == 0 for figures in both)
    assert any(figures["organs"] > 0 for figures in both)
    assert any(figures["rebuilt"] > 0 for figures in both if "rebuilt" in figures)
    _, rebuilt = stage_on(place, replace(SETTINGS, organ_weight=0.0)).loss(Draw(0, 0))
    assert set(rebuilt) == {"report", "rebuilt"}
    _, named = stage_on(place, replace(SETTINGS, reconstruction_weight=0.0)).loss(Draw(0, 0))
    assert set(named) == {"report", "organs"}
    assert named["organs"] > 0


def test_the_very_same_report_is_no_negative(manifest: Path, listed: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Pairs] = []
    plain = alignment_learner.siglip_loss

    def watched(images: Tensor, own: Pairs, others: Pairs, t_prime: Tensor, bias: Tensor) -> Tensor:
        seen.append(own)
        return plain(images, own, others, t_prime, bias)

    monkeypatch.setattr(alignment_learner, "siglip_loss", watched)
    place = only(manifest, listed, "train_1_a_1", "train_2_a_1", "train_3_a_1")
    stage = stage_on(place, replace(SETTINGS, batch=3, organ_weight=0.0))
    stage.loss(Draw(0, 0))
    assert seen[0].valid.all()
    reports = [case.reports[0] for case in stage.feed.cases(0, 3)]
    assert sorted(reports).count(alignment_folder.SAME) == 2
    expected = [[one == other for other in reports] for one in reports]
    assert (seen[0].keys[:, None] == seen[0].keys[None]).tolist() == expected


def settings(folder: Path, steps: int, **changes: object) -> Path:
    """The shipped file with a few steps and other changes."""
    shipped = yaml.safe_load((Path(alignment_stage.__file__).parent / "stages" / "alignment.yaml").read_text())
    shipped["trainer"] |= {"steps": steps, "warmup": 0, "log_steps": 1, "save_steps": 1, "tensorboard": False}
    shipped |= {"batch": 4, "head": asdict(HEAD), "learning_rate": 3e-3, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "alignment.yaml"
    path.write_text(yaml.safe_dump(shipped))
    return path


def run(file: Path, manifest: Path, out: Path) -> dict[str, Any]:
    alignment_stage.main(["--config", str(file), "--manifest", str(manifest), "--out", str(out)])
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with the tests' small model as its preset."""
    monkeypatch.setattr(alignment_stage, "preset", lambda name: SMALL)


@pytest.mark.usefixtures("small")
def test_the_command_learns_from_both_layouts_and_goes_on(
    manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in (3, 40):
        metrics = run(settings(tmp_path, steps), manifest, tmp_path / "run")
    assert metrics["steps"] == 40
    assert metrics["held_out_cases"] == 3
    before, after = metrics["held_out"]["before"], metrics["held_out"]["after"]
    assert after["loss"] < 0.8 * before["loss"]
    assert {"report", "organs", "image_to_text_r1", "chance_r1"} <= set(after)
    assert list(metrics["skipped_cases"]) == ["totalsegmentator/s0021"]
    assert "case totalsegmentator/s0021 skipped" in caplog.text
    with pytest.raises(CheckpointError, match="begun with cases"):
        run(settings(tmp_path, 41), only(manifest, read_manifest(manifest), "train_1_a_1"), tmp_path / "run")
    # The folder of the run is where another begins, with its text tower and its tokenizer.
    start = tmp_path / "run" / "alignment"
    stored = load_image_text(start)
    again = run(settings(tmp_path / "next", 1, start=[str(start)]), manifest, tmp_path / "next")
    begun = again["held_out"]["before"]
    assert begun["report"] == pytest.approx(after["report"], rel=1e-5)
    assert stored.tokenizer is not None
    assert (tmp_path / "next" / "tokenizer.json").read_text() == (start / "tokenizer.json").read_text()


@pytest.mark.usefixtures("small")
def test_masks_alone_are_enough(manifest: Path, listed: Manifest, tmp_path: Path) -> None:
    """A TotalSegmentator manifest has no report on either side: no retrieval, but a held-out loss."""
    place = manifest.with_name("masks.jsonl")
    write_manifest(place, [r for r in listed.records if r.source == "totalsegmentator"])
    metrics = run(settings(tmp_path, 40), place, tmp_path / "run")
    before, after = metrics["held_out"]["before"], metrics["held_out"]["after"]
    assert set(after) == {"loss", "report", "organs", "rebuilt"}
    assert after["rebuilt"] < 0.9 * before["rebuilt"]
    write_manifest(place, [r for r in listed.records if r.id.endswith("s0000")])  # nothing is held out
    metrics = run(settings(tmp_path, 1, data={"held_out": 0}), place, tmp_path / "all")
    assert metrics["held_out_cases"] == 0
    assert (tmp_path / "all" / "alignment" / "meta.json").exists()


def test_converted_parts_are_a_start(tmp_path: Path) -> None:
    """Encoder and text tower of DCFormer_SigLIP, but for the words of a tokenizer that is not read."""
    published = replace(HEAD, vocab_size=77, max_length=50, layers=2)
    torch.manual_seed(1)
    source = ImageTextModel(replace(SMALL, alignment=published), None)
    target: ModelConfig = source.config
    parts = {"vision": source.vision, "alignment": source.alignment}
    for name, module in parts.items():
        (tmp_path / name).mkdir()
        save_file(module.state_dict(), tmp_path / name / "model.safetensors")
        write_part_config(tmp_path / name, PartTarget({name: vars(getattr(target, name))}, {}))
    starts = [tmp_path / name for name in parts]
    assert image_text_tokenizer(starts) is None
    config = image_text_config(replace(SMALL, vision=replace(SMALL.vision, taps=(1, 2))), HEAD, starts)
    assert config.alignment == published
    assert config.vision == SMALL.vision
    own = ImageTextModel(replace(config, alignment=replace(published, vocab_size=300)), None)
    words = own.alignment.language_encoder.embeddings.word_embeddings.weight.clone()
    load_image_text_starts(own, starts)
    state, given = own.state_dict(), source.state_dict()
    new = {name for name, tensor in state.items() if not torch.equal(tensor, given[name])}
    assert new == {"alignment.language_encoder.embeddings.word_embeddings.weight"}
    assert torch.equal(own.alignment.language_encoder.embeddings.word_embeddings.weight, words)
    assert isinstance(own.alignment, SiglipHead)


# --- processes --------------------------------------------------------------------------------------------------------


def environment(repository: Path) -> dict[str, str]:
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.hours  # the joint stage's, by the same trainer, runs always
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_a_killed_run_goes_on_bit_for_bit(manifest: Path, tmp_path: Path, repository: Path) -> None:
    file, steps = settings(tmp_path, 6), 6

    def command(out: Path) -> list[str]:
        module = [sys.executable, "-m", "medvl_sam2.training.alignment_stage"]
        return [*module, "--config", str(file), "--manifest", str(manifest), "--out", str(out)]

    process = subprocess.Popen(command(tmp_path / "killed"), env=environment(repository))
    deadline = time.monotonic() + 400
    while not (tmp_path / "killed" / STATE).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    for out in ("killed", "straight"):
        subprocess.run(command(tmp_path / out), env=environment(repository), check=True, timeout=400)
    resumed, whole = (load_file(tmp_path / out / STATE) for out in ("killed", "straight"))
    assert len(whole) > 100
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert json.loads((tmp_path / "killed" / "metrics.json").read_text())["steps"] == steps


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_two_processes_train_like_one_by_either_way_of_sharing(
    manifest: Path, tmp_path: Path, repository: Path
) -> None:
    """A step of DDP, then one of FSDP from the state DDP left, each process with half of the batch."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(repository / "tests" / "alignment_folder.py")
    arguments = [script, str(manifest), str(tmp_path), "2", "ddp", "fsdp"]
    subprocess.run([*launch, *arguments], env=environment(repository), check=True, timeout=400)
    alone = stage_on(manifest, SETTINGS)
    begun = {name: tensor.clone() for name, tensor in alone.module.state_dict().items()}
    Trainer(alone, replace(SETTINGS.trainer, steps=2)).run()
    own, together = alone.module.state_dict(), load_file(tmp_path / STATE)
    assert any(not torch.equal(tensor, begun[name]) for name, tensor in own.items())
    for name, tensor in together.items():
        if name.startswith("weights."):
            assert torch.allclose(tensor, own[name.removeprefix("weights.")], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.timeout(900)  # two processes, each of which loads torch
def test_the_command_runs_in_two_processes(manifest: Path, tmp_path: Path, repository: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", "medvl_sam2.training.alignment_stage", "--config", str(settings(tmp_path, 2))]
    out = tmp_path / "run"
    arguments = ["--manifest", str(manifest), "--out", str(out)]
    subprocess.run([*launch, *module, *arguments], env=environment(repository), check=True, timeout=400)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["held_out"]["after"]["loss"] > 0
    assert metrics["config"]["batch"] == 4
