import pytest
import tiny
import torch
import torch.nn.functional as F

from fedmix.data import phantom
from fedmix.model import pyramid
from fedmix.model.layers import to_image, to_patches

KINDS = ("multi_scale", "single_scale", "norm_pix")


@pytest.mark.parametrize("kind", ["multi_scale", "single_scale"])
@pytest.mark.parametrize("patch_size", [4, 8, 16, 20])
def test_join_undoes_split(kind: str, patch_size: int) -> None:
    patches = torch.rand(2, 5, patch_size * patch_size, generator=tiny.generator(3))
    values = pyramid.split(kind, patches)
    assert values.shape[-1] == pyramid.num_values(kind, patch_size)
    torch.testing.assert_close(pyramid.join(kind, values), patches, atol=1e-6, rtol=0)


def test_split_undoes_join() -> None:
    """Every prediction of the pyramid stands for one image, and no two for the same."""
    values = torch.randn(2, 5, pyramid.num_values("multi_scale", 8), generator=tiny.generator(4))
    patches = pyramid.join("multi_scale", values)
    torch.testing.assert_close(pyramid.join("multi_scale", pyramid.split("multi_scale", patches)), patches, atol=1e-5, rtol=0)


def test_levels_equal_laplacian_pyramid_of_one_patch_at_a_time() -> None:
    patches = torch.rand(2, 3, 64, generator=tiny.generator(5))
    found = pyramid.split("multi_scale", patches)
    for study in range(2):
        for place in range(3):
            image = patches[study, place].reshape(1, 1, 8, 8) - 0.5
            coarse, middle = F.avg_pool2d(image, 4), F.avg_pool2d(image, 2)
            up_coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear")
            up_middle = F.interpolate(middle, scale_factor=2, mode="bilinear")
            levels = [coarse / 0.2, (middle - up_coarse) / 0.06, (image - up_middle) / 0.06]
            torch.testing.assert_close(found[study, place], torch.cat([level.flatten() for level in levels]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_of_a_patch_depends_on_another_patch(kind: str) -> None:
    """Pooling across the border would let a hidden patch be read off its visible neighbours' values."""
    image = tiny.images(1)
    changed = image.clone()
    changed[:, 8:16, 8:16] += 0.3 * torch.rand(8, 8, generator=tiny.generator(6))  # patch 5 of 16
    before, after = (pyramid.split(kind, to_patches(one, 8))[0] for one in (image, changed))
    assert [place for place in range(16) if not torch.equal(before[place], after[place])] == [5]


def test_coarse_level_alone_is_the_low_pass_image() -> None:
    patches = to_patches(tiny.images(2), 8)
    values = pyramid.split("multi_scale", patches)
    values[:, :, pyramid.level_sizes(8)[0] :] = 0
    drawn = pyramid.join("multi_scale", values)
    torch.testing.assert_close(drawn.mean(dim=-1), patches.mean(dim=-1))
    assert drawn.var() < patches.var()


def test_norm_pix_equals_the_formula_of_mae_written_as_a_loop() -> None:
    patches = torch.rand(2, 3, 16, generator=tiny.generator(7))
    found = pyramid.split("norm_pix", patches)
    for study in range(2):
        for place in range(3):
            pixels = patches[study, place].tolist()
            mean = sum(pixels) / 16
            variance = sum((pixel - mean) ** 2 for pixel in pixels) / 15  # torch's var, which MAE's code uses
            expected = torch.tensor([(pixel - mean) / (variance + 1e-6) ** 0.5 for pixel in pixels])
            torch.testing.assert_close(found[study, place], expected, atol=1e-5, rtol=1e-5)


def test_flat_patch_has_finite_normalised_pixels() -> None:
    assert (pyramid.split("norm_pix", torch.full((1, 1, 16), 0.7)).abs() < 1e-2).all()


def test_drawing_norm_pix_needs_nothing_of_the_truth() -> None:
    """One fixed mean and deviation for every patch: the true ones would leak the answer into PSNR."""
    values = torch.tensor([[[0.0, 1.0, -1.0, 2.0]]])
    torch.testing.assert_close(pyramid.join("norm_pix", values), torch.tensor([[[0.5, 0.7, 0.3, 0.9]]]))


@pytest.mark.parametrize("kind", ["multi_scale", "single_scale"])
def test_targets_of_phantoms_have_unit_scale(kind: str) -> None:
    """Each level's weight in the loss is meant to be alike, so its deviation must be near 1: within a factor of 2."""
    drawn = phantom.generate(64, look="north", seed=1, size=48, reports=False).images
    assert drawn is not None
    values = pyramid.split(kind, to_patches(torch.from_numpy(drawn).float() / 255, 8))
    sizes = pyramid.level_sizes(8) if kind == "multi_scale" else [64]
    assert all(0.5 < level.std() < 2 for level in values.split(sizes, dim=-1))


def test_regenerated_image_of_true_values_is_the_image() -> None:
    image = tiny.images(2)
    values = pyramid.split("multi_scale", to_patches(image, 8))
    torch.testing.assert_close(to_image(pyramid.join("multi_scale", values), 8), image, atol=1e-6, rtol=0)
