"""Byte-level BPE tokenizer, one ``tokenizer.json`` in the checkpoint: our own, or a published Qwen2.5 one extended.

Ours is trained on the project's corpus and has its special tokens at ids 0..5. A published one keeps its own ids; its
end-of-text and end-of-message tokens serve as padding and end, the other four tokens are appended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from medvl_sam2.errors import CheckpointError

PAD, EOS, IMAGE, SEG, PHRASE_OPEN, PHRASE_CLOSE = "<pad>", "<eos>", "<im_patch>", "[SEG]", "<p>", "</p>"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, EOS, IMAGE, SEG, PHRASE_OPEN, PHRASE_CLOSE)
"""Of a tokenizer trained here, in id order, starting at 0."""
PUBLISHED_SPECIAL_TOKENS: tuple[str, ...] = ("<|endoftext|>", "<|im_end|>", IMAGE, SEG, PHRASE_OPEN, PHRASE_CLOSE)
"""The same roles in an extended Qwen2.5 tokenizer, at whatever ids they have there."""


class Tokenizer:
    """Text to ids and back.

    What a person typed never becomes a special token (:meth:`encode`): a question that contains ``<im_patch>`` is
    plain text, so the number of image slots stays what the model placed. :meth:`encode_reply` reads the model's own
    replies, where ``[SEG]`` is the token.
    """

    def __init__(self, fast: FastTokenizer):
        names = next((n for n in (SPECIAL_TOKENS, PUBLISHED_SPECIAL_TOKENS) if fast.token_to_id(n[0]) is not None), ())
        found = [fast.token_to_id(token) for token in names]
        ids = [token for token in found if token is not None]
        if len(ids) != len(SPECIAL_TOKENS) or (names == SPECIAL_TOKENS and ids != list(range(len(ids)))):
            raise CheckpointError(
                f"tokenizer has special token ids {found}, expected 0..5 or those of an extended Qwen2.5 tokenizer; "
                "restore tokenizer.json, or convert the published one with scripts/convert_weights.py"
            )
        self._fast = fast
        self._fast.encode_special_tokens = True
        self._special = dict(zip(ids, names, strict=True))
        self._special_ids = dict(zip(names, ids, strict=True))
        self._special_pattern = _pattern(names)
        self.pad_id, self.eos_id, self.image_id, self.seg_id = ids[:4]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of at most ``vocab_size`` entries (at least the 256 bytes and the special tokens)."""
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        fast.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        fast.train_from_iterator((_pattern(SPECIAL_TOKENS).sub(" ", text) for text in texts), trainer)
        return cls(fast)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json``; raises :class:`CheckpointError` when missing or damaged."""
        return cls(_read(path))

    @classmethod
    def extend(cls, path: Path) -> tuple[Tokenizer, int]:
        """Read a published Qwen2.5 ``tokenizer.json``, append the special tokens it lacks; also tell its own size.

        Raises :class:`CheckpointError` when the file is damaged, of another family, or spells a special token as an
        ordinary one, which a person could then type.
        """
        fast = _read(path)
        lacking = [token for token in PUBLISHED_SPECIAL_TOKENS[:2] if fast.token_to_id(token) is None]
        ordinary = {IMAGE, SEG} & set(fast.get_vocab(with_added_tokens=False))
        if lacking or ordinary:
            what = f"lacks {lacking[0]!r}" if lacking else f"has {min(ordinary)!r} as an ordinary entry"
            raise CheckpointError(f"tokenizer {path} {what}; take tokenizer.json of a Qwen2.5 release")
        size = int(fast.get_vocab_size())
        fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in PUBLISHED_SPECIAL_TOKENS[2:]])
        return cls(fast), size

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``."""
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Content of ``tokenizer.json``: equal for equal tokenizers."""
        return str(self._fast.to_str(pretty=False))

    def __len__(self) -> int:
        return int(self._fast.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings inside it stay plain text."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply, where the spellings of special tokens are the tokens."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                ids.extend(self.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; padding, end and image slots are dropped, ``[SEG]`` and phrase marks are kept."""
        hidden = (self.pad_id, self.eos_id, self.image_id)
        text, run = "", list[int]()
        for token in ids:
            if token not in self._special:
                run.append(token)
                continue
            text += self._fast.decode(run, skip_special_tokens=False) if run else ""
            run = []
            text += "" if token in hidden else self._special[token]
        return text + (self._fast.decode(run, skip_special_tokens=False) if run else "")


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(re.escape(token) for token in tokens) + ")")


def _read(path: Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"cannot read tokenizer {path} ({error}); restore the checkpoint folder") from error
