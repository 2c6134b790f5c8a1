import pytest
import tiny
import torch

from fedmix.model.heads import PatchDecoder, Projection


def test_decoder_puts_every_visible_token_at_its_own_place() -> None:
    """Shuffling tokens together with their places changes nothing; shuffling the tokens alone does."""
    decoder = PatchDecoder(8, side=4, decoder_width=16, depth=1, num_heads=2, num_values=5)
    tokens, places = torch.randn(2, 1 + 6, 8), tiny.places(2, tiny.VISIBLE)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(decoder(shuffled, places[:, order]), decoder(tokens, places))
    assert not torch.allclose(decoder(shuffled, places), decoder(tokens, places), atol=1e-3)


def test_decoder_tells_hidden_places_apart() -> None:
    decoder = PatchDecoder(8, side=4, decoder_width=16, depth=1, num_heads=2, num_values=5)
    values = decoder(torch.randn(1, 7, 8), tiny.places(1, tiny.VISIBLE))[0]
    assert torch.pdist(values).min() > 1e-4


def test_embedding_is_the_normalised_projection_of_the_mean_and_highest_present_word() -> None:
    projection = Projection(8, 4)
    tokens, present = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, True, False, False]])
    found = projection.embed("text", tokens, present)
    for row, length in enumerate((5, 3)):
        words = torch.stack([tokens[row, place] for place in range(1, length)])
        raw = projection.text(torch.cat([words.mean(dim=0), words.max(dim=0).values]))
        torch.testing.assert_close(found[row], raw / raw.norm())


def test_report_of_the_summary_alone_has_a_finite_embedding() -> None:
    found = Projection(8, 4).embed("text", torch.randn(1, 3, 8), torch.tensor([[True, False, False]]))
    assert found.isfinite().all()


def test_temperature_starts_at_a_tenth() -> None:
    assert Projection(8, 4).temperature().item() == pytest.approx(0.1)


@pytest.mark.parametrize(("learned", "used"), [(-20.0, 0.01), (5.0, 0.5)])
def test_temperature_stays_inside_its_bounds(learned: float, used: float) -> None:
    projection = Projection(8, 4)
    torch.nn.init.constant_(projection.log_temperature.weight, learned)
    assert projection.temperature().item() == pytest.approx(used)
