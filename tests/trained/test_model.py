"""An exported model says what the model that was evaluated says, of every study alone as in company."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from little import ROOT
from PIL import Image

import fedmix
from fedmix.data.images import ImageOptions, read_image
from fedmix.data.phantom import Phantoms
from fedmix.errors import ConfigError, DataError, RunError
from fedmix.evaluation import features, regeneration
from fedmix.model.folder import load_model
from fedmix.trained import model as trained
from fedmix.trained.export import export
from fedmix.trained.model import FedmixModel

TEXTS = [
    "no effusion.",
    "the heart is enlarged and there is a large effusion on the right.",
    "a pacemaker.",
    "lungs are clear.",
]


def words_of(model: FedmixModel, texts: list[str]) -> list[np.ndarray]:
    return [np.array(ids) for ids in model.tokenizer.encode(texts, model.max_words)]


def png(values: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


# ---- parity with the model that was evaluated


def test_embeddings_are_those_that_evaluation_reads_off_the_runs_model(run: Path, exported: Path, phantoms: Phantoms) -> None:
    model = fedmix.load(exported)
    original, _, tokenizer = load_model(run / "model")
    words = [np.array(ids) for ids in tokenizer.encode(phantoms.reports, 24)]
    np.testing.assert_allclose(
        model.encode_image(phantoms.images), features.encode_images(original, phantoms.images), atol=1e-6
    )
    np.testing.assert_allclose(model.encode_text(phantoms.reports), features.encode_texts(original, words), atol=1e-6)
    norms = np.linalg.norm(model.encode_image(phantoms.images), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    assert model.encode_image(phantoms.images).dtype == model.encode_text(TEXTS).dtype == np.float32


@pytest.mark.parametrize("with_report", [False, True])
def test_a_regenerated_image_is_evaluations_on_the_same_mask(
    model: FedmixModel, run: Path, phantoms: Phantoms, with_report: bool
) -> None:
    original, _, _ = load_model(run / "model")
    hidden_NP = regeneration.hidden_patches(3, 16, mask_ratio=0.5, seed=4)
    masked = regeneration.MaskedImages(phantoms.images[:3], hidden_NP, 12)
    reports = phantoms.reports[:3] if with_report else [None] * 3
    words = words_of(model, reports) if with_report else None
    expected = regeneration.regenerate(original, masked, words)
    for row, report in enumerate(reports):
        image, hidden = model.regenerate(phantoms.images[row], hidden_NP[row], report=report)
        np.testing.assert_allclose(image, expected[row], atol=1e-5)
        assert (hidden == hidden_NP[row]).all()
        shown = ~regeneration.hidden_pixels(hidden[None], 12)[0]
        assert (image[shown] == phantoms.images[row][shown] / np.float32(255)).all()


def test_the_report_and_the_mask_change_what_is_drawn(model: FedmixModel, phantoms: Phantoms) -> None:
    one = phantoms.images[0]
    alone, hidden = model.regenerate(one, mask_ratio=0.5)
    told = model.regenerate(one, hidden.reshape(4, 4), report=TEXTS[1])
    assert np.abs(told.image - alone).max() > 1e-4
    assert hidden.sum() == 8
    assert (model.regenerate(one, mask_ratio=0.5).hidden == hidden).all()
    other = model.regenerate(one, mask_ratio=0.5, generator=torch.Generator().manual_seed(9)).hidden
    assert other.sum() == 8
    assert (other != hidden).any()


@pytest.mark.parametrize("num_hidden", [0, 1, 15, 16])
def test_any_mask_can_be_drawn(model: FedmixModel, phantoms: Phantoms, num_hidden: int) -> None:
    hidden = np.arange(16) < num_hidden
    image, _ = model.regenerate(phantoms.images[0], hidden)
    assert np.isfinite(image).all()
    assert (image == phantoms.images[0] / np.float32(255)).all() == (num_hidden == 0)


def test_a_mask_may_be_patches_by_number_by_place_or_pixels(model: FedmixModel, phantoms: Phantoms) -> None:
    """A hidden pixel hides its patch: 12 pixels a side, so rows 10 to 13 touch patch rows 0 and 1."""
    one = phantoms.images[0]
    pixels = np.zeros((48, 48), bool)
    pixels[10:14, 25] = True
    by_pixel = model.regenerate(one, pixels, report=TEXTS[1])
    grid = np.zeros((4, 4), bool)
    grid[:2, 2] = True
    for form in ([2, 6], np.array([6, 2, 2], np.uint8), grid, grid.reshape(-1)):
        found = model.regenerate(one, form, report=TEXTS[1])
        np.testing.assert_array_equal(found.hidden, by_pixel.hidden)
        np.testing.assert_array_equal(found.image, by_pixel.image)
    assert by_pixel.hidden.nonzero()[0].tolist() == [2, 6]
    assert (by_pixel.image[:, :24] == one[:, :24] / np.float32(255)).all()


@pytest.mark.parametrize("with_image", [False, True])
def test_filled_in_words_are_those_of_a_direct_pass(
    model: FedmixModel, run: Path, phantoms: Phantoms, with_image: bool
) -> None:
    original, _, tokenizer = load_model(run / "model")
    special = sorted(tokenizer.special_ids)
    image = phantoms.images[0] if with_image else None
    num_words = tokenizer.vocab_size - len(special)
    found = model.fill_words("the heart is [MASK]. no ___ on the left.", image, top_k=num_words)
    before, between, after = (ids[1:] for ids in tokenizer.encode(["the heart is", ". no", "on the left."], 24))
    flat = [tokenizer.summary_id, *before, tokenizer.mask_id, *between, tokenizer.mask_id, *after]
    pixels = None if image is None else torch.from_numpy(image[None] / np.float32(255))
    with torch.no_grad():
        logits = original.eval().word_logits(torch.tensor([flat]), pixels)[0]
    places = [place for place, number in enumerate(flat) if number == tokenizer.mask_id]
    assert len(found) == len(places) == 2
    for candidates, place in zip(found, places, strict=True):
        logits[place, special] = -torch.inf
        expected = dict(zip(range(tokenizer.vocab_size), logits[place].softmax(0).tolist(), strict=True))
        assert sum(candidate.probability for candidate in candidates) == pytest.approx(1, abs=1e-5)
        by_word = {tokenizer.token(number): share for number, share in expected.items() if number not in special}
        for word, share in candidates:
            assert share == pytest.approx(by_word[word], abs=1e-6)
        shares = [candidate.probability for candidate in candidates]
        assert shares == sorted(shares, reverse=True)


def test_the_image_changes_the_words_and_top_k_is_the_head_of_all(model: FedmixModel, phantoms: Phantoms) -> None:
    text = "there is a ___ effusion."
    many, few = model.fill_words(text, top_k=50)[0], model.fill_words(text)[0]
    assert many[:5] == few
    assert model.fill_words(text, phantoms.images[0])[0][0].probability != pytest.approx(few[0].probability, abs=1e-6)


# ---- alone and in company


def test_a_study_does_not_depend_on_its_neighbours(model: FedmixModel, phantoms: Phantoms, monkeypatch: Any) -> None:
    together = model.similarity(phantoms.images, TEXTS)
    alone = [[model.similarity([image], [text]).item() for text in TEXTS] for image in phantoms.images]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-2, "studies that all look alike would pass this test in any case"
    monkeypatch.setattr(trained, "BATCH_SIZE", 5)
    np.testing.assert_allclose(model.similarity(phantoms.images, TEXTS), together, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(phantoms.images))
    np.testing.assert_allclose(model.similarity(phantoms.images[order], TEXTS[::-1]), together[order][:, ::-1], atol=1e-5)


def test_similarity_is_the_cosine_and_probabilities_share_it_at_the_temperature(model: FedmixModel, phantoms: Phantoms) -> None:
    cosine = model.similarity(phantoms.images, TEXTS)
    np.testing.assert_allclose(cosine, model.encode_image(phantoms.images) @ model.encode_text(TEXTS).T, atol=1e-6)
    powers = np.exp(cosine.astype(np.float64) / model.network.projection.temperature().item())
    np.testing.assert_allclose(
        model.probabilities(phantoms.images, TEXTS), powers / powers.sum(axis=1, keepdims=True), atol=1e-5
    )


def test_nothing_asked_is_nothing_answered(model: FedmixModel) -> None:
    assert model.encode_image([]).shape == (0, 8)
    assert model.similarity([], TEXTS).shape == (0, 4)
    assert model.encode_text([]).shape == (0, 8)


def test_no_call_trains_or_draws_from_the_callers_chance(model: FedmixModel, phantoms: Phantoms) -> None:
    before = torch.random.get_rng_state()
    model.regenerate(phantoms.images[0], mask_ratio=0.5)
    model.similarity(phantoms.images[:2], TEXTS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(module.training for module in model.network.modules())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


# ---- pictures of another size


def test_a_model_for_larger_pictures_differs_in_its_patch_positions_alone(exported: Path, phantoms: Phantoms) -> None:
    own, larger = fedmix.load(exported), fedmix.load(exported, image_size=96)
    assert (larger.network.num_patches, larger.preparation.size) == (64, 96)
    before, after = dict(own.network.named_parameters()), dict(larger.network.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embed_image.position.weight", "patch_decoder.position.weight"}
    for name in changed:
        grid = before[name].T.reshape(1, -1, 4, 4)
        expected = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(after[name], expected.flatten(2)[0].T)
    picture = np.kron(phantoms.images[0], np.ones((2, 2), np.uint8))
    redrawn = larger.regenerate(picture, mask_ratio=0.5)
    assert redrawn.image.shape == (96, 96)
    assert redrawn.hidden.shape == (64,)


def test_a_model_for_pictures_of_its_own_size_is_the_same_to_the_bit(exported: Path, phantoms: Phantoms) -> None:
    one, other = fedmix.load(exported), fedmix.load(exported, image_size=48)
    np.testing.assert_array_equal(one.encode_image(phantoms.images), other.encode_image(phantoms.images))


@pytest.mark.parametrize("size", [0, 12, 50])
def test_a_size_that_patches_do_not_fill_is_refused(exported: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=f"image size {size} must be twice the model's patch of 12 pixels"):
        fedmix.load(exported, image_size=size)


# ---- matching


@pytest.fixture
def matcher(exported: Path, tmp_path: Path) -> FedmixModel:
    """The same weights, of a folder that says they were trained on matching."""
    folder = shutil.copytree(exported, tmp_path / "matcher")
    edit(folder / "config.json", trained_on=["contrast", "match"])
    return fedmix.load(folder)


def test_a_match_is_the_heads_probability_of_each_image_with_each_text(
    matcher: FedmixModel, phantoms: Phantoms, monkeypatch: Any
) -> None:
    found = matcher.match(phantoms.images[:5], TEXTS)
    assert (found.shape, found.dtype) == ((5, 4), np.float32)
    for column, ids in enumerate(words_of(matcher, TEXTS)):
        for row in range(5):
            with torch.no_grad():
                image = torch.from_numpy(phantoms.images[row : row + 1] / np.float32(255))
                tokens = matcher.network.encode(image_BSS=image, words_BL=torch.from_numpy(ids)[None]).tokens
                logit = matcher.network.match_head(tokens["image"][:, 0], tokens["text"][:, 0])
            assert found[row, column] == pytest.approx(logit.sigmoid().item(), abs=1e-5)
    assert np.ptp(found) > 1e-3
    monkeypatch.setattr(trained, "BATCH_SIZE", 2)
    np.testing.assert_allclose(matcher.match(phantoms.images[:5], TEXTS), found, atol=1e-5)
    assert matcher.match([], TEXTS).shape == (0, 4)
    assert matcher.match(phantoms.images[:3], []).shape == (3, 0)


def test_a_folder_that_does_not_say_what_was_trained_may_be_asked(exported: Path, phantoms: Phantoms, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "older")
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("trained_on") == ["mvm", "mlm", "contrast"]
    (folder / "config.json").write_text(json.dumps(values))
    assert fedmix.load(folder).match(phantoms.images[:1], TEXTS).shape == (1, 4)


# ---- pictures and texts are prepared as shards are


def test_a_picture_is_prepared_as_a_file_of_a_shard_is(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "x", normalise="standard", fit="crop")
    model = fedmix.load(tmp_path / "x")
    grey = np.random.default_rng(3).integers(20, 90, (90, 130)).astype(np.uint8)
    square = read_image(png(grey), ImageOptions(size=48, fit="crop", normalise="standard"))
    expected = features.encode_images(model.network, square[None])
    turned = Image.fromarray(np.rot90(grey))  # counter-clockwise; orientation 6 says to turn it back
    turned.getexif()[0x0112] = 6
    forms = [png(grey), Image.fromarray(grey), Image.fromarray(grey).convert("RGB"), grey, grey / 255.0, turned]
    for form in forms:
        np.testing.assert_allclose(model.encode_image([form]), expected, atol=1e-6)
    export(run, tmp_path / "plain")
    raw = fedmix.load(tmp_path / "plain").encode_image([grey])
    assert np.abs(raw - expected).max() > 1e-3, "the folder's choices make no difference"


def test_sixteen_bits_are_stretched_as_a_file_of_sixteen_bits(model: FedmixModel) -> None:
    deep = np.random.default_rng(3).integers(900, 3000, (60, 60)).astype(np.uint16)
    np.testing.assert_array_equal(model.encode_image([deep]), model.encode_image([png(deep)]))


def test_a_text_is_cleaned_and_cut_as_reports_are(model: FedmixModel) -> None:
    plain, long = model.encode_text(["no effusion.", "no effusion. " * 50])
    np.testing.assert_allclose(model.encode_text(["  no\n\x1b[31meffu\u200bsion.\t"])[0], plain, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(["no effusion. " * 60])[0], long, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda model, ok: model.encode_image(["scan.png"]), "image 0: expected a Pillow image, .* got str; open it first"),
        (lambda model, ok: model.encode_image([ok, b"GIF89a"]), "image 1: the file is neither PNG, JPEG nor DICOM"),
        (lambda model, ok: model.encode_image([ok[:8, :8]]), "image 0: a side of the image is shorter"),
        (
            lambda model, ok: model.encode_image([np.zeros((48, 48, 3))]),
            r"image 0: expected a grey image \[H, W\], got .*48, 48, 3",
        ),
        (lambda model, ok: model.encode_image([np.full((48, 48), 7.0)]), "image 0: an image of floats has values outside 0..1"),
        (lambda model, ok: model.encode_image([np.full((48, 48), np.nan)]), "not finite"),
        (lambda model, ok: model.encode_image([ok.astype(np.int64)]), "image 0: an image array is int64"),
        (lambda model, ok: model.encode_image([np.zeros((48, 48))]), "image 0: every pixel of the image has the same value"),
        (lambda model, ok: model.encode_image(ok), r"expected a list of images, got an array of shape \(48, 48\)"),
        (lambda model, ok: model.encode_image(Image.fromarray(ok)), "expected a list of images, got Image"),
        (lambda model, ok: model.encode_text("no effusion"), "expected a list of texts, got str; put even a single one"),
        (lambda model, ok: model.encode_text(["a", 3]), "text 1: expected a string, got int"),
        (lambda model, ok: model.encode_text(["..."]), "text 0: it holds neither a letter nor a digit"),
        (lambda model, ok: model.encode_text(["a", "b\0"]), "text 1: the text holds NUL"),
        (lambda model, ok: model.encode_image([Image.open(BytesIO(png(ok)[:300]))]), "image 0: the image cannot be decoded"),
        (lambda model, ok: model.fill_words("no blank"), "the text has no blank"),
        (lambda model, ok: model.fill_words("no effusion " * 30 + "___"), "a blank lies beyond the 24 words"),
        (lambda model, ok: model.fill_words("___", top_k=0), "top_k is 0"),
        (lambda model, ok: model.regenerate(ok), "either hidden or mask_ratio"),
        (lambda model, ok: model.regenerate(ok, mask_ratio=1.0), "mask_ratio is 1.0"),
        (
            lambda model, ok: model.regenerate(ok, np.zeros(9, bool)),
            r"hidden is bool \(9,\), expected bool \(16,\), \(4, 4\) or \(48, 48\), or numbers of patches",
        ),
        (lambda model, ok: model.regenerate(ok, [3, 16]), "hidden names patches from 3 to 16; they count from 0 to 15"),
        (lambda model, ok: model.regenerate(ok, [-1, 3]), "hidden names patches from -1 to 3"),
        (lambda model, ok: model.match([ok], TEXTS), "never trained on matching"),
        (lambda model, ok: model.regenerate(ok, np.zeros(16)), r"hidden is float64 \(16,\)"),
    ],
)
def test_what_cannot_be_read_is_said(model: FedmixModel, phantoms: Phantoms, call: Callable[..., Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        call(model, phantoms.images[0])


# ---- loading


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda x: shutil.rmtree(x), "there is no folder .* name one that `fedmix export` wrote"),
        (lambda x: (x / "model.safetensors").unlink(), "no model folder: model.safetensors is missing"),
        (
            lambda x: (x / "preprocessor_config.json").unlink(),
            r"how pictures are prepared \(preprocessor_config.json\); load what",
        ),
        (
            lambda x: edit(x / "config.json", schema=2, fedmix_version="0.9"),
            "format is 2 and this fedmix reads 1; use the fedmix 0.9",
        ),
        (lambda x: edit(x / "config.json", model_type="bert"), "of a model of type 'bert'"),
        (lambda x: edit(x / "preprocessor_config.json", resample="bicubic"), "says of resample what this fedmix does not do"),
        (lambda x: edit(x / "preprocessor_config.json", fit="squeeze"), r"cannot be read \(DataError\)"),
        (lambda x: edit(x / "preprocessor_config.json", do_flip=True), "says of do_flip"),
        (
            lambda x: edit(x / "preprocessor_config.json", size={"height": 96, "width": 96}),
            "config.json are of different models",
        ),
        (lambda x: (x / "preprocessor_config.json").write_text("[]"), r"cannot be read \(TypeError\)"),
    ],
)
def test_what_is_wrong_with_an_exported_folder_is_said(
    exported: Path, tmp_path: Path, damage: Callable[[Path], object], why: str
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    damage(copy)
    with pytest.raises(RunError, match=why):
        fedmix.load(copy)


def test_a_device_that_is_not_there_is_said(exported: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be put on device 'nowhere' \(RuntimeError\)"):
        fedmix.load(exported, device="nowhere")


def test_importing_fedmix_is_light() -> None:
    program = "import sys, fedmix; fedmix.load; print(sorted({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.split() == ["[]"]


# ---- what the README shows


def readme_example() -> str:
    section = (ROOT / "README.md").read_text().split("## Use a trained model", 1)[1].split("\n## ", 1)[0]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_readmes_example_runs_and_is_short(exported: Path, phantoms: Phantoms, tmp_path: Path) -> None:
    lines = readme_example()
    assert len(lines.strip().splitlines()) <= 10
    shutil.copytree(exported, tmp_path / "exported/demo")
    (tmp_path / "scans").mkdir()
    for number, image in enumerate(phantoms.images):
        Image.fromarray(image).save(tmp_path / f"scans/{number}.png")
    # A program of its own, as a reader would start it.
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", lines],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    assert len(answer.stdout.strip().splitlines()) == len(phantoms.images) + 1
