"""Made-up sites for the server's arithmetic: one parameter of each tower by its real name, four values each."""

from __future__ import annotations

import tiny
import torch
from hypothesis import strategies as st
from torch import Tensor

from fedmix import config
from fedmix.federation.aggregate import aggregate
from fedmix.federation.slabs import Group, groups_of
from fedmix.federation.update import Update

SHARED, IMAGE, TEXT, PAIR = (
    "blocks.0.attention.qkv.weight",
    "patch_decoder.values.bias",
    "word_head.logits.bias",
    "projection.image.bias",
)
ATTENTION, DECODER, HEAD, PROJECTION = "block0.attention", "image.decoder", "text.head", "pair.projection"
TRAINS = {"image": (SHARED, IMAGE), "text": (SHARED, TEXT), "paired": (SHARED, IMAGE, TEXT, PAIR)}
SHAPES = {SHARED: torch.Size([2, 2]), IMAGE: torch.Size([4]), TEXT: torch.Size([4]), PAIR: torch.Size([4])}

COUNTS = st.integers(0, 5000)
ALL_COUNTS = st.lists(
    st.fixed_dictionaries({"image": COUNTS, "text": COUNTS, "paired": COUNTS}).filter(lambda counts: any(counts.values())),
    min_size=1,
    max_size=7,
)


def site(name: str, value: float | Tensor = 1.0, *, steps: int = 1, **examples: int) -> Update:
    """A site that trained what its streams reach; its whole change is ``value``."""
    names = sorted({parameter for stream, count in examples.items() if count for parameter in TRAINS[stream]})
    values = torch.as_tensor(value, dtype=torch.float32) * torch.ones(4)
    return Update(name, {one: values.reshape(SHAPES[one]) for one in names}, examples, steps)


def drawn(all_counts: list[dict[str, int]], seed: int, *, scale: float = 1.0) -> list[Update]:
    """Sites with random changes and from 1 to 40 steps."""
    chance = tiny.generator(seed)
    return [
        site(
            f"site{number}",
            scale * torch.randn(4, generator=chance),
            steps=int(torch.randint(1, 41, (), generator=chance)),
            **counts,
        )
        for number, counts in enumerate(all_counts)
    ]


def added(updates: list[Update] | tuple[Update, ...], settings: config.Aggregation) -> dict[str, Tensor]:
    """Everything that ``aggregate`` yields."""
    return dict(aggregate(updates, SHAPES, settings))


def first(deltas: dict[str, Tensor], name: str) -> float:
    """The first of four equal values."""
    return deltas[name].flatten()[0].item()


def group(name: str, *updates: Update) -> Group:
    """One group of the round that these sites make."""
    return groups_of(updates)[name]
