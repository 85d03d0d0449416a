"""The SigLIP head over a measured scene: what it reads, whose scene it fits, how it is trained and carried along."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import alignment_folder
from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, save_checkpoint
from medvl_sam2.config import AlignmentConfig, ModelConfig, SceneSideConfig
from medvl_sam2.errors import CheckpointError, ConfigError, DataError
from medvl_sam2.evaluation.cases import FIRST_SEED
from medvl_sam2.evaluation.kept_scenes import KeptScenes
from medvl_sam2.modeling.scene_measured import MeasuredScene, measured_scene, scene_sha256
from medvl_sam2.modeling.scene_text import SceneSide, SceneTextModel
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.text_grams import GramEncoder
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.partial_weights import load_image_text
from medvl_sam2.predictor import Predictor
from medvl_sam2.publishing import publish
from medvl_sam2.synthesis import generate_case
from medvl_sam2.training import scene_alignment_stage
from medvl_sam2.training.case_feed import CaseFeed
from medvl_sam2.training.labelled_scenes import labelled_scene
from medvl_sam2.training.language_data import ORGANS, prepare_case
from medvl_sam2.training.scene_alignment import (
    SceneAlignmentConfig,
    SceneAlignmentStage,
    begin_bias,
    scene_retrieval,
)
from medvl_sam2.training.scene_records import SceneRecord, stack_scenes
from medvl_sam2.training.stage_config import read_stage_config
from medvl_sam2.training.trainer import Trainer, TrainerConfig
from small_model import SMALL, oblique_volume, small_model

META = CheckpointMeta("small", "0", "Random weights for tests.")
SIDE = SceneSideConfig(hidden_size=16, lesion_size=8, dropout=0.0, noise=0.0, missed=0.0)
HEAD = AlignmentConfig(400, 16, 24, layers=1, heads=2, max_length=96, width=12, scene=SIDE)
REPORT = "The liver is normal."
SETTINGS = """
start: {start}
data: {{generated: 4, held_out: 2}}
head: {{hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2, width: 12,
  scene: {{hidden_size: 16, lesion_size: 8}}}}
batch: 2
trainer: {{steps: {steps}, log_steps: 1}}
"""


def head_beside(language: VisionLanguage, seed: int = 5) -> SceneTextModel:
    side = replace(SIDE, weights_sha256=scene_sha256(language))
    torch.manual_seed(seed)
    return SceneTextModel(replace(SMALL, alignment=replace(HEAD, scene=side)), language.tokenizer).eval()


def scenes(rows: int, seed: int = 0) -> MeasuredScene:
    generator = torch.Generator().manual_seed(seed)
    lesions = torch.rand(rows, 4, 20 + len(ORGANS), generator=generator)
    lesions[:, :, 0] = 1
    lesions[:, 2:] = 0
    organs = torch.rand(rows, len(ORGANS), 14, generator=generator)
    return MeasuredScene(organs, lesions, torch.full((rows, 3), 250.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head over its scene."""
    place, model = tmp_path_factory.mktemp("scene_text"), small_model()
    model.language.tokenizer.save(place / "tokenizer.json")
    head = head_beside(model.language)
    save_checkpoint(place / "head", head.state_dict(), head.config, place / "tokenizer.json", META)
    save_checkpoint(
        place / "checkpoint", model.state_dict(), SMALL, place / "tokenizer.json", META, alignment=place / "head"
    )
    return place / "checkpoint"


def test_a_volume_is_embedded_from_the_scene_that_answers_share(folder: Path) -> None:
    predictor = Predictor.load(folder)
    volume, _ = oblique_volume()
    session = predictor.open(volume)
    found, said = predictor.embed_volume(session), predictor.embed_text(REPORT)
    assert found.shape == said.shape == (HEAD.width,)
    assert np.linalg.norm([found, said], axis=1) == pytest.approx([1, 1], abs=1e-5)
    look = session.shared.look
    assert look is not None
    assert look.scene is not None
    scene = predictor.measured_scene(session)
    assert scene is look.scene
    assert np.array_equal(predictor.embed_scene(scene), found)
    other = predictor.embed_scene(scene._replace(extent_mm=scene.extent_mm * 2))
    assert not np.allclose(other, found, atol=1e-3)


def test_a_head_beside_another_scene_is_refused(folder: Path, tmp_path: Path) -> None:
    moved = small_model()
    with torch.no_grad():
        moved.language.scene.organ_token[0].weight += 1  # type: ignore[union-attr,operator]  # embeds, measures nothing
    assert scene_sha256(moved.language) == scene_sha256(small_model().language)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    save_checkpoint(spoilt, moved.state_dict(), SMALL, folder / "tokenizer.json", META, overwrite=True)
    assert Predictor.load(spoilt).embeds
    with torch.no_grad():
        next(iter(moved.language.vision.parameters()))[0] += 0.1
    save_checkpoint(spoilt, moved.state_dict(), SMALL, folder / "tokenizer.json", META, overwrite=True)
    with pytest.raises(CheckpointError, match="trained on the scene of other weights"):
        Predictor.load(spoilt)


def test_a_published_version_keeps_the_head(folder: Path, tmp_path: Path) -> None:
    version = publish(tmp_path / "store", folder)
    volume, _ = oblique_volume()
    assert np.array_equal(Predictor.load(version).embed_volume(volume), Predictor.load(folder).embed_volume(volume))


def test_configurations_that_do_not_fit_are_named() -> None:
    with_head = replace(SMALL, alignment=HEAD)
    assert ModelConfig.from_json(with_head.to_json()) == with_head
    tokenizer = small_model().language.tokenizer
    with pytest.raises(ConfigError, match="SceneTextModel"):
        ImageTextModel(with_head, tokenizer)
    for wrong in (SMALL, replace(with_head, scene=replace(SMALL.scene, lesions=0))):
        with pytest.raises(ConfigError, match=r"no scene or no 'alignment\.scene'"):
            SceneTextModel(wrong, tokenizer)
    with pytest.raises(ConfigError, match=r"head\.scene is missing"):
        SceneAlignmentConfig(head=replace(HEAD, scene=None))
    with pytest.raises(ConfigError, match="batch 1 must be at least 2"):
        SceneAlignmentConfig(batch=1)
    shipped = Path(scene_alignment_stage.__file__).parent / "stages" / "scene_alignment.yaml"
    assert read_stage_config(shipped, SceneAlignmentConfig) == SceneAlignmentConfig()


def test_lesions_are_a_set_and_empty_slots_are_not_there() -> None:
    torch.manual_seed(0)
    side = SceneSide(len(ORGANS), SIDE)
    some = scenes(6)
    side.standardise(some)
    found = side(some)
    assert torch.allclose(side(some._replace(lesions=some.lesions.flip(1))), found, atol=1e-5)
    assert torch.allclose(side(some._replace(lesions=some.lesions[:, :2])), found, atol=1e-5)
    assert not torch.allclose(side(some._replace(lesions=some.lesions[:, :1])), found, atol=1e-2)
    scaled = side._scaled("whole", side._whole(some))
    assert torch.allclose(scaled.mean(dim=0), torch.zeros(1), atol=1e-4)
    for spoilt in (replace(SIDE, noise=0.5), replace(SIDE, missed=0.5)):
        noisy = SceneSide(len(ORGANS), spoilt)
        assert not torch.equal(noisy(some), noisy(some))
        assert torch.equal(noisy.eval()(some), noisy(some))


def test_labels_are_measured_as_a_scene_that_sees_everything() -> None:
    tiny = ModelConfig.tiny()
    case = prepare_case(generate_case(9), tiny.vision)
    assert len(case.findings) == 2
    record = labelled_scene(case, tiny.scene)
    found = record.lesions[record.lesions[:, 0] > 0]
    largest_first = sorted(case.findings, key=lambda finding: -finding.diameter_mm)
    assert found[:, 4] * 30 == pytest.approx([finding.diameter_mm for finding in largest_first], rel=1e-3)
    for row, finding in zip(found, largest_first, strict=True):
        assert ORGANS[int(row[20:].argmax())] == finding.organ
        assert tiny.scene.kinds[int(row[14:18].argmax())] == finding.kind
    liver, spleen = (record.organs[ORGANS.index(name)] for name in ("liver", "spleen"))
    assert liver[7] < spleen[7]  # x grows to the patient's left
    share = case.organ_cells[ORGANS.index("liver")].astype(np.float64) / 255
    millilitres = (share * (share > 0.3)).sum() * np.prod(case.extent_mm) / share.size / 1000
    assert liver[1] == pytest.approx(np.log1p(millilitres) / 5, abs=0.01)
    assert record.reports == case.reports


def records(count: int) -> list[SceneRecord]:
    made = scenes(count, seed=3)
    texts = [f"There is a {n}.5 cm cyst in the liver." for n in range(count)]
    edges = (250.0, 200.0, 300.0)
    return [SceneRecord(made.organs[n].numpy(), made.lesions[n].numpy(), edges, (texts[n],)) for n in range(count)]


def stage_on(told: list[SceneRecord], config: SceneAlignmentConfig) -> SceneAlignmentStage:
    head = head_beside(small_model().language)
    head.alignment.scene.standardise(stack_scenes(told))
    begin_bias(head, config.batch)
    feed = CaseFeed([str(number) for number in range(len(told))], told.__getitem__, 0)
    return SceneAlignmentStage(config, head, feed)


def test_the_stage_learns_pairs_stops_and_goes_on(tmp_path: Path) -> None:
    told = records(8)
    loop = TrainerConfig(steps=150, warmup=5, schedule="constant")
    config = SceneAlignmentConfig(head=HEAD, batch=8, learning_rate=1e-2, trainer=loop)
    stage = stage_on(told, config)
    before = scene_retrieval(stage.module, told)
    stage.module.train()
    Trainer(stage, loop).run()
    after = scene_retrieval(stage.module, told)
    assert after["image_to_text_r1"] >= 0.75 > before["image_to_text_r1"]
    untold = [replace(record, reports=()) for record in told]
    with pytest.raises(DataError, match="no held-out record has a report"):
        scene_retrieval(stage.module, untold)

    loop = replace(loop, steps=4)
    straight = stage_on(told, config)
    Trainer(straight, loop).run()
    for steps in (2, 4):
        stopped = stage_on(told, config)
        Trainer(stopped, replace(loop, steps=steps), tmp_path).run()
    whole, resumed = straight.module.state_dict(), stopped.module.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert stopped.settings()["head"]["scene"]["weights_sha256"] == scene_sha256(small_model().language)


def test_the_command_trains_measures_and_goes_on(folder: Path, tmp_path: Path) -> None:
    settings, run = tmp_path / "stage.yaml", tmp_path / "run"
    for steps in (1, 2):
        settings.write_text(SETTINGS.format(start=folder, steps=steps))
        scene_alignment_stage.main(["--config", str(settings), "--out", str(run)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["steps"], metrics["cases"], metrics["held_out_cases"]) == (2, 4, 2)
    assert {"loss", "report", "image_to_text_r1"} <= set(metrics["held_out"]["after"])
    assert len(list((run / "scenes").glob("*.npz"))) == 2
    assert len(list((run / "labelled").glob("*.npz"))) == 4
    head = load_image_text(run / ALIGNMENT_FOLDER)
    assert isinstance(head, SceneTextModel)
    assert head.reads == scene_sha256(small_model().language)
    beside = tmp_path / "beside"
    shutil.copytree(folder, beside)
    shutil.rmtree(beside / ALIGNMENT_FOLDER)
    shutil.copytree(run / ALIGNMENT_FOLDER, beside / ALIGNMENT_FOLDER)
    assert Predictor.load(beside).embeds


def test_cases_of_a_manifest_are_measured_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = alignment_folder.manifest(tmp_path)
    settings, run = tmp_path / "stage.yaml", tmp_path / "run"
    settings.write_text(SETTINGS.format(start=folder, steps=1))
    arguments = ["--config", str(settings), "--manifest", str(path), "--out", str(run)]
    scene_alignment_stage.main(arguments)
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["cases"], metrics["held_out_cases"]) == (3, 2)
    monkeypatch.setattr("medvl_sam2.training.scene_records.measured_scene", None)  # a second look would fail
    settings.write_text(SETTINGS.format(start=folder, steps=2))
    scene_alignment_stage.main(arguments)


def test_kept_scenes_are_looked_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor.load(folder)
    first = KeptScenes(predictor, tmp_path).pair(FIRST_SEED)
    case = generate_case(FIRST_SEED)
    assert first.text == case.report
    assert np.allclose(first.volume_embedding, predictor.embed_volume(case.volume()), atol=1e-6)
    assert np.allclose(first.text_embedding, predictor.embed_text(case.report), atol=1e-6)
    with pytest.raises(DataError, match="may have been trained on"):
        KeptScenes(predictor, tmp_path).pair(5)
    monkeypatch.setattr(predictor, "measured_scene", None)
    again = KeptScenes(predictor, tmp_path).pair(FIRST_SEED)
    assert np.array_equal(again.volume_embedding, first.volume_embedding)
    with pytest.raises(DataError, match="leave --scenes out"):
        KeptScenes(Predictor(predictor.model, predictor.meta), tmp_path)


def test_a_scene_is_measured_as_the_predictor_does(folder: Path) -> None:
    predictor = Predictor.load(folder)
    view = torch.rand(1, 1, *SMALL.vision.input_size)
    extent = torch.tensor([[250.0, 200.0, 300.0]])
    with torch.no_grad():
        look = predictor.model.look(view, extent)
        found = measured_scene(predictor.model.language, view, extent)
    assert look.scene is not None
    assert all(torch.equal(a, b) for a, b in zip(look.scene, found, strict=True))


def test_a_text_of_runs_is_its_tokens_in_order_and_not_its_padding() -> None:
    torch.manual_seed(0)
    encoder = GramEncoder(3, 64, 8).eval()
    ids = torch.tensor([[1, 7, 9, 3, 0, 0], [1, 9, 7, 3, 5, 6]])
    there = ids > 0
    rows, kept = encoder.runs(ids, there)
    assert rows.shape == kept.shape == (2, 6 + 5 + 4)
    assert kept.sum(dim=1).tolist() == [4 + 3 + 2, 15]
    assert int(rows.min()) >= 0
    assert int(rows.max()) < 64
    found = encoder(ids, there).last_hidden_state
    assert found.shape == (2, 1, 8)
    alone = encoder(ids[:1, :4], there[:1, :4]).last_hidden_state
    assert torch.allclose(alone, found[:1], atol=1e-6)
    turned = encoder(ids[:1, [0, 2, 1, 3]], there[:1, :4]).last_hidden_state
    assert not torch.allclose(turned, alone, atol=1e-3)
    single = encoder(ids[:1, :1], there[:1, :1]).last_hidden_state  # shorter than the longest run
    assert bool(torch.isfinite(single).all())


def test_a_head_may_read_texts_as_runs_of_tokens() -> None:
    language = small_model().language
    torch.manual_seed(0)
    head = SceneTextModel(replace(SMALL, alignment=replace(HEAD, grams=4, gram_buckets=128)), language.tokenizer)
    assert isinstance(head.alignment.language_encoder, GramEncoder)
    texts = ["The liver is normal.", "A cyst of 2.5 cm lies in the spleen, and nothing else is to be seen."]
    found = head.eval().embed_texts(texts)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2))
    assert torch.allclose(head.embed_texts(texts[:1]), found[:1], atol=1e-6)
