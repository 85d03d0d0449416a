"""The tokenizer spells any text back and never lets a person type a special token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medvl_sam2.errors import CheckpointError
from medvl_sam2.modeling.tokenizer import SPECIAL_TOKENS, Tokenizer
from published_layouts import qwen_tokenizer

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


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, int, int]:
    """An extended Qwen2.5 tokenizer, the size it reports, and the size it had."""
    folder = tmp_path_factory.mktemp("qwen")
    size = qwen_tokenizer(folder)
    tokenizer, known = Tokenizer.extend(folder / "tokenizer.json")
    return tokenizer, known, size


def test_published_tokenizer_gets_special_tokens_at_its_end(published: tuple[Tokenizer, int, int]) -> None:
    tokenizer, known, size = published
    assert known == size
    assert len(tokenizer) == size + 4
    assert (tokenizer.image_id, tokenizer.seg_id) == (size, size + 1)
    assert tokenizer.pad_id != tokenizer.eos_id
    assert tokenizer.decode([tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_id, tokenizer.seg_id]) == "[SEG]"


@pytest.mark.parametrize("text", ["<im_patch> [SEG] <p>x</p>", "<|im_end|> <|endoftext|>", "Größe 14 mm", ""])
def test_published_tokenizer_never_reads_special_tokens_typed(published: tuple[Tokenizer, int, int], text: str) -> None:
    tokenizer = published[0]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.pad_id, tokenizer.eos_id, *range(published[1], len(tokenizer))}


def test_published_tokenizer_reads_replies_and_its_own_file(
    published: tuple[Tokenizer, int, int], tmp_path: Path
) -> None:
    tokenizer = published[0]
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    ids = again.encode_reply("liver [SEG], <p>cyst</p> [SEG]<|im_end|>")
    assert ids == tokenizer.encode_reply("liver [SEG], <p>cyst</p> [SEG]<|im_end|>")
    assert ids.count(again.seg_id) == 2
    assert ids[-1] == again.eos_id
    assert again.decode(ids) == "liver [SEG], <p>cyst</p> [SEG]"
    assert again.to_json() == tokenizer.to_json()


def test_extending_twice_changes_nothing(published: tuple[Tokenizer, int, int], tmp_path: Path) -> None:
    published[0].save(tmp_path / "tokenizer.json")
    again, known = Tokenizer.extend(tmp_path / "tokenizer.json")
    assert known == len(again) == len(published[0])


def test_other_families_are_not_extended(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"lacks '<\|endoftext\|>'"):
        Tokenizer.extend(tmp_path / "tokenizer.json")


def test_special_token_as_ordinary_entry_is_refused(tmp_path: Path) -> None:
    size = qwen_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["[SEG]"] = size
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"has '\[SEG\]' as an ordinary entry"):
        Tokenizer.extend(tmp_path / "tokenizer.json")


def test_extended_tokenizer_that_lost_a_token_is_refused(tmp_path: Path) -> None:
    qwen_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="convert the published one"):
        Tokenizer.load(tmp_path / "tokenizer.json")
