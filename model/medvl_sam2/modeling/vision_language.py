"""The language half of the unified model: volume encoder, projector, language model and ``[SEG]`` projection.

A sequence is ``<im_patch> * n, question, newline, reply, <eos>`` without a chat template. The embeddings of exactly
the ``<im_patch>`` slots are replaced by image tokens.

Departures from the published Med3DVLM, and what undoes them: the newline between question and reply
(``LanguageConfig.prompt_end`` and ``reply_start``; a space there), the slots (``legacy_splice``; the image tokens begin
at the second slot there and overwrite the first token of the question), the edge lengths of the view among the image
tokens (``ProjectorConfig.extent``), the scene stream (``SceneConfig.lesions``). A question that is published with a
leading space (its VQA, not its reports) is read without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import ConfigError, PromptError
from medvl_sam2.modeling.dcformer import DCFormer
from medvl_sam2.modeling.language import additive_mask, build_language_model
from medvl_sam2.modeling.projector import MixerProjector
from medvl_sam2.modeling.scene import SceneReader
from medvl_sam2.modeling.scene_facts import SceneFacts
from medvl_sam2.modeling.scene_pointer import ScenePointer
from medvl_sam2.modeling.tokenizer import Tokenizer

IGNORE = -100
"""Label of a position without loss."""

_REFERENCE_MM = 300.0
"""Field of view that maps to zero in the extent embedding."""


class LanguageOutput(NamedTuple):
    """``loss``: mean cross entropy over labelled positions; ``hidden`` (B, L, H): last-layer states."""

    loss: Tensor
    hidden: Tensor


class VisionLanguage(nn.Module):
    """Answers questions about a volume and turns ``[SEG]`` states into prompt embeddings for the mask decoder."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        super().__init__()
        if len(tokenizer) > config.language.vocab_size:
            raise ConfigError(
                f"tokenizer has {len(tokenizer)} entries, the language model {config.language.vocab_size}; "
                "use the tokenizer of this checkpoint"
            )
        hidden = config.language.hidden_size
        self.config = config
        self.tokenizer = tokenizer
        self.vision = DCFormer(config.vision)
        self.projector = MixerProjector(config.vision, config.projector, hidden)
        self.scene = SceneReader(config) if config.scene.lesions else None
        self.pointer = ScenePointer(config) if config.scene.lesions else None
        self.extent: nn.Module | None = None
        if config.projector.extent:
            self.extent = nn.Sequential(nn.Linear(3, hidden // 4), nn.GELU(), nn.Linear(hidden // 4, hidden))
        self.lm = build_language_model(config.language, tokenizer.pad_id, tokenizer.eos_id)
        self.seg_projector = nn.Sequential(
            nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, config.slices.d_model)
        )

    @property
    def image_slots(self) -> int:
        """Number of ``<im_patch>`` slots of every sequence."""
        return self.config.image_tokens

    def encode_image(self, images: Tensor, extent_mm: Tensor | None = None) -> Tensor:
        """Global views (B, 1, D, H, W) in [0, 1] to image tokens (B, n, hidden).

        ``extent_mm`` (B, 3): edge lengths (z, y, x) of the view in mm. The view has a fixed voxel count, so without
        this the model cannot know sizes; None means unknown.
        """
        maps = self.vision(images)
        facts = None if self.scene is None else self.scene.measure(images, self.scene(images, maps), extent_mm)
        return self.project(maps, extent_mm, facts)

    def project(self, maps: list[Tensor], extent_mm: Tensor | None, facts: SceneFacts | None) -> Tensor:
        """Token maps of :class:`DCFormer` and the measured scene to image tokens (B, n, hidden)."""
        tokens = cast(Tensor, self.projector(maps))
        if self.extent is not None and extent_mm is not None:
            scale = torch.log(extent_mm.to(tokens.dtype).clamp_min(1.0) / _REFERENCE_MM)
            tokens = tokens + self.extent(scale)[:, None]
        if self.scene is None or facts is None:
            return tokens
        return torch.cat([tokens, self.scene.embed(facts).to(tokens.dtype)], dim=1)

    def prompt_ids(self, question: str) -> list[int]:
        """Image slots, question and its end as ids; raises :class:`PromptError` when empty or too long."""
        text = " ".join(question.split())
        if not text:
            raise PromptError("the prompt is empty; type a question or a description")
        longest = self.config.language.max_length // 2
        if len(text) > 16 * longest:
            raise PromptError(f"the prompt has {len(text)} characters; shorten it to about {4 * longest}")
        ids = self.tokenizer.encode(text + self.config.language.prompt_end)
        if len(ids) > longest:
            raise PromptError(f"the prompt has {len(ids)} tokens, at most {longest} fit; shorten it")
        return [self.tokenizer.image_id] * self.image_slots + ids

    def reply_ids(self, reply: str) -> list[int]:
        """Reply and end mark as ids."""
        return [*self.tokenizer.encode_reply(self.config.language.reply_start + reply), self.tokenizer.eos_id]

    def word_embedding(self, text: str) -> Tensor:
        """Mean input embedding (hidden,) of a text as it stands within a sentence."""
        ids = torch.tensor(self.tokenizer.encode(" " + text)).to(self.lm.device)
        return cast(Tensor, self.lm.get_input_embeddings()(ids).mean(dim=0))

    def embed(self, image_tokens: Tensor, input_ids: Tensor) -> Tensor:
        """Input embeddings (B, L, hidden) with the ``<im_patch>`` slots replaced.

        Raises :class:`PromptError` unless every row has exactly as many slots as image tokens.
        """
        slots = input_ids == self.tokenizer.image_id
        counts = slots.sum(dim=1)
        if not bool((counts == image_tokens.shape[1]).all()) or len(input_ids) != len(image_tokens):
            raise PromptError(
                f"{counts.tolist()} image slots for image tokens {tuple(image_tokens.shape[:2])}; build prompts with "
                "prompt_ids"
            )
        if self.config.language.legacy_splice:
            slots = slots.roll(1, dims=1)
        embeddings = self.lm.get_input_embeddings()(input_ids)
        return cast(Tensor, embeddings.masked_scatter(slots[..., None], image_tokens.to(embeddings.dtype)))

    def hidden_states(
        self,
        image_tokens: Tensor,
        input_ids: Tensor,
        attention: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Last-layer states (B, L, hidden).

        ``attention`` bool (B, L, L), True where a position may look; default causal without padding on either side.
        ``position_ids`` (B, L); default counts the positions that are not padding.
        """
        if attention is None:
            attention, counted = _causal(input_ids != self.tokenizer.pad_id)
            position_ids = counted if position_ids is None else position_ids
        embeddings = self.embed(image_tokens, input_ids)
        mask = additive_mask(attention, embeddings.dtype)
        output = self.lm.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False
        )
        return cast(Tensor, output.last_hidden_state)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy (N,) of the labelled positions of ``labels`` (B, L), in row order; the shift is done here."""
        targets = labels[:, 1:]
        chosen = targets != IGNORE
        logits = self.lm.lm_head(hidden[:, :-1][chosen])
        return functional.cross_entropy(logits.float(), targets[chosen], reduction="none")

    def forward(
        self,
        image_tokens: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> LanguageOutput:
        """Teacher-forced pass over (B, L) ids; ``labels`` holds the ids of the reply and ``IGNORE`` elsewhere."""
        hidden = self.hidden_states(image_tokens, input_ids, attention, position_ids)
        losses = self.token_losses(hidden, labels)
        return LanguageOutput(losses.mean() if len(losses) else hidden.sum() * 0.0, hidden)

    def seg_embeddings(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """States at the ``[SEG]`` positions, projected: (num_seg, slices.d_model), in row then reading order."""
        return cast(Tensor, self.seg_projector(hidden[input_ids == self.tokenizer.seg_id]))

    def seg_states(self, image_tokens: Tensor, prompts: Sequence[str], replies: Sequence[str]) -> Tensor:
        """Last-layer states (num_seg, hidden) of every ``[SEG]`` in the replies, by one teacher-forced pass.

        ``image_tokens`` (B, n, hidden), or (1, n, hidden) for several prompts on one image.
        """
        rows = [self.prompt_ids(p) + self.reply_ids(r) for p, r in zip(prompts, replies, strict=True)]
        ids, _ = self._pad(rows, left=False)
        hidden = self.hidden_states(self._spread(image_tokens, len(rows)), ids)
        return hidden[ids == self.tokenizer.seg_id]

    def seg_tokens(self, image_tokens: Tensor, prompts: Sequence[str], replies: Sequence[str]) -> Tensor:
        """Prompt embeddings (num_seg, slices.d_model): :meth:`seg_states`, projected."""
        return cast(Tensor, self.seg_projector(self.seg_states(image_tokens, prompts, replies)))

    @torch.no_grad()
    def generate(self, image_tokens: Tensor, prompts: Sequence[str], max_new_tokens: int = 160) -> list[str]:
        """Greedy replies, batched; ``image_tokens`` (B, n, hidden) or (1, n, hidden) for one image."""
        if not prompts:
            return []
        ids, mask = self._pad([self.prompt_ids(prompt) for prompt in prompts], left=True)
        attention, positions = _causal(mask)
        step = self.embed(self._spread(image_tokens, len(prompts)), ids)
        cache = DynamicCache()
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)
        replies: list[list[int]] = [[] for _ in prompts]
        for _ in range(max_new_tokens):
            output = self.lm.model(
                inputs_embeds=step,
                attention_mask=additive_mask(attention, step.dtype),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = self.lm.lm_head(output.last_hidden_state[:, -1])
            logits[:, self.tokenizer.pad_id] = -torch.inf
            logits[:, self.tokenizer.image_id] = -torch.inf
            logits[:, len(self.tokenizer) :] = -torch.inf
            chosen = logits.argmax(dim=-1)
            finished |= chosen == self.tokenizer.eos_id
            over = finished.tolist()
            if all(over):
                break
            for reply, done, token in zip(replies, over, chosen.tolist(), strict=True):
                if not done:
                    reply.append(token)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            attention, positions = mask[:, None, :], positions[:, -1:] + 1
            step = self.lm.get_input_embeddings()(chosen[:, None])
        return [self.tokenizer.decode(reply).strip() for reply in replies]

    def _spread(self, image_tokens: Tensor, rows: int) -> Tensor:
        return image_tokens.expand(rows, -1, -1) if len(image_tokens) == 1 else image_tokens

    def _pad(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Equal-length ids (B, L) and the bool mask (B, L) of real positions."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_id)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if left else slice(0, len(row))
            ids[index, place] = torch.tensor(row)
        ids = ids.to(self.lm.device)
        return ids, ids != self.tokenizer.pad_id


def _causal(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Bool mask (B, L) of real positions to causal attention (B, L, L) and position ids (B, L)."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return causal & mask[:, None, :], (mask.long().cumsum(dim=1) - 1).clamp_min(0)
