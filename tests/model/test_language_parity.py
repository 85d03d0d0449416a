"""Our language path against transformers' own Qwen2 on plain token ids, at the same weights.

The width, heads and rotary base are those of Qwen2.5-0.5B; two layers and a small vocabulary keep it quick. Ours puts
embeddings, masks and positions together itself. Measured: logits equal bit by bit, greedy replies equal; the tolerance
leaves room for machines that sum in another order.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.presets import LANGUAGE_PRESETS
from small_model import SMALL

TOLERANCE = 5e-5
VOCABULARY = 300
QUESTIONS = ("Where?", "What is the largest finding in the right lung?")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> VisionLanguage:
    language = replace(
        LANGUAGE_PRESETS["qwen2.5_0.5b"], layers=2, vocab_size=VOCABULARY, max_length=128, tied_head=request.param
    )
    torch.manual_seed(0)
    config = replace(SMALL, language=language)
    return VisionLanguage(config, Tokenizer.train(QUESTIONS, VOCABULARY)).eval()


@pytest.fixture(scope="module")
def plain(model: VisionLanguage) -> Qwen2ForCausalLM:
    """Qwen2.5-0.5B as its configuration file says, but for the sizes above."""
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=model.config.language.tied_head,
        pad_token_id=model.tokenizer.pad_id, bos_token_id=None, eos_token_id=model.tokenizer.eos_id,
    )  # fmt: skip
    reference = Qwen2ForCausalLM(config).eval()
    reference.load_state_dict(model.lm.state_dict(), strict=True)
    return reference


def image_words(model: VisionLanguage) -> Tensor:
    """Ids (n,) of words that stand where the image tokens go, so that the other side can read them."""
    return torch.arange(20, 20 + model.image_slots)


@torch.no_grad()
def test_logits_of_a_padded_batch(model: VisionLanguage, plain: Qwen2ForCausalLM) -> None:
    words = image_words(model)
    image = model.lm.get_input_embeddings()(words)[None].expand(2, -1, -1)
    rows = [model.prompt_ids(question) + model.reply_ids("liver [SEG]") for question in QUESTIONS]
    ids, real = model._pad(rows, left=False)
    ours = model.lm.lm_head(model.hidden_states(image, ids))
    spelled = ids.clone()
    spelled[:, : len(words)] = words
    theirs = plain(input_ids=spelled, attention_mask=real.long()).logits
    assert theirs[real].std() > 0.1
    assert float((ours - theirs)[real].abs().max()) <= TOLERANCE


@torch.no_grad()
def test_greedy_replies_with_left_padding_and_cache(model: VisionLanguage, plain: Qwen2ForCausalLM) -> None:
    tokenizer, words = model.tokenizer, image_words(model)
    image = model.lm.get_input_embeddings()(words)[None]
    ours = model.generate(image, QUESTIONS, max_new_tokens=12)
    unused = list(range(len(tokenizer), VOCABULARY))
    for question, reply in zip(QUESTIONS, ours, strict=True):  # one by one: no padding on this side
        ids = torch.tensor([[*words.tolist(), *model.prompt_ids(question)[len(words) :]]])
        theirs = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            suppress_tokens=[tokenizer.pad_id, tokenizer.image_id, *unused],
        )  # fmt: skip
        assert reply == tokenizer.decode(theirs[0, ids.shape[1] :].tolist()).strip()
        assert len(reply) > 3


@torch.no_grad()
def test_the_published_splice_overwrites_the_first_token_of_the_question(
    model: VisionLanguage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = torch.randn(2, model.image_slots, 896)
    embed = model.lm.get_input_embeddings()
    prompts = [model.prompt_ids(question) for question in QUESTIONS]
    legacy = replace(model.config.language, legacy_splice=True)
    monkeypatch.setattr(model, "config", replace(model.config, language=legacy))
    for left in (False, True):
        ids, real = model._pad(prompts, left=left)
        spliced = model.embed(image, ids)
        for row in range(2):
            words = embed(ids[row, real[row]])
            published = torch.cat([words[:1], image[row], words[1 + model.image_slots :]])
            assert torch.equal(spliced[row, real[row]], published)


def test_the_published_sequence_has_no_newline(model: VisionLanguage, monkeypatch: pytest.MonkeyPatch) -> None:
    published = replace(model.config.language, prompt_end="", reply_start=" ")
    monkeypatch.setattr(model, "config", replace(model.config, language=published))
    ids = model.prompt_ids("Where?") + model.reply_ids("left")
    slots = [model.tokenizer.image_id] * model.image_slots
    whole = [*model.tokenizer.encode("Where?"), *model.tokenizer.encode(" left")]
    assert ids == [*slots, *whole, model.tokenizer.eos_id]
