"""The tokenizer knows every ASCII text, no rare name, and never mistakes text for a special token."""

import hashlib
import json
import re
import string
from importlib import resources
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from fedmix.data.phantom import LOOKS, generate
from fedmix.data.tokenizer import SPECIAL_TOKENS, Tokenizer, fertility
from fedmix.errors import ConfigError

PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " \t\n"


@pytest.fixture(scope="module")
def shipped() -> Tokenizer:
    return Tokenizer.load()


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, int]:
    content = json.loads(resources.files("fedmix.data").joinpath("tokenizer.json").read_text())
    words: dict[str, int] = content["model"]["vocab"]
    return words


@pytest.fixture(scope="module")
def reports() -> list[str]:
    return [text for look in LOOKS for text in generate(50, look=look, seed=123, images=False).reports or []]


# ---- encoding


def wordpiece(text: str, vocabulary: dict[str, int]) -> list[int]:
    """The longest-match-first rule as BERT's authors wrote it down, for ASCII."""
    ids = []
    for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower()):
        start = 0
        while start < len(word):
            end = next(end for end in range(len(word), start, -1) if ("##" if start else "") + word[start:end] in vocabulary)
            ids.append(vocabulary[("##" if start else "") + word[start:end]])
            start = end
    return ids


@given(st.text(alphabet=PRINTABLE, max_size=120))
@settings(deadline=None, max_examples=300)
def test_no_printable_ascii_text_has_unknown_pieces(text: str) -> None:
    tokenizer = Tokenizer.load()
    (ids,) = tokenizer.encode([text], max_words=1000)
    assert ids[0] == tokenizer.summary_id
    assert not tokenizer.special_ids & set(ids[1:])


@given(st.text(alphabet=PRINTABLE, max_size=60))
@settings(deadline=None, max_examples=100)
def test_encoding_is_greedy_longest_match(text: str) -> None:
    tokenizer = Tokenizer.load()
    content = json.loads(resources.files("fedmix.data").joinpath("tokenizer.json").read_text())
    assert tokenizer.encode([text], max_words=1000)[0][1:] == wordpiece(text, content["model"]["vocab"])


def test_a_word_of_two_hundred_letters_is_still_known(shipped: Tokenizer) -> None:
    (ids,) = shipped.encode(["qj" * 100], max_words=1000)
    assert shipped.unknown_id not in ids


def test_foreign_letters_are_unknown_and_accents_are_dropped(shipped: Tokenizer) -> None:
    accented, plain, foreign = shipped.encode(["épanchement", "epanchement", "胸"], max_words=64)
    assert accented == plain
    assert foreign == [shipped.summary_id, shipped.unknown_id]


def test_decoding_a_phantom_report_gives_it_back(shipped: Tokenizer, reports: list[str]) -> None:
    for text, ids in zip(reports, shipped.encode(reports, max_words=1000), strict=True):
        assert shipped.decode(ids) == text.lower()


def test_phantom_reports_need_no_pieces(shipped: Tokenizer, reports: list[str]) -> None:
    measured = fertility(shipped, reports)
    assert measured.tokens_per_word == 1.0
    assert measured.unknown_rate == 0.0


def test_truncation_keeps_the_summary_token_and_the_beginning(shipped: Tokenizer, reports: list[str]) -> None:
    for whole, short in zip(shipped.encode(reports, 1000), shipped.encode(reports, 9), strict=True):
        assert short == whole[:9]
        assert short[0] == shipped.summary_id
    assert shipped.encode(["small effusion"], 1) == [[shipped.summary_id]]
    with pytest.raises(ConfigError, match="max_words is 0, expected at least 1"):
        shipped.encode(["small effusion"], 0)


def test_no_text_and_empty_text(shipped: Tokenizer) -> None:
    assert shipped.encode([], 10) == []
    assert shipped.encode(["", "  "], 10) == [[shipped.summary_id]] * 2
    assert shipped.decode([]) == ""


def test_text_never_becomes_a_special_token(shipped: Tokenizer) -> None:
    (ids,) = shipped.encode([" ".join(SPECIAL_TOKENS)], max_words=100)
    assert not shipped.special_ids & set(ids[1:])


# ---- the shipped vocabulary


def test_special_ids_are_as_promised(shipped: Tokenizer, vocabulary: dict[str, int]) -> None:
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert (shipped.pad_id, shipped.unknown_id, shipped.summary_id, shipped.mask_id) == (0, 1, 2, 4)
    assert shipped.special_ids == frozenset(range(5))
    assert shipped.vocab_size == len(vocabulary)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert shipped.vocab_size <= 8000


def test_digits_stand_alone(shipped: Tokenizer, vocabulary: dict[str, int]) -> None:
    assert not [piece for piece in vocabulary if re.search(r"\d", piece) and len(piece) > 1]
    assert len(shipped.encode(["2024"], 10)[0]) == 5


def test_fingerprint_is_the_hash_of_the_file_and_the_same_every_time(shipped: Tokenizer) -> None:
    content = resources.files("fedmix.data").joinpath("tokenizer.json").read_bytes()
    assert shipped.fingerprint == Tokenizer.load().fingerprint == hashlib.sha256(content).hexdigest()


# ---- measuring


def test_fertility_by_hand(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "effusion", ".", "a", "##b"]
    tokenizer = Tokenizer.load(save_foreign(tmp_path / "model", tokens))
    measured = fertility(tokenizer, ["effusion.", "effusion ab cyst"], max_words=4)
    # 2 tokens for 2 words, then effusion + a ##b + unknown for 3 words; the second has 5 ids with the summary token.
    assert (measured.num_texts, measured.num_tokens) == (2, 6)
    assert measured.tokens_per_word == pytest.approx(6 / 5)
    assert measured.unknown_rate == pytest.approx(1 / 6)
    assert measured.truncated_rate == 0.5


def test_fertility_of_nothing_is_zero(shipped: Tokenizer) -> None:
    measured = fertility(shipped, [])
    assert (measured.tokens_per_word, measured.unknown_rate, measured.truncated_rate) == (0.0, 0.0, 0.0)


# ---- a folder from elsewhere


def save_foreign(folder: Path, tokens: list[str]) -> Path:
    backend = tokenizers.Tokenizer(models.WordPiece({token: n for n, token in enumerate(tokens)}, unk_token=tokens[1]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([token for token in tokens if token[0] in "[<"])
    backend.enable_padding(length=50)
    backend.enable_truncation(2)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_hugging_face_folder_is_read_and_its_own_padding_and_truncation_are_ignored(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "heart", "size", "[MASK]", "[CLS]", "[SEP]"]
    folder = save_foreign(tmp_path / "model", tokens)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode(["heart size heart spleen"], 10) == [[5, 2, 3, 2, 1]]
    assert (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.summary_id, tokenizer.mask_id) == (0, 1, 5, 4)
    assert tokenizer.special_ids == {0, 1, 4, 5, 6}
    assert tokenizer.fingerprint == Tokenizer.load(folder / "tokenizer.json").fingerprint


def test_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="padding at id 1, fedmix needs it at 0"):
        Tokenizer.load(save_foreign(tmp_path / "roberta", ["<s>", "<pad>", "<unk>", "<mask>", "heart"]))
    with pytest.raises(ConfigError, match=r"no mask token, expected one of \[MASK\]"):
        Tokenizer.load(save_foreign(tmp_path / "maskless", ["[PAD]", "[UNK]", "[CLS]", "heart"]))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer that the tokenizers library can read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
