"""Volume encoder, projector, language model and adapters on a very small configuration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvl_sam2.config import LanguageConfig, ModelConfig, ProjectorConfig, SceneConfig, VisionConfig
from medvl_sam2.errors import CheckpointError, ConfigError, PromptError
from medvl_sam2.geometry import global_view
from medvl_sam2.intensity import global_channel
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.language import additive_mask, build_language_model
from medvl_sam2.modeling.lora import LoRALinear, add_lora, load_lora_state, lora_state, merge_lora, remove_lora
from medvl_sam2.modeling.prompts import format_choices, segment_prompt, segment_reply
from medvl_sam2.modeling.scene import SceneReader
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import language_view
from medvl_sam2.modeling.vision_language import IGNORE, VisionLanguage
from medvl_sam2.types import Modality
from medvl_sam2.vocabulary import CLASSES

SMALL = ModelConfig(
    name="small",
    classes=CLASSES,
    scene=SceneConfig(lesions=2, width=8),
    vision=VisionConfig(input_size=(16, 24, 32), channels=(4, 6, 8, 10, 12), kernels=(5, 5, 3, 3), taps=(1, 2)),
    projector=ProjectorConfig(low_tokens=(6, 5), high_tokens=(4, 3)),
    language=LanguageConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, max_length=96
    ),
)
PROMPTS = ["Where is the liver?", "Is there a lesion in the spleen or in the left kidney?"]


@pytest.fixture(scope="module")
def model() -> VisionLanguage:
    torch.manual_seed(0)
    return VisionLanguage(SMALL, Tokenizer.train([*PROMPTS, "liver spleen kidney"], 320)).eval()


@pytest.fixture(scope="module")
def image_tokens(model: VisionLanguage) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(torch.rand(2, 1, 16, 24, 32), torch.full((2, 3), 250.0))


def test_token_maps_have_the_configured_grids() -> None:
    maps = DCFormer(SMALL.vision)(torch.rand(2, 1, 16, 24, 32))
    assert [tuple(m.shape) for m in maps] == [
        (2, SMALL.vision.tokens(stage), SMALL.vision.channels[stage]) for stage in range(5)
    ]


def test_tokens_are_depth_major() -> None:
    """A change at the last slices of the view moves the last tokens of the stem, not the first."""
    encoder = DCFormer(replace(SMALL.vision, smoothing=1)).eval()
    view = torch.zeros(1, 1, 16, 24, 32)
    other = view.clone()
    other[:, :, -1:] = 1.0
    first, second = encoder.s0(view.permute(0, 1, 3, 4, 2)), encoder.s0(other.permute(0, 1, 3, 4, 2))
    assert first.shape == (1, 4, 6, 8, 4)  # (B, C, H, W, D)
    moved = (encoder(view)[0] - encoder(other)[0]).abs().sum(-1).view(SMALL.vision.grid(0))
    assert moved[0].max() < moved[-1].max()
    assert torch.allclose(moved, (first - second).abs().sum(1)[0].permute(2, 0, 1), atol=1e-5)


def test_encoder_keys_follow_the_published_layout() -> None:
    keys = set(DCFormer(SMALL.vision).state_dict())
    for key in ("s0.0.0.c1.0.weight", "s0.0.3.c3.1.running_var", "s1.0.proj.weight", "s2.0.dwconv.c2.0.bias",
                "s3.0.mlp.mlp.0.weight", "s4.0.mlp.mlp.3.bias", "s4.0.scale"):  # fmt: skip
        assert key in keys
    assert DCFormer(SMALL.vision).s0[0][0].c1[0].weight.shape == (4, 1, 7, 1, 1)


def test_published_small_encoder_has_its_parameter_count() -> None:
    """The published small size has 18.25 M parameters."""
    config = VisionConfig(blocks=(1, 2, 3, 6, 2), channels=(64, 96, 192, 384, 768))
    with torch.device("meta"):
        encoder = DCFormer(config)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(18.25e6, rel=0.005)


def test_bad_encoder_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocks"):
        DCFormer(VisionConfig(blocks=(1, 1)))
    with pytest.raises(ConfigError, match="heads"):
        build_language_model(LanguageConfig(hidden_size=30, heads=4))


def test_exactly_the_slots_are_replaced(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    ids = torch.tensor([model.prompt_ids(PROMPTS[0])] * 2)
    embedded = model.embed(image_tokens, ids)
    slots = model.image_slots
    assert slots == 8 + 16 + 2
    assert (ids[:, :slots] == model.tokenizer.image_id).all()
    assert torch.equal(embedded[:, :slots], image_tokens)
    assert torch.equal(embedded[:, slots:], model.lm.get_input_embeddings()(ids[:, slots:]))


def test_wrong_number_of_slots_is_refused(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    with pytest.raises(PromptError, match="slots"):
        model.embed(image_tokens[:, :-1], torch.tensor([model.prompt_ids(PROMPTS[0])] * 2))


@pytest.mark.parametrize("prompt", ["", "  \n ", "liver " * 20_000, "q7 " * 40])
def test_empty_or_long_prompts_are_refused(model: VisionLanguage, prompt: str) -> None:
    with pytest.raises(PromptError, match="prompt"):
        model.prompt_ids(prompt)


def test_typed_special_tokens_add_no_slot(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    ids = model.prompt_ids("<im_patch>[SEG]")
    assert ids.count(model.tokenizer.image_id) == model.image_slots
    assert model.tokenizer.seg_id not in ids
    assert len(model.generate(image_tokens[:1], ["<im_patch>"], 2)) == 1


def test_loss_covers_the_reply_only(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    prompt, reply = model.prompt_ids(PROMPTS[0]), model.reply_ids("liver [SEG]")
    ids = torch.tensor([prompt + reply])
    labels = torch.tensor([[IGNORE] * len(prompt) + reply])
    output = model(image_tokens[:1], ids, labels)
    logits = model.lm.lm_head(output.hidden[0, len(prompt) - 1 : -1])
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(logits, torch.tensor(reply)), atol=1e-5)


def test_padding_changes_nothing(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    """Left padding in generation, right padding in the teacher-forced pass, batched against alone."""
    together = model.generate(image_tokens, PROMPTS, 8)
    apart = [model.generate(image_tokens[n : n + 1], [PROMPTS[n]], 8)[0] for n in range(2)]
    assert together == apart
    replies = ["liver [SEG]", "left kidney [SEG], spleen [SEG]"]
    with torch.no_grad():
        batch = model.seg_tokens(image_tokens, PROMPTS, replies)
        single = [model.seg_tokens(image_tokens[n : n + 1], [PROMPTS[n]], [replies[n]]) for n in range(2)]
    assert batch.shape == (3, SMALL.slices.d_model)
    assert torch.allclose(batch, torch.cat(single), atol=1e-5)


def test_generation_equals_greedy_without_cache(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    ids = model.prompt_ids(PROMPTS[0])
    start = len(ids)
    with torch.no_grad():
        for _ in range(6):
            hidden = model.hidden_states(image_tokens[:1], torch.tensor([ids]))
            logits = model.lm.lm_head(hidden[0, -1])[: len(model.tokenizer)]
            logits[[model.tokenizer.pad_id, model.tokenizer.image_id]] = -torch.inf
            ids.append(int(logits.argmax()))
            if ids[-1] == model.tokenizer.eos_id:
                break
    assert model.generate(image_tokens[:1], [PROMPTS[0]], 6) == [model.tokenizer.decode(ids[start:]).strip()]


def test_image_reaches_the_reply_and_its_extent_the_tokens(model: VisionLanguage) -> None:
    view = torch.rand(1, 1, 16, 24, 32)
    near, far = (model.encode_image(view, torch.full((1, 3), mm)) for mm in (150.0, 450.0))
    assert not torch.allclose(near, far)
    loss = model.seg_tokens(near, [PROMPTS[0]], ["liver [SEG]"]).square().sum()
    (gradient,) = torch.autograd.grad(loss, model.vision.s1[0].proj.weight)
    assert gradient.abs().sum() > 0


def test_no_seg_gives_no_embedding(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    assert model.seg_tokens(image_tokens[:1], [PROMPTS[0]], ["no liver"]).shape == (0, SMALL.slices.d_model)


def test_additive_mask_never_blocks_a_whole_row() -> None:
    mask = additive_mask(torch.tensor([[[True, False], [False, False]]]))
    assert mask.shape == (1, 1, 2, 2)
    assert mask[0, 0, 0, 0] == 0
    assert mask[0, 0, 0, 1] < -1e30
    assert (mask[0, 0, 1] == 0).all()


def test_wordings() -> None:
    assert format_choices("Phase?", ["arterial", "portal venous"]) == "Phase? Choices: A. arterial B. portal venous"
    assert format_choices("Phase?", []) == "Phase?"
    assert segment_prompt(["liver", "spleen", "colon"]) == "Please segment the liver, spleen and colon."
    assert segment_reply(["liver", "spleen"], [True, False]) == "liver [SEG], no spleen"


def test_adapters_start_neutral_merge_and_travel(model: VisionLanguage, image_tokens: torch.Tensor) -> None:
    torch.manual_seed(1)
    plain = build_language_model(SMALL.language)
    ids = torch.randint(6, 300, (1, 7))
    names = set(plain.state_dict())
    before = plain(ids).logits
    parameters = add_lora(plain, rank=2, alpha=4)
    assert len(parameters) == 2 * 7 * SMALL.language.layers
    assert torch.allclose(plain(ids).logits, before, atol=1e-6)
    trainable = {id(p) for p in plain.parameters() if p.requires_grad}
    assert all(id(p) in trainable for p in parameters)
    assert not plain.model.layers[0].self_attn.q_proj.base.weight.requires_grad
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    adapted = plain(ids).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    state = lora_state(plain)
    merge_lora(plain)
    assert set(plain.state_dict()) == names
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    assert torch.allclose(plain(ids).logits, adapted, atol=1e-4)

    torch.manual_seed(1)
    fresh = build_language_model(SMALL.language)
    add_lora(fresh, rank=2, alpha=4)
    load_lora_state(fresh, state)
    assert torch.allclose(fresh(ids).logits, adapted, atol=1e-5)
    remove_lora(fresh)
    assert torch.allclose(fresh(ids).logits, before, atol=1e-6)


def test_adapter_mistakes_are_named() -> None:
    plain = build_language_model(SMALL.language)
    with pytest.raises(ConfigError, match="rank"):
        add_lora(plain, rank=0, alpha=1)
    with pytest.raises(ConfigError, match="named"):
        add_lora(plain, rank=1, alpha=1, targets=("nothing",))
    add_lora(plain, rank=1, alpha=1)
    with pytest.raises(ConfigError, match="already"):
        add_lora(plain, rank=1, alpha=1)
    state = lora_state(plain)
    with pytest.raises(CheckpointError, match="only one"):
        load_lora_state(plain, dict(list(state.items())[1:]))
    with pytest.raises(CheckpointError, match="shape"):
        load_lora_state(plain, {name: torch.zeros(3, 3) for name in state})


def scene_logits(reader: SceneReader, organ: slice, lesion: tuple[slice, slice, slice] | None) -> torch.Tensor:
    """A dense map (1, C, 64, 48, 64): the first organ fills ``organ`` planes, a cyst fills ``lesion``."""
    logits = torch.full((1, reader.organs + 5, *reader.grid), -9.0)
    logits[0, 0, organ] = 9.0
    if lesion is not None:
        logits[0, reader.organs][lesion] = 9.0
        logits[0, reader.organs + 1][lesion] = 9.0
    return logits


@pytest.fixture(scope="module")
def reader() -> SceneReader:
    config = replace(SMALL, vision=replace(SMALL.vision, input_size=(64, 96, 128)))
    return SceneReader(config).eval()


def test_scene_measures_what_the_map_says(reader: SceneReader) -> None:
    images = torch.full((1, 1, 64, 96, 128), 0.5)
    images[:, :, 16:32, 32:48, 40:80] = 0.25
    lesion = (slice(16, 32), slice(16, 24), slice(20, 40))
    extent = torch.tensor([[160.0, 240.0, 320.0]])  # cells of 2.5 x 5 x 5 mm
    facts = reader.measure(images, scene_logits(reader, slice(0, 32), lesion), extent)
    volume = 40 * 40 * 100.0
    first = facts.lesions[0, 0]
    assert facts.organs.shape == (1, 16, 14)
    assert facts.organs[0, 0, 5:8].tolist() == pytest.approx([0.25, 0.5, 0.5], abs=1e-3)
    assert facts.organs[0, 1, 1:].abs().sum() == 0
    assert first[0] == 1
    assert float(first[4]) * 30 == pytest.approx((6 * volume / torch.pi) ** (1 / 3), rel=0.01)
    assert first[8:11].tolist() == pytest.approx([24 / 64, 20 / 48, 30 / 64], abs=1e-3)
    assert first[14:18].argmax() == 0  # a cyst
    assert float(first[18]) == pytest.approx(0.25, abs=1e-3)
    assert first[20:].argmax() == 0  # in the first organ
    assert facts.lesions[0, 1].abs().sum() == 0


def test_scene_sizes_follow_the_extent(reader: SceneReader) -> None:
    images, logits = torch.rand(1, 1, 64, 96, 128), scene_logits(reader, slice(0, 32), (slice(4, 8),) * 3)
    near = reader.measure(images, logits, torch.full((1, 3), 100.0)).lesions[0, 0]
    far = reader.measure(images, logits, torch.full((1, 3), 200.0)).lesions[0, 0]
    assert float(far[4] / near[4]) == pytest.approx(2.0, rel=1e-3)
    assert torch.allclose(near[8:11], far[8:11])


def test_scene_lists_the_largest_lesion_first(reader: SceneReader) -> None:
    logits = scene_logits(reader, slice(0, 64), (slice(1, 2), slice(1, 3), slice(1, 3)))
    logits[0, reader.organs, 32:48, 20:32, 40:56] = 9.0
    lesions = reader.measure(torch.rand(1, 1, 64, 96, 128), logits, None).lesions[0]
    assert lesions[:, 0].tolist() == [1, 1]
    assert lesions[0, 4] > lesions[1, 4]


def test_some_rows_are_sharpened_as_in_the_whole(reader: SceneReader) -> None:
    config = replace(SMALL, vision=replace(SMALL.vision, input_size=(64, 96, 128)))
    images = torch.rand(1, 1, 64, 96, 128)
    with torch.no_grad():
        coarse = reader.coarse(images, DCFormer(config.vision).eval()(images))
        whole, some = reader.sharpen(images, coarse), reader.sharpen(images, coarse, (4, 10))
    assert whole.shape[2:] == reader.grid
    assert some.shape[2] == 24
    assert torch.allclose(whole[:, :, 16:40], some, atol=1e-5)


def test_scene_map_is_trained_by_labels_and_left_out_on_demand() -> None:
    config = replace(SMALL, scene=SceneConfig(lesions=0))
    plain = VisionLanguage(config, Tokenizer.train(PROMPTS, 300)).eval()
    assert plain.scene is None
    assert plain.image_slots == 8
    assert plain.encode_image(torch.rand(1, 1, 16, 24, 32)).shape == (1, 8, 32)
    full = VisionLanguage(SMALL, Tokenizer.train(PROMPTS, 300))
    assert full.scene is not None
    images = torch.rand(2, 1, 16, 24, 32)
    full.scene(images, full.vision(images)).square().mean().backward()
    assert all(p.grad is not None for p in full.scene.map_parameters())
    assert full.vision.s3[0].scale.grad is not None


@pytest.mark.parametrize("shape", [(40, 30, 50), (150, 70, 33), (5, 200, 129), (1, 16, 16)])
@pytest.mark.parametrize("modality", [Modality.CT, Modality.MR])
def test_the_view_by_slabs_is_the_view_of_the_whole(shape: tuple[int, int, int], modality: Modality) -> None:
    image = np.random.default_rng(1).normal(40, 300, shape).astype(np.float32)
    size = (16, 24, 32)
    view, extent = language_view(image, (2.0, 1.0, 0.5), modality, size)
    assert torch.allclose(view[0], global_view(global_channel(image, modality), size), atol=1e-5)
    assert extent.tolist() == [[shape[0] * 2.0, shape[1] * 1.0, shape[2] * 0.5]]
