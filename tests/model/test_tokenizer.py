"""The tokenizer spells any text back and never lets a person type a special token."""

from __future__ import annotations

from pathlib import Path

import pytest

from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.tokenizer import SPECIAL_TOKENS, Tokenizer

CORPUS = ["Is there a cyst in the liver?", "A cyst of 2.5 cm lies in the right lobe of the liver.", "no spleen"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=400)


@pytest.mark.parametrize(
    "text",
    ["A cyst of 2.5 cm.", "Größe 14 mm, 肝臓 \U0001fac0", "two  spaces\nand a line", "<im_patch> [SEG] <eos>", ""],
)
def test_plain_text_survives_without_special_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(token >= len(SPECIAL_TOKENS) for token in ids)


def test_reply_holds_one_seg_token_per_mark(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_reply("liver [SEG], <p>cyst</p> [SEG]")
    assert ids.count(tokenizer.seg_id) == 2
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.eos_id]) == "liver [SEG], <p>cyst</p> [SEG]"


def test_corpus_is_shorter_than_bytes_and_vocabulary_is_bounded(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) <= 400
    assert len(tokenizer.encode(CORPUS[1])) < len(CORPUS[1]) / 2


def test_digits_stay_apart(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2512")) == 4


def test_file_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert again.encode("[SEG]") == tokenizer.encode("[SEG]") != [tokenizer.seg_id]


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_damaged_file_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match="restore"):
        Tokenizer.load(path)


def test_missing_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
