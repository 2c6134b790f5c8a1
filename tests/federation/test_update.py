from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation.optimisers import Optimisers
from fedmix.federation.update import REACHED_BY, digest, group_of, mean_metrics, num_bytes, tower_of, typed

# ---- groups and towers


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "shared"])
def test_every_parameter_of_the_model_belongs_to_a_group(experts: bool) -> None:
    names = [name for name, _ in tiny.model(modality_experts=experts).named_parameters()]
    found = {group_of(name) for name in names}
    expected = {"image.embedding", "text.embedding", "image.decoder", "text.head", "pair.projection", "pair.match_head"}
    expected |= {f"block{number}.attention" for number in range(2)}
    kinds = ("image", "text") if experts else ("shared",)
    expected |= {f"block{number}.{kind}" for number in range(2) for kind in kinds} | {f"{kind}.norm" for kind in kinds}
    assert found == expected


def test_parameter_of_an_unknown_room_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"'audio.weight' belongs to no group; give its room a line"):
        group_of("audio.weight")


@pytest.mark.parametrize(
    ("group", "tower"),
    [
        ("block0.attention", "shared"),
        ("block1.shared", "shared"),
        ("shared.norm", "shared"),
        ("block1.image", "image"),
        ("image.norm", "image"),
        ("image.decoder", "image"),
        ("block0.text", "text"),
        ("text.head", "text"),
        ("text.embedding", "text"),
        ("pair.projection", "pair"),
        ("pair.match_head", "pair"),
        ("block3.pair", "pair"),
    ],
)
def test_tower_says_which_streams_reach_a_group(group: str, tower: str) -> None:
    assert tower_of(group) == tower


def test_sigmoids_bias_is_sent_with_the_projection_and_not_decayed() -> None:
    net = tiny.model(contrast_form="sigmoid")
    assert group_of("projection.contrast_bias.weight") == "pair.projection"
    adamw = Optimisers(net, config.Optimiser(weight_decay=0.5))._parts["adamw"][0]
    undecayed = {parameter for group in adamw.param_groups if group["weight_decay"] == 0 for parameter in group["params"]}
    assert net.projection.contrast_bias.weight in undecayed


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "shared"])
@pytest.mark.parametrize(("kinds", "stream"), [("iii", "image"), ("ttt", "text"), ("pppp", "paired")])
def test_stream_trains_exactly_the_parameters_of_the_towers_it_reaches(kinds: str, stream: str, experts: bool) -> None:
    """The table REACHED_BY against where gradients really go, with every objective on."""
    learner = tiny.learner(
        mvm=1.0, mlm=1.0, contrast=1.0, match=1.0, joint_share=1.0, sizes={"modality_experts": experts}
    )  # fmt: skip
    learner.loss(learner.terms(tiny.batch(kinds), tiny.generator())).backward()
    names = {name for name, _ in learner.model.named_parameters()}
    assert tiny.touched(learner.model) == {name for name in names if stream in REACHED_BY[tower_of(group_of(name))]}


@pytest.fixture
def parameters() -> dict[str, Tensor]:
    return tiny.parameters_of(tiny.model())


# ---- fields of messages


def test_field_of_the_right_type_is_returned() -> None:
    assert typed({"round": 3}, "round", int) == 3


@pytest.mark.parametrize(
    ("values", "got"), [({}, "NoneType"), ({"round": "3"}, "str"), ({"round": True}, "bool"), ({"round": 3.0}, "float")]
)
def test_field_that_is_missing_or_of_another_type_is_refused(values: dict[str, object], got: str) -> None:
    """True is an int to Python, and no round number."""
    with pytest.raises(UpdateError, match=f"field 'round' of a message should be int, it is {got}"):
        typed(values, "round", int)


# ---- the identity of a model


def flipped(value: Tensor, index: int, bit: int) -> Tensor:
    """A copy with one bit turned."""
    raw = value.clone().view(torch.int32)
    raw.view(-1)[index] ^= 1 << bit
    return raw.view(torch.float32)


@pytest.mark.parametrize("bit", [0, 22, 30])
def test_digest_changes_with_any_bit(parameters: dict[str, Tensor], bit: int) -> None:
    before = digest(parameters)
    for name in ("embed_image.project.bias", "blocks.1.attention.qkv.weight", "word_head.logits.bias"):
        assert digest({**parameters, name: flipped(parameters[name], -1, bit)}) != before


def test_digest_changes_with_the_sign_of_zero() -> None:
    assert digest({"a": torch.tensor([0.0])}) != digest({"a": torch.tensor([-0.0])})


def test_digest_changes_with_names_shapes_and_types() -> None:
    value = torch.arange(6.0)
    others = [{"b": value}, {"a": value.reshape(2, 3)}, {"a": value.view(torch.int32)}, {"a": value[:3], "a2": value[3:]}]
    assert len({digest(parameters) for parameters in [{"a": value}, *others]}) == 5


def test_digest_does_not_depend_on_order_memory_layout_or_gradients(parameters: dict[str, Tensor]) -> None:
    before = digest(parameters)
    assert digest(dict(reversed(parameters.items()))) == before
    assert digest({name: value.clone().requires_grad_() for name, value in parameters.items()}) == before
    turned = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in parameters.items()}
    assert digest(turned) == before


def test_bytes_are_counted_by_element_size() -> None:
    assert num_bytes([torch.zeros(3, 4), torch.zeros(5, dtype=torch.float16)]) == 48 + 10


# ---- metrics


def test_metrics_of_sites_are_added_and_divided_once() -> None:
    """A site of weight 30 at loss 1 and one of 10 at loss 3 make 1.5; a site without the metric is not a zero."""
    sums = [{"mvm/loss": (30.0, 30.0)}, {"mvm/loss": (30.0, 10.0), "mlm/loss": (8.0, 4.0)}, {"contrast/loss": (0.0, 0.0)}]
    assert mean_metrics(sums) == {"mvm/loss": 1.5, "mlm/loss": 2.0}
