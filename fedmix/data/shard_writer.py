"""Writing a prepared shard (fedmix/data/shard.py says what is in one), study by study and through a kill.

The same studies, key and tokenizer give the same bytes, and hold no time. A writer works in a hidden folder beside its goal
(``fedmix.data.journal``) and renames it at the end, so a shard is there as a whole or not at all; one that was killed leaves
``.NAME.*partial``, from which a preparation goes on, or which may be deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedmix.data.characteristics import AGE_BANDS, NOT_SAID, SEXES, Characteristics
from fedmix.data.deidentification import Deidentification
from fedmix.data.journal import ROW, Journal, Line
from fedmix.data.keys import hash_of, mark_of
from fedmix.data.languages import language
from fedmix.data.quarantine import REASONS
from fedmix.disk import flush
from fedmix.errors import DataError

if TYPE_CHECKING:  # a hospital's preparation starts without torch
    from fedmix.batch import Stream
    from fedmix.data.tokenizer import Tokenizer
from fedmix.data.array_file import ArrayFile
from fedmix.data.shard import (
    MEMBERS,
    SCHEMA_VERSION,
    SPLITS,
    STUDIES,
    STUDIES_WITH_CHARACTERISTICS,
    VIEWS,
    member_entry,
    seal_of,
    token_type,
)

MIN_KEY_BYTES = 16
_FLUSH_STUDIES = 256
_FLUSH_S = 10.0  # what a kill may cost where studies take long
_ROW_GROUP = 256  # studies of studies.parquet that are written together


@dataclass(frozen=True)
class _Study:
    """One row on its way to disk."""

    patient: str
    study: str
    split: str
    view: str
    lang: str
    image: NDArray[np.uint8] | None
    text: str | None
    labels: Sequence[int]
    characteristics: Characteristics = NOT_SAID


class _Written(NamedTuple):
    """One row of studies.parquet, and how many words it has; as the journal keeps it."""

    patient: str
    study: str
    split: str
    view: str
    lang: str
    has_image: bool
    num_words: int
    labels: list[int]
    sex: str
    age_band: str


class ShardWriter:
    """Writes a shard study by study, holding no more than a few hundred of them; use it in a ``with`` block.

    ``key``: the site's secret, at least 16 bytes, for the hashes and for the split. ``split_shares``: train, val and test,
    for patients whose split is not given. ``replace``: an older shard at ``path`` may be replaced, once this one is whole.
    ``keeps_characteristics``: sex and age band are kept; otherwise a study that says either is refused.

    ``mark``: of all that decides what the shard will be. With it, what was ended by ``end_row`` outlives this process, and
    the next writer of the same mark goes on behind it, unless it is told to start ``fresh``.
    """

    def __init__(
        self,
        path: Path,
        *,
        image_size: int,
        tokenizer: Tokenizer,
        key: bytes,
        label_names: Sequence[str] = (),
        max_words: int = 128,
        split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        keeps_characteristics: bool = False,
        replace: bool = False,
        mark: str | None = None,
        fresh: bool = False,
    ) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise DataError(f"the site key has {len(key)} bytes, at least {MIN_KEY_BYTES} are needed; let fedmix make one")
        if min(split_shares) < 0 or abs(sum(split_shares) - 1) > 1e-6:
            raise DataError(f"split shares are {split_shares}; three shares of at least 0 have to add up to 1")
        if len(set(label_names)) != len(label_names):
            raise DataError("two findings have the same name; name each once")
        self._replaces, self._mark, self._starts_fresh = replace, mark, fresh
        self._goal, self._image_size, self._tokenizer, self._key = path, image_size, tokenizer, key
        self._label_names, self._max_words, self._shares = list(label_names), max_words, split_shares
        self._schema = STUDIES_WITH_CHARACTERISTICS if keeps_characteristics else STUDIES
        self._label_column = {name: column for column, name in enumerate(label_names)}
        self._pending: list[_Study | Line] = []
        self._num_waiting, self._flushed = 0, time.monotonic()
        self._deidentification = Deidentification()
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._journal = Journal(self._goal, self._mark, fresh=self._starts_fresh)
        with contextlib.ExitStack() as opened:
            opened.callback(self._journal.close)
            try:
                if not self._journal.is_finished:
                    _check_goal(self._goal, replace=self._replaces)
                    self._open_arrays(opened)
            except BaseException:
                if self._journal.is_new:
                    self._journal.discard()
                raise
            self._files = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None and not self._journal.is_finished:
                self._flush()
                self._seal()
            if kind is None:
                self._journal.finish()
        finally:
            if self._mark is None:
                self._journal.discard()
            with contextlib.suppress(OSError):  # on a full disk closing fails too; the first error counts
                self._files.close()

    @property
    def is_finished(self) -> bool:
        """Whether an earlier writer had put this very shard in its place when it was killed: nothing is to be added."""
        return self._journal.is_finished

    def rows_done(self) -> Iterator[Any]:
        """What ``end_row`` was told of each row that an earlier writer finished, in order."""
        return (said[0] for kind, *said in self._journal.lines() if kind == ROW)

    def end_row(self, said: Any) -> None:
        """What was added since the last call belongs together, and to a row of which ``said``, as JSON, is to be remembered."""
        self._pending.append([ROW, said])
        self._num_waiting += 1
        if self._num_waiting >= _FLUSH_STUDIES or time.monotonic() - self._flushed > _FLUSH_S:
            self._flush()

    def discard(self) -> None:
        """Let nothing of this outlive the writer."""
        self._mark = None

    def add(
        self,
        *,
        patient: str,
        study: str,
        image: NDArray[np.uint8] | None = None,
        text: str | None = None,
        labels: Mapping[str, int] | None = None,
        view: str = "unknown",
        lang: str = "",
        characteristics: Characteristics = NOT_SAID,
        split: str | None = None,
        never_test: bool = False,
    ) -> None:
        """Add one study: ``image`` uint8 [S, S] or None, ``text`` cleaned or None, ``labels`` finding -> 1, 0, -1 (not known).

        Findings that are not mentioned are not known. ``view`` is one of ``VIEWS``; ``lang`` is the text's, as BCP 47 has it.
        Where ``split`` is None it is drawn, with ``never_test`` between train and val only. ``characteristics`` only where the
        shard keeps them.
        """
        if characteristics != NOT_SAID and self._schema is STUDIES:
            raise DataError("a study says sex or age band, and this shard is not to keep them; leave them out")
        row = [-1] * len(self._label_names)
        for name, value in (labels or {}).items():
            if name not in self._label_column:
                raise DataError(f"a study names a finding that is not among the {len(self._label_names)} of the shard")
            row[self._label_column[name]] = value
        place = self._split_of(patient, never_test=never_test) if split is None else split
        spoken = "" if text is None else lang
        self._add(_Study(patient, study, place, view, spoken, image, text, row, characteristics))

    def quarantine(self, code: str, count: int = 1) -> None:
        """Count something that was left out, by a reason code of ``fedmix.data.quarantine``."""
        if code not in REASONS:
            raise DataError("a quarantine code is not in the list of reasons; add it there, so that no content can be one")
        self._pending.append(["left_out", code, count])

    def describe(self, deidentification: Deidentification) -> None:
        """Say how patients were protected."""
        self._deidentification = deidentification

    def _add(self, study: _Study) -> None:
        """Check and queue a study; an identifier leaves this method only as its hash."""
        _check_study(study, self._image_size)
        patient = hash_of(self._key, "patient", study.patient)
        number = hash_of(self._key, "study", f"{study.patient}\0{study.study}")
        self._pending.append(replace(study, patient=patient, study=number))
        self._num_waiting += 1
        if self._num_waiting >= _FLUSH_STUDIES:
            self._flush()

    def _split_of(self, patient: str, *, never_test: bool = False) -> str:
        position = int(hash_of(self._key, "split", patient), 16) / 16**32
        if never_test:
            train, val, _ = self._shares
            return "train" if position * (train + val) < train or not train + val else "val"
        if position < self._shares[0]:
            return "train"
        return "val" if position < self._shares[0] + self._shares[1] else "test"

    def _open_arrays(self, opened: contextlib.ExitStack) -> None:
        """The arrays with as many rows as the journal knows of."""
        num_images = num_words = 0
        for row in self._written():
            num_images += row.has_image
            num_words += row.num_words
        square, folder = (self._image_size, self._image_size), self._journal.folder
        self._images = ArrayFile(folder / "images.npy", np.dtype(np.uint8), square, num_rows=num_images)
        opened.callback(self._images.close)
        self._tokens = ArrayFile(folder / "tokens.npy", token_type(self._tokenizer.vocab_size), (), num_rows=num_words)
        opened.callback(self._tokens.close)

    def _written(self) -> Iterator[_Written]:
        return (_Written(*said) for kind, *said in self._journal.lines() if kind == "study")

    def _flush(self) -> None:
        """Arrays first, then the lines that tell of them."""
        waiting, self._pending, self._num_waiting = self._pending, [], 0
        studies = [each for each in waiting if isinstance(each, _Study)]
        images = [study.image for study in studies if study.image is not None]
        if images:
            self._images.append(np.stack(images))
        lengths = iter(self._append_texts([study.text for study in studies]))
        if self._mark is not None:
            self._images.flush()
            self._tokens.flush()
        self._journal.write(_line(each, next(lengths)) if isinstance(each, _Study) else each for each in waiting)
        self._flushed = time.monotonic()

    def _append_texts(self, texts: Sequence[str | None]) -> list[int]:
        """How many words each has."""
        words = self._tokenizer.encode([text for text in texts if text is not None], self._max_words)
        self._tokens.append(np.fromiter(itertools.chain.from_iterable(words), dtype=self._tokens.dtype))
        encoded = iter(words)
        return [0 if text is None else len(next(encoded)) for text in texts]

    def _write_studies(self) -> None:
        """studies.parquet and offsets.npy; only now, since neither can be gone on with."""
        rows, num_images = self._written(), 0
        offsets = ArrayFile(self._journal.folder / "offsets.npy", np.dtype(np.int64), ())
        with (
            contextlib.closing(offsets),
            pq.ParquetWriter(self._journal.folder / "studies.parquet", self._schema) as studies,
        ):
            position = np.zeros(1, dtype=np.int64)
            offsets.append(position)
            while group := list(itertools.islice(rows, _ROW_GROUP)):
                studies.write_table(_study_table(group, num_images, self._schema))
                num_images += sum(row.has_image for row in group)
                ends = position[-1] + np.cumsum([row.num_words for row in group], dtype=np.int64)
                offsets.append(ends)
                position = ends

    def _counts(self) -> tuple[dict[str, Counter[str]], Counter[str]]:
        """How many studies of each stream, split and language, and how often each reason code."""
        studies = {name: Counter[str]() for name in ("streams", "splits", "languages")}
        left_out = Counter[str]()
        for kind, *said in self._journal.lines():
            if kind == "left_out":
                left_out[said[0]] += said[1]
            elif kind == "study":
                row = _Written(*said)
                studies["streams"][_stream(row)] += 1
                studies["splits"][row.split] += 1
                studies["languages"].update([row.lang] if row.lang else ())
        return studies, left_out

    def _seal(self) -> None:
        """Write the studies, what is left out and shard.json, and see all of it to the disk."""
        studies, left_out = self._counts()
        if not studies["streams"]:
            raise DataError("no study was added, so there is no shard to write")
        self._images.close()
        self._tokens.close()
        self._write_studies()
        folder, counts = self._journal.folder, dict(sorted(left_out.items()))
        lines = [json.dumps({"code": code, "count": count, "reason": REASONS[code]}) + "\n" for code, count in counts.items()]
        (folder / "quarantine.jsonl").write_text("".join(lines))
        content = {
            "schema": SCHEMA_VERSION,
            "num_studies": studies["streams"].total(),
            "num_images": self._images.num_rows,
            "num_words": self._tokens.num_rows,
            "streams": {name: studies["streams"][name] for name in ("image", "text", "paired")},
            "splits": {name: studies["splits"][name] for name in SPLITS},
            "image_size": self._image_size,
            "max_words": self._max_words,
            "label_names": self._label_names,
            "tokenizer": {"fingerprint": self._tokenizer.fingerprint, "vocab_size": self._tokenizer.vocab_size},
            "files": {name: member_entry(folder / name) for name in MEMBERS},
            "deidentification": self._deidentification.model_dump(),
            "quarantine": counts,
            "languages": dict(sorted(studies["languages"].items())),
            "key_mark": mark_of(self._key),
        }
        sealed = {**content, "seal": seal_of(content)}
        (folder / "shard.json").write_text(json.dumps(sealed, indent=2, ensure_ascii=True) + "\n")
        for name in (*MEMBERS, "shard.json", "."):
            flush(folder / name)


def write_arrays(
    path: Path,
    *,
    images: NDArray[np.uint8] | None,
    texts: Sequence[str] | None,
    has_image: NDArray[np.bool_],
    has_text: NDArray[np.bool_],
    labels: NDArray[Any],
    label_names: Sequence[str],
    patients: Sequence[Any] | NDArray[Any],
    splits: Sequence[str] | None,
    tokenizer: Tokenizer,
    key: bytes,
    max_words: int = 128,
    image_size: int | None = None,
    replace: bool = False,
) -> None:
    """Write a shard of a generated corpus in one go.

    ``images``: uint8 [number with image, S, S] and ``texts``: one for each study with text, both in study order.
    ``has_image``, ``has_text``: bool [N]. ``labels``: [N, F], 1, 0 or -1, or bool. ``patients``: [N], any printable ids.
    ``splits``: [N], or None to draw them from the key. ``image_size`` says S where there are no images (0 if not given).
    """
    _check_arrays(images, texts, has_image, has_text, labels, patients)
    size = image_size or 0 if images is None or not len(images) else images.shape[-1]
    next_image, next_text = iter(() if images is None else images), iter(() if texts is None else texts)
    writer = ShardWriter(
        path, image_size=size, tokenizer=tokenizer, key=key, label_names=label_names, max_words=max_words, replace=replace
    )
    rows = labels.astype(np.int8).tolist()
    with writer:
        for study, patient in enumerate(map(str, patients)):
            writer._add(
                _Study(
                    patient=patient,
                    study=str(study),
                    split=writer._split_of(patient) if splits is None else splits[study],
                    view="unknown",
                    lang="",
                    image=next(next_image) if has_image[study] else None,
                    text=next(next_text) if has_text[study] else None,
                    labels=rows[study],
                )
            )


def _line(study: _Study, num_words: int) -> Line:
    has_image, labels, said = study.image is not None, list(study.labels), study.characteristics
    names = (study.patient, study.study, study.split, study.view, study.lang)
    return ["study", *_Written(*names, has_image, num_words, labels, said.sex, said.age_band)]


def _stream(row: _Written) -> Stream:
    if not row.has_image:
        return "text"
    return "paired" if row.num_words else "image"


def _study_table(rows: Sequence[_Written], first_image: int, schema: pa.Schema) -> pa.Table:
    """Rows as the columns of a schema; what it does not name is not in the table."""
    has_image = np.array([row.has_image for row in rows])
    num_labels = len(rows[0].labels)
    labels = np.array([row.labels for row in rows], dtype=np.int8).ravel()
    starts = np.arange(len(rows) + 1, dtype=np.int32) * num_labels
    return pa.table(
        {
            "patient": [row.patient for row in rows],
            "study": [row.study for row in rows],
            "split": [row.split for row in rows],
            "view": [row.view for row in rows],
            "lang": [row.lang for row in rows],
            "has_image": has_image,
            "has_text": [row.num_words > 0 for row in rows],
            "image_row": np.where(has_image, first_image + np.cumsum(has_image) - 1, -1),
            "labels": pa.ListArray.from_arrays(starts, labels),
            "sex": [row.sex for row in rows],
            "age_band": [row.age_band for row in rows],
        },
        schema=schema,
    )


def _check_study(study: _Study, image_size: int) -> None:
    if study.image is None and study.text is None:
        raise DataError("a study has neither an image nor a text; leave it out")
    if study.image is not None and (study.image.shape != (image_size, image_size) or study.image.dtype != np.uint8):
        raise DataError(
            f"an image is {study.image.dtype} {study.image.shape}, expected uint8 {(image_size, image_size)}; resize it first"
        )
    if study.text is not None and not study.text.strip():
        raise DataError("a text is empty; give None where there is no text")
    if study.split not in SPLITS or study.view not in VIEWS:
        raise DataError(f"a split is one of {', '.join(SPLITS)}, a view one of {', '.join(VIEWS)}; got something else")
    if study.characteristics.sex not in SEXES or study.characteristics.age_band not in AGE_BANDS:
        known = f"a sex is one of {', '.join(SEXES)}, an age band one of {', '.join(AGE_BANDS)}"
        raise DataError(f"{known}; got something else")
    if study.lang != language(study.lang):
        raise DataError("a language is a tag of BCP 47 such as en or pt-BR, or nothing; got something else")
    if not set(study.labels) <= {-1, 0, 1}:
        raise DataError("a label is 1, 0 or -1 (not known); got another number")


def _check_arrays(
    images: NDArray[np.uint8] | None,
    texts: Sequence[str] | None,
    has_image: NDArray[np.bool_],
    has_text: NDArray[np.bool_],
    labels: NDArray[Any],
    patients: Sequence[Any] | NDArray[Any],
) -> None:
    if not len(has_image) == len(has_text) == len(labels) == len(patients):
        rows = f"{len(has_image)}, {len(has_text)}, {len(labels)} and {len(patients)}"
        raise DataError(f"has_image, has_text, labels and patients have {rows} rows; each needs one a study")
    got = (0 if images is None else len(images), 0 if texts is None else len(texts))
    expected = (int(np.sum(has_image)), int(np.sum(has_text)))
    if got != expected:
        raise DataError(f"got {got[0]} images and {got[1]} texts, has_image and has_text say {expected[0]} and {expected[1]}")


def _check_goal(path: Path, *, replace: bool) -> None:
    if not path.exists():
        return
    if not (path / "shard.json").is_file():
        raise DataError("the place for the shard is taken by something that is not a shard; choose another")
    if not replace:
        raise DataError("there is a shard in this place already; choose another, or ask to replace it")
