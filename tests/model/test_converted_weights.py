"""Random weights under published names, written to disk, converted, loaded, and run beside the model they belong to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from converted_files import load, write
from medvl_sam2.config import ModelConfig, SceneConfig, VisionConfig
from medvl_sam2.converters import Conversion, config_from_parts, convert, load_parts, open_source, read_part_config
from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.slice_segmenter import SlicePrompt, SliceSegmenter
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.presets import SLICE_PRESETS, preset
from published_layouts import (
    State,
    dcformer_forward,
    dcformer_shapes,
    empty,
    mixer_forward,
    mixer_shapes,
    qwen_config,
    qwen_shapes,
    qwen_tokenizer,
    randomise,
    write_json,
)
from small_model import SMALL
from upstream_sam2 import upstream_sam2

BLOCKS, CHANNELS = (1, 2, 3, 6, 2), (8, 12, 16, 24, 32)
NARROW = VisionConfig(
    input_size=(40, 64, 48), blocks=BLOCKS, channels=CHANNELS, smoothing=1, stem_activation=False, taps=(3, 4)
)
"""DCFormer small, narrow; the view is neither cubic nor square."""
QWEN = {"hidden": 64, "ffn": 96, "layers": 3, "heads": 4, "kv_heads": 2}


# --- SAM2.1 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sam2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Upstream's SAM2.1 tiny at 256 px with random weights, and its published file."""
    model = upstream_sam2("sam2.1_tiny", image_size=256)
    state = randomise(model.state_dict())
    model.load_state_dict(state)
    return model, write(tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt", state)


def test_sam2_runs_as_upstream(sam2: tuple[Any, Path], tmp_path: Path) -> None:
    upstream, path = sam2
    config = replace(SLICE_PRESETS["sam2.1_tiny"], image_size=256, multimask=False, rgb_statistics=False)
    convert(open_source(path), "sam2.1_tiny", tmp_path / "out", config=ModelConfig(slices=config))
    ours = SliceSegmenter(config).eval()
    load(ours.sam2, tmp_path / "out" / "slices")
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 256, 256, generator=generator)
    points = torch.tensor([[[30.0, 200.0]], [[128.0, 64.0]]])
    labels = torch.ones(2, 1, dtype=torch.int32)
    with torch.no_grad():
        features = ours.encode(images)
        theirs = upstream.forward_image(images)
        for a, b in zip((features.fine, features.middle, features.coarse), theirs["backbone_fpn"], strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
        fine, middle, coarse = theirs["backbone_fpn"]
        decoded = ours.decode(features, SlicePrompt(points, labels))
        _, _, iou, masks, _, pointer, presence = upstream._forward_sam_heads(
            coarse + upstream.no_mem_embed.reshape(1, -1, 1, 1),
            {"point_coords": points, "point_labels": labels},
            high_res_features=[fine, middle],
            multimask_output=False,
        )
        appears = presence[:, 0] > 0
        torch.testing.assert_close(decoded.presence, presence[:, 0], atol=0, rtol=0)
        torch.testing.assert_close(decoded.logits[appears], masks[appears], atol=0, rtol=0)
        torch.testing.assert_close(decoded.iou, iou[:, 0], atol=0, rtol=0)
        torch.testing.assert_close(decoded.pointer, pointer, atol=0, rtol=0)
        logits = torch.randn(2, 1, 256, 256, generator=generator)
        flat = [level.flatten(2).permute(2, 0, 1) for level in theirs["backbone_fpn"]]
        memory = ours.remember(features, logits, presence[:, 0], pointer)
        expected, _ = upstream._encode_new_memory(
            flat, [(64, 64), (32, 32), (16, 16)], logits, presence, is_mask_from_pts=False
        )
        torch.testing.assert_close(memory.features, expected, atol=1e-5, rtol=1e-5)


def test_medsam2_is_the_same_layout_at_512_pixels(sam2: tuple[Any, Path], tmp_path: Path) -> None:
    result = convert(open_source(sam2[1]), "medsam2", tmp_path / "out")
    slices = read_part_config(tmp_path / "out" / "slices").slices
    assert slices == replace(SLICE_PRESETS["sam2.1_tiny"], image_size=512)
    assert result.parts["slices"].numbers == sum(value.numel() for value in sam2[0].state_dict().values())


# --- Qwen2.5 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tied"), [(400, True), (None, False)])
def test_qwen_runs_as_transformers_and_grows(tmp_path: Path, rows: int | None, tied: bool) -> None:
    """``rows`` None: no spare rows, so that the table grows."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    known = qwen_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=rows or known, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    theirs = Qwen2ForCausalLM(config).eval()
    theirs.load_state_dict(randomise(theirs.state_dict()))
    theirs.tie_weights()
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    result = convert(open_source(folder), "qwen2.5", tmp_path / "out", shard_bytes=60_000)
    assert len(list((tmp_path / "out" / "language").glob("*.safetensors"))) > 1
    assert result.appended == 4

    part = {"language": tmp_path / "out" / "language"}
    tokenizer = Tokenizer.load(part["language"] / "tokenizer.json")
    ours_config = config_from_parts(part, replace(SMALL, vision=NARROW, scene=SceneConfig(lesions=0)))
    assert ours_config.language.vocab_size == (rows or known + 4)
    assert ours_config.language.rope_theta == 1e6
    model = UnifiedModel(ours_config, tokenizer).eval()
    loaded = load_parts(model, part)
    assert loaded.loaded == {"language": result.parts["language"].tensors}
    assert not any(name.startswith("language.lm.") for name in loaded.untouched)
    assert "language.vision.s0.0.0.c1.0.weight" in loaded.untouched
    ids = torch.arange(3, 203).reshape(2, 100)
    with torch.no_grad():
        a, b = model.language.lm(ids).logits[..., :known], theirs(ids).logits[..., :known]
    assert b.std() > 0.01
    torch.testing.assert_close(a, b, atol=0, rtol=0)

    for table in (model.language.lm.get_input_embeddings(), model.language.lm.get_output_embeddings()):
        published = theirs.get_input_embeddings() if tied else theirs.get_output_embeddings()
        source = published if table is not model.language.lm.get_input_embeddings() else theirs.get_input_embeddings()
        mean = source.weight[:known].mean(dim=0)
        assert torch.equal(table.weight[:known], source.weight[:known])
        torch.testing.assert_close(table.weight[known : known + 4], mean.expand(4, -1))
        assert torch.equal(table.weight[known + 4 :], source.weight[known + 4 :])


def test_half_precision_is_kept_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    folder.mkdir()
    sizes = QWEN | {"vocabulary": qwen_tokenizer(folder), "tied": True}
    write_json(folder / "config.json", qwen_config(**sizes))
    write(folder, {name: value.bfloat16() for name, value in randomise(empty(qwen_shapes(**sizes))).items()})
    convert(open_source(folder), "qwen2.5", tmp_path / "out")
    state = load_file(tmp_path / "out" / "language" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


# --- Med3DVLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def med3dvlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, Conversion, ModelConfig]:
    """The whole folder, narrow: published tensors, what became of them, and the configuration to build."""
    folder = tmp_path_factory.mktemp("med3dvlm")
    sizes = QWEN | {"vocabulary": qwen_tokenizer(folder, extra=["<im_patch>"]), "tied": False}
    low, high = NARROW.tokens(3), NARROW.tokens(4)
    state = empty(dcformer_shapes(BLOCKS, CHANNELS), "model.vision_tower.vision_tower.encoder.")
    state |= empty(mixer_shapes("low", (low, 6, 5), (24, 32, 64)))
    state |= empty(mixer_shapes("high", (high, 4, 5), (32, 32, 64)))
    state = randomise(state | empty(qwen_shapes(**sizes)))
    write_json(folder / "config.json", qwen_config(**sizes))
    write(folder, state)
    base = ModelConfig()
    base = replace(
        base,
        vision=NARROW,
        projector=replace(base.projector, low_tokens=(6, 5), high_tokens=(4, 5)),
        language=replace(
            base.language, vocab_size=sizes["vocabulary"], hidden_size=64, intermediate_size=96, layers=3, heads=4,
            kv_heads=2, tied_head=False, rope_theta=1e6,
        ),
    )  # fmt: skip
    result = convert(open_source(folder), "med3dvlm", folder / "out", config=base)
    small = replace(SMALL, scene=SceneConfig(lesions=0), projector=replace(SMALL.projector, extent=False))
    return state, result, config_from_parts({name: part.folder for name, part in result.parts.items()}, small)


def _unified(med3dvlm: tuple[State, Conversion, ModelConfig]) -> UnifiedModel:
    _, result, config = med3dvlm
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(result.parts["language"].folder / "tokenizer.json")
    return UnifiedModel(config, tokenizer).eval()


def _folders(result: Conversion) -> dict[str, Path]:
    return {name: part.folder for name, part in result.parts.items()}


def test_med3dvlm_runs_as_published(med3dvlm: tuple[State, Conversion, ModelConfig]) -> None:
    state, result, config = med3dvlm
    assert result.appended == 3
    assert (config.language.legacy_splice, config.language.prompt_end, config.language.reply_start) == (True, "", " ")
    model = _unified(med3dvlm)
    loaded = load_parts(model, _folders(result))
    assert {name.split(".")[1] for name in loaded.untouched} == {"seg_projector", "sam2", "height_token"}
    prefix = "model.vision_tower.vision_tower.encoder."
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    volume = torch.rand(1, 1, *NARROW.input_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        maps = dcformer_forward(encoder, volume)
        theirs = torch.cat([mixer_forward(state, "low", maps[3]), mixer_forward(state, "high", maps[4])], dim=1)
        ours = model.language.encode_image(volume)
        assert ours.shape == (1, 10, 64)
        assert theirs.std() > 0.01
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

        # A question as published: image tokens one position late, over the first question token; no separator.
        ids = torch.tensor([model.language.prompt_ids("liver and spleen")])
        lm = model.language.lm
        embedded = torch.nn.functional.embedding(ids, state["model.embed_tokens.weight"])
        spliced = torch.cat([embedded[:, :1], theirs, embedded[:, 11:]], dim=1)
        hidden = lm.model(inputs_embeds=spliced, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.language.hidden_states(ours, ids), hidden, atol=1e-4, rtol=1e-4)
        assert model.language.generate(ours, ["liver and spleen"], max_new_tokens=3)


def test_training_starts_from_converted_parts(med3dvlm: tuple[State, Conversion, ModelConfig]) -> None:
    model = _unified(med3dvlm).train()
    load_parts(model, _folders(med3dvlm[1]))
    language = model.language
    prompt, reply = language.prompt_ids("segment the liver"), language.reply_ids("liver [SEG]")
    ids = torch.tensor([prompt + reply])
    labels = torch.tensor([[-100] * len(prompt) + reply])
    output = language(language.encode_image(torch.rand(2, 1, *NARROW.input_size))[:1], ids, labels)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name in ("lm.lm_head.weight", "projector.low_mixer.0.mlp1.0.weight", "vision.s4.1.scale"):
        assert language.get_parameter(name).grad.abs().sum() > 0


# --- load_parts -------------------------------------------------------------------------------------------------------


def _changed(model: UnifiedModel, before: State) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": replace(NARROW, smoothing=3)}, r"'smoothing' of the model's 'vision' configuration is 3, .* to 1"),
        ({"vision": replace(NARROW, channels=(8, 12, 16, 24, 40))}, "weights are of another shape or type"),
        ({"vision": replace(NARROW, blocks=(1, 2, 3, 6, 3))}, "weights are missing: 's4.2"),
        ({"vision": replace(NARROW, blocks=(1, 2, 3, 6, 1))}, "weights are unused: 's4.1"),
    ],
)
def test_parts_that_do_not_fit_change_nothing(
    med3dvlm: tuple[State, Conversion, ModelConfig], change: dict[str, Any], message: str
) -> None:
    model = _unified((med3dvlm[0], med3dvlm[1], replace(med3dvlm[2], **change)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folders = _folders(med3dvlm[1])
    with pytest.raises(CheckpointError, match=message):
        load_parts(model, {"language": folders["language"], "vision": folders["vision"]})
    assert not _changed(model, before)


def test_choices_of_the_model_outlive_the_parts(sam2: tuple[Any, Path], tmp_path: Path) -> None:
    convert(open_source(sam2[1]), "sam2.1_tiny", tmp_path / "out")
    config = config_from_parts({"slices": tmp_path / "out" / "slices"}, preset("small"))
    assert config == preset("small")


def test_fields_that_change_no_weight_may_differ(med3dvlm: tuple[State, Conversion, ModelConfig]) -> None:
    state, result, config = med3dvlm
    model = _unified((state, result, replace(config, vision=replace(NARROW, input_size=(32, 64, 64)))))
    assert load_parts(model, {"vision": result.parts["vision"].folder}).loaded == {"vision": 426}


def test_rotary_base_and_tokenizer_must_be_those_of_the_weights(
    med3dvlm: tuple[State, Conversion, ModelConfig], tmp_path: Path
) -> None:
    state, result, config = med3dvlm
    folder = {"language": result.parts["language"].folder}
    other = _unified((state, result, replace(config, language=replace(config.language, rope_theta=1e4))))
    with pytest.raises(CheckpointError, match=r"'rope_theta' of the model's 'language' configuration is 10000\.0"):
        load_parts(other, folder)
    content = json.loads((folder["language"] / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(CheckpointError, match="the model's tokenizer is not that of"):
        load_parts(UnifiedModel(config, Tokenizer.load(tmp_path / "tokenizer.json")), folder)


def test_unknown_part_and_foreign_folder(med3dvlm: tuple[State, Conversion, ModelConfig], tmp_path: Path) -> None:
    model = _unified(med3dvlm)
    with pytest.raises(
        CheckpointError, match=r"no part 'siglip'; parts: vision, projector, language, slices, alignment"
    ):
        load_parts(model, {"siglip": tmp_path})
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights are missing"):
        load_parts(model, {"vision": tmp_path})
    with pytest.raises(CheckpointError, match=r"config\.json is no part configuration"):
        read_part_config(tmp_path)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_conversion_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    state = randomise(empty(dcformer_shapes(BLOCKS, CHANNELS), "encoder."))
    source = open_source(write(tmp_path / "w.pt", state))
    config = ModelConfig(vision=NARROW)

    def stop(done: int, _: int) -> None:
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, "dcformer_small", tmp_path / "out", config=config, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    steps: list[tuple[int, int]] = []
    convert(source, "dcformer_small", tmp_path / "out", config=config, progress=lambda *step: steps.append(step))
    assert steps == [(n, 426) for n in range(1, 427)]
    with pytest.raises(CheckpointError, match="out exists; name a new folder"):
        convert(source, "dcformer_small", tmp_path / "out", config=config)


def test_report_names_every_tensor(tmp_path: Path) -> None:
    state = randomise(empty(dcformer_shapes(BLOCKS, CHANNELS, older=True), "encoder."))
    source = open_source(write(tmp_path / "w.pt", state))
    convert(source, "dcformer_small", tmp_path / "out", config=ModelConfig(vision=NARROW))
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert set(report["targets"]) | set(report["dropped"]) == set(state)
    assert report["targets"]["encoder.s1.0.gamma"] == "vision/s1.0.scale"
    assert report["parts"]["vision"]["tensors"] == 426
