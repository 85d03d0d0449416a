"""The image-text model beside a checkpoint, and weights of one stage in a part of another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medvl_sam2.checkpoint import (
    ALIGNMENT_FOLDER,
    CheckpointMeta,
    save_checkpoint,
    shipped_checkpoint,
)
from medvl_sam2.config import AlignmentConfig, ModelConfig
from medvl_sam2.errors import CheckpointError, ConfigError, PromptError
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.unified import UnifiedModel, language_view
from medvl_sam2.partial_weights import load_encoder, load_image_text, load_part, read_weights
from medvl_sam2.predictor import Predictor
from medvl_sam2.publishing import publish, read_published, rollback
from medvl_sam2.synthesis import generate_case
from medvl_sam2.training.language_weights import load_language
from medvl_sam2.training.scene_phase import ScenePhase, ScenePhaseConfig
from medvl_sam2.training.trainer_state import write_tensors
from medvl_sam2.training.volume_sources import from_case
from small_model import SMALL, oblique_volume, small_model, small_predictor

HEAD = AlignmentConfig(vocab_size=400, hidden_size=16, intermediate_size=24, layers=1, heads=2, max_length=32, width=12)
WITH_HEAD = replace(SMALL, alignment=HEAD)
META = CheckpointMeta("small", "0", "Random weights for tests.")
REPORT = "The liver is normal."


def encoder(seed: int) -> DCFormer:
    torch.manual_seed(seed)
    return DCFormer(SMALL.vision)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.allclose(tensor, theirs[name], atol=1e-3) for name, tensor in one.state_dict().items())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint without an image-text model, and the folder of one."""
    folder = tmp_path_factory.mktemp("image_text")
    model = small_model()
    model.language.tokenizer.save(folder / "tokenizer.json")
    save_checkpoint(folder / "plain", model.state_dict(), SMALL, folder / "tokenizer.json", META)
    torch.manual_seed(5)
    head = ImageTextModel(WITH_HEAD, model.language.tokenizer)
    save_checkpoint(folder / "alignment", head.state_dict(), WITH_HEAD, folder / "tokenizer.json", META)
    return folder / "plain", folder / "alignment"


@pytest.fixture(scope="module")
def both(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an image-text model."""
    plain, alignment = folders
    folder = tmp_path_factory.mktemp("both") / "checkpoint"
    state = small_model().state_dict()
    save_checkpoint(folder, state, SMALL, plain / "tokenizer.json", META, alignment=alignment)
    return folder


def test_volumes_and_texts_are_unit_vectors_of_the_image_text_model(both: Path) -> None:
    predictor = Predictor.load(both)
    assert predictor.embeds
    volume, _ = oblique_volume()
    found, said = predictor.embed_volume(volume), predictor.embed_text(f" {REPORT}\n")
    assert found.shape == said.shape == (HEAD.width,)
    assert found.dtype == said.dtype == np.float32
    assert np.linalg.norm([found, said], axis=1) == pytest.approx([1, 1], abs=1e-5)
    session = predictor.open(volume)
    assert np.array_equal(predictor.embed_volume(session), found)
    assert "image" in vars(session.shared)  # the open session's own canonical image was used
    model = load_image_text(both / ALIGNMENT_FOLDER)
    transform = CanonicalTransform(volume.geometry)
    image = np.ascontiguousarray(transform.forward_array(volume.array))
    view, _ = language_view(image, transform.spacing, volume.modality, SMALL.vision.input_size)
    with torch.no_grad():
        assert np.allclose(found, model.embed_views(view)[0])
        assert np.allclose(said, model.embed_texts([REPORT])[0])
        # The encoder is that of the image-text model, not the one the language model reads with.
        features = predictor.model.language.vision(view)
        assert not np.allclose(found, model.alignment.embed_volumes(features)[0], atol=1e-3)
    with pytest.raises(PromptError, match="empty"):
        predictor.embed_text("  ")


def test_without_an_image_text_model_the_remedy_is_named(folders: tuple[Path, Path]) -> None:
    predictor = Predictor.load(folders[0])
    assert not predictor.embeds
    for ask in (lambda: predictor.embed_text(REPORT), lambda: predictor.embed_volume(oblique_volume()[0])):
        with pytest.raises(CheckpointError, match="no image-text model; copy the folder 'alignment'"):
            ask()
    assert not small_predictor().embeds
    with pytest.raises(ConfigError, match="no 'alignment' section"):
        ImageTextModel(SMALL, None)
    with pytest.raises(CheckpointError, match="holds no image-text model"):
        load_image_text(folders[0])
    with pytest.raises(ConfigError, match="belongs to an image-text model"):
        UnifiedModel(WITH_HEAD, small_model().language.tokenizer)
    with pytest.raises(CheckpointError, match="word pieces"):
        ImageTextModel(WITH_HEAD, None).embed_texts([REPORT])


def test_a_published_version_keeps_the_image_text_model(both: Path, tmp_path: Path) -> None:
    version = publish(tmp_path / "store", both)
    volume, _ = oblique_volume()
    assert np.array_equal(Predictor.load(version).embed_volume(volume), Predictor.load(both).embed_volume(volume))
    weights = version / ALIGNMENT_FOLDER / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        Predictor.load(version)
    with pytest.raises(CheckpointError, match="SHA-256"):
        publish(tmp_path / "store", version)
    with pytest.raises(CheckpointError, match="SHA-256"):
        rollback(tmp_path / "store", 1)


def test_a_folder_that_is_no_image_text_model_is_not_published(folders: tuple[Path, Path], tmp_path: Path) -> None:
    candidate = tmp_path / "candidate"
    shutil.copytree(folders[0], candidate)
    shutil.copytree(folders[0], candidate / ALIGNMENT_FOLDER)
    with pytest.raises(CheckpointError, match="alignment holds no image-text model"):
        publish(tmp_path / "store", candidate)
    assert read_published(tmp_path / "store") is None


def test_overwritten_weights_keep_the_image_text_model(both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(both, folder)
    state = small_model(seed=4).state_dict()
    save_checkpoint(folder, state, SMALL, both / "tokenizer.json", META, overwrite=True)
    assert same(load_image_text(folder / ALIGNMENT_FOLDER), load_image_text(both / ALIGNMENT_FOLDER))


def test_the_encoder_is_found_in_every_kind_of_result(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plain, alignment = folders
    head = load_image_text(alignment)
    write_tensors(tmp_path / "alignment.safetensors", head.state_dict())
    part = tmp_path / "vision"
    write_tensors(part / "model.safetensors", head.vision.state_dict())
    for source in (alignment, tmp_path / "alignment.safetensors", part):
        model = small_model(seed=2)
        assert not same(model.language.vision, head.vision)
        load_encoder(model.language.vision, source)
        assert same(model.language.vision, head.vision)
    mine = encoder(3)
    load_encoder(mine, plain)
    assert same(mine, small_model().language.vision)


def test_what_does_not_fit_is_named_and_changes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    weights, source = read_weights(folders[1]), folders[1]
    mine = encoder(3)
    for spoil, named in (
        (lambda w: w.pop("vision.s1.0.scale"), "s1.0.scale"),
        (lambda w: w.update({"vision.s1.9.scale": torch.zeros(8)}), "s1.9.scale"),
        (lambda w: w.update({"vision.s2.0.scale": torch.zeros(9)}), "s2.0.scale"),
    ):
        odd = dict(weights)
        spoil(odd)
        with pytest.raises(CheckpointError, match=f"does not fit this model at '{named}'"):
            load_part(mine, odd, source, "vision.")
    assert same(mine, encoder(3))
    load_part(mine, weights, source, "vision.", ["s1.", "s2."])
    assert torch.allclose(mine.s1[0].mlp.mlp[0].weight, weights["vision.s1.0.mlp.mlp.0.weight"])
    assert torch.equal(mine.s3[0].mlp.mlp[0].weight, encoder(3).s3[0].mlp.mlp[0].weight)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path)
    write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds no volume encoder"):
        load_encoder(mine, tmp_path / "x.safetensors")


def test_tied_weights_need_one_name(folders: tuple[Path, Path]) -> None:
    model = small_model(seed=2)
    weights = {name: tensor for name, tensor in read_weights(folders[0]).items() if "lm_head" not in name}
    load_part(model.language, weights, folders[0], "language.")
    assert same(model.language, small_model().language)


@pytest.mark.weights
def test_shipped_weights_lend_their_encoder() -> None:
    folder = shipped_checkpoint()
    tiny = DCFormer(ModelConfig.tiny().vision)
    load_encoder(tiny, folder)
    stored = load_file(folder / "model.safetensors")["language.vision.s1.0.mlp.mlp.0.weight"]
    assert torch.equal(tiny.s1[0].mlp.mlp[0].weight, stored.float())
    with pytest.raises(CheckpointError, match="does not fit this model"):
        load_encoder(encoder(0), folder)


def test_later_stages_begin_with_an_earlier_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Alignment lends its encoder to the scene phase; a checkpoint lends encoder and scene, or its language half."""
    plain, alignment = folders
    shipped, aligned = small_model(), load_image_text(alignment)
    write_tensors(tmp_path / "alignment.safetensors", aligned.state_dict())
    phase = ScenePhase(ScenePhaseConfig(), [from_case(generate_case(3))], [1.0], SMALL, tmp_path / "scene")
    assert shipped.language.scene is not None
    phase.start_from(plain)
    assert same(phase.learner.vision, shipped.language.vision)
    assert same(phase.learner.scene, shipped.language.scene)
    phase.start_from(tmp_path / "alignment.safetensors")
    assert same(phase.learner.vision, aligned.vision)
    assert same(phase.learner.scene, shipped.language.scene)
    other = small_model(seed=2).language
    load_language(other, plain)
    assert same(other, shipped.language)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_language(other, alignment)
