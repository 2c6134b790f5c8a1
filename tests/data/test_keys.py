import json
import stat

import pytest

from fedmix.data.deidentification import Deidentification
from fedmix.data.keys import mark_of, site_key
from fedmix.data.shard import Shard, seal_of
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

KEY = bytes(range(32))


@pytest.fixture
def shard(tmp_path):
    with ShardWriter(tmp_path / "shard", image_size=16, tokenizer=Tokenizer.load(), key=KEY) as writer:
        writer.add(patient="MUELLER", study="A1", text="Normal.")
    return tmp_path / "shard"


def rewritten(shard, change):
    """shard.json with some values changed, sealed again as an older fedmix would have."""
    content = json.loads((shard / "shard.json").read_text())
    content.pop("seal")
    change(content)
    (shard / "shard.json").write_text(json.dumps({**content, "seal": seal_of(content)}))


def test_a_shard_says_in_the_standards_terms_what_was_done(shard):
    said = Shard.open(shard).manifest.deidentification
    assert isinstance(said, Deidentification)
    assert said.standard == "DICOM PS3.15 Annex E"
    assert said.longitudinal_temporal_information_modified == "REMOVED"
    assert said.actions["PatientID"] == "U"
    assert said.actions["all other attributes, private ones included"] == "X"
    assert said.options["Clean Pixel Data"] == "not applied"
    assert (said.texts, said.pixels_searched) == ("not searched", False)


def test_the_statement_says_whether_patient_characteristics_were_kept():
    usual, kept = Deidentification(), Deidentification().keeping_characteristics()
    assert usual.options["Retain Patient Characteristics"] == "not applied: age, sex and size are removed"
    assert kept.options["Retain Patient Characteristics"] == "applied: sex is kept, age as one of five bands; size is removed"
    assert {name: kept.actions[name] for name in kept.actions.keys() - usual.actions.keys()} == {
        "PatientSex": "K",
        "PatientAge": "C",
    }
    assert kept.options.keys() == usual.options.keys()


def test_a_shard_of_before_the_statement_still_opens(shard):
    def older(content):
        content["deidentification"] = "Identifiers are hashes."
        del content["languages"], content["key_mark"]

    rewritten(shard, older)
    manifest = Shard.open(shard).manifest
    assert (manifest.deidentification, manifest.languages, manifest.key_mark) == ("Identifiers are hashes.", {}, "")


def test_a_statement_of_another_shape_is_refused(shard):
    rewritten(shard, lambda content: content["deidentification"].update(texts="clean, trust me"))
    with pytest.raises(DataError, match="entries that are not as expected"):
        Shard.open(shard)


def test_a_keys_mark_tells_keys_apart_and_holds_no_part_of_them(shard):
    assert Shard.open(shard).manifest.key_mark == mark_of(KEY) != mark_of(bytes(32))
    assert len(mark_of(KEY)) == 16
    assert mark_of(KEY) not in KEY.hex()
    for member in shard.iterdir():
        assert KEY not in member.read_bytes()
        assert KEY.hex().encode() not in member.read_bytes()


def test_a_key_is_not_kept_anywhere_inside_a_shard(shard):
    for place in (shard / "site.key", shard / "deeper" / "site.key"):
        with pytest.raises(DataError, match="must not lie in a shard"):
            site_key(place)


def test_the_key_is_for_its_owner_only(tmp_path):
    site_key(tmp_path / "site.key")
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
