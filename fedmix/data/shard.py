"""The prepared shard: one folder with everything training needs of a site's data, read through memory maps.

::

    SHARD/ shard.json       schema, counts, image size, tokenizer, size and SHA-256 of each member file, quarantine counts
           studies.parquet  one row a study: keyed hashes of patient and study, split, view, lang, has_image, has_text,
                            image_row, labels
           images.npy       uint8 [num_images, S, S]
           tokens.npy       token ids of all texts, one after the other: uint16, or int32 for 65,536 words and more
           offsets.npy      int64 [num_studies + 1]: where a study's tokens start; equal neighbours mean no text
           quarantine.jsonl reason codes and counts of what was left out

The same studies, key and tokenizer give the same bytes, and hold no time. A writer works in a hidden folder beside its goal
(``fedmix.data.journal``) and renames it at the end, so a shard is there as a whole or not at all; one that was killed leaves
``.NAME.*partial``, from which a preparation goes on, or which may be deleted.

Shapes: N studies, F findings, S pixels a side.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
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
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

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

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
VIEWS = ("PA", "AP", "lateral", "unknown")
MEMBERS = ("studies.parquet", "images.npy", "tokens.npy", "offsets.npy", "quarantine.jsonl")
MIN_KEY_BYTES = 16

_FLUSH_STUDIES = 256
_FLUSH_S = 10.0  # what a kill may cost where studies take long
_ROW_GROUP = 256  # studies of studies.parquet that are written together
_STUDIES = pa.schema(
    [
        ("patient", pa.string()),
        ("study", pa.string()),
        ("split", pa.string()),
        ("view", pa.string()),
        ("lang", pa.string()),
        ("has_image", pa.bool_()),
        ("has_text", pa.bool_()),
        ("image_row", pa.int64()),
        ("labels", pa.list_(pa.int8())),
    ]
)
_LANG = _STUDIES.get_field_index("lang")


class _Border(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MemberFile(_Border):
    """Size and SHA-256 of one member file."""

    bytes: NonNegativeInt
    sha256: str


class TokenizerMark(_Border):
    """Which tokenizer made the tokens."""

    fingerprint: str
    vocab_size: NonNegativeInt


class Manifest(_Border):
    """What shard.json says. ``streams`` counts studies by what they have, ``splits`` by where they belong.

    ``languages`` counts texts by language (BCP 47) where it is known. ``key_mark`` is alike in shards of one site key.
    """

    schema_version: int = Field(alias="schema")
    num_studies: NonNegativeInt
    num_images: NonNegativeInt
    num_words: NonNegativeInt
    streams: dict[str, NonNegativeInt]
    splits: dict[str, NonNegativeInt]
    image_size: NonNegativeInt
    max_words: NonNegativeInt
    label_names: list[str]
    tokenizer: TokenizerMark
    files: dict[str, MemberFile]
    deidentification: Deidentification | str  # a sentence in shards of before 2026-11
    quarantine: dict[str, NonNegativeInt]
    languages: dict[str, NonNegativeInt] = Field(default_factory=dict)
    key_mark: str = ""


@dataclass(frozen=True, eq=False)
class Shard:
    """A prepared shard, open for reading; images and tokens stay on disk until asked for.

    ``has_image``, ``has_text``: bool [N]. ``labels``: int8 [N, F], -1 not known. ``image_row``: int64 [N], -1 absent.
    ``images``: uint8 [num_images, S, S] and ``tokens``: flat, both memory-mapped. ``offsets``: int64 [N + 1].
    ``patient``: keyed hashes [N]. ``lang``: of each text, BCP 47 such as "en", "" where there is none or nobody said (as in
    shards of before 2026-12). ``stream_counts``: studies with only an image, only a text, both.
    ``image_size`` is 0 where a shard of reports was written without one. ``fingerprint`` covers every member file.
    """

    path: Path
    manifest: Manifest
    fingerprint: str
    patient: NDArray[np.str_]
    split: list[str]
    view: list[str]
    lang: list[str]
    has_image: NDArray[np.bool_]
    has_text: NDArray[np.bool_]
    image_row: NDArray[np.int64]
    labels: NDArray[np.int8]
    images: NDArray[np.uint8]
    tokens: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> Shard:
        """Open a shard folder; ``verify`` reads every member once to compare its hash.

        Raises ``DataError`` that names the member file which is missing, truncated, changed or of another schema.
        """
        manifest, fingerprint = _read_manifest(path)
        for name in MEMBERS:
            _check_member(path, name, manifest.files[name], verify=verify)
        studies = _read_studies(path)
        images, tokens, offsets = (_map_array(path, name) for name in ("images.npy", "tokens.npy", "offsets.npy"))
        shard = cls(
            path=path,
            manifest=manifest,
            fingerprint=fingerprint,
            patient=_frozen(studies["patient"].to_numpy().astype(np.str_)),
            split=studies["split"].to_pylist(),
            view=studies["view"].to_pylist(),
            lang=studies["lang"].to_pylist(),
            has_image=_frozen(studies["has_image"].to_numpy()),
            has_text=_frozen(studies["has_text"].to_numpy()),
            image_row=_frozen(studies["image_row"].to_numpy()),
            labels=_frozen(_label_matrix(studies["labels"], len(manifest.label_names))),
            images=images,
            tokens=tokens,
            offsets=offsets,
        )
        _check_agreement(shard)
        return shard

    @property
    def num_studies(self) -> int:
        """How many studies, whatever they have."""
        return self.manifest.num_studies

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.manifest.image_size

    @property
    def label_names(self) -> tuple[str, ...]:
        """The findings, in the order of the columns of ``labels``."""
        return tuple(self.manifest.label_names)

    @property
    def stream_counts(self) -> dict[Stream, int]:
        """Number of studies of each stream."""
        streams = self.manifest.streams
        return {"image": streams["image"], "text": streams["text"], "paired": streams["paired"]}

    @property
    def tokenizer_fingerprint(self) -> str:
        """Which tokenizer the words were made with."""
        return self.manifest.tokenizer.fingerprint

    def __len__(self) -> int:
        return self.num_studies

    def image(self, study: int) -> NDArray[np.uint8] | None:
        """A copy of a study's image [S, S], or None."""
        row = int(self.image_row[study])
        return None if row < 0 else np.array(self.images[row])

    def words(self, study: int) -> NDArray[np.int64] | None:
        """A study's token ids [L], or None."""
        if not self.has_text[study]:
            return None
        return self.tokens[self.offsets[study] : self.offsets[study + 1]].astype(np.int64)

    def select(self, split: str | None = None, stream: Stream | None = None) -> NDArray[np.int64]:
        """Study numbers of one split and one stream (None: all), in order. "image" means an image and no text."""
        if split is not None and split not in SPLITS:
            raise DataError(f"split is {split!r}; it is one of {', '.join(SPLITS)}")
        wanted = {None: (None, None), "image": (True, False), "text": (False, True), "paired": (True, True)}
        if stream not in wanted:
            raise DataError(f"stream is {stream!r}; it is one of image, text, paired")
        chosen = np.ones(self.num_studies, dtype=np.bool_) if split is None else np.asarray(self.split) == split
        for has, want in zip((self.has_image, self.has_text), wanted[stream], strict=True):
            if want is not None:
                chosen = chosen & (has == want)
        return np.flatnonzero(chosen)


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


class ShardWriter:
    """Writes a shard study by study, holding no more than a few hundred of them; use it in a ``with`` block.

    ``key``: the site's secret, at least 16 bytes, for the hashes and for the split. ``split_shares``: train, val and test,
    for patients whose split is not given. ``replace``: an older shard at ``path`` may be replaced, once this one is whole.

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
        split: str | None = None,
        never_test: bool = False,
    ) -> None:
        """Add one study: ``image`` uint8 [S, S] or None, ``text`` cleaned or None, ``labels`` finding -> 1, 0, -1 (not known).

        Findings that are not mentioned are not known. ``view`` is one of ``VIEWS``; ``lang`` is the text's, as BCP 47 has it.
        Where ``split`` is None it is drawn, with ``never_test`` between train and val only.
        """
        row = [-1] * len(self._label_names)
        for name, value in (labels or {}).items():
            if name not in self._label_column:
                raise DataError(f"a study names a finding that is not among the {len(self._label_names)} of the shard")
            row[self._label_column[name]] = value
        place = self._split_of(patient, never_test=never_test) if split is None else split
        self._add(_Study(patient, study, place, view, "" if text is None else lang, image, text, row))

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
        self._images = _ArrayFile(folder / "images.npy", np.dtype(np.uint8), square, num_rows=num_images)
        opened.callback(self._images.close)
        self._tokens = _ArrayFile(folder / "tokens.npy", _token_type(self._tokenizer.vocab_size), (), num_rows=num_words)
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
        offsets = _ArrayFile(self._journal.folder / "offsets.npy", np.dtype(np.int64), ())
        with (
            contextlib.closing(offsets),
            pq.ParquetWriter(self._journal.folder / "studies.parquet", _STUDIES) as studies,
        ):
            position = np.zeros(1, dtype=np.int64)
            offsets.append(position)
            while group := list(itertools.islice(rows, _ROW_GROUP)):
                studies.write_table(_study_table(group, num_images))
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
            "files": {name: _member_entry(folder / name) for name in MEMBERS},
            "deidentification": self._deidentification.model_dump(),
            "quarantine": counts,
            "languages": dict(sorted(studies["languages"].items())),
            "key_mark": mark_of(self._key),
        }
        sealed = {**content, "seal": _seal_of(content)}
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


class _ArrayFile:
    """A .npy file that grows by rows: the header leaves room for the count and is written again at the end.

    ``num_rows``: so many are there already, to be kept; what stands behind them is cut off.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], row_shape: tuple[int, ...], *, num_rows: int = 0) -> None:
        self.dtype, self.num_rows, self._row_shape = dtype, num_rows, row_shape
        self._file = open(path, "r+b" if num_rows else "wb")  # noqa: SIM115  closed by the writer that owns it
        self._write_header()
        self._header_bytes = self._file.tell()
        if num_rows:
            self._keep(num_rows * math.prod(row_shape) * dtype.itemsize)

    def append(self, rows: NDArray[Any]) -> None:
        """Append [k, *row_shape]."""
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.num_rows += len(rows)

    def flush(self) -> None:
        """See the rows to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put the count into the header; closing twice is harmless."""
        if self._file.closed:
            return
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes, "numpy pads the header for a first axis of up to 21 digits"
        self._file.close()

    def _keep(self, num_bytes: int) -> None:
        end = self._header_bytes + num_bytes
        if os.fstat(self._file.fileno()).st_size < end:
            self._file.close()
            raise DataError("what an interrupted preparation had finished is damaged; start over with --fresh")
        self._file.truncate(end)
        self._file.seek(end)

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def _token_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size < 65536 else np.int32)


def _line(study: _Study, num_words: int) -> Line:
    has_image, labels = study.image is not None, list(study.labels)
    return ["study", *_Written(study.patient, study.study, study.split, study.view, study.lang, has_image, num_words, labels)]


def _stream(row: _Written) -> Stream:
    if not row.has_image:
        return "text"
    return "paired" if row.num_words else "image"


def _study_table(rows: Sequence[_Written], first_image: int) -> pa.Table:
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
        },
        schema=_STUDIES,
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


def _member_entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _seal_of(content: dict[str, Any]) -> str:
    """Hash of shard.json's own content: finds accidents; it is no signature."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_goal(path: Path, *, replace: bool) -> None:
    if not path.exists():
        return
    if not (path / "shard.json").is_file():
        raise DataError("the place for the shard is taken by something that is not a shard; choose another")
    if not replace:
        raise DataError("there is a shard in this place already; choose another, or ask to replace it")


def _fault(member: str, what: str) -> DataError:
    return DataError(f"shard member {member} {what}; prepare the shard again")


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    if not path.is_dir():
        raise DataError("there is no shard folder in the given place; check the path, or prepare a shard with fedmix prepare")
    try:
        data = (path / "shard.json").read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        raise _fault("shard.json", "is missing") from None
    except (OSError, ValueError):
        raise _fault("shard.json", "cannot be read: truncated or damaged") from None
    if not isinstance(content, dict):
        raise _fault("shard.json", "does not describe a shard")
    if content.get("schema") != SCHEMA_VERSION:
        raise _fault("shard.json", f"has schema version {content.get('schema')!r}, this fedmix reads {SCHEMA_VERSION}")
    seal = content.pop("seal", None)
    if seal != _seal_of(content):
        raise _fault("shard.json", "was changed after it was written")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise _fault("shard.json", f"has {error.error_count()} entries that are not as expected") from None
    if set(manifest.files) != set(MEMBERS) or set(manifest.streams) != {"image", "text", "paired"}:
        raise _fault("shard.json", "does not list the member files and streams of its schema")
    return manifest, hashlib.sha256(data).hexdigest()


def _check_member(path: Path, name: str, entry: MemberFile, *, verify: bool) -> None:
    try:
        size = (path / name).stat().st_size
        if size != entry.bytes:
            raise _fault(name, f"has {size} bytes, expected {entry.bytes}: truncated or changed")
        if verify and _member_entry(path / name)["sha256"] != entry.sha256:
            raise _fault(name, "does not have the hash it was written with: changed or damaged")
    except FileNotFoundError:
        raise _fault(name, "is missing") from None
    except OSError as error:
        raise _fault(name, f"cannot be read ({type(error).__name__})") from None


def _read_studies(path: Path) -> pa.Table:
    try:
        # Not read_table: it would take a folder called site=a for a column.
        with pq.ParquetFile(path / "studies.parquet") as file:
            table = file.read()
    except (OSError, pa.ArrowException):
        raise _fault("studies.parquet", "cannot be read: damaged") from None
    if table.schema.equals(_STUDIES.remove(_LANG)):  # written before languages were kept study by study
        table = table.add_column(_LANG, _STUDIES.field(_LANG), pa.array([""] * len(table), pa.string()))
    if not table.schema.equals(_STUDIES):
        raise _fault("studies.parquet", "does not have the columns of its schema")
    if any(column.null_count for column in table.columns):
        raise _fault("studies.parquet", "has empty cells")
    return table.combine_chunks()


def _map_array(path: Path, name: str) -> NDArray[Any]:
    try:
        return np.load(path / name, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError):
        raise _fault(name, "cannot be read: damaged") from None


def _label_matrix(column: pa.ChunkedArray, num_labels: int) -> NDArray[np.int8]:
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    if not bool((np.diff(lists.offsets.to_numpy()) == num_labels).all()):
        raise _fault("studies.parquet", f"has studies without exactly {num_labels} labels")
    return values.reshape(len(lists), num_labels)  # type: ignore[no-any-return]


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _check_agreement(shard: Shard) -> None:
    """The members against the manifest and against each other, without reading images or tokens."""
    manifest, num_studies = shard.manifest, shard.manifest.num_studies
    if len(shard.split) != num_studies:
        raise _fault("studies.parquet", f"has {len(shard.split)} rows, shard.json says {num_studies}")
    expected: dict[str, tuple[NDArray[Any], tuple[int, ...], np.dtype[Any]]] = {
        "images.npy": (shard.images, (manifest.num_images, manifest.image_size, manifest.image_size), np.dtype(np.uint8)),
        "tokens.npy": (shard.tokens, (manifest.num_words,), _token_type(manifest.tokenizer.vocab_size)),
        "offsets.npy": (shard.offsets, (num_studies + 1,), np.dtype(np.int64)),
    }
    for name, (array, shape, dtype) in expected.items():
        if array.shape != shape or array.dtype != dtype:
            raise _fault(name, f"holds {array.dtype} {array.shape}, expected {dtype} {shape}")
    if not np.array_equal(shard.image_row[shard.has_image], np.arange(manifest.num_images)):
        raise _fault("studies.parquet", "does not number the images one after the other")
    if not bool((shard.image_row[~shard.has_image] == -1).all()) or not bool((shard.has_image | shard.has_text).all()):
        raise _fault("studies.parquet", "has studies whose image or text is neither there nor absent")
    lengths = np.diff(shard.offsets)
    if shard.offsets[0] != 0 or shard.offsets[-1] != manifest.num_words or not np.array_equal(lengths > 0, shard.has_text):
        raise _fault("offsets.npy", "does not fit the tokens and the studies with text")
    if bool((lengths < 0).any()):
        raise _fault("offsets.npy", "runs backwards")
    if not set(shard.split) <= set(SPLITS):
        raise _fault("studies.parquet", "has a split that is none of train, val and test")
