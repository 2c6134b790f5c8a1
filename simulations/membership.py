"""Who was in the training? The attack of `fedmix audit` on every model of a simulation, where both sides are at hand.

Members are patients that the sites trained on. The others are further draws of the same phantoms, or the validation and test
split of a site's shard, so that nothing but the training tells them apart. The reference that never saw them is what training
began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from fedmix import config
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.evaluation import leakage, subjects
from fedmix.evaluation.features import Report
from fedmix.evaluation.membership import AuditSettings
from fedmix.evaluation.subjects import Subjects
from server import held_out as central
from server.store import Parameters
from simulations.partition import prepare_sites


def membership(
    experiment: config.Experiment, parameters: Parameters, shards: Mapping[str, Path], tokenizer: Tokenizer
) -> Report:
    """The attack on whole patients, and the epsilon that it proves: the branch ``membership`` of an evaluation."""
    found = leakage.audit(
        central.set_parameters(central.random_model(experiment, tokenizer), parameters),
        people(experiment, shards, tokenizer),
        tokenizer,
        reference=central.initial_model(experiment, tokenizer),
        settings=AuditSettings(delta=experiment.privacy.delta, seed=experiment.seed),
    )
    return {**found["membership"]["patient"], "epsilon_lower_bound": found["epsilon"]}


def people(experiment: config.Experiment, shards: Mapping[str, Path], tokenizer: Tokenizer) -> Subjects:
    """Members and others of every site, as many of either side and from every site alike."""
    most = experiment.evaluation.membership_patients
    others = prepare_sites(_with_further(experiment.data, 2 * most), tokenizer)
    return _pooled(
        {
            name: subjects.of_shards(
                [Shard.open(path, verify=False)],
                [Shard.open(others[name], verify=False)],
                image_size=experiment.data.image_size,
                tokenizer=tokenizer.fingerprint,
                most_patients=max(1, most // len(shards)),
                seed=experiment.seed,
            )
            for name, path in shards.items()
        }
    )


def _with_further(data: config.Data, studies: int) -> config.Data:
    """The sites with more of the same phantoms, of which an audit leaves out the members; a site's shard stays as it is."""
    sites = []
    for site in data.sites:
        phantom = site.phantom
        if phantom is not None:
            phantom = phantom.model_copy(update={"studies": phantom.studies + studies})
        sites.append(site.model_copy(update={"phantom": phantom}))
    return data.model_copy(update={"sites": tuple(sites)})


def _pooled(sites: Mapping[str, Subjects]) -> Subjects:
    """The subjects of all sites; phantoms are numbered from zero at each, so a patient is one of its site."""
    parts = list(sites.values())
    pictures = [part.images for part in parts if part.images is not None]
    before = np.cumsum([0, *(0 if part.images is None else len(part.images) for part in parts)])
    return Subjects(
        images=np.concatenate(pictures) if pictures else None,
        image_row=np.concatenate(
            [np.where(part.has_image, part.image_row + first, -1) for part, first in zip(parts, before, strict=False)]
        ),
        words=list(chain.from_iterable(part.words for part in parts)),
        patient=np.concatenate([np.char.add(f"{name}/", part.patient.astype(str)) for name, part in sites.items()]),
        is_member=np.concatenate([part.is_member for part in parts]),
    )
