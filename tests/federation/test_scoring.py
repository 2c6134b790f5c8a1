"""What a site measures on its own held-out patients: the same as a plain loop, and nothing of a few."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fedmix.batch import Stream
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import write_arrays
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.federation import scoring
from fedmix.federation.scoring import GALLERY, Held
from fedmix.model.encoder import MixedModel
from fedmix.objectives.masking import WordIds, hide_patches, hide_words

REPORTS = (
    "the heart is large .",
    "no effusion .",
    "lungs are clear and the heart is normal .",
    "a small effusion on the left .",
)


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    return Tokenizer.load()


def held(folder: Path, num: int, stream: Stream = "paired", *, patients: int | None = None) -> Held:
    """Studies that are not for training, each of a patient of its own unless there are fewer ``patients``; two are."""
    total = num + 2
    every, none = np.ones(total, bool), np.zeros(total, bool)
    grey = (tiny.images(total) * 255).byte().numpy()
    write_arrays(
        folder / stream,
        images=None if stream == "text" else grey,
        texts=None if stream == "image" else [REPORTS[row % len(REPORTS)] for row in range(total)],
        has_image=none if stream == "text" else every,
        has_text=none if stream == "image" else every,
        labels=np.zeros((total, 1), np.int8),
        label_names=("effusion",),
        patients=[row if row < 2 else 2 + row % (patients or num) for row in range(total)],
        splits=["train", "train", *(["val", "test"] * num)[:num]],
        tokenizer=tokenizer(),
        key=b"k" * 32,
        max_words=tiny.MAX_WORDS,
    )
    shard = Shard.open(folder / stream)
    return Held(shard, scoring.held_out(shard, stream, 5), WordIds.of(tokenizer()), seed=5)


def model() -> MixedModel:
    return tiny.model(vocabulary=tokenizer().vocab_size)


def test_psnr_is_that_of_a_loop_over_images(tmp_path: Path) -> None:
    here, net = held(tmp_path, 70, "image"), model()
    chance, total = here.chance("hidden patches"), 0.0
    side, patch = tiny.IMAGE_SIZE // tiny.PATCH_SIZE, tiny.PATCH_SIZE
    for rows in (here.rows[:64], here.rows[64:]):
        hidden_BP = hide_patches(len(rows), tiny.NUM_PATCHES, 0.75, chance).hidden_BP
        for row, hidden_P in zip(rows, hidden_BP, strict=True):
            truth_SS = here.batch(np.array([row])).image[0]  # type: ignore[index]
            with torch.no_grad():
                drawn_SS = net.regenerate(truth_SS[None], hidden_P[None])[0].clamp(0, 1)
            is_hidden_SS = hidden_P.reshape(side, side).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
            total -= 10 * math.log10(float((drawn_SS - truth_SS)[is_hidden_SS].square().mean()))
    found = scoring.score(net, here, ("score/psnr_db",))
    assert found["score/psnr_db"] == (pytest.approx(total, rel=1e-4), 70.0)


def test_bits_are_those_of_a_loop_over_reports(tmp_path: Path) -> None:
    here, net = held(tmp_path, 70, "text"), model()
    chance, bits, num_words = here.chance("hidden words"), 0.0, 0
    for row in here.rows:
        words_L = torch.from_numpy(here.shard.words(int(row)))
        shown, hidden = hide_words(words_L[None], 0.15, here.word_ids, chance)
        with torch.no_grad():
            chances_LV = net.word_logits(shown)[0].softmax(dim=-1)
        for place in hidden[0].nonzero().flatten().tolist():
            bits -= math.log2(float(chances_LV[place, words_L[place]]))
            num_words += 1
    found = scoring.score(net, here, ("score/bits_per_token",))
    assert found["score/bits_per_token"] == (pytest.approx(bits, rel=1e-4), float(num_words))


def test_first_ranks_are_counted_in_whole_galleries_of_different_patients(tmp_path: Path) -> None:
    here, net = held(tmp_path, 120, patients=70), model()
    right, queries = scoring.score(net, here, ("score/r1_of_32",))["score/r1_of_32"]
    assert queries == 2 * 2 * GALLERY  # both directions; the six patients left over fill no third gallery
    _, firsts = np.unique(here.shard.patient[here.rows], return_index=True)
    pairs = here.rows[firsts][torch.randperm(70, generator=here.chance("galleries")).numpy()]
    expected = 0
    for gallery in (pairs[:GALLERY], pairs[GALLERY : 2 * GALLERY]):
        batch = here.batch(gallery)
        assert batch.image is not None
        assert batch.text is not None
        with torch.no_grad():
            images, texts = net.encode_image(batch.image), net.encode_text(batch.text)
        for own in range(GALLERY):
            expected += int((texts @ images[own]).argmax()) == own
            expected += int((images @ texts[own]).argmax()) == own
    assert right == expected


def test_a_perfect_match_ranks_every_partner_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, net = held(tmp_path, GALLERY), model()
    monkeypatch.setattr(net, "encode_image", lambda image_BSS: torch.eye(len(image_BSS)))
    monkeypatch.setattr(net, "encode_text", lambda words_BL: torch.eye(len(words_BL)))
    assert scoring.score(net, here, ("score/r1_of_32",)) == {"score/r1_of_32": (2.0 * GALLERY, 2.0 * GALLERY)}


def test_the_same_seed_asks_two_models_the_same(tmp_path: Path) -> None:
    here, names = held(tmp_path, 40), scoring.measures_of("paired", ("mvm", "mlm", "contrast"))
    assert len(names) == 3
    assert scoring.score(model(), here, names) == scoring.score(model().train(), here, names)


def test_studies_of_too_few_patients_give_no_score(tmp_path: Path) -> None:
    here = held(tmp_path, 60, "image", patients=19)
    assert here.num_patients == 19
    assert scoring.score(model(), here, ("score/psnr_db",)) == {}
    assert scoring.score(model(), here, ("score/psnr_db",), min_patients=19).keys() == {"score/psnr_db"}


def test_pairs_that_fill_no_gallery_give_no_rank(tmp_path: Path) -> None:
    assert scoring.score(model(), held(tmp_path, GALLERY - 1), ("score/r1_of_32",)) == {}


def test_only_studies_that_no_training_touches_are_scored_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = held(tmp_path, 40)
    assert {here.shard.split[row] for row in here.rows} == {"val", "test"}
    assert len(here.rows) == 40
    monkeypatch.setattr(scoring, "MAX_STUDIES", 7)
    drawn = scoring.held_out(here.shard, "paired", 5)
    assert len(drawn) == 7
    assert set(drawn) <= set(here.rows)


def test_a_model_is_asked_for_what_it_learnt_and_a_site_for_what_it_holds() -> None:
    assert scoring.measures_of("image", ("mvm", "mlm", "contrast")) == ("score/psnr_db",)
    assert scoring.measures_of("text", ("mvm", "mlm")) == ("score/bits_per_token",)
    assert scoring.measures_of("paired", ("semantic",)) == ("score/r1_of_32",)
    assert scoring.measures_of("text", ("mvm",)) == ()


def test_a_diverged_model_is_told_and_not_summed_up(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.word_head.logits.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite; training has probably diverged"):
        scoring.score(net, held(tmp_path, 30, "text"), ("score/bits_per_token",))
