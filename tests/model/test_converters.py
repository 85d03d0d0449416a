"""Every published layout at its true size, names and shapes only: what fits, and what is said of what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medvl_sam2.converters import KINDS
from medvl_sam2.converters.convert import plan_conversion
from medvl_sam2.converters.keymap import Drop, Rename, plan
from medvl_sam2.converters.source import TensorInfo, WeightSource
from medvl_sam2.errors import CheckpointError
from published_layouts import (
    State,
    dcformer_shapes,
    dec_clip,
    empty,
    mixer_shapes,
    qwen_config,
    qwen_shapes,
    qwen_tokenizer,
    split_tokenizer,
    write_json,
)
from upstream_sam2 import upstream_sam2

SMALL_DCFORMER = ((1, 2, 3, 6, 2), (64, 96, 192, 384, 768))
QWEN_7B = {"vocabulary": 152064, "hidden": 3584, "ffn": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "tied": False}
QWEN_HALF = {"vocabulary": 151936, "hidden": 896, "ffn": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "tied": True}


def source_of(state: State, path: Path) -> WeightSource:
    """A source that only lists ``state``."""
    infos = {name: TensorInfo(tuple(value.shape), value.is_floating_point()) for name, value in state.items()}
    return WeightSource(path, infos, dict.fromkeys(infos, path))


def _sam2(name: str) -> Callable[[Path], State]:
    def state(_: Path) -> State:
        with torch.device("meta"):
            return dict(upstream_sam2(name).state_dict())

    return state


def _qwen(sizes: dict[str, Any]) -> Callable[[Path], State]:
    def state(folder: Path) -> State:
        write_json(folder / "config.json", qwen_config(**sizes))
        qwen_tokenizer(folder)
        return empty(qwen_shapes(**sizes))

    return state


def _med3dvlm(folder: Path) -> State:
    vocabulary = qwen_tokenizer(folder, extra=["<im_patch>"])
    sizes = QWEN_7B | {"vocabulary": max(vocabulary, 151666)}
    published = {
        "model_type": "vlm_qwen",
        "vision_tower": "dcformer",
        "vision_select_layer": -2,
        "mm_projector_type": "mixer",
        "mm_mlp_depth": 2,
        "input_size": [256, 256, 128],
        "low_output_size": [192, 128],
        "high_output_size": [64, 128],
    }
    write_json(folder / "config.json", qwen_config(**sizes) | published)
    state = empty(dcformer_shapes(*SMALL_DCFORMER), "model.vision_tower.vision_tower.encoder.")
    state |= empty(mixer_shapes("low", (256, 192, 128), (384, 1792, 3584)))
    state |= empty(mixer_shapes("high", (32, 64, 128), (768, 1792, 3584)))
    return state | empty(qwen_shapes(**sizes))


def _dcformer(blocks: tuple[int, ...], channels: tuple[int, ...], prefix: str, older: bool) -> Callable[[Path], State]:
    return lambda _: empty(dcformer_shapes(blocks, channels, older=older), prefix)


def _ct_clip(_: Path) -> State:
    """``checkpoint-*.pth`` of mirthAI/DCFormer: the encoder, its codebook, a text tower and two projections."""
    state = empty(dcformer_shapes((1, 2, 3, 3, 2), SMALL_DCFORMER[1], older=True), "visual_transformer.encoder.")
    rest = {
        "visual_transformer.vq._codebook.embed": (1, 8192, 768),
        "visual_transformer.vq._codebook.initted": (1,),
        "text_transformer.embeddings.word_embeddings.weight": (30522, 768),
        "to_text_latent.weight": (512, 768),
        "to_visual_latent.weight": (512, 768),
    }
    return state | empty(rest)


PUBLISHED: dict[str, tuple[str, Callable[[Path], State], dict[str, int], int]] = {
    # what it is: kind, layout, tensors of every part, tensors left out
    "SAM2.1 tiny": ("sam2.1_tiny", _sam2("sam2.1_tiny"), {"slices": 471}, 0),
    "SAM2.1 small": ("sam2.1_small", _sam2("sam2.1_small"), {"slices": 519}, 0),
    "SAM2.1 base+": ("sam2.1_base_plus", _sam2("sam2.1_base_plus"), {"slices": 615}, 0),
    "SAM2.1 large": ("sam2.1_large", _sam2("sam2.1_large"), {"slices": 903}, 0),
    "MedSAM2": ("medsam2", _sam2("sam2.1_tiny"), {"slices": 471}, 0),
    "DCFormer_SigLIP": (
        "dcformer_siglip",
        lambda _: dec_clip(*SMALL_DCFORMER, text_dim=768, width=768, words=119547),
        {"vision": 426, "alignment": 106},
        0,
    ),
    "pretrained_ViT.bin": ("dcformer_small", _dcformer(*SMALL_DCFORMER, "encoder.", False), {"vision": 426}, 0),
    "vision_tower.bin": (
        "dcformer_small",
        _dcformer(*SMALL_DCFORMER, "vision_tower.encoder.", False),
        {"vision": 426},
        0,
    ),
    "DCFormer nano": (
        "dcformer_nano",
        _dcformer((1,) * 5, (32, 32, 64, 128, 256), "visual_transformer.encoder.", True),
        {"vision": 192},
        120,
    ),
    "DCFormer tiny in CT-CLIP": ("dcformer_tiny", _ct_clip, {"vision": 348}, 215),
    "Med3DVLM": ("med3dvlm", _med3dvlm, {"vision": 426, "projector": 48, "language": 339}, 0),
    "Qwen2.5 0.5B": ("qwen2.5", _qwen(QWEN_HALF), {"language": 290}, 0),
    "Qwen2.5 7B": ("qwen2.5", _qwen(QWEN_7B), {"language": 339}, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_true_layout_fits_at_full_size(name: str, tmp_path: Path) -> None:
    kind, layout, parts, dropped = PUBLISHED[name]
    state = layout(tmp_path)
    target, matched = plan_conversion(source_of(state, tmp_path), kind)
    assert {part: len(wanted.expected) for part, wanted in target.parts.items()} == parts
    assert len(matched.targets) == sum(parts.values())
    assert len(matched.dropped) == dropped
    assert len(state) == sum(parts.values()) + dropped


def test_every_kind_has_a_published_layout() -> None:
    unchecked = {"dcformer_naive", "dcformer_base", "dcformer_large"}
    assert {kind for kind, *_ in PUBLISHED.values()} == set(KINDS) - unchecked


@pytest.mark.parametrize("name", ["SAM2.1 tiny", "DCFormer_SigLIP", "DCFormer nano", "Med3DVLM", "Qwen2.5 0.5B"])
def test_misfits_are_named(name: str, tmp_path: Path) -> None:
    kind, layout, *_ = PUBLISHED[name]
    state = layout(tmp_path)
    key = next(k for k in reversed(state) if state[k].dim() > 1)

    def message(changed: State) -> str:
        with pytest.raises(CheckpointError) as caught:
            plan_conversion(source_of(changed, tmp_path / "weights.pt"), kind)
        return str(caught.value)

    ours = plan_conversion(source_of(state, tmp_path), kind)[1].targets[key]
    without = {k: v for k, v in state.items() if k != key}
    assert f"weights.pt as {kind}: 1 weights are missing: {ours!r}. Check" in message(without)
    assert "1 weights are unused: 'surprise'" in message(state | {"surprise": torch.empty(1, device="meta")})
    wider = torch.empty(*state[key].shape, 2, device="meta")
    shapes = f"{key!r} is floating {tuple(wider.shape)}, wanted floating {tuple(state[key].shape)}"
    assert f"1 weights are of another shape or type: {shapes}" in message(state | {key: wider})
    assert f"{key!r} is whole numbers" in message(state | {key: state[key].to(torch.int8)})


def test_messages_count_what_they_do_not_show(tmp_path: Path) -> None:
    state = PUBLISHED["SAM2.1 tiny"][1](tmp_path)
    with pytest.raises(CheckpointError, match=r"50 weights are missing: ('[^']+', ){4}'[^']+' and 45 more; 2 weights"):
        plan_conversion(source_of(state, tmp_path), "sam2.1_small")


def test_wrong_size_of_the_same_depth_names_shapes(tmp_path: Path) -> None:
    state = PUBLISHED["DCFormer nano"][1](tmp_path)
    with pytest.raises(CheckpointError, match=r"weights are missing: .* weights are of another shape or type: "):
        plan_conversion(source_of(state, tmp_path), "dcformer_naive")


def test_two_names_for_one_tensor() -> None:
    found = {"a.x": TensorInfo((1,)), "b.x": TensorInfo((1,))}
    with pytest.raises(CheckpointError, match=r"1 weights are there twice: 'b\.x' and 'a\.x' \(both here 'x'\)"):
        plan(found, (Rename(r"[ab]\.(.)", r"\1"),), {"x": TensorInfo((1,))}, "test")


def test_first_rule_that_fits_a_whole_name_decides() -> None:
    rules = (Drop("ax", "old"), Rename("a(.*)", r"\1"))
    matched = plan({"ax": TensorInfo(()), "axe": TensorInfo(())}, rules, {"xe": TensorInfo(())}, "test")
    assert matched.targets == {"axe": "xe"}
    assert matched.dropped == {"ax": "old"}


def test_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown kind of weights 'sam3'; kinds: sam2\.1_tiny"):
        plan_conversion(source_of({}, tmp_path), "sam3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling' is"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True"),
        ({"head_dim": 128}, "'head_dim' is 128"),
        ({"num_hidden_layers": None}, "'num_hidden_layers' is None"),
        ({"rope_theta": None}, "'rope_theta' is None"),
        ({"vocab_size": 100}, None),
    ],
)
def test_qwen_config_is_read_with_care(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    state = _qwen(QWEN_HALF)(tmp_path)
    write_json(tmp_path / "config.json", qwen_config(**QWEN_HALF) | change)
    if message is None:  # the rows of the embedding count, not what the configuration says of them
        plan_conversion(source_of(state, tmp_path), "qwen2.5")
        return
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(source_of(state, tmp_path), "qwen2.5")


def test_tokenizer_in_its_older_files_is_the_same(tmp_path: Path) -> None:
    """Med3DVLM's own scripts write these: it loads its tokenizer with ``use_fast=False``."""

    def tokenizer() -> tuple[str, list[int], int]:
        target, _ = plan_conversion(source_of(state, tmp_path), "med3dvlm")
        vocabulary = target.parts["language"].vocabulary
        assert vocabulary is not None
        ids = vocabulary.tokenizer.encode("the liver, and spleen <im_patch>")
        return vocabulary.tokenizer.decode(ids), ids, vocabulary.known

    state = _med3dvlm(tmp_path)
    ready = tokenizer()
    split_tokenizer(tmp_path)
    assert tokenizer() == ready


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_files_beside_the_weights_are_asked_for(tmp_path: Path, missing: str) -> None:
    state = _qwen(QWEN_HALF)(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing}.*download"):
        plan_conversion(source_of(state, tmp_path), "qwen2.5")


def test_other_projectors_of_med3dvlm_are_refused(tmp_path: Path) -> None:
    state = _med3dvlm(tmp_path)
    config = qwen_config(**QWEN_7B) | {"vision_tower": "dcformer", "mm_projector_type": "low_high_mlp"}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match="'mm_projector_type' 'low_high_mlp'; only 'mixer'"):
        plan_conversion(source_of(state, tmp_path), "med3dvlm")
