import hashlib
import json
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedmix.data.array_file import ArrayFile
from fedmix.data.characteristics import AGE_BANDS, SEXES, Characteristics
from fedmix.data.shard import MEMBERS, SPLITS, Shard, seal_of, token_type
from fedmix.data.shard_writer import ShardWriter, write_arrays
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

KEY = bytes(range(32))
SIZE = 16
LABELS = ("cardiomegaly", "effusion")
SENTENCES = ("Heart size is normal.", "Small left pleural effusion.", "No pneumothorax. Lungs are clear.")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


def study(number):
    """The study that every test here means by this number: a third images, a third texts, a third both."""
    image = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    return {
        "patient": f"patient-{number // 2}",
        "study": f"study-{number}",
        "image": image if number % 3 != 1 else None,
        "text": SENTENCES[number % len(SENTENCES)] if number % 3 != 0 else None,
        "labels": {"effusion": number % 2} if number % 5 else None,
        "view": ("PA", "AP", "unknown")[number % 3],
        "lang": ("en", "", "pt-BR")[number % 3],
    }


def write(path, tokenizer, count=10, **options):
    settings = {"image_size": SIZE, "tokenizer": tokenizer, "key": KEY, "label_names": LABELS, **options}
    with ShardWriter(path, **settings) as writer:
        for number in range(count):
            writer.add(**study(number))
    return path


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("pristine") / "shard", tokenizer)


@pytest.fixture
def path(tmp_path, pristine):
    return shutil.copytree(pristine, tmp_path / "shard")


def folder_bytes(path):
    return {member.name: member.read_bytes() for member in sorted(path.iterdir())}


@pytest.mark.parametrize("count", [1, 10, 256, 600])  # around and across the writer's blocks of 256
def test_a_shard_gives_back_what_was_put_in(tmp_path, tokenizer, count):
    shard = Shard.open(write(tmp_path / "shard", tokenizer, count))
    assert len(shard) == shard.num_studies == count
    for number in range(count):
        expected = study(number)
        image, words = shard.image(number), shard.words(number)
        assert (image is None) == (expected["image"] is None)
        assert image is None or np.array_equal(image, expected["image"])
        assert (words is None) == (expected["text"] is None)
        assert words is None or words.tolist() == tokenizer.encode([expected["text"]], 128)[0]
        assert shard.labels[number].tolist() == [-1, -1 if expected["labels"] is None else expected["labels"]["effusion"]]
        assert shard.view[number] == expected["view"]


def test_a_shard_describes_itself(pristine, tokenizer):
    shard = Shard.open(pristine)
    assert shard.stream_counts == {"image": 4, "text": 3, "paired": 3}
    assert shard.image_size == SIZE
    assert shard.label_names == LABELS
    assert shard.tokenizer_fingerprint == tokenizer.fingerprint
    assert isinstance(shard.images, np.memmap)
    assert isinstance(shard.tokens, np.memmap)
    assert shard.tokens.dtype == np.uint16
    assert shard.image_row[shard.has_image].tolist() == list(range(7))
    assert np.array_equal(np.diff(shard.offsets) > 0, shard.has_text)
    assert shard.fingerprint == hashlib.sha256((pristine / "shard.json").read_bytes()).hexdigest()


def test_select_finds_the_studies_of_a_split_and_stream(pristine):
    shard = Shard.open(pristine)
    assert shard.select().tolist() == list(range(10))
    assert shard.select(stream="image").tolist() == [0, 3, 6, 9]
    assert shard.select(stream="text").tolist() == [1, 4, 7]
    assert shard.select(stream="paired").tolist() == [2, 5, 8]
    parts = [shard.select(split, stream) for split in SPLITS for stream in ("image", "text", "paired")]
    assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    with pytest.raises(DataError, match="train, val, test"):
        shard.select("validate")
    with pytest.raises(DataError, match="image, text, paired"):
        shard.select(stream="both")


def test_what_is_handed_out_can_be_written_to_and_the_shard_cannot(pristine):
    shard = Shard.open(pristine)
    shard.image(0)[:] = 0
    shard.words(1)[:] = 0
    assert shard.image(0).any()
    for array in (shard.images, shard.tokens, shard.offsets, shard.labels, shard.has_image, shard.patient):
        assert not array.flags.writeable


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_shard_of_one_stream_has_no_rows_of_the_other(tmp_path, tokenizer, kind):
    with ShardWriter(tmp_path / "shard", image_size=SIZE, tokenizer=tokenizer, key=KEY) as writer:
        writer.add(patient="a", study="b", **{kind: SENTENCES[0] if kind == "text" else np.eye(SIZE, dtype=np.uint8)})
    shard = Shard.open(tmp_path / "shard")
    assert shard.stream_counts == {"image": 0, "text": 0, "paired": 0, kind: 1}
    assert shard.images.shape == (int(kind == "image"), SIZE, SIZE)
    assert (shard.tokens.size > 0) == (kind == "text")
    assert shard.labels.shape == (1, 0)


def test_the_same_studies_and_key_give_the_same_bytes(tmp_path, tokenizer, pristine):
    assert folder_bytes(write(tmp_path / "again", tokenizer)) == folder_bytes(pristine)


def test_no_identifier_is_left_in_any_byte_of_the_shard(pristine):
    for name, data in folder_bytes(pristine).items():
        assert b"patient-" not in data, name
        assert b"study-" not in data, name


def test_hashes_tell_patients_apart_only_to_who_has_the_key(tmp_path, tokenizer, pristine):
    ours, theirs = Shard.open(pristine), Shard.open(write(tmp_path / "shard", tokenizer, key=bytes(32)))
    assert len(set(ours.patient)) == 5
    assert ours.patient[0] == ours.patient[1]
    assert not set(ours.patient) & set(theirs.patient)
    unkeyed = {hashlib.sha256(f"patient-{number}".encode()).hexdigest()[:32] for number in range(5)}
    assert not unkeyed & set(ours.patient)


def test_splits_keep_patients_together_and_meet_their_shares(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "shard", image_size=SIZE, tokenizer=tokenizer, key=KEY, split_shares=(0.6, 0.3, 0.1)) as writer:
        for number in range(3000):
            writer.add(patient=f"p{number // 3}", study=str(number), text=SENTENCES[0])
    shard = Shard.open(tmp_path / "shard")
    assert len(set(zip(shard.patient, shard.split, strict=True))) == 1000
    assert [shard.split.count(name) / 3000 for name in SPLITS] == pytest.approx([0.6, 0.3, 0.1], abs=0.05)
    assert shard.manifest.splits == {name: shard.split.count(name) for name in SPLITS}


def test_texts_are_cut_at_max_words(tmp_path, tokenizer):
    shard = Shard.open(write(tmp_path / "shard", tokenizer, max_words=3))
    assert np.diff(shard.offsets).max() == 3
    assert shard.words(1)[0] == tokenizer.summary_id


def test_quarantine_holds_codes_and_counts_and_takes_no_others(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "shard", image_size=SIZE, tokenizer=tokenizer, key=KEY) as writer:
        writer.add(**{**study(1), "labels": None})
        writer.quarantine("file_missing")
        writer.quarantine("image_broken", 3)
        writer.quarantine("file_missing")
        with pytest.raises(DataError) as caught:
            writer.quarantine("images/MUELLER_HANS.png")
        assert "MUELLER" not in str(caught.value)
    lines = [json.loads(line) for line in (tmp_path / "shard" / "quarantine.jsonl").read_text().splitlines()]
    assert {line["code"]: line["count"] for line in lines} == {"file_missing": 2, "image_broken": 3}
    assert Shard.open(tmp_path / "shard").manifest.quarantine == {"file_missing": 2, "image_broken": 3}


def test_the_language_of_each_text_is_kept_and_an_image_has_none(pristine):
    shard = Shard.open(pristine)
    assert shard.lang == ["", "", "pt-BR", "", "", "pt-BR", "", "", "pt-BR", ""]
    assert shard.manifest.languages == {"pt-BR": 3}


def test_a_shard_of_before_the_column_of_languages_still_opens(path):
    studies = pq.ParquetFile(path / "studies.parquet").read().drop_columns(["lang"])
    pq.write_table(studies, path / "studies.parquet")
    content = json.loads((path / "shard.json").read_text())
    del content["seal"], content["languages"]
    data = (path / "studies.parquet").read_bytes()
    content["files"]["studies.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "shard.json").write_text(json.dumps({**content, "seal": seal_of(content)}))
    shard = Shard.open(path)
    assert shard.lang == [""] * 10
    assert shard.words(1) is not None
    assert (shard.sex, shard.age_band) == (["unknown"] * 10, ["unknown"] * 10)


def test_sex_and_age_band_are_kept_where_the_site_asks_for_it(tmp_path, tokenizer):
    said = [Characteristics(SEXES[number % 3], AGE_BANDS[number % 6]) for number in range(10)]
    settings = {"image_size": SIZE, "tokenizer": tokenizer, "key": KEY, "label_names": LABELS}
    with ShardWriter(tmp_path / "shard", keeps_characteristics=True, **settings) as writer:
        for number in range(10):
            writer.add(**study(number), characteristics=said[number])
    shard = Shard.open(tmp_path / "shard")
    assert [Characteristics(*row) for row in zip(shard.sex, shard.age_band, strict=True)] == said
    assert (shard.view[0], shard.labels.shape) == ("PA", (10, 2))


def test_a_shard_that_was_not_asked_to_keep_them_has_the_columns_it_always_had(pristine):
    table = pq.read_table(pristine / "studies.parquet")
    columns = ["patient", "study", "split", "view", "lang", "has_image", "has_text", "image_row", "labels"]
    assert table.column_names == columns
    assert b"age_band" not in (pristine / "studies.parquet").read_bytes()
    shard = Shard.open(pristine)
    assert (shard.sex, shard.age_band) == (["unknown"] * 10, ["unknown"] * 10)


def test_a_writer_that_was_not_asked_to_keep_them_refuses_them(tmp_path, tokenizer):
    writer = ShardWriter(tmp_path / "shard", image_size=SIZE, tokenizer=tokenizer, key=KEY)
    with pytest.raises(DataError, match="not to keep them"), writer:
        writer.add(patient="a", study="b", text=SENTENCES[0], characteristics=Characteristics(sex="F"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", [Characteristics(sex="Female"), Characteristics(age_band="83")])
def test_a_writer_takes_no_exact_age_and_no_other_sex(tmp_path, tokenizer, said):
    settings = {"image_size": SIZE, "tokenizer": tokenizer, "key": KEY, "keeps_characteristics": True}
    writer = ShardWriter(tmp_path / "shard", **settings)
    with pytest.raises(DataError, match="an age band one of 0-17") as caught, writer:
        writer.add(patient="a", study="b", text=SENTENCES[0], characteristics=said)
    assert "83" not in str(caught.value)


# Damage


def damage(path, name, how):
    member = path / name
    if how == "missing":
        member.unlink()
    elif how == "truncated":
        member.write_bytes(member.read_bytes()[:-1])
    elif how == "emptied":
        member.write_bytes(b"")
    else:
        data = bytearray(member.read_bytes())
        data[int(len(data) * how)] ^= 0x01
        member.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "emptied", 0.0, 0.4, 0.95])
@pytest.mark.parametrize("name", [*MEMBERS, "shard.json"])
def test_damage_names_the_member_file_and_what_to_do(tmp_path, tokenizer, name, how):
    path = tmp_path / "shard"
    with ShardWriter(path, image_size=SIZE, tokenizer=tokenizer, key=KEY, label_names=LABELS) as writer:
        for number in range(10):
            writer.add(**study(number))
        writer.quarantine("file_missing")
    if name == "shard.json" and how == "truncated":
        how = "emptied"  # its last byte is a line's end
    damage(path, name, how)
    with pytest.raises(DataError) as caught:
        Shard.open(path)
    message = str(caught.value)
    assert name in message
    assert not [other for other in (*MEMBERS, "shard.json") if other != name and other in message]
    assert "prepare the shard again" in message


def test_no_single_changed_byte_of_the_description_goes_unnoticed(path):
    original = (path / "shard.json").read_bytes()
    for position in range(len(original) - 1):
        data = bytearray(original)
        data[position] ^= 0x01
        (path / "shard.json").write_bytes(data)
        with pytest.raises(DataError, match=r"shard\.json"):
            Shard.open(path, verify=False)


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_missing_or_short_member_is_found_without_hashing(path, name, how):
    if name == "quarantine.jsonl" and how == "truncated":
        (path / name).write_bytes(b"x")  # it was empty: longer is as wrong
    else:
        damage(path, name, how)
    with pytest.raises(DataError, match=name):
        Shard.open(path, verify=False)


def reseal(path, **changes):
    """Describe the folder as it now is, as a faulty writer would."""
    content = json.loads((path / "shard.json").read_text())
    content.pop("seal")
    content["files"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in folder_bytes(path).items()
        if name in MEMBERS
    }
    content.update(changes)
    (path / "shard.json").write_text(json.dumps({**content, "seal": seal_of(content)}))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused_by_name(path, version):
    reseal(path, schema=version)
    with pytest.raises(DataError, match=r"shard\.json has schema version"):
        Shard.open(path)


@pytest.mark.parametrize("change", [{"extra": 1}, {"num_images": -1}, {"label_names": "cardiomegaly"}, {"files": {}}])
def test_a_manifest_of_another_shape_is_refused_by_name(path, change):
    reseal(path, **change)
    with pytest.raises(DataError, match=r"shard\.json"):
        Shard.open(path)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images.npy", np.zeros((7, SIZE, SIZE), dtype=np.int8)),
        ("images.npy", np.zeros((7, SIZE, SIZE + 1), dtype=np.uint8)),
        ("images.npy", np.zeros((6, SIZE, SIZE), dtype=np.uint8)),
        ("tokens.npy", np.zeros(3, dtype=np.uint16)),
        ("tokens.npy", np.zeros(3, dtype=np.float32)),
        ("offsets.npy", np.zeros(11, dtype=np.int32)),
        ("offsets.npy", np.zeros(11, dtype=np.int64)),
        ("offsets.npy", np.arange(4, dtype=np.int64)),
    ],
)
def test_arrays_of_another_shape_type_or_content_are_refused_by_name(path, name, array):
    np.save(path / name, array)
    reseal(path)
    with pytest.raises(DataError, match=name):
        Shard.open(path)


def test_an_array_of_python_objects_is_refused(path):
    np.save(path / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    reseal(path)
    with pytest.raises(DataError, match=r"images\.npy"):
        Shard.open(path)


def test_tables_that_contradict_the_rest_are_refused_by_name(path):
    table = pq.read_table(path / "studies.parquet")
    labels = pa.array([[0]] * 10, pa.list_(pa.int8()))
    wrong = {
        "columns": table.drop_columns(["view"]),
        "rows": table.slice(0, 9),
        "image_row": table.set_column(6, "image_row", pa.array([0] * 10, pa.int64())),
        "has_image": table.set_column(4, "has_image", pa.array([True] * 10)),
        "labels": table.set_column(7, table.schema.field("labels"), labels),
        "split": table.set_column(2, "split", pa.array(["holdout"] * 10)),
        "sex alone": table.append_column("sex", pa.array(["F"] * 10)),
        "another sex": table.append_column("sex", pa.array(["?"] * 10)).append_column("age_band", pa.array(["80+"] * 10)),
        "exact ages": table.append_column("sex", pa.array(["F"] * 10)).append_column("age_band", pa.array(["83"] * 10)),
    }
    for name, changed in wrong.items():
        pq.write_table(changed, path / "studies.parquet")
        reseal(path)
        with pytest.raises(DataError, match=r"studies\.parquet"):
            Shard.open(path)
        assert name


def test_a_folder_that_is_not_there_or_not_a_shard_is_refused(tmp_path):
    with pytest.raises(DataError, match="no shard folder"):
        Shard.open(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"shard\.json is missing"):
        Shard.open(tmp_path)


def test_messages_do_not_tell_where_the_shard_lies(tmp_path, pristine):
    path = shutil.copytree(pristine, tmp_path / "MUELLER_HANS_1950")
    (path / "images.npy").unlink()
    with pytest.raises(DataError) as caught:
        Shard.open(path)
    assert "MUELLER" not in str(caught.value)


def test_a_folder_called_like_a_column_does_not_become_one(tmp_path, tokenizer):
    assert len(Shard.open(write(tmp_path / "site=a" / "split=b", tokenizer))) == 10


# Writing


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_writer_leaves_nothing(tmp_path, tokenizer, fault):
    def interrupted():
        with ShardWriter(tmp_path / "shard", image_size=SIZE, tokenizer=tokenizer, key=KEY, label_names=LABELS) as writer:
            for number in range(300):
                writer.add(**study(number))
            assert [entry.name.endswith(".partial") for entry in tmp_path.iterdir()] == [True]
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, tokenizer):
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write(tmp_path / "shard", tokenizer, 600)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_an_older_shard_is_replaced_only_on_request_and_only_by_a_whole_one(path, tokenizer):
    before = folder_bytes(path)
    with pytest.raises(DataError, match="already"):
        write(path, tokenizer, 3)
    with pytest.raises(DataError, match="no study"):
        write(path, tokenizer, 0, replace=True)
    assert folder_bytes(path) == before
    write(path, tokenizer, 3, replace=True)
    assert len(Shard.open(path)) == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["shard"]


def test_something_that_is_not_a_shard_is_never_replaced(tmp_path, tokenizer):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(DataError, match="not a shard"):
        write(tmp_path, tokenizer, replace=True)
    assert (tmp_path / "precious.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((SIZE, SIZE + 1), dtype=np.uint8)}, "resize"),
        ({"image": np.zeros((SIZE, SIZE), dtype=np.float32)}, "uint8"),
        ({"image": None, "text": None}, "neither"),
        ({"text": " "}, "empty"),
        ({"split": "holdout"}, "split"),
        ({"view": "sideways"}, "view"),
        ({"lang": "MUELLER"}, "BCP 47"),
        ({"labels": {"effusion": 2}}, "1, 0 or -1"),
        ({"labels": {"MUELLER": 1}}, "not among the 2"),
    ],
)
def test_a_study_that_does_not_fit_is_refused_without_being_quoted(tmp_path, tokenizer, change, message):
    with (
        pytest.raises(DataError, match=message) as caught,
        ShardWriter(tmp_path / "shard", image_size=SIZE, tokenizer=tokenizer, key=KEY, label_names=LABELS) as writer,
    ):
        writer.add(**{**study(2), **change})
    assert "patient-" not in str(caught.value)
    assert "MUELLER" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"key": b"short"}, "16"), ({"split_shares": (0.9, 0.3, -0.2)}, "shares"), ({"label_names": ("a", "a")}, "same name")],
)
def test_a_writer_that_cannot_keep_its_promise_is_refused_at_once(tmp_path, tokenizer, wrong, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "shard", tokenizer, **wrong)


def test_the_writer_does_not_hold_the_corpus_in_memory(tmp_path, tokenizer):
    image = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    tracemalloc.start()
    with ShardWriter(tmp_path / "shard", image_size=128, tokenizer=tokenizer, key=KEY) as writer:
        for number in range(4000):  # 62 MiB of pixels
            writer.add(patient=str(number), study="1", image=image.copy())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert len(Shard.open(tmp_path / "shard", verify=False).images) == 4000


def test_an_array_file_is_what_numpy_would_have_saved(tmp_path):
    rows = np.arange(60, dtype=np.int32).reshape(5, 3, 4)
    file = ArrayFile(tmp_path / "grown.npy", rows.dtype, (3, 4))
    file.append(rows[:2])
    file.append(rows[2:])
    file.close()
    np.save(tmp_path / "saved.npy", rows)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_tokens_take_two_bytes_while_every_id_fits():
    assert token_type(8_000) == np.uint16
    assert token_type(65_535) == np.uint16
    assert token_type(65_536) == np.int32
    assert token_type(250_000) == np.int32


def arrays(count=20):
    studies = [study(number) for number in range(count)]
    return {
        "images": np.stack([one["image"] for one in studies if one["image"] is not None]),
        "texts": [one["text"] for one in studies if one["text"] is not None],
        "has_image": np.array([one["image"] is not None for one in studies]),
        "has_text": np.array([one["text"] is not None for one in studies]),
        "labels": np.array([[-1, -1 if one["labels"] is None else one["labels"]["effusion"]] for one in studies]),
        "label_names": LABELS,
        "patients": [one["patient"] for one in studies],
        "splits": None,
        "key": KEY,
    }


def test_arrays_written_in_bulk_give_the_shard_that_single_studies_give(tmp_path, tokenizer):
    write_arrays(tmp_path / "bulk", **arrays(), tokenizer=tokenizer)
    bulk, single = Shard.open(tmp_path / "bulk"), Shard.open(write(tmp_path / "single", tokenizer, 20))
    for name in ("patient", "has_image", "has_text", "labels", "images", "tokens", "offsets", "image_row"):
        assert np.array_equal(getattr(bulk, name), getattr(single, name)), name
    assert bulk.split == single.split


def test_bulk_arrays_may_lack_a_stream_bring_their_splits_and_have_boolean_labels(tmp_path, tokenizer):
    texts_only = {
        **arrays(3),
        "images": None,
        "texts": list(SENTENCES),
        "has_image": np.zeros(3, dtype=bool),
        "has_text": np.ones(3, dtype=bool),
        "labels": np.array([[True, False]] * 3),
        "patients": np.arange(3),
        "splits": ["test", "val", "train"],
    }
    write_arrays(tmp_path / "shard", **texts_only, tokenizer=tokenizer, image_size=64)
    shard = Shard.open(tmp_path / "shard")
    assert shard.split == ["test", "val", "train"]
    assert shard.labels.tolist() == [[1, 0]] * 3
    assert shard.image_size == 64
    with pytest.raises(DataError, match="2 texts"):
        write_arrays(tmp_path / "other", **{**texts_only, "texts": list(SENTENCES[:2])}, tokenizer=tokenizer)
    with pytest.raises(DataError, match="rows"):
        write_arrays(tmp_path / "other", **{**texts_only, "patients": [1]}, tokenizer=tokenizer)
