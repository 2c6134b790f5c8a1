from __future__ import annotations

from dataclasses import fields

import pytest
import tiny
import torch
from torch import Tensor

from fedmix import config
from fedmix.data.augmentation import Changes, augmented, draw, exposed, moved

SIZE = 33  # odd, so that a pixel lies in the middle
ALL = config.Augment(smallest_crop=0.5, rotation_deg=10.0, gamma=0.3, gain=0.2, offset=0.1)


def changes(num: int = 1, **wanted: float) -> Changes:
    """The same for each image; what is not named is left as it is."""
    plain = {"side": 1.0, "across": 0.0, "down": 0.0, "angle": 0.0, "gamma": 1.0, "gain": 1.0, "offset": 0.0} | wanted
    values = {f"{name}_B": torch.full((num,), value) for name, value in plain.items() if name != "mirrored"}
    return Changes(mirrored_B=torch.full((num,), bool(wanted.get("mirrored", False))), **values)


def cross() -> Tensor:
    """A thin upright cross with a dot at the end of its upper arm: [1, 33, 33]."""
    image = torch.zeros(1, SIZE, SIZE)
    image[0, 16, 4:29] = image[0, 4:29, 16] = 1.0
    image[0, 2:5, 15:18] = 1.0
    return image


# ---- places


def test_nothing_wanted_is_nothing_changed() -> None:
    image = tiny.images(3)
    torch.testing.assert_close(moved(image, changes(3)), image, rtol=0, atol=1e-6)
    assert torch.equal(exposed(image, changes(3)), image)
    batch = tiny.batch("itp")
    assert augmented(batch, config.Augment(), seed=0, step=0) is batch


def test_a_quarter_turn_is_anticlockwise_and_exact() -> None:
    torch.testing.assert_close(moved(cross(), changes(angle=90.0)), torch.rot90(cross(), 1, (1, 2)), rtol=0, atol=1e-4)


def test_a_cross_turned_by_30_degrees_lies_where_geometry_puts_it() -> None:
    """The upper arm, turned anticlockwise, points up and to the left: 10 pixels along it there is light, above none."""
    turned = moved(cross(), changes(angle=30.0))[0]
    angle = torch.deg2rad(torch.tensor(30.0))
    for arm in range(4):
        towards = angle + arm * torch.pi / 2
        row, column = 16 - 10 * towards.cos(), 16 - 10 * towards.sin()
        assert turned[round(row.item()), round(column.item())] > 0.4
    assert turned[16, 16] > 0.8
    assert turned[6, 16] < 0.05


@pytest.mark.parametrize(("across", "down"), [(-1.0, -1.0), (1.0, -1.0), (0.0, 1.0)])
def test_a_crop_is_the_part_of_the_picture_that_it_says(across: float, down: float) -> None:
    image = tiny.images(1)  # 32 pixels: half of it is 16
    left, top = round(8 * (across + 1)), round(8 * (down + 1))
    part = image[:, top : top + 16, left : left + 16]
    expected = torch.nn.functional.interpolate(part[:, None], scale_factor=2.0, mode="bilinear", align_corners=False)[:, 0]
    found = moved(image, changes(side=0.5, across=across, down=down))
    torch.testing.assert_close(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1e-5)


def test_what_is_turned_in_from_outside_continues_the_edge() -> None:
    bright = torch.full((1, SIZE, SIZE), 0.7)
    torch.testing.assert_close(moved(bright, changes(angle=20.0)), bright)


def test_a_mirror_swaps_left_and_right() -> None:
    torch.testing.assert_close(moved(tiny.images(2), changes(2, mirrored=True)), tiny.images(2).flip(2), rtol=0, atol=1e-5)


def test_each_image_moves_by_its_own_numbers() -> None:
    images = tiny.images(3)
    drawn = draw(3, ALL, seed=1, step=2)
    together = moved(images, drawn)
    for row in range(3):
        own = Changes(**{one.name: getattr(drawn, one.name)[row : row + 1] for one in fields(Changes)})
        torch.testing.assert_close(moved(images[row : row + 1], own)[0], together[row])


# ---- grey values


def test_grey_values_by_hand() -> None:
    image = torch.tensor([[[0.0, 0.25], [0.81, 1.0]]])
    found = exposed(image, changes(gamma=0.5, gain=1.2, offset=-0.1))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.5], [0.98, 1.0]]]))


# ---- chance


def test_draws_follow_from_seed_and_step_and_from_nothing_else() -> None:
    batch = tiny.batch("iipt")
    first = augmented(batch, ALL, seed=5, step=3)
    torch.rand(7)
    augmented(batch, ALL, seed=5, step=4)
    again = augmented(batch, ALL, seed=5, step=3)
    assert torch.equal(first.image, again.image)
    for seed, step in ((6, 3), (5, 4)):
        assert not torch.equal(first.image, augmented(batch, ALL, seed=seed, step=step).image)
    assert first.text is batch.text


def test_to_turn_one_change_on_moves_no_other() -> None:
    alone, beside = draw(4, config.Augment(gain=0.2), seed=0, step=0), draw(4, ALL, seed=0, step=0)
    assert torch.equal(alone.gain_B, beside.gain_B)


def test_draws_stay_within_what_is_asked_and_use_all_of_it() -> None:
    drawn = draw(4000, replace_mirror(ALL, 0.25), seed=0, step=0)
    for values, low, high in (
        (drawn.side_B**2, 0.5, 1.0),
        (drawn.across_B, -1.0, 1.0),
        (drawn.angle_B, -10.0, 10.0),
        (drawn.gamma_B, 1 / 1.3, 1.3),
        (drawn.gain_B, 0.8, 1.2),
        (drawn.offset_B, -0.1, 0.1),
    ):
        slack = 0.02 * (high - low)
        assert low - 1e-6 <= values.min() < low + slack
        assert high - slack < values.max() <= high + 1e-6
    assert drawn.mirrored_B.float().mean() == pytest.approx(0.25, abs=0.03)


def replace_mirror(wanted: config.Augment, chance: float) -> config.Augment:
    return wanted.model_copy(update={"mirror": chance})


def test_nothing_is_mirrored_unless_asked() -> None:
    assert not draw(1000, ALL, seed=0, step=0).mirrored_B.any()


def test_images_stay_grey_values_and_reports_alone_stay_as_they_are() -> None:
    strong = config.Augment(smallest_crop=0.1, rotation_deg=45.0, gamma=4.0, gain=0.9, offset=0.9)
    image = augmented(tiny.batch("iiii"), strong, seed=0, step=0).image
    assert 0.0 <= image.min() <= image.max() <= 1.0
    texts = tiny.batch("tt")
    assert augmented(texts, strong, seed=0, step=0) is texts


def test_patients_and_masks_of_the_batch_are_kept() -> None:
    batch = tiny.batch("ipt")
    found = augmented(batch, ALL, seed=0, step=0)
    assert found.patient is batch.patient
    assert found.has_image is batch.has_image
