"""The central evaluation: the held-out set that no site holds, the model it is run on, and what it leaves in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedmix import config
from fedmix.data import phantom
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.evaluation import suite
from fedmix.evaluation.features import random_for
from fedmix.evaluation.held_out import HeldOut
from fedmix.federation.local import seed_of
from fedmix.model import pretrained
from fedmix.model.encoder import MixedModel
from fedmix.model.folder import continue_from, trained_on
from fedmix.model.pretrained import LoadReport
from server.store import Parameters

NO_MEAN_IMAGE = "the held-out shards have no image in their training split, which gives the mean image"


def initial_model(experiment: config.Experiment, tokenizer: Tokenizer) -> MixedModel:
    """What training begins with: the model of the seed, and over it what ``model.warm_start`` names."""
    return warm_started(experiment, tokenizer)[0]


def warm_started(experiment: config.Experiment, tokenizer: Tokenizer) -> tuple[MixedModel, LoadReport | None]:
    """The initial model, and what it took from files; None where it took nothing. Raises ConfigError for unfit files."""
    model, files = random_model(experiment, tokenizer), experiment.model.warm_start
    if files is None:
        return model, None
    if files.model is not None:
        return model, continue_from(model, files.model, tokenizer)
    return model, pretrained.warm_start(model, image=files.image, text=files.text, tokenizer=tokenizer)


def random_model(experiment: config.Experiment, tokenizer: Tokenizer) -> MixedModel:
    """The model that a seed alone stands for; no file is read for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(experiment.seed, "initial model"))
        return MixedModel(
            experiment.model,
            image_size=experiment.data.image_size,
            max_words=experiment.data.max_words,
            vocabulary=tokenizer.vocab_size,
        )


def parameters_of(model: MixedModel) -> Parameters:
    """A model's parameters by name, detached."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def set_parameters(model: MixedModel, parameters: Parameters) -> MixedModel:
    """Copy parameters into a model."""
    with torch.no_grad():
        for name, own in model.named_parameters():
            own.copy_(parameters[name])
    return model


def load(data: config.Data, tokenizer: Tokenizer, name: str | None = None) -> HeldOut:
    """The held-out set of an experiment, or the one of this name among ``held_out.also``: drawn phantoms, or the test split of
    prepared shards with their training split for the probe. A shard that a site trains on may be named here: only its test
    split is evaluated on.

    With the first of them the shards of all are looked at: a run is not to fail after its last round for want of one.
    """
    wanted = data.held_out if name is None else data.held_out.also[name]
    if name is None:
        for other in data.held_out.also.values():
            _check([Shard.open(path, verify=False) for path in other.shards], data.image_size, tokenizer)
    if wanted.phantom is not None:
        return _phantoms(wanted.phantom, wanted.probe_studies, data, tokenizer)
    shards = [Shard.open(path) for path in wanted.shards]
    return of_shards(shards, data.image_size, tokenizer, most_train=wanted.probe_studies)


def of_shards(shards: Sequence[Shard], image_size: int, tokenizer: Tokenizer, *, most_train: int | None = None) -> HeldOut:
    """Training splits (for probes) and test splits of shards as one held-out set; labels are matched by name.

    ``most_train``: of a longer training split so many studies are drawn, for a probe has no use for more; None takes all.
    """
    _check(shards, image_size, tokenizer)
    images: list[NDArray[np.uint8]] = []
    words: list[NDArray[np.int64] | None] = []
    labels: list[NDArray[np.int8]] = []
    patients: list[str] = []
    is_train: list[bool] = []
    image_row: list[int] = []
    groups: dict[str, list[str]] = {"view": [], "sex": [], "age_band": [], "site": []}
    names = sorted({name for shard in shards for name in shard.label_names})
    for number, shard in enumerate(shards, 1):
        columns = [names.index(name) for name in shard.label_names]
        train = random_for(0, "held-out training split").permutation(shard.select("train"))[:most_train]
        for row in np.concatenate([np.sort(train), shard.select("test")]):
            image = shard.image(int(row))
            image_row.append(-1 if image is None else len(images))
            if image is not None:
                images.append(image)
            words.append(shard.words(int(row)))
            line = np.full(len(names), -1, np.int8)
            line[columns] = shard.labels[row]
            labels.append(line)
            patients.append(str(shard.patient[row]))
            is_train.append(shard.split[int(row)] == "train")
            for kind, said in (("view", shard.view), ("sex", shard.sex), ("age_band", shard.age_band)):
                groups[kind].append(said[int(row)])
            groups["site"].append(f"shard {number}")  # in the order given: a folder's name may say more than may leave
    stacked = np.stack(images) if images else None
    return HeldOut(
        images=stacked,
        words=words if any(ids is not None for ids in words) else None,
        labels=np.stack(labels) if names else None,
        label_names=tuple(names),
        patient=np.array(patients),
        is_probe_train=np.array(is_train),
        mean_image=_mean_image(stacked, image_row, is_train),
        image_row=np.array(image_row),
        groups={kind: np.array(names) for kind, names in groups.items()},
    )


def _check(shards: Sequence[Shard], image_size: int, tokenizer: Tokenizer) -> None:
    """Raise DataError for shards that cannot be evaluated on with these images and words."""
    for shard in shards:
        if shard.has_text.any() and shard.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(f"held-out shard {shard.path}: prepared with another tokenizer; prepare it again")
        if shard.has_image.any() and shard.image_size != image_size:
            raise DataError(
                f"held-out shard {shard.path}: images of {shard.image_size} px, the model wants {image_size}; prepare it with "
                f"--size {image_size}, or evaluate a resampled model: fedmix evaluate --image-size {shard.image_size}"
            )
    has_images = any(shard.has_image.any() for shard in shards)
    if has_images and not any(shard.has_image[shard.select("train")].any() for shard in shards):
        raise DataError(NO_MEAN_IMAGE)


def _phantoms(wanted: config.PhantomData, num_probe: int, data: config.Data, tokenizer: Tokenizer) -> HeldOut:
    drawn = phantom.generate(
        wanted.studies,
        look=wanted.look,
        seed=wanted.seed,
        size=data.image_size,
        difficulty=wanted.difficulty,
        contrast=wanted.contrast,
    )
    assert drawn.images is not None
    assert drawn.reports is not None
    if num_probe >= wanted.studies:
        raise DataError(f"held_out.probe_studies = {num_probe} leaves no test study of {wanted.studies}; lower it")
    is_train = np.arange(wanted.studies) < num_probe
    straddling = drawn.patient == drawn.patient[num_probe]
    is_train[straddling] = False  # a patient's studies stay on one side
    return HeldOut(
        images=drawn.images,
        words=[np.array(ids, np.int64) for ids in tokenizer.encode(drawn.reports, data.max_words)],
        labels=drawn.labels,
        label_names=phantom.LABELS,
        patient=drawn.patient,
        is_probe_train=is_train,
        mean_image=drawn.images[is_train].mean(axis=0) / 255.0,
    )


def _mean_image(images: NDArray[np.uint8] | None, image_row: Sequence[int], is_train: Sequence[bool]) -> NDArray[Any] | None:
    """The mean of the training split's images; a baseline must not have seen the test images."""
    if images is None:
        return None
    rows = [row for row, train in zip(image_row, is_train, strict=True) if train and row >= 0]
    if not rows:
        raise DataError(NO_MEAN_IMAGE)
    mean_SS: NDArray[Any] = images[rows].mean(axis=0) / 255.0
    return mean_SS


def settings_of(experiment: config.Experiment, name: str | None = None) -> suite.EvaluationSettings:
    """The experiment's evaluation section as the evaluation room takes it, for the held-out set of this name as in ``load``."""
    wanted, held_out = experiment.evaluation, experiment.data.held_out
    return suite.EvaluationSettings(
        gallery=wanted.gallery,
        mask_ratio=wanted.mask_ratio,
        num_probe_train=(held_out if name is None else held_out.also[name]).probe_studies,
        num_bootstrap=wanted.num_bootstrap,
        max_images_regeneration=wanted.regeneration_images,
        seed=experiment.seed,
        rerank_top=wanted.rerank_top,
        fine_tune_steps=wanted.fine_tune_steps,
        prompt_tune_steps=wanted.prompt_tune_steps,
        trained_on=learnt(experiment),
    )


def learnt(experiment: config.Experiment) -> tuple[str, ...] | None:
    """The objectives that the experiment's model has learnt in the end, those of a model that it goes on from too.

    None where that model's folder does not say.
    """
    files = experiment.model.warm_start
    if files is None or files.model is None:
        return experiment.trained_on
    before = trained_on(files.model)
    return None if before is None else tuple(dict.fromkeys((*before, *experiment.trained_on)))


def write_examples(folder: Path, examples: Mapping[str, Any], held_out: HeldOut, tokenizer: Tokenizer, source: str) -> None:
    """Keep a few pictures and retrieved reports for the HTML report; only of phantoms or public studies."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {}
    if "regeneration" in examples:
        panel = examples["regeneration"]
        for name in ("original", "masked", "regenerated", "regenerated_with_report"):
            value = getattr(panel, name)
            if value is not None:
                arrays[name] = np.asarray(value, np.float32)
    found = examples.get("retrieval", ())
    if found:
        arrays["retrieval_image"] = np.stack([one.image for one in found])
    np.savez_compressed(folder / "examples.npz", allow_pickle=False, **arrays)
    described = [
        {
            "image": number,
            "texts": [tokenizer.decode(ids.tolist()) for ids in one.top_words],
            "correct": list(one.is_right),
            "truth": tokenizer.decode(held_out.words_of(np.array([one.study]))[0].tolist()),
        }
        for number, one in enumerate(found)
    ]
    (folder / "examples.json").write_text(json.dumps({"retrieval": described, "source": source}))
