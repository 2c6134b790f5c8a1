"""A run's model -> a folder for others, laid out as Hugging Face's are: written whole or not at all.

The vocabulary gains a template that puts the summary token first, so that transformers gives the ids this model knows;
config.json keeps the fingerprint of what the shards were prepared with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers
import yaml
from safetensors.torch import save_file

from fedmix.data.images import Fit, ImageOptions, Normalise
from fedmix.data.tokenizer import Tokenizer
from fedmix.disk import flush
from fedmix.errors import RunError
from fedmix.model.encoder import MixedModel
from fedmix.model.folder import FILES, MODEL_TYPE, Sizes, load_model
from fedmix.report.page import read_manifest
from fedmix.report.summary import read_report
from fedmix.trained.card import About, model_card
from fedmix.trained.preparation import FILE, described

WRITTEN = (*FILES, FILE, "tokenizer_config.json", "README.md")


def export(
    source: Path,
    out: Path,
    *,
    fit: Fit | None = None,
    normalise: Normalise | None = None,
    licence: str = "unknown",
    replace: bool = False,
) -> About:
    """Write the model folder, or the run folder around it, ``source`` as ``out``; returns what its card tells.

    ``fit`` and ``normalise`` say how the sites prepared pictures. Left out, they are what the run's phantoms are, or else
    what `fedmix prepare` does unless told otherwise: shards do not record it.
    """
    folder, run = _located(source)
    network, sizes, tokenizer = load_model(folder)
    if sizes.model_type is not None:
        raise RunError(f"{folder} is an exported model already; copy it, or export the run's own")
    phantoms_only = run is not None and _phantoms_only(run)
    preparation = ImageOptions(
        size=sizes.image_size, fit=fit or "pad", normalise=normalise or ("none" if phantoms_only else "standard")
    )
    about = About(
        sizes=sizes,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        preparation=preparation,
        preparation_is_assumed=not phantoms_only and (fit is None or normalise is None),
        phantoms_only=phantoms_only,
        report=read_report(run) if run is not None and (run / "report.json").is_file() else None,
        manifest=read_manifest(run) if run is not None else (),
        licence=licence,
    )
    with _written_whole(out, replace=replace) as partial:
        _write_files(partial, about, network, tokenizer, (folder / "tokenizer.json").read_text(encoding="utf-8"))
    return about


def _write_files(folder: Path, about: About, network: MixedModel, tokenizer: Tokenizer, definition: str) -> None:
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(_exported(about.sizes, tokenizer).as_json())
    # safetensors lets only the owner read what it writes; the others may as far as they may read the rest.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    (folder / "tokenizer.json").write_text(_with_summary(definition, tokenizer), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, about.sizes.max_words))
    _write_json(folder / FILE, described(about.preparation))
    (folder / "README.md").write_text(model_card(about), encoding="utf-8")


def _located(source: Path) -> tuple[Path, Path | None]:
    """The model folder, and the run it lies in if it does."""
    folder = source / "model" if (source / "model" / "config.json").is_file() else source
    run = folder.resolve().parent
    return folder, run if (run / "manifest.json").is_file() and (run / "config.yaml").is_file() else None


def _phantoms_only(run: Path) -> bool:
    """Whether every site trained on drawn phantoms. Only this is read, so that runs of an older fedmix can be exported."""
    try:
        sites = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["sites"]
        return all(site.get("phantom") is not None for site in sites)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"the run's config.yaml cannot be read ({type(error).__name__}); move the model folder elsewhere"
        ) from None


def _exported(sizes: Sizes, tokenizer: Tokenizer) -> Sizes:
    more = {
        "model_type": MODEL_TYPE,
        "architectures": ("MixedModel",),
        "fedmix_version": version("fedmix"),
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    return sizes.model_copy(update=more)


def _with_summary(definition: str, tokenizer: Tokenizer) -> str:
    """tokenizer.json with the summary token put before every text."""
    backend = tokenizers.Tokenizer.from_str(definition)
    summary = tokenizer.token(tokenizer.summary_id)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[summary, "$A"], pair=[summary, "$A", "$B"], special_tokens=[(summary, tokenizer.summary_id)]
    )
    text: str = backend.to_str(pretty=True)
    return text


def _tokenizer_config(tokenizer: Tokenizer, max_words: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_words,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "pad_token": tokenizer.token(tokenizer.pad_id),
        "unk_token": tokenizer.token(tokenizer.unknown_id),
        "cls_token": tokenizer.token(tokenizer.summary_id),
        "mask_token": tokenizer.token(tokenizer.mask_id),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _written_whole(out: Path, *, replace: bool) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it if all goes well, and is gone if not."""
    out = out.resolve()
    _check_goal(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = (out.with_name(f".{out.name}.{what}.{os.getpid()}") for what in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        for written in (*partial.iterdir(), partial):
            flush(written)
        if out.exists():
            out.rename(aside)
        try:
            partial.rename(out)
        except BaseException:
            if aside.exists():
                aside.rename(out)
            raise
        flush(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _check_goal(out: Path, *, replace: bool) -> None:
    """Nothing but an exported model may be replaced: ``--out ~ --replace`` must not cost anyone their files."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not replace:
        raise RunError(f"{out} is there already; name another folder, or add --replace")
    is_export = out.is_dir() and (out / FILE).is_file() and {path.name for path in out.iterdir()} <= set(WRITTEN)
    if not is_export:
        raise RunError(f"{out} holds other things than an exported model, so it is not replaced; name another folder")
