import ast
import csv
import json
import os
import stat
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fedmix.data
from fedmix.data.characteristics import AGE_BANDS
from fedmix.data.images import ImageOptions
from fedmix.data.keys import site_key
from fedmix.data.layouts.paths import open_inside, real_root
from fedmix.data.layouts.records import Picture, Record, Refusal, Report, SourceOptions
from fedmix.data.layouts.table import TableColumns, TableOptions, open_table, table_records, table_source
from fedmix.data.prepare import PrepareOptions, PrepareSummary, prepare
from fedmix.data.quarantine import REASONS, RefusedError
from fedmix.data.shard import Shard, seal_of
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

KEY = bytes(range(32))
REPORT = "Heart size is normal. No pleural effusion."


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


def picture(number=0):
    """A PNG that is darker to the right and bottom, a little different for each number."""
    rows, columns = np.mgrid[:40, :48]
    buffer = BytesIO()
    Image.fromarray((240 - 2 * rows - 2 * columns - number % 30).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare_table(root, out, *, tokenizer, workers=2, on_progress=None, **options) -> PrepareSummary:
    """Each option goes where it belongs: to the table, to its reader, or to the preparation."""
    table = TableOptions(**{name: options.pop(name) for name in ("csv", "columns", "delimiter") if name in options})
    reader = {name: options.pop(name) for name in ("label_names", "fallback_encoding", "lang") if name in options}
    source = table_source(real_root(root), SourceOptions(**reader), table)
    return prepare(
        source,
        out,
        options=PrepareOptions(**options),
        tokenizer=tokenizer,
        key=KEY,
        workers=workers,
        on_progress=on_progress,
    )


class Site:
    """A root folder with a table and images, and the tokenizer to prepare it with."""

    def __init__(self, root, tokenizer):
        self.root, self.tokenizer = root, tokenizer
        (root / "images").mkdir()

    def image(self, name, data=None):
        (self.root / "images" / name).write_bytes(picture() if data is None else data)
        return f"images/{name}"

    def table(self, rows, name="table.csv"):
        with open(self.root / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def paired(self, count):
        """Rows of complete studies, two to a patient."""
        return [
            {
                "image": self.image(f"{number}.png", picture(number)),
                "text": f"Study {number}. {REPORT}",
                "patient_id": f"p{number // 2}",
            }
            for number in range(count)
        ]

    def prepare(self, out="shard", workers=2, on_progress=None, **options) -> PrepareSummary:
        return prepare_table(
            self.root,
            self.root / out,
            tokenizer=self.tokenizer,
            workers=workers,
            on_progress=on_progress,
            **{"image": ImageOptions(size=24), "max_bad_share": 1.0, **options},
        )

    def shard(self, out="shard"):
        return Shard.open(self.root / out)


@pytest.fixture
def site(tmp_path, tokenizer):
    root = tmp_path / "root"
    root.mkdir()
    return Site(root, tokenizer)


# From a table to a shard


def test_a_table_becomes_a_shard_in_its_own_order(site):
    site.table(site.paired(30))
    heard = []
    summary = site.prepare(on_progress=lambda done, rows: heard.append((done, rows)))
    shard = site.shard()
    assert (summary.rows, summary.studies, summary.num_patients, summary.quarantined) == (30, 30, 15, {})
    assert summary.written == {"image": 0, "text": 0, "paired": 30} == shard.stream_counts
    assert heard == [(done, 30) for done in range(1, 31)]
    for number in range(30):
        assert shard.words(number).tolist() == site.tokenizer.encode([f"Study {number}. {REPORT}"], 128)[0]
    first_row = shard.image(0)[4]
    assert first_row[0] > first_row[-1]
    assert shard.image(0)[4, 2] > shard.image(0)[-4, 2]


def test_the_number_of_workers_changes_nothing(site):
    site.table([*site.paired(40), {"image": "images/none.png", "text": "", "patient_id": "q"}])
    for workers in (1, 4):
        site.prepare(out=f"shard{workers}", workers=workers)
    assert site.shard("shard1").fingerprint == site.shard("shard4").fingerprint


@pytest.mark.parametrize(
    ("stream", "written", "quarantined"),
    [
        (None, {"image": 2, "text": 2, "paired": 2}, {"no_image_no_text": 2}),
        ("image", {"image": 4, "text": 0, "paired": 0}, {"no_image": 4}),
        ("text", {"image": 0, "text": 4, "paired": 0}, {"no_text": 4}),
        ("paired", {"image": 0, "text": 0, "paired": 2}, {"no_image": 2, "no_text": 2, "no_image_no_text": 2}),
    ],
)
def test_a_stream_keeps_what_it_is_for(site, stream, written, quarantined):
    rows = site.paired(8)
    for row in rows[:4]:
        row["image"] = ""
    for row in (*rows[:2], *rows[4:6]):
        row["text"] = " \t"
    site.table(rows)
    summary = site.prepare(stream=stream)
    assert summary.written == written
    assert summary.quarantined == quarantined


def test_a_text_shard_never_touches_the_images_and_an_image_shard_never_the_texts(site):
    rows = site.paired(4)
    rows[0]["image"] = "../../etc/passwd"
    rows[1]["text"] = "nul\x00"
    site.table(rows)
    assert site.prepare("a", stream="text").quarantined == {"text_nul": 1}
    assert site.prepare("b", stream="image").quarantined == {"path_parent": 1}


def test_rows_that_merely_lack_the_other_side_are_not_bad(site):
    rows = site.paired(10)
    for row in rows[:9]:
        row["text"] = ""
    site.table(rows)
    assert site.prepare(stream="paired", max_bad_share=0.0).studies == 1


def test_a_text_is_in_the_language_of_its_cell_or_else_in_that_of_the_site(site):
    rows = [{**row, "lang": lang} for row, lang in zip(site.paired(4), ("es", "", "pt_br", "Hans Müller"), strict=True)]
    site.table(rows)
    site.prepare("a", lang="fr")
    site.prepare("b")
    assert (site.shard("a").lang, site.shard("b").lang) == (["es", "fr", "pt-BR", "fr"], ["es", "", "pt-BR", ""])
    with pytest.raises(DataError, match="BCP 47"):
        site.prepare("c", lang="French")


def test_sex_and_age_of_a_table_are_kept_as_bands_where_they_are_asked_for(site):
    told = [("F", "39"), ("male", "40.0"), ("M", "411"), ("", "018M"), ("X", "eighty"), ("f", "97")]
    site.table([{**row, "sex": sex, "age": age} for row, (sex, age) in zip(site.paired(6), told, strict=True)])
    site.prepare("kept", keeps_characteristics=True)
    site.prepare("texts", keeps_characteristics=True, stream="text")
    for out in ("kept", "texts"):
        shard = site.shard(out)
        assert shard.sex == ["F", "M", "M", "unknown", "unknown", "F"]
        assert shard.age_band == ["18-39", "40-59", "unknown", "0-17", "unknown", "80+"]
    site.prepare("usual")
    assert set(site.shard("usual").sex + site.shard("usual").age_band) == {"unknown"}


def test_columns_of_sex_and_age_change_no_byte_where_they_are_not_asked_for(site):
    rows = site.paired(6)
    site.table(rows)
    site.prepare("without")
    site.table([{**row, "sex": "F", "age": "83"} for row in rows])
    site.prepare("with")
    assert site.shard("with").fingerprint == site.shard("without").fingerprint


# What goes wrong is counted and does not stop the run


def test_broken_rows_are_quarantined_by_code_and_the_rest_is_written(site):
    rows = site.paired(12)
    rows[0]["image"] = "images/absent.png"
    rows[1]["image"] = site.image("broken.png", picture()[:-40])
    rows[2]["image"] = site.image("notes.png", b"%PDF-1.4")
    rows[3]["image"] = "images"
    rows[4]["text"] = "... --"
    rows[5]["patient_id"] = " "
    site.table(rows)
    summary = site.prepare()
    assert summary.quarantined == {
        "file_missing": 1,
        "file_not_regular": 1,
        "image_broken": 1,
        "image_format": 1,
        "patient_missing": 1,
        "text_empty": 1,
    }
    assert summary.studies == 6
    assert summary.shown_rows["file_missing"] == (2,)
    assert summary.shown_rows["patient_missing"] == (7,)
    assert site.shard().manifest.quarantine == summary.quarantined


def test_lines_that_are_no_rows_are_quarantined_and_reading_goes_on(site):
    lines = ["text,patient_id", f"{REPORT},a", "too,many,cells", "few", "", '"quote" astray,b', f'"{REPORT} ""OK""",c']
    (site.root / "table.csv").write_text("\n".join(lines))
    summary = site.prepare()
    assert (summary.rows, summary.studies, summary.quarantined) == (5, 2, {"row_malformed": 3})


def test_a_quote_that_never_closes_costs_one_row_and_no_memory(site):
    lines = ["text,patient_id", *(f"{REPORT},{number}" for number in range(50)), f'"{"swallowed " * 30_000}']
    (site.root / "table.csv").write_text("\n".join(lines))
    summary = site.prepare()
    assert summary.studies == 50
    assert set(summary.quarantined) == {"row_malformed"}


def test_a_row_in_another_encoding_is_decoded_as_declared_or_refused_alone(site):
    (site.root / "table.csv").write_bytes(f"text,patient_id\n{REPORT},a\n".encode() + b"C\x9cur \xe9largi,b\xe9\n")
    assert site.prepare("utf8").quarantined == {"text_encoding": 1}
    assert site.prepare("cp1252", fallback_encoding="cp1252").quarantined == {}
    assert site.shard("cp1252").words(1).tolist() == site.tokenizer.encode(["Cœur élargi"], 128)[0]


def test_too_many_bad_rows_end_the_preparation_and_leave_no_shard(site):
    rows = site.paired(10)
    for row in rows[:3]:
        row["image"] = "images/MUELLER_HANS.png"
    site.table(rows)
    with pytest.raises(DataError, match=r"3 of the first \d+ rows cannot be used, more than 20%.*file_missing") as caught:
        site.prepare(max_bad_share=0.2)
    assert "MUELLER" not in str(caught.value)
    assert sorted(entry.name for entry in site.root.iterdir()) == ["images", "table.csv"]
    assert site.prepare(max_bad_share=0.3).studies == 7


@pytest.mark.parametrize("rows", [[{"text": "..."}], [{"text": ""}]])
def test_a_table_of_which_nothing_is_left_is_an_error(site, rows):
    site.table(rows)
    with pytest.raises(DataError, match="none of the 1 rows can be used; most often"):
        site.prepare()


def test_an_empty_table_says_so(site):
    (site.root / "table.csv").write_text("image,text\n")
    with pytest.raises(DataError, match="no rows below its header"):
        site.prepare()


def test_a_place_that_cannot_be_written_is_said_without_its_name(site):
    site.table(site.paired(2))
    (site.root / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*check the place") as caught:
        site.prepare(out="file/shard")
    assert str(site.root) not in str(caught.value)


# Patients, splits, labels, views


def test_without_a_patient_column_each_row_is_its_own_patient_and_the_summary_says_so(site):
    site.table([{"text": REPORT}] * 5)
    summary = site.prepare()
    assert summary.num_patients == 5
    assert any("no patient column" in note for note in summary.notes)


def test_the_tables_own_splits_are_kept_under_their_usual_names(site):
    names = ["train", "Training", "validate", "val", " TEST", "holdout", ""]
    site.table([{"text": REPORT, "patient_id": str(number), "split": name} for number, name in enumerate(names)])
    summary = site.prepare()
    assert site.shard().split == ["train", "train", "val", "val", "test"]
    assert summary.quarantined == {"split_unknown": 2}
    assert summary.splits == {"train": 2, "val": 2, "test": 1}


def test_a_patient_in_two_splits_stays_in_the_first(site):
    site.table([{"text": REPORT, "patient_id": "a", "split": split} for split in ("test", "train", "test")])
    assert site.prepare().quarantined == {"split_conflict": 1}
    assert site.shard().split == ["test", "test"]


def test_splits_drawn_from_the_key_keep_patients_together(site):
    site.table([{"text": REPORT, "patient_id": str(number // 4)} for number in range(400)])
    summary = site.prepare()
    shard = site.shard()
    assert len(set(zip(shard.patient, shard.split, strict=True))) == 100
    assert all(summary.splits.values())


def test_piped_labels_mean_present_absent_or_not_known(site):
    cells = ["Edema|Effusion", "No Finding", "", " Effusion "]
    site.table([{"text": REPORT, "labels": cell} for cell in cells])
    site.prepare()
    shard = site.shard()
    assert shard.label_names == ("Edema", "Effusion", "No Finding")
    assert shard.labels.tolist() == [[1, 1, 0], [0, 0, 1], [-1, -1, -1], [0, 1, 0]]


def test_label_names_can_be_fixed_to_agree_between_sites(site):
    site.table([{"text": REPORT, "labels": "Edema|Hernia"}, {"text": REPORT, "labels": "Hernia"}])
    site.prepare(label_names=("Effusion", "Edema"))
    assert site.shard().label_names == ("Effusion", "Edema")
    assert site.shard().labels.tolist() == [[0, 1], [0, 0]]


def test_one_column_per_label_holds_numbers_or_blanks(site):
    cells = ["1.0", "0", "-1.0", "", "maybe"]
    site.table([{"text": REPORT, "Edema": cell, "Effusion": "1"} for cell in cells])
    summary = site.prepare(columns=TableColumns(label_columns=("Effusion", "Edema")))
    assert site.shard().labels.tolist() == [[1, 1], [1, 0], [1, -1], [1, -1]]
    assert summary.quarantined == {"label_unreadable": 1}


def test_free_text_in_the_labels_column_is_not_taken_for_findings(site):
    site.table([{"text": REPORT, "labels": f"finding {number}"} for number in range(600)])
    with pytest.raises(DataError, match="more than 512 different findings"):
        site.prepare()
    site.table([{"text": REPORT, "labels": cell} for cell in ("Edema", "A whole sentence. " * 6)])
    assert site.prepare().quarantined == {"label_unreadable": 1}
    assert site.shard().label_names == ("Edema",)


def test_views_get_one_of_four_names(site):
    cells = ["PA", "ap", "LL", "LATERAL", "AP_horizontal", "", "LARGE LATERAL", "oblique"]
    site.table([{"image": site.image("a.png"), "view": cell} for cell in cells])
    site.prepare()
    assert site.shard().view == ["PA", "AP", "lateral", "lateral", "AP", "unknown", "lateral", "unknown"]


def test_views_that_are_not_wanted_are_counted_and_no_fault(site):
    cells = ["PA", "AP", "LL", "LATERAL", ""]
    site.table([{"image": site.image("a.png"), "view": cell} for cell in cells])
    summary = site.prepare(views="frontal", max_bad_share=0.0)
    assert summary.quarantined == {"view_lateral": 2, "view_unknown": 1}
    assert site.shard().view == ["PA", "AP"]
    site.prepare("more", views="frontal-or-unknown")
    assert site.shard("more").view == ["PA", "AP", "unknown"]


# Tables that cannot be read


def test_columns_may_have_any_name_and_one_given_on_purpose_has_to_be_there(site):
    site.table([{"Befund": REPORT, "Pat": "a"}])
    assert site.prepare(columns=TableColumns(text="Befund", patient="Pat")).studies == 1
    with pytest.raises(DataError, match="none named 'Patient'"):
        site.prepare("other", columns=TableColumns(text="Befund", patient="Patient"))


def test_a_table_without_a_header_is_refused_without_quoting_its_first_patient(site):
    (site.root / "table.csv").write_text(f"MUELLER HANS,1950,{REPORT}\n")
    with pytest.raises(DataError, match="has 3 columns, none named 'image'") as caught:
        site.prepare()
    assert "MUELLER" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,text\na,b\n", "more than one column named 'text'"),
        (b"", "has 0 columns"),
        (b'"text', "cannot be read"),
        (bytes(range(256)) * 20, "the table"),
    ],
)
def test_a_file_that_is_no_table_is_refused(site, content, message):
    (site.root / "table.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        site.prepare()


def test_the_table_is_the_given_one_or_the_only_one(site):
    site.table([{"text": REPORT}], "one.csv")
    site.table([{"text": REPORT}] * 2, "two.csv")
    with pytest.raises(DataError, match="2 CSV files; name the one"):
        site.prepare()
    assert site.prepare("a", csv=Path("two.csv")).studies == 2
    assert site.prepare("b", csv=site.root / "one.csv").studies == 1
    with pytest.raises(DataError, match="CSV file is not there"):
        site.prepare("c", csv=Path("three.csv"))


@pytest.mark.parametrize(
    "wrong", [{"stream": "both"}, {"max_words": 1}, {"max_bad_share": 20}, {"phi": "ignore"}, {"views": "side"}]
)
def test_options_that_mean_nothing_are_refused(wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        PrepareOptions(**wrong)


@pytest.mark.parametrize(("sections", "said"), [((), "no section is asked for"), (("findigns",), "is called 'findigns'")])
def test_sections_that_there_are_not_are_refused(sections, said):
    with pytest.raises(DataError, match=said):
        PrepareOptions(sections=sections)


def test_a_delimiter_is_one_character():
    with pytest.raises(DataError, match="delimiter"):
        TableOptions(delimiter="")


def test_a_semicolon_may_separate_the_cells(site):
    (site.root / "table.csv").write_text(f"text;patient_id\n{REPORT};a\n")
    assert site.prepare(delimiter=";").studies == 1


def test_a_root_that_is_not_there_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="root folder is not there"):
        prepare_table(tmp_path / "no", tmp_path / "out", tokenizer=tokenizer)


# Hostile paths

POISON = {
    "../secret.png": "path_parent",
    "../../../../../../etc/passwd": "path_parent",
    "images/../../secret.png": "path_parent",
    "images/../../root/images/ok.png": "path_parent",
    "..": "path_parent",
    "./../secret.png": "path_parent",
    "images//..//..//secret.png": "path_parent",
    "/etc/passwd": "path_absolute",
    "//server/share/secret.png": "path_absolute",
    "///etc/passwd": "path_absolute",
    "file:///etc/passwd": "path_absolute",
    "http://example.org/x.png": "path_absolute",
    "C:/secret.png": "path_absolute",
    "C:secret.png": "path_absolute",
    "\\\\server\\share\\secret.png": "path_backslash",
    "..\\secret.png": "path_backslash",
    "C:\\secret.png": "path_backslash",
    "images\\..\\..\\secret.png": "path_backslash",
    "images/ok.png\x00.txt": "path_control",
    "\x00": "path_control",
    "images/ok\n.png": "path_control",
    "images/\x1b[31mok.png": "path_control",
    "images/\u202egnp.ko": "path_control",
    "images/o\u200bk.png": "path_control",
    "out.png": "path_escape",
    "outside/secret.png": "path_escape",
    "chain.png": "path_escape",
    "self.png": "path_escape",
    "=HYPERLINK(1)": "file_missing",
    "=cmd|' /C calc'!A0": "file_missing",
    "@SUM(1+1)": "file_missing",
    "~/secret.png": "file_missing",
    "$HOME/secret.png": "file_missing",
    "%2e%2e/secret.png": "file_missing",
    "\uff0e\uff0e/secret.png": "file_missing",
    "....//secret.png": "file_missing",
    "images/ok.png/": None,
    "images/ok.png/x": "file_missing",
    "images": "file_not_regular",
    ".": "file_not_regular",
    "pipe.png": "file_not_regular",
    "/".join(["a"] * 3000): "path_too_long",
    "a" * 300 + ".png": "path_too_long",
    "inside.png": None,
    "images/./ok.png": None,
}


@pytest.fixture
def hostile(tmp_path):
    """A root with one good image and links of every kind, next to a secret."""
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "ok.png").write_bytes(picture())
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "chain.png").symlink_to(root / "out.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "outside").symlink_to(tmp_path)
    (root / "inside.png").symlink_to("images/ok.png")
    os.mkfifo(root / "pipe.png")
    return root.resolve()


@pytest.mark.timeout(20)  # a pipe that is opened in earnest waits for ever
@pytest.mark.parametrize(("cell", "code"), POISON.items(), ids=lambda value: ascii(value)[:40])
def test_a_path_cell_opens_a_file_below_the_root_or_nothing(hostile, cell, code):
    if code is None:
        with open_inside(hostile, cell) as file:
            assert file.read() == picture()
    else:
        with pytest.raises(RefusedError) as caught:
            open_inside(hostile, cell)
        assert caught.value.code == code
        assert cell not in str(caught.value) or len(cell) < 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "", "images", "outside", "ok.png", "root", "out.png", "\\", "~"]), max_size=7))
def test_no_combination_of_path_parts_reads_the_secret(tmp_path_factory, parts):
    tmp_path = tmp_path_factory.mktemp("hostile")
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "ok.png").write_bytes(b"fine")
    (tmp_path / "ok.png").write_bytes(b"secret")
    (root / "out.png").symlink_to(tmp_path / "ok.png")
    (root / "outside").symlink_to(tmp_path)
    try:
        with open_inside(root.resolve(), "/".join(parts)) as file:
            content = file.read()
    except RefusedError:
        return
    assert content == b"fine"


def test_a_link_put_in_place_of_a_folder_after_the_check_is_not_followed(hostile, monkeypatch):
    resolve = os.path.realpath

    def swapped(path):
        resolved = resolve(path)
        (hostile / "images").rename(hostile / "moved")
        (hostile / "images").symlink_to(hostile.parent)
        (hostile.parent / "ok.png").write_bytes(b"secret")
        return resolved

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(RefusedError):
        open_inside(hostile, "images/ok.png")


def test_poisoned_rows_are_counted_and_leave_no_trace_in_the_shard(hostile, tokenizer):
    with open(hostile / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient_id"])
        writer.writerows([cell, f"CANARY{number}"] for number, cell in enumerate(POISON))
    options = {"image": ImageOptions(size=16), "max_bad_share": 1.0}
    summary = prepare_table(hostile, hostile.parent / "shard", tokenizer=tokenizer, **options)
    assert summary.studies == sum(code is None for code in POISON.values()) == 3
    assert sum(summary.quarantined.values()) == len(POISON) - 3
    for member in (hostile.parent / "shard").iterdir():
        data = member.read_bytes()
        assert not [word for word in (b"CANARY", b"passwd", b"secret", b"ok.png") if word in data], member.name
    assert "CANARY" not in repr(summary)


@pytest.mark.parametrize("add", [True, False], ids=["besides a member", "instead of a member"])
def test_a_manifest_that_names_another_file_opens_nothing(site, add):
    site.table(site.paired(2))
    site.prepare()
    path = site.root / "shard" / "shard.json"
    whole = json.loads(path.read_text())
    for cell in POISON:
        content = json.loads(json.dumps({name: value for name, value in whole.items() if name != "seal"}))
        content["files"][cell] = content["files"]["images.npy"] if add else content["files"].pop("images.npy")
        path.write_text(json.dumps({**content, "seal": seal_of(content)}))
        with pytest.raises(DataError, match="does not list the member files"):
            Shard.open(path.parent)


def test_a_file_beyond_the_size_limit_is_not_read(hostile):
    with open(hostile / "huge.png", "wb") as file:
        file.truncate(257 * 2**20)
    with pytest.raises(RefusedError) as caught:
        open_inside(hostile, "huge.png")
    assert caught.value.code == "file_too_large"


def test_no_file_stays_open(hostile):
    before = len(os.listdir("/proc/self/fd"))
    for cell, code in POISON.items():
        if code is not None:
            with pytest.raises(RefusedError):
                open_inside(hostile, cell)
    assert len(os.listdir("/proc/self/fd")) == before


# Records, codes, keys


def test_records_say_what_the_row_says(site):
    site.table(
        [
            {"image": " a.png ", "text": REPORT, "patient_id": "p", "study_id": "s", "view": "PA", "split": "val"},
            {"image": "", "text": "", "patient_id": "", "study_id": "s", "view": "", "split": "val"},
        ]
    )
    table = open_table(site.root / "table.csv", TableColumns())
    assert (table.num_rows, table.label_names) == (2, ())
    assert list(table_records(table)) == [
        Record(2, "p", "s", (Picture(("a.png",), "PA"),), Report(REPORT), "val", {}),
        Refusal(3, "patient_missing"),
    ]


def test_every_code_that_is_raised_is_in_the_list_of_reasons():
    raised = set()
    for source in Path(fedmix.data.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("RefusedError", "Refusal"):
                codes = [leaf.value for part in node.args for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)]
                raised.update(code for code in codes if isinstance(code, str))
    assert len(raised) > 15
    assert raised <= set(REASONS)


def test_the_site_key_is_made_once_for_its_owner_only(tmp_path):
    path = tmp_path / "keys" / "site.key"
    key = site_key(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert site_key(path) == key
    assert site_key(tmp_path / "other.key") != key
    assert [entry.name for entry in path.parent.iterdir()] == ["site.key"]


def test_a_site_key_that_is_short_open_to_others_or_in_a_shard_is_refused(tmp_path):
    path = tmp_path / "site.key"
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="32 bytes"):
        site_key(path)
    path.write_bytes(bytes(32))
    path.chmod(0o644)
    with pytest.raises(DataError, match="chmod 600"):
        site_key(path)
    (tmp_path / "shard.json").write_text("{}")
    with pytest.raises(DataError, match="must not lie in a shard"):
        site_key(tmp_path / "new.key")


# The small real corpus


@pytest.fixture(scope="module")
def corpus():
    root = Path(os.environ.get("FEDMIX_OPEN_DATA") or Path(__file__).parents[2].parent / "shared" / "data" / "cxr-open")
    if not (root / "paired.csv").is_file():
        pytest.skip("the small real corpus is not here; point FEDMIX_OPEN_DATA at it")
    return root


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "stream", "rows", "splits", "patients"),
    [
        ("reports-only.csv", "text", 3927, {"train": 3145, "val": 0, "test": 782}, 3927),
        ("images-only.csv", "image", 849, {"train": 697, "val": 0, "test": 152}, 686),
        ("paired.csv", "paired", 180, {"train": 128, "val": 0, "test": 52}, 124),
    ],
)
def test_the_real_corpus_is_prepared_whole(corpus, tmp_path, tokenizer, name, stream, rows, splits, patients):
    options = {"csv": Path(name), "stream": stream, "image": ImageOptions(size=96), "max_bad_share": 0.0, "phi": "count"}
    summary = prepare_table(corpus, tmp_path / "shard", tokenizer=tokenizer, **options)
    assert (summary.rows, summary.written[stream], summary.studies) == (rows, rows, rows)
    assert (summary.splits, summary.num_patients, summary.quarantined) == (splits, patients, {})


@pytest.mark.data
def test_sex_and_age_band_of_the_real_corpus_are_those_of_its_table(corpus, tmp_path, tokenizer):
    options = {"csv": Path("images-only.csv"), "stream": "image", "image": ImageOptions(size=16), "keeps_characteristics": True}
    prepare_table(corpus, tmp_path / "shard", tokenizer=tokenizer, **options)
    shard = Shard.open(tmp_path / "shard")
    with open(corpus / "images-only.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert shard.sex == [row["sex"] for row in rows]
    assert {name: shard.sex.count(name) for name in ("F", "M")} == {"F": 398, "M": 451}
    bands = {
        name: [int(row["age"]) for row, band in zip(rows, shard.age_band, strict=True) if band == name] for name in AGE_BANDS
    }
    assert [(min(ages), max(ages)) for ages in bands.values() if ages] == [(4, 17), (18, 39), (40, 59), (60, 79), (80, 85)]


@pytest.mark.data
def test_real_radiographs_stand_upright(corpus, tmp_path, tokenizer):
    """Lungs are dark and lie to both sides of a bright spine, the abdomen below is brighter than they are."""
    options = {"csv": Path("images-only.csv"), "stream": "image", "image": ImageOptions(size=96)}
    prepare_table(corpus, tmp_path / "shard", tokenizer=tokenizer, **options)
    mean = Shard.open(tmp_path / "shard").images[:].mean(axis=0)
    right_lung, left_lung, spine, abdomen = mean[35:55, 22:36], mean[35:55, 62:74], mean[35:55, 44:52], mean[82:92, 30:66]
    assert max(right_lung.mean(), left_lung.mean()) < min(spine.mean(), abdomen.mean())
    heart = mean[55:68]
    assert heart[:, 52:64].mean() > heart[:, 32:44].mean()  # the heart lies to the viewer's right: not mirrored
