"""Joint stage: what is taken from a manifest, what is trained, and that it learns, stops, goes on and is served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import dataset_folders as folders
import taught_folder
from medvl_sam2.datasets.manifest import CaseRecord, ImageFile, Split, read_manifest
from medvl_sam2.datasets.volumes import read_case
from medvl_sam2.errors import CheckpointError, ConfigError, DataError
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.predictor import Predictor
from medvl_sam2.training import joint_learner, joint_stage
from medvl_sam2.training.alignment_learner import AlignmentStageConfig
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.finetune_records import FinetuneConfig
from medvl_sam2.training.joint_learner import JointStage, JointStageConfig
from medvl_sam2.training.language_batches import pack
from medvl_sam2.training.losses import LossWeights
from medvl_sam2.training.manifest_feed import FeedConfig, manifest_feed
from medvl_sam2.training.scene_alignment import SceneAlignmentConfig
from medvl_sam2.training.slice_batches import Sheet
from medvl_sam2.training.spoken_masks import SheetLoss
from medvl_sam2.training.stage import Draw
from medvl_sam2.training.stage_config import read_stage_config
from medvl_sam2.training.stage_start import load_starts, start_tokenizer
from medvl_sam2.training.taught_cases import TaughtCase, record_offers, taught_case
from medvl_sam2.training.taught_texts import Shares, draw_tasks, task_samples
from medvl_sam2.training.trainer import Trainer
from small_model import SMALL, small_model
from taught_folder import SCENELESS, SETTINGS, stage_on

STAGES = Path(joint_learner.__file__).parent / "stages"
KINDS = {"alignment": AlignmentStageConfig, "finetune": FinetuneConfig, "scene_alignment": SceneAlignmentConfig}
STATE = "joint_stage_resume.safetensors"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_folder.manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def case(manifest: Path) -> TaughtCase:
    return taught(manifest, 0)


def taught(manifest: Path, number: int) -> TaughtCase:
    listed = read_manifest(manifest)
    return taught_case(read_case(listed.records[number], listed.root), SMALL.vision)


def feed_on(records: Sequence[CaseRecord], root: Path, keep: int = 2, workers: int = 0) -> CaseFeed[TaughtCase]:
    return manifest_feed(
        records, root, lambda case: taught_case(case, SMALL.vision), FeedConfig(keep=keep, workers=workers), 7, 1
    )


def state_of(stage: JointStage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.module.state_dict().items()}


# --- cases ------------------------------------------------------------------------------------------------------------


def test_masks_and_texts_of_a_case(case: TaughtCase, manifest: Path) -> None:
    loaded = read_case(read_manifest(manifest).records[0], manifest.parent)
    assert case.volume is not None
    assert loaded.labels is not None
    assert case.names == folders.NAMES
    for name in folders.NAMES:
        target = case.volume.find(name)
        assert target is not None
        mask = case.volume.mask(target, slice(None))
        assert mask.sum() == loaded.labels.mask(name).sum()
    right, left = (case.volume.find(f"kidney_{side}") for side in ("right", "left"))
    assert right is not None
    assert left is not None
    columns = [np.nonzero(case.volume.mask(t, slice(None)))[2].mean() for t in (right, left)]
    assert columns[0] < columns[1]  # canonical x grows to the left
    assert case.view.shape == SMALL.vision.input_size
    assert case.extent_mm == pytest.approx(np.array(case.volume.image.shape) * case.volume.spacing)
    one, both = case.references
    assert [mask.name for mask in one.masks] == ["liver"]
    assert [mask.name for mask in both.masks] == ["liver", "kidney_left"]
    without = taught(manifest, 2)  # its right kidney is known to be absent
    assert "kidney_right" in without.names
    assert without.volume is not None
    assert without.volume.find("kidney_right") is None


def test_one_segment_token_may_mean_several_structures(manifest: Path) -> None:
    listed = read_manifest(manifest)
    record = listed.records[0]
    reference = replace(record.references[1], answer="These two.")
    loaded = read_case(replace(record, references=(reference,)), listed.root)
    found = taught_case(loaded, SMALL.vision)
    assert found.volume is not None
    assert found.references[0].answer == "These two. [SEG]"
    (mask,) = found.references[0].masks
    assert set(mask.members) == {"liver", "kidney_left"}
    assert loaded.labels is not None
    both = loaded.labels.mask("liver") | loaded.labels.mask("kidney_left")
    assert found.volume.mask(mask, slice(None)).sum() == both.sum()


def test_without_certain_sides_nothing_with_a_side_is_taught(manifest: Path) -> None:
    listed = read_manifest(manifest)
    loaded = replace(read_case(listed.records[0], listed.root), sides_known=False)
    found = taught_case(loaded, SMALL.vision)
    assert found.names == ("liver",)
    assert [q.text for q in found.questions] == ["Which organ is the largest?"]
    assert [r.text for r in found.references] == ["both of them"]
    assert found.report is not None  # it says "both kidneys"
    silent = replace(loaded.record, labels=(), questions=(), references=(), report="The left lung is normal.")
    with pytest.raises(DataError, match="teaches nothing"):
        taught_case(replace(loaded, record=silent, labels=None), SMALL.vision)


def test_numbers_name_the_same_cases_whatever_reads_them(manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = read_manifest(manifest).of(Split.TRAIN)

    def feed(records: Sequence[CaseRecord], keep: int = 16, workers: int = 0) -> CaseFeed[TaughtCase]:
        return feed_on(records, manifest.parent, keep, workers)

    plain, ahead = feed(listed.records), feed(listed.records, keep=2, workers=2)
    first = [case.id for case in plain.cases(0, 6)]
    assert sorted(first[:3]) == sorted(first[3:]) == ["case0", "case1", "case2"]  # two epochs
    assert [c.id for n in (0, 2, 4) for c in ahead.cases(n, 2, n + 2)] == first
    assert [case.id for case in plain.cases(4, 2)] == first[4:]
    torn = [replace(r, image=ImageFile("none.nii.gz")) if r.id == first[1] else r for r in listed.records]
    holed = feed(torn)
    assert [case.id for case in holed.cases(0, 3)] == [first[0], first[2], first[2]]
    assert set(holed.skipped) == {first[1]}
    assert f"case {first[1]} skipped" in caplog.text
    assert [case.id for case in holed.readable(3)] == [first[0], first[2]]
    broken = [replace(r, image=ImageFile("none.nii.gz")) for r in listed.records]
    with pytest.raises(DataError, match="none of the 3 cases"):
        feed(broken).cases(0, 1)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_tasks_are_what_a_case_has_by_their_shares(case: TaughtCase, manifest: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = draw_tasks(case, Shares(), 6000, rng)
    counts = {kind: drawn.count(kind) / 500 for kind in Shares().values}
    assert counts == pytest.approx(Shares().values, abs=0.25)
    assert set(draw_tasks(replace(case, report=None, questions=()), Shares(), 99, rng)) == {
        "semantic",
        "referring",
        "interactive",
    }
    assert draw_tasks(replace(case, report=None), Shares(1, 0, 0, 0, 0), 3, rng) == []
    record = read_manifest(manifest).records[0]
    assert record_offers(record) == set(Shares().values)
    assert record_offers(replace(record, labels=(), references=())) == {"report", "vqa"}
    with pytest.raises(ConfigError, match="must not be negative"):
        Shares(report=-1)


def test_absent_structures_are_refused_and_searched_all_the_same(manifest: Path) -> None:
    language = small_model().language
    only = replace(taught(manifest, 2), names=("kidney_right",))
    said, searched = task_samples("semantic", only, language.tokenizer, 99, np.random.default_rng(0))
    assert (said.reply, said.targets, said.taught) == ("no right kidney", (), True)
    assert (searched.reply, searched.taught) == ("right kidney [SEG]", False)
    assert searched.targets[0].mask is None
    alone, both = pack(language, [[said]], 200), pack(language, [[said, searched]], 200)
    assert len(alone.weights) == len(both.weights) == int((both.labels >= 0).sum())
    assert [target.name for _, target in both.segs] == ["kidney_right"]
    assert int((both.ids == language.tokenizer.seg_id).sum()) == 1


def test_a_report_that_is_too_long_ends_at_a_sentence(case: TaughtCase) -> None:
    tokenizer, rng = small_model().language.tokenizer, np.random.default_rng(0)
    long = replace(case, report="First [SEG] sentence. " + "More of it follows here. " * 9)
    (cut,) = task_samples("report", long, tokenizer, 60, rng)
    assert cut.reply.startswith("First sentence. More")
    assert cut.reply.endswith("here.")
    assert len(tokenizer.encode(cut.reply)) <= 60


# --- stage ------------------------------------------------------------------------------------------------------------


def moved(stage: JointStage, before: dict[str, Tensor]) -> set[str]:
    after = stage.module.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_each_phase_trains_its_own_parts(manifest: Path) -> None:
    judged = replace(SMALL, scene=replace(SMALL.scene, judge=True))
    projector = stage_on(manifest, replace(SETTINGS, phase="projector"), judged)
    assert projector.model.language.scene is not None
    with torch.no_grad():
        projector.model.language.scene.lesion_head[-1].bias.fill_(9.0)  # words are said of lesions that are seen
    before = state_of(projector)
    Trainer(projector, replace(SETTINGS.trainer, steps=2)).run()
    parts = {".".join(name.split(".")[:2]) for name in moved(projector, before)}
    assert parts == {"language.projector", "language.extent", "language.scene"}
    assert {n for n in moved(projector, before) if n.startswith("language.scene.")} <= {
        n
        for n in before
        if n.startswith(tuple(f"language.scene.{part}" for part in ("slots", "organ", "lesion_t", "words")))
    }
    assert any(name.startswith("language.scene.words.") for name in moved(projector, before))
    joint = stage_on(manifest, SETTINGS, SCENELESS)
    before = state_of(joint)
    Trainer(joint, replace(SETTINGS.trainer, steps=2)).run()
    changed = moved(joint, before)
    frozen = ("language.vision.", "segmenter.sam2.image_encoder.", "segmenter.sam2.sam_mask_decoder.conv_s")
    assert not any(name.startswith(frozen) for name in changed)
    assert not any(".base." in name for name in changed)
    for part in (
        "language.projector.",
        "language.seg_projector.",
        "language.lm.model.embed_tokens.",
        "segmenter.scorer.",
        "segmenter.height_token.",
        "segmenter.sam2.sam_mask_decoder.",
        "segmenter.sam2.memory_attention.",
    ):
        assert any(name.startswith(part) for name in changed), part
    assert any(name.endswith("lora_b") for name in changed)


def test_slice_scores_are_weighted_by_the_requests_that_have_a_mask(
    manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[SheetLoss] = []

    def one_volume_without_any(model: UnifiedModel, sheet: Sheet, vectors: Tensor, weights: LossWeights) -> SheetLoss:
        placed = len(vectors) if not told else 0
        told.append(SheetLoss(vectors.sum() * 0 + 1, 0.5, vectors.sum() * 0 + (2.0 if placed else 0.0), 1.0, placed))
        return told[-1]

    monkeypatch.setattr(joint_learner, "sheet_loss", one_volume_without_any)
    config = replace(SETTINGS, batch=2, tasks=5, requests=20, shares=Shares(0, 0, 2, 1, 0))
    _, figures = stage_on(manifest, config, SCENELESS).loss(Draw(0, 0))
    assert len(told) == 2
    assert figures["scores"] == 2.0


def test_changed_texts_are_another_feed(manifest: Path) -> None:
    listed = read_manifest(manifest).of(Split.TRAIN)
    first = listed.records[0]
    changed = [replace(first, report=f"{first.report} No."), *listed.records[1:]]
    assert feed_on(listed.records, listed.root).digest == feed_on(list(listed.records), listed.root).digest
    assert feed_on(listed.records, listed.root).digest != feed_on(changed, listed.root).digest


@pytest.mark.slow
def test_losses_fall_on_a_fixed_batch(manifest: Path) -> None:
    """Texts, masks from words, slices to begin on and clicks, each in the same micro-batch again and again."""
    config = replace(SETTINGS, tasks=5, shares=Shares(1, 1, 2, 1, 0), slices=1)
    stage = stage_on(manifest, config, SCENELESS)
    optimiser = torch.optim.AdamW([{"params": list(g.parameters), "lr": 3e-3} for g in stage.groups()])
    history = []
    for _ in range(14):
        loss, figures = stage.loss(Draw(0, 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(figures)
    assert history[-1]["language"] < 0.7 * history[0]["language"]
    assert history[-1]["masks"] < 0.7 * history[0]["masks"]
    assert history[-1]["scores"] < history[0]["scores"] - 0.02
    assert stage.work is not None
    assert stage.work.samples == 2
    assert stage.work.tokens > 2 * stage.module.language.image_slots
    assert stage.work.slices >= config.sheet


def test_a_scene_is_pointed_at_and_masks_are_learned_where_it_located(manifest: Path) -> None:
    stage = stage_on(manifest, replace(SETTINGS, shares=Shares(0, 0, 1, 0, 1)))
    scene = stage.module.language.scene
    assert scene is not None
    organs = len(stage.module.config.scene_organs)

    def everywhere(images: Tensor, maps: list[Tensor]) -> Tensor:
        return torch.full((len(images), organs + 1 + len(scene.scene.kinds), *scene.grid), 2.0)

    scene.forward = everywhere  # type: ignore[method-assign]
    loss, figures = stage.loss(Draw(0, 1))
    assert bool(torch.isfinite(loss))
    assert {"language", "pointed", "masks", "window"} <= set(figures)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_other_cases_are_refused(manifest: Path, tmp_path: Path) -> None:
    config = SETTINGS
    straight = stage_on(manifest, config)
    Trainer(straight, config.trainer).run()
    for steps in (2, 4):
        stopped = stage_on(manifest, config, out=tmp_path)
        Trainer(stopped, replace(config.trainer, steps=steps), tmp_path).run()
    assert not moved(stopped, state_of(straight))
    other = taught_folder.manifest(tmp_path / "other", "ttttv")
    with pytest.raises(CheckpointError, match="begun with cases"):
        Trainer(stage_on(other, config, out=tmp_path), config.trainer, tmp_path)
    # What was written is the model with its adapters merged, served as it is and a place to begin from.
    served = Predictor.load(tmp_path / "checkpoint")
    head = served.model.language.lm
    assert head.lm_head.weight is head.model.embed_tokens.weight
    wanted = stopped.module.language.lm.model.layers[0].self_attn.q_proj
    plain = wanted.base.weight + wanted.delta
    assert torch.allclose(head.model.layers[0].self_attn.q_proj.weight, plain, atol=2e-3)
    tokenizer = start_tokenizer([tmp_path / "checkpoint"])
    assert tokenizer is not None
    again = small_model()
    with pytest.raises(CheckpointError, match="holds no volume encoder"):
        load_starts(again, [tmp_path / STATE])
    load_starts(again, [tmp_path / "checkpoint"])
    own = again.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in served.model.state_dict().items())


def test_settings_that_cannot_be_meant_are_refused(manifest: Path) -> None:
    for wrong, said in (
        ({"batch": 0}, "batch 0"),
        ({"clip_length": 1}, "clip_length 1"),
        ({"phase": "projector", "shares": Shares(0, 0, 0, 0, 1)}, "learns from texts"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(SETTINGS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has no test case with a task of the joint phase"):
        stage_on(manifest, SETTINGS, split=Split.TEST)


@pytest.mark.parametrize("path", sorted(STAGES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_is_read(path: Path) -> None:
    config = read_stage_config(path, KINDS.get(path.stem, JointStageConfig))
    if isinstance(config, JointStageConfig):
        assert config.phase == path.stem


# --- commands ---------------------------------------------------------------------------------------------------------


def shortened(name: str, steps: int, folder: Path, **changes: object) -> Path:
    """A shipped file with a few steps and other changes."""
    settings = yaml.safe_load((STAGES / f"{name}.yaml").read_text())
    settings["trainer"] |= {"steps": steps, "warmup": 0, "log_steps": 1, "accumulate": 1, "tensorboard": False}
    settings |= {"batch": 1, "tasks": 2, "requests": 2, "seam_rate": 3e-3, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_the_commands_train_measure_go_on_and_are_served(manifest: Path, tmp_path: Path) -> None:
    for steps in (1, 3):
        file = shortened("projector", steps, tmp_path)
        joint_stage.main(["--config", str(file), "--manifest", str(manifest), "--out", str(tmp_path / "projector")])
    start = tmp_path / "projector" / "checkpoint"
    file = shortened("joint", 3, tmp_path, start=[str(start)], language_rate=1e-3, segmenter_rate=1e-3)
    joint_stage.main(["--config", str(file), "--manifest", str(manifest), "--out", str(tmp_path / "joint")])
    for name in ("projector", "joint"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["steps"] == 3
        assert [entry["step"] for entry in metrics["history"]] == [1, 2, 3]
        assert metrics["held_out_cases"] == 1
        before, after = metrics["held_out"]["before"], metrics["held_out"]["after"]
        assert after["loss"] < before["loss"]
        assert after["language"] < before["language"]
        assert metrics["skipped_cases"] == {}
    served = Predictor.load(tmp_path / "joint" / "checkpoint")
    listed = read_manifest(manifest)
    session = served.open(read_case(listed.records[-1], listed.root).volume)
    assert served.segment_classes(session, ["liver"]).mask.shape == folders.SHAPE
    assert served.report(session).question


def command(manifest: Path, out: Path, steps: int, *more: str) -> list[str]:
    return [str(Path(taught_folder.__file__)), str(manifest), str(out), str(steps), *more]


def environment(repository: Path) -> dict[str, str]:
    path = os.pathsep.join([str(repository / "model"), str(repository / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def alone(manifest: Path, steps: int) -> JointStage:
    config = replace(SETTINGS, trainer=replace(SETTINGS.trainer, steps=steps, accumulate=2))
    stage = stage_on(manifest, config, SCENELESS)
    Trainer(stage, config.trainer).run()
    return stage


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_a_killed_run_goes_on_bit_for_bit(manifest: Path, tmp_path: Path, repository: Path) -> None:
    process = subprocess.Popen([sys.executable, *command(manifest, tmp_path, 4)], env=environment(repository))
    deadline = time.monotonic() + 400
    while not (tmp_path / STATE).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)  # at whatever place in the next steps this is
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still at work
    subprocess.run([sys.executable, *command(manifest, tmp_path, 4)], env=environment(repository), check=True)
    resumed, whole = load_file(tmp_path / STATE), alone(manifest, 4)
    weights = {name: tensor for name, tensor in resumed.items() if name.startswith("weights.")}
    own = whole.module.state_dict()
    assert len(weights) > 50
    assert all(torch.equal(tensor, own[name.removeprefix("weights.")]) for name, tensor in weights.items())


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes, each of which loads torch
def test_two_processes_train_like_one_by_either_way_of_sharing(
    manifest: Path, tmp_path: Path, repository: Path
) -> None:
    """A step of DDP, then one of FSDP from the state DDP left; halves sum otherwise, hence the tolerance."""
    begun = {
        name: tensor.clone() for name, tensor in stage_on(manifest, SETTINGS, SCENELESS).module.state_dict().items()
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(manifest, tmp_path, 2, "ddp", "fsdp")
    subprocess.run([*launch, *arguments], env=environment(repository), check=True, timeout=400)
    own, together = alone(manifest, 2).module.state_dict(), load_file(tmp_path / STATE)
    apart, way = dict[str, float](), dict[str, float]()
    for name, tensor in together.items():
        if name.startswith("weights."):
            one = own[name.removeprefix("weights.")]
            part = ".".join(name.split(".")[1:3])
            apart[part] = apart.get(part, 0.0) + float((tensor - one).double().square().sum())
            way[part] = way.get(part, 0.0) + float((one - begun[name.removeprefix("weights.")]).double().square().sum())
    assert all(apart[part] <= 0.05**2 * way[part] for part in apart), (apart, way)
    assert (tmp_path / "checkpoint" / "meta.json").exists()
