"""Who holds which data, what is held out for the evaluation, and how a study becomes numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fedmix.config.base import Count, Name, Section, StreamName


class PhantomData(Section):
    """Studies drawn from the phantom generator (fedmix/data/phantom.py)."""

    studies: Count
    look: Name = Field(description="appearance, phrasing and prevalence habits; `fedmix phantom --looks` lists them")
    seed: int = Field(default=0, ge=0, description="draws of different seeds share no study")
    difficulty: float = Field(default=1.0, gt=0.0, le=3.0, description="more anatomical variation, fainter findings")
    contrast: float = Field(default=1.0, gt=0.0, le=3.0, description="how strongly findings show")


class Site(Section):
    """One institute and the kind of data it holds."""

    name: Name
    stream: StreamName
    phantom: PhantomData | None = None
    shard: Path | None = Field(default=None, description="folder written by `fedmix prepare`")
    test_studies: int = Field(
        default=0,
        ge=0,
        description="further phantoms, of other patients, on which the site scores models and never trains "
        "(evaluation.at_sites); a shard has its own validation and test splits",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Site:
        if (self.phantom is None) == (self.shard is None):
            raise ValueError("give a site either phantom or shard, not both and not neither")
        if self.test_studies and self.phantom is None:
            raise ValueError("test_studies are drawn like phantoms, and a shard has its own splits; take test_studies out")
        return self


class Studies(Section):
    """Studies to evaluate on: drawn phantoms, or the test split of shards with their training split for the probes."""

    phantom: PhantomData | None = None
    shards: tuple[Path, ...] = ()
    probe_studies: Count = Field(
        default=1000,
        description="studies that train the linear probe; of phantoms the rest, of shards the test split is tested on",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Studies:
        if (self.phantom is None) == (not self.shards):
            raise ValueError("give held_out either phantom or shards, not both and not neither")
        return self


class HeldOut(Studies):
    """The central evaluation set, which no site ever holds, and further ones that are reported apart."""

    public: bool = Field(
        default=False, description="pictures and report texts of the held-out studies may be shown in the report"
    )
    also: dict[Name, Studies] = Field(
        default={},
        description="name -> another set with labels of its own; the finished model is evaluated on each, under its own name",
    )


class Data(Section):
    """Sites, held-out set, and how a study becomes numbers."""

    image_size: Count = Field(default=48, description="pixels a side")
    max_words: int = Field(default=64, ge=4, le=512, description="token ids a report, the summary token included")
    tokenizer: Path | None = Field(default=None, description="a Hugging Face tokenizer folder; null is the shipped WordPiece")
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    held_out: HeldOut
    cache: Path = Field(default=Path("runs/.phantoms"), description="where drawn phantoms are kept between runs")

    @model_validator(mode="after")
    def _unique_names(self) -> Data:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("site names must differ from each other")
        return self
