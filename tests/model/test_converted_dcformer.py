"""The DCFormer family converted, loaded, and run beside the model it belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import DistilBertConfig, DistilBertModel

from converted_files import load, write
from medvl_sam2.config import AlignmentConfig, ModelConfig, VisionConfig
from medvl_sam2.converters import config_from_parts, convert, load_parts, open_source, read_part_config
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.partial_weights import load_encoder
from published_layouts import (
    dcformer_forward,
    dcformer_shapes,
    dec_clip,
    empty,
    randomise,
)
from small_model import small_model

BLOCKS, CHANNELS = (1, 2, 3, 6, 2), (8, 12, 16, 24, 32)
NARROW = VisionConfig(
    input_size=(40, 64, 48), blocks=BLOCKS, channels=CHANNELS, smoothing=1, stem_activation=False, taps=(3, 4)
)
"""DCFormer small, narrow; the view is neither cubic nor square."""


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "shards"])
def test_siglip_encoder_and_text_tower_run_as_published(tmp_path: Path, name: str) -> None:
    state = randomise(dec_clip(BLOCKS, CHANNELS, text_dim=24, width=20, words=50))
    source = open_source(write(tmp_path / name, state))
    result = convert(source, "dcformer_siglip", tmp_path / "out", config=ModelConfig(vision=NARROW))
    assert (result.parts["vision"].tensors, result.parts["alignment"].tensors) == (426, 106)
    assert read_part_config(tmp_path / "out" / "vision").vision == NARROW
    prefix = "vision_encoder.encoder."
    published = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    volume = torch.rand(2, 1, *NARROW.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load(DCFormer(NARROW), tmp_path / "out" / "vision")(volume)
        theirs = dcformer_forward(published, volume)
    for stage, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == (2, NARROW.tokens(stage), CHANNELS[stage])
        assert b.std() > 0.01
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)  # the same sums in another order

    folders = {part: tmp_path / "out" / part for part in ("vision", "alignment")}
    sizes = config_from_parts(folders, ModelConfig())
    assert sizes.alignment == AlignmentConfig(50, 24, 96, layers=6, heads=12, max_length=512, width=20)
    model = ImageTextModel(sizes, None).eval()
    assert load_parts(model, folders).untouched == ()
    tower = DistilBertModel(DistilBertConfig(vocab_size=50, dim=24, hidden_dim=96, n_heads=12)).eval()
    tower.load_state_dict(
        {k.removeprefix("language_encoder."): v for k, v in state.items() if k.startswith("language_encoder.")}
    )
    ids = torch.tensor([[1, 7, 3, 49], [1, 9, 0, 0]])  # the second one is padded
    with torch.no_grad():
        said = tower(input_ids=ids, attention_mask=ids != 0).last_hidden_state[:, 0]
        said = functional.linear(said, state["mm_language_proj.weight"], state["mm_language_proj.bias"])
        seen = theirs[-1].mean(dim=1)
        seen = functional.linear(seen, state["mm_vision_proj.weight"], state["mm_vision_proj.bias"])
        torch.testing.assert_close(model.alignment.embed_texts(ids), functional.normalize(said, dim=-1))
        torch.testing.assert_close(model.embed_views(volume), functional.normalize(seen, dim=-1), atol=2e-6, rtol=1e-5)
    assert model.alignment.t_prime.item() == state["t_prime"].item()
    assert model.alignment.bias.item() == state["bias"].item()
    with pytest.raises(CheckpointError, match="word pieces"):
        model.embed_texts(["The liver is normal."])
    encoder = DCFormer(NARROW)
    load_encoder(encoder, folders["vision"])  # the alignment stage may begin with the published encoder
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), model.vision.parameters(), strict=True))


def test_the_image_text_model_takes_its_own_parts_only(tmp_path: Path) -> None:
    state = randomise(dec_clip(BLOCKS, CHANNELS, text_dim=24, width=20, words=50))
    path = write(tmp_path / "w.safetensors", state)
    source = open_source(path)
    convert(source, "dcformer_siglip", tmp_path / "out", config=ModelConfig(vision=NARROW))
    folder = tmp_path / "out" / "alignment"
    sizes = config_from_parts({"alignment": folder}, ModelConfig(vision=NARROW))
    assert sizes.alignment is not None
    other = replace(sizes, alignment=replace(sizes.alignment, heads=6))
    with pytest.raises(CheckpointError, match="'heads' of the model's 'alignment' configuration is 6"):
        load_parts(ImageTextModel(other, None), {"alignment": folder})
    with pytest.raises(CheckpointError, match="ImageTextModel has no part 'slices'"):
        load_parts(ImageTextModel(sizes, None), {"slices": folder})
    with pytest.raises(CheckpointError, match="UnifiedModel has no part 'alignment'; 'alignment' belongs to ImageText"):
        load_parts(small_model(), {"alignment": folder})
    # A tower of another depth or kind is refused; its encoder can still be had.
    deep = {k.replace("layer.5.", "layer.6."): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match=r"missing.*transformer\.layer\.5.*unused.*layer\.6"):
        convert(open_source(write(tmp_path / "deep.safetensors", deep)), "dcformer_siglip", tmp_path / "deep")
    bert = {k.replace("language_encoder.transformer.", "language_encoder.encoder."): v for k, v in state.items()}
    source = open_source(write(tmp_path / "bert.safetensors", bert))
    with pytest.raises(CheckpointError, match="BERT as its text tower; only DistilBERT"):
        convert(source, "dcformer_siglip", tmp_path / "bert")
    alone = convert(source, "dcformer_small", tmp_path / "bert", config=ModelConfig(vision=NARROW))
    assert set(alone.parts) == {"vision"}
    assert len(alone.dropped) == 106


def test_older_layout_gives_the_same_encoder(tmp_path: Path) -> None:
    """``gamma`` is the scale, the doubled batch norms and the codebook go, and the report says so."""
    prefix = "visual_transformer.encoder."
    state = randomise(empty(dcformer_shapes(BLOCKS, CHANNELS, older=True), prefix))
    for key in [k for k in state if ".norm." in k]:
        axial, _, branch_and_end = key.partition(".norm.")
        branch, _, end = branch_and_end.partition(".")
        state[key] = state[f"{axial}.c{int(branch) + 1}.1.{end}"].clone()
    extra = {"visual_transformer.vq._codebook.embed": torch.zeros(1, 4, 32), "to_text_latent.weight": torch.zeros(2, 2)}
    source = open_source(write(tmp_path / "checkpoint-9.pth", state | extra))
    result = convert(source, "dcformer_small", tmp_path / "out", config=ModelConfig(vision=NARROW))
    assert result.ignored == ("epoch", "args")
    assert len(result.dropped) == 5 * 3 * 17 + 2
    published = {
        key.removeprefix(prefix).replace("gamma", "scale"): value for key, value in state.items() if ".norm." not in key
    }
    volume = torch.rand(1, 1, *NARROW.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = load(DCFormer(NARROW), tmp_path / "out" / "vision")(volume)
    for a, b in zip(ours, dcformer_forward(published, volume), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
