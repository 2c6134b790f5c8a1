"""The vocabulary is the same every time, ends where it should, and holds no word that could be a name."""

import json
import os
import random
import re
import warnings
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import pytest

from fedmix.data.phantom import LOOKS, generate
from fedmix.data.tokenizer import SPECIAL_TOKENS, Tokenizer, fertility
from fedmix.errors import DataError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer 0.20 imports names that click 8.5 calls old
    from typer.testing import CliRunner

    from fedmix.data.vocabulary import app, joined_by_patient, read_reports, train_wordpiece

TEXTS = ["no pleural effusion", "small pleural effusion", "large effusion", "pleural thickening", "no pneumothorax"] * 3


@pytest.fixture(scope="module")
def reports() -> list[str]:
    return [text for look in LOOKS for text in generate(50, look=look, seed=123, images=False).reports or []]


def plain_merges(counts: dict[str, int], min_count: int) -> list[str]:
    """Byte-pair merging that recounts every pair each time: slow and easy to believe."""
    split = {word: [word[0], *("##" + letter for letter in word[1:])] for word in counts}
    made = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < min_count:
            return made
        made.append(best[0] + best[1].removeprefix("##"))
        for word, pieces in split.items():
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] = made[-1]
                else:
                    merged.append(piece)
            split[word] = merged


def learned(definition: str) -> list[str]:
    """Pieces longer than a letter, in their order."""
    vocabulary = json.loads(definition)["model"]["vocab"]
    return [piece for piece in vocabulary if piece not in SPECIAL_TOKENS and len(piece.removeprefix("##")) > 1]


def test_training_agrees_with_a_trainer_that_recounts(reports: list[str]) -> None:
    texts = [*TEXTS, *reports[:40], "banana banana papaya"] + ["banana papaya"] * 3
    words = [re.findall(r"[a-z]+|\.", text.lower()) for text in texts]
    num_reports = Counter(word for report in words for word in set(report))
    counts = {word: number for word, number in Counter(chain.from_iterable(words)).items() if num_reports[word] >= 3}
    assert learned(train_wordpiece(texts)) == list(dict.fromkeys(plain_merges(counts, 3)))


def test_training_does_not_depend_on_the_order_of_reports(reports: list[str]) -> None:
    shuffled = reports[:100]
    random.Random(0).shuffle(shuffled)
    assert train_wordpiece(shuffled) == train_wordpiece(reports[:100])


def test_training_stops_at_the_size_asked_for(reports: list[str]) -> None:
    for size in (120, 150):
        definition = train_wordpiece(reports, vocab_size=size)
        assert Tokenizer(definition.encode()).vocab_size == size


def test_a_word_of_fewer_than_three_patients_is_not_in_the_vocabulary() -> None:
    rows = (
        [("p1", "reported by quillfeather")] * 5
        + [("p2", "seen by quillfeather")]
        + [(f"p{n}", "cardiomegaly") for n in range(3)]
    )
    pieces = learned(train_wordpiece(joined_by_patient(rows)))
    assert "cardiomegaly" in pieces
    assert not [piece for piece in pieces if piece.removeprefix("##") in "quillfeather"]
    assert "quillfeather" in learned(train_wordpiece(joined_by_patient([*rows, ("p3", "told quillfeather")])))


def test_command_line_builds_from_the_training_split_only_and_measures_the_test_split(tmp_path: Path) -> None:
    table, out = tmp_path / "reports.csv", tmp_path / "tokenizer.json"
    lines = [f"p{n},train,bronchiectasis noted" for n in range(3)] + [f"q{n},test,spondylosis noted" for n in range(3)]
    table.write_text("\n".join(["patient_id,split,text", *lines]))
    built = CliRunner().invoke(app, ["build", "--reports", str(table), "--out", str(out)])
    assert built.exit_code == 0, built.output
    pieces = learned(out.read_text())
    assert "bronchiectasis" in pieces
    assert "spondylosis" not in pieces
    measured = CliRunner().invoke(app, ["measure", "--reports", str(table), "--tokenizer", str(out)])
    assert "num_texts=3" in measured.output


def test_report_tables_are_checked_without_naming_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="report table 1 is not there"):
        read_reports([tmp_path / "smith.csv"], ["text"], "train")
    table = tmp_path / "smith.csv"
    table.write_text("patient_id,text\n1,clear\n")
    with pytest.raises(DataError, match="report table 1 needs columns split, patient_id and one of text") as caught:
        read_reports([table], ["text"], "train")
    assert "smith" not in str(caught.value)


@pytest.mark.data
def test_real_reports_fit_the_shipped_vocabulary() -> None:
    root = Path(os.environ.get("FEDMIX_OPEN_DATA", Path(__file__).parents[3] / "shared" / "data" / "cxr-open"))
    measured = fertility(Tokenizer.load(), [text for _, text in read_reports([root / "reports-only.csv"], ["text"], "test")])
    assert measured.num_texts == 782
    assert measured.tokens_per_word < 1.05
    assert measured.unknown_rate == 0.0
    assert measured.truncated_rate < 0.03
