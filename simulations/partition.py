"""From an experiment's sites to prepared shards on this machine: phantoms are drawn once and kept, shards taken as they are."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from fedmix import config
from fedmix.data import phantom
from fedmix.data.phantom import Phantoms
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import write_arrays
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, DataError
from fedmix.federation.local import seed_of

# Phantoms are nobody, so the key that hides their patients is public.
PHANTOM_KEY = hashlib.sha256(b"fedmix phantoms").digest()


class Alteration(Protocol):
    """What becomes of a site's phantoms after they are drawn."""

    @property
    def recipe(self) -> Any:
        """All that it depends on, as JSON values."""

    def __call__(self, drawn: Phantoms) -> Phantoms:
        """The phantoms that are kept."""


def prepare_sites(
    data: config.Data,
    tokenizer: Tokenizer,
    *,
    on_site: Callable[[str], None] = lambda name: None,
    altered: Mapping[str, Alteration] = MappingProxyType({}),
) -> dict[str, Path]:
    """The shard of every site by name; draws the phantoms that are not there yet, ``altered`` at the sites that it names.

    What can be wrong is looked for first: drawing takes minutes where studies are many.
    """
    for site in data.sites:
        if site.shard is not None and not site.shard.is_dir():
            raise DataError(f"site {site.name}: there is no shard at {site.shard}; make one with `fedmix prepare`")
    _check_looks(data)
    shards = {}
    for site in data.sites:
        on_site(site.name)
        if site.shard is not None:
            shards[site.name] = site.shard
        elif site.phantom is not None:
            shards[site.name] = _phantom_shard(site, site.phantom, data, tokenizer, altered.get(site.name))
    return shards


def draw_site(data: config.Data, name: str, path: Path) -> None:
    """Draw a site's phantoms into a shard of its own; the same bits as a simulation draws for it.

    Raises ConfigError if the site has no phantoms, and DataError where the folder is taken or cannot be written.
    """
    _check_looks(data)
    site = next((site for site in data.sites if site.name == name), None)
    if site is None or site.phantom is None:
        drawn = ", ".join(site.name for site in data.sites if site.phantom is not None)
        raise ConfigError(f"the experiment draws no phantoms for a site {name!r}; it does for: {drawn or 'none'}")
    if path.exists():
        raise DataError(f"{path} is there already; name another folder, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(path, site, site.phantom, data, Tokenizer.load(data.tokenizer))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def _phantom_shard(
    site: config.Site,
    wanted: config.PhantomData,
    data: config.Data,
    tokenizer: Tokenizer,
    alter: Alteration | None,
) -> Path:
    """A shard of drawn phantoms, kept under a name that says everything it depends on."""
    recipe = [phantom.fingerprint(), wanted.model_dump(), site.stream, data.image_size, data.max_words, tokenizer.fingerprint]
    recipe += [] if alter is None else [alter.recipe]
    recipe += [{"test_studies": site.test_studies}] if site.test_studies else []
    path = data.cache / hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:20]
    if path.is_dir():
        try:
            Shard.open(path)
        except DataError:  # an older or damaged copy of something that can be drawn again
            shutil.rmtree(path, ignore_errors=True)
        else:
            return path
    try:
        data.cache.mkdir(parents=True, exist_ok=True)
        if not os.access(data.cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _draw(path, site, wanted, data, tokenizer, alter)
    except OSError as error:
        raise DataError(
            f"cannot keep phantoms under {data.cache}: {error.strerror}; set data.cache to a folder you may write"
        ) from None
    return path


def _draw(
    path: Path,
    site: config.Site,
    wanted: config.PhantomData,
    data: config.Data,
    tokenizer: Tokenizer,
    alter: Alteration | None = None,
) -> None:
    drawn = _generated(wanted, site.stream, data.image_size)
    drawn = drawn if alter is None else alter(drawn)
    if site.test_studies:
        other = {"studies": site.test_studies, "seed": seed_of(wanted.seed, "test studies of a site") % 2**31}
        drawn = _joined(drawn, _generated(wanted.model_copy(update=other), site.stream, data.image_size))
    every, none = np.ones(len(drawn.patient), bool), np.zeros(len(drawn.patient), bool)
    write_arrays(
        path,
        images=drawn.images,
        texts=drawn.reports,
        has_image=none if site.stream == "text" else every,
        has_text=none if site.stream == "image" else every,
        labels=drawn.labels,
        label_names=phantom.LABELS,
        patients=drawn.patient,
        splits=["train"] * wanted.studies + ["test"] * site.test_studies,  # the central held-out set is another draw
        tokenizer=tokenizer,
        key=PHANTOM_KEY,
        max_words=data.max_words,
        image_size=data.image_size,
        replace=True,  # another run may have drawn the same meanwhile
    )


def _generated(wanted: config.PhantomData, stream: config.StreamName, size: int) -> Phantoms:
    return phantom.generate(
        wanted.studies,
        look=wanted.look,
        seed=wanted.seed,
        size=size,
        difficulty=wanted.difficulty,
        contrast=wanted.contrast,
        images=stream != "text",
        reports=stream != "image",
    )


def _joined(first: Phantoms, then: Phantoms) -> Phantoms:
    """Two draws as one; patients are numbered within a draw, so the second's go on after the first's."""
    return Phantoms(
        images=None if first.images is None or then.images is None else np.concatenate([first.images, then.images]),
        reports=None if first.reports is None or then.reports is None else [*first.reports, *then.reports],
        labels=np.concatenate([first.labels, then.labels]),
        patient=np.concatenate([first.patient, then.patient + len(first.patient)]),
    )


def _check_looks(data: config.Data) -> None:
    """Raise DataError for a look that nobody drew."""
    wanted = {f"site {site.name}": site.phantom for site in data.sites} | {"data.held_out": data.held_out.phantom}
    wanted |= {f"data.held_out.also.{name}": studies.phantom for name, studies in data.held_out.also.items()}
    for where, phantoms in wanted.items():
        if phantoms is not None and phantoms.look not in phantom.LOOKS:
            raise DataError(f"{where}: there is no look {phantoms.look!r}; it is one of {', '.join(phantom.LOOKS)}")
