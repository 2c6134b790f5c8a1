"""The prepared shard: one folder with everything training needs of a site's data, read through memory maps.

::

    SHARD/ shard.json       schema, counts, image size, tokenizer, size and SHA-256 of each member file, quarantine counts
           studies.parquet  one row a study: keyed hashes of patient and study, split, view, lang, has_image, has_text,
                            image_row, labels; sex and age_band where the site asked to keep them
           images.npy       uint8 [num_images, S, S]
           tokens.npy       token ids of all texts, one after the other: uint16, or int32 for 65,536 words and more
           offsets.npy      int64 [num_studies + 1]: where a study's tokens start; equal neighbours mean no text
           quarantine.jsonl reason codes and counts of what was left out

``shard_writer.py`` writes one.

Shapes: N studies, F findings, S pixels a side.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from fedmix.data.characteristics import AGE_BANDS, SEXES, UNKNOWN
from fedmix.data.deidentification import Deidentification
from fedmix.errors import DataError

if TYPE_CHECKING:  # a hospital's preparation starts without torch
    from fedmix.batch import Stream

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
VIEWS = ("PA", "AP", "lateral", "unknown")
MEMBERS = ("studies.parquet", "images.npy", "tokens.npy", "offsets.npy", "quarantine.jsonl")
STUDIES = pa.schema(
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
# Of a site that asked to keep them. A shard of one that did not has the bytes that it always had.
STUDIES_WITH_CHARACTERISTICS = pa.schema([*STUDIES, ("sex", pa.string()), ("age_band", pa.string())])
_LANG = STUDIES.get_field_index("lang")


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
    shards of before 2026-12). ``sex``, ``age_band``: "unknown" throughout where the shard does not keep them.
    ``stream_counts``: studies with only an image, only a text, both.
    ``image_size`` is 0 where a shard of reports was written without one. ``fingerprint`` covers every member file.
    """

    path: Path
    manifest: Manifest
    fingerprint: str
    patient: NDArray[np.str_]
    split: list[str]
    view: list[str]
    lang: list[str]
    sex: list[str]
    age_band: list[str]
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
            sex=studies["sex"].to_pylist(),
            age_band=studies["age_band"].to_pylist(),
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


def token_type(vocab_size: int) -> np.dtype[Any]:
    """What tokens are kept as."""
    return np.dtype(np.uint16 if vocab_size < 65536 else np.int32)


def member_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a member file, as shard.json has them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def seal_of(content: dict[str, Any]) -> str:
    """Hash of shard.json's own content: finds accidents; it is no signature."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
    if seal != seal_of(content):
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
        if verify and member_entry(path / name)["sha256"] != entry.sha256:
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
    if table.schema.equals(STUDIES.remove(_LANG)):  # written before languages were kept study by study
        table = table.add_column(_LANG, STUDIES.field(_LANG), pa.array([""] * len(table), pa.string()))
    if table.schema.equals(STUDIES):
        for name in ("sex", "age_band"):
            table = table.append_column(name, pa.array([UNKNOWN] * len(table), pa.string()))
    if not table.schema.equals(STUDIES_WITH_CHARACTERISTICS):
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
        "tokens.npy": (shard.tokens, (manifest.num_words,), token_type(manifest.tokenizer.vocab_size)),
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
    if not set(shard.sex) <= set(SEXES) or not set(shard.age_band) <= set(AGE_BANDS):
        raise _fault("studies.parquet", "has a sex or an age band that is not in the list of them")
