"""Byte-level BPE tokenizer trained on the project's own corpus; one ``tokenizer.json`` in the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from medvl_sam2.errors import CheckpointError

PAD, EOS, IMAGE, SEG, PHRASE_OPEN, PHRASE_CLOSE = "<pad>", "<eos>", "<im_patch>", "[SEG]", "<p>", "</p>"
SPECIAL_TOKENS: tuple[str, ...] = (PAD, EOS, IMAGE, SEG, PHRASE_OPEN, PHRASE_CLOSE)
"""In id order, starting at 0."""

_SPECIAL_PATTERN = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")


class Tokenizer:
    """Text to ids and back.

    What a person typed never becomes a special token (:meth:`encode`): a question that contains ``<im_patch>`` is
    plain text, so the number of image slots stays what the model placed. :meth:`encode_reply` reads the model's own
    replies, where ``[SEG]`` is the token.
    """

    def __init__(self, fast: FastTokenizer):
        ids = [fast.token_to_id(token) for token in SPECIAL_TOKENS]
        if ids != list(range(len(SPECIAL_TOKENS))):
            raise CheckpointError(f"tokenizer has special token ids {ids}, expected 0..5; restore tokenizer.json")
        self._fast = fast
        self._fast.encode_special_tokens = True
        self.pad_id, self.eos_id, self.image_id, self.seg_id = range(4)

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
        fast.train_from_iterator((_SPECIAL_PATTERN.sub(" ", text) for text in texts), trainer)
        return cls(fast)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json``; raises :class:`CheckpointError` when missing or damaged."""
        try:
            return cls(FastTokenizer.from_file(str(path)))
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"cannot read tokenizer {path} ({error}); restore the checkpoint folder") from error

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``."""
        path.write_text(self._fast.to_str(pretty=False), encoding="utf-8")

    def __len__(self) -> int:
        return int(self._fast.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings inside it stay plain text."""
        return list(self._fast.encode(text, add_special_tokens=False).ids)

    def encode_reply(self, text: str) -> list[int]:
        """Ids of a reply, where the spellings of special tokens are the tokens."""
        ids: list[int] = []
        for part in _SPECIAL_PATTERN.split(text):
            if part in SPECIAL_TOKENS:
                ids.append(SPECIAL_TOKENS.index(part))
            elif part:
                ids.extend(self.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; padding, end and image slots are dropped, ``[SEG]`` and phrase marks are kept."""
        hidden = (self.pad_id, self.eos_id, self.image_id)
        text, run = "", list[int]()
        for token in ids:
            if token >= len(SPECIAL_TOKENS):
                run.append(token)
                continue
            text += self._fast.decode(run, skip_special_tokens=False) if run else ""
            run = []
            text += "" if token in hidden else SPECIAL_TOKENS[token]
        return text + (self._fast.decode(run, skip_special_tokens=False) if run else "")
