"""Builds the shipped vocabulary from public reports and the phantom grammar.

It holds only words that at least three patients' public reports contain, so no rare name; single letters and signs make
sure that no ASCII text is unknown. Digits stand alone: "5 cm" and "15 cm" share pieces. It comes out smaller than asked
for where the reports have no more: every row of an embedding table is trained, and sent, by every site with text.
"""

from __future__ import annotations

import csv
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase, digits, punctuation
from typing import Annotated

import tokenizers
import typer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fedmix.data.phantom import LOOKS, generate
from fedmix.data.tokenizer import SPECIAL_TOKENS, Tokenizer, fertility
from fedmix.errors import DataError

MIN_REPORTS = 3  # a word in fewer patients' public reports than this could be a name
_MAX_CHARACTERS = 200  # of one word; the library's search is cubic in it


def train_wordpiece(texts: Iterable[str], vocab_size: int = 8000, min_reports: int = MIN_REPORTS) -> str:
    """Train a lower-case WordPiece vocabulary and return it as the text of a ``tokenizer.json``.

    The same texts in any order give the same vocabulary. It ends below ``vocab_size`` where the texts hold no more pieces
    that occur ``min_reports`` times.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)])
    counts: Counter[str] = Counter()
    num_reports: Counter[str] = Counter()
    for text in texts:
        words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
        counts.update(words)
        num_reports.update(set(words))
    kept = {word: counts[word] for word in sorted(counts) if num_reports[word] >= min_reports}
    vocabulary = {piece: number for number, piece in enumerate(_pieces(kept, vocab_size, min_reports))}
    model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=_MAX_CHARACTERS)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    definition: str = backend.to_str(pretty=True)
    return definition + "\n"


def _pieces(counts: dict[str, int], vocab_size: int, min_count: int) -> Iterable[str]:
    # Upper case never reaches the vocabulary, and signs and digits never continue a word: both would be dead rows.
    letters = [*punctuation, *digits, *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
    pieces = dict.fromkeys([*SPECIAL_TOKENS, *letters, *(piece for word in counts for piece in _characters(word))])
    for piece in _merges(counts, min_count):
        if len(pieces) >= vocab_size:
            break
        pieces.setdefault(piece)
    return pieces


def _characters(word: str) -> list[str]:
    return [word[0], *(f"##{letter}" for letter in word[1:])]


def _merges(counts: dict[str, int], min_count: int) -> Iterator[str]:
    """Yield pieces in the order in which joining the most frequent neighbours makes them; ties go to the alphabet.

    The tokenizers library's own trainer breaks ties by the order of a hash map, so that two builds differ.
    """
    split = {word: _characters(word) for word in counts}
    num_pairs: Counter[tuple[str, str]] = Counter()
    homes: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def tally(word: str, sign: int) -> set[tuple[str, str]]:
        pairs = list(pairwise(split[word]))
        for pair in pairs:
            num_pairs[pair] += sign * counts[word]
            homes[pair].add(word)
        return set(pairs)

    for word in counts:
        tally(word, 1)
    queue = [(-number, pair) for pair, number in num_pairs.items()]
    heapq.heapify(queue)
    while queue:
        number, pair = heapq.heappop(queue)
        if -number != num_pairs[pair] or -number < min_count:
            continue  # the count has changed since; the pair was queued again then
        changed: set[tuple[str, str]] = set()
        for word in homes[pair]:
            changed |= tally(word, -1)
            split[word] = _joined(split[word], pair)
            changed |= tally(word, 1)
        for other in changed:
            heapq.heappush(queue, (-num_pairs[other], other))
        yield pair[0] + pair[1].removeprefix("##")


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece.removeprefix("##")
        else:
            joined.append(piece)
    return joined


def read_reports(tables: Sequence[Path], columns: Sequence[str], split: str) -> list[tuple[str, str]]:
    """Read (patient, text) of each row of one split from CSV tables; text columns that a table lacks are left out.

    Raises:
        DataError: a table is missing, or has no split column, no patient column or none of the text columns.
    """
    reports: list[tuple[str, str]] = []
    for number, table in enumerate(tables, start=1):
        if not table.is_file():
            raise DataError(f"report table {number} is not there; check --reports")
        with table.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            names = set(rows.fieldnames or [])
            present = [column for column in columns if column in names]
            if not present or not {"split", "patient_id"} <= names:
                raise DataError(f"report table {number} needs columns split, patient_id and one of {', '.join(columns)}")
            texts = ((row["patient_id"], "\n".join(row[column] for column in present), row["split"]) for row in rows)
            reports += [(patient, text) for patient, text, its_split in texts if its_split == split]
    return reports


def joined_by_patient(reports: Iterable[tuple[str, str]]) -> list[str]:
    """Return one text per patient, so that a name repeated in one patient's reports still counts once."""
    joined: defaultdict[str, list[str]] = defaultdict(list)
    for patient, text in reports:
        joined[patient].append(text)
    return ["\n".join(texts) for texts in joined.values()]


def phantom_reports(num_studies: int = 1000) -> list[str]:
    """Reports of every phantom look, so that its grammar needs no pieces."""
    return [text for look in LOOKS for text in generate(num_studies, look=look, seed=0, images=False).reports or []]


app: typer.Typer = typer.Typer(
    help="Build or measure a vocabulary for radiology reports.", no_args_is_help=True, add_completion=False
)
Tables = Annotated[list[Path], typer.Option("--reports", help="CSV with a split column; give it again for more tables")]
Columns = Annotated[list[str], typer.Option("--column", help="text column; give it again for more")]


@app.command()
def build(
    reports: Tables,
    column: Columns = ["text", "indication", "comparison", "mesh"],  # noqa: B006  (typer wants a plain default)
    out: Annotated[Path, typer.Option(help="where to write tokenizer.json")] = Path("tokenizer.json"),
    vocab_size: Annotated[int, typer.Option(help="most entries the vocabulary may have")] = 8000,
) -> None:
    """Train a vocabulary on the training split of public reports and on the phantom grammar.

    Example: python -m fedmix.data.tokenizer build --reports reports-only.csv --out tokenizer.json
    """
    definition = train_wordpiece([*joined_by_patient(read_reports(reports, column, "train")), *phantom_reports()], vocab_size)
    out.write_text(definition, encoding="utf-8", newline="\n")
    typer.echo(f"{Tokenizer.load(out).vocab_size} entries")


@app.command()
def measure(
    reports: Tables,
    column: Columns = ["text"],  # noqa: B006
    tokenizer: Annotated[Path | None, typer.Option(help="a folder with tokenizer.json; the shipped one if left out")] = None,
    max_words: Annotated[int, typer.Option(help="longest text in tokens")] = 128,
) -> None:
    """Print how well a vocabulary fits the test split of some reports.

    Example: python -m fedmix.data.tokenizer measure --reports reports-only.csv
    """
    texts = [text for _, text in read_reports(reports, column, "test")]
    typer.echo(fertility(Tokenizer.load(tokenizer), texts, max_words))
