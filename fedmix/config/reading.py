"""From YAML to an Experiment: bounded reading, overrides, and errors that name key, value and what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedmix.config.experiment import Experiment
from fedmix.config.model import SIZES
from fedmix.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20  # a config is pages, not megabytes: refuse before parsing
MAX_CONFIG_VALUES, MAX_CONFIG_DEPTH = 100_000, 50  # aliases unfolded: a page of them can stand for gigabytes


def load(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from YAML and apply ``key.path=value`` overrides.

    Raises ConfigError that names the key, the value and what is allowed.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}; configs/ holds examples, configs/demo.yaml is a start") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} holds {len(raw)} bytes; a config has at most {MAX_CONFIG_BYTES}")
    return parse(raw.decode("utf-8", errors="replace"), overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> Experiment:
    """The experiment that a YAML text describes; ``source`` is what errors call it."""
    values = read_yaml(text, source)
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold keys and values at its top, such as name: demo")
    for override in sorted(overrides, key=lambda override: not override.startswith("model.size=")):
        _apply_override(values, override)
    return build(values, source=source)


def build(values: Mapping[str, Any], *, source: str = "config") -> Experiment:
    """The experiment of already parsed values."""
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(error))) from None
    for name in experiment.baselines:
        variant(experiment, name)  # a misspelt key in a baseline is found before hours of training
    return experiment


def variant(experiment: Experiment, name: str) -> Experiment:
    """The experiment of a baseline: this one with the baseline's overrides merged in.

    Mappings merge key by key, everything else (lists of stages too) is replaced.
    """
    values = experiment.model_dump(mode="json")
    overrides = values.pop("baselines")[name]
    if isinstance(overrides.get("model"), Mapping) and "size" in overrides["model"]:
        _forget_sizes(values["model"])
    merged = _merge(values, overrides)
    merged["name"] = name
    return build(merged, source=f"baselines.{name}")


def regime(experiment: Experiment, name: str) -> Experiment:
    """The experiment of a study's regime: this one with the regime's overrides, which may name a list's entry.

    ``{data: {sites: {west: {phantom: {studies: 12}}}}}`` and ``{data.sites.west.phantom.studies: 12}`` are the same.
    """
    assert experiment.study is not None
    overrides = [f"{path}={json.dumps(value)}" for path, value in _leaves(experiment.study.regimes[name])]
    return parse(experiment.to_yaml(), overrides, source=f"study.regimes.{name}")


def json_schema() -> dict[str, Any]:
    """JSON Schema of an experiment file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Experiment.model_json_schema()


def read_yaml(text: str, source: str) -> Any:
    """Plain values from a YAML text. Raises ConfigError, which calls the text ``source``."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source} is not YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (ValueError, LookupError, AttributeError) as error:  # what Python says of 2001-99-99 or !!int x
        raise ConfigError(f"{source} holds a value that YAML cannot read: {_short(str(error))}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; a config has at most {MAX_CONFIG_DEPTH} levels") from None
    _check_extent(values, source)
    return _unshared(values)


def _check_extent(values: Any, source: str) -> None:
    """Refuse what aliases make endless or huge, before anything copies it."""
    waiting, num_values = [(values, 0)], 1
    while waiting:
        node, depth = waiting.pop()
        inner = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        num_values += len(inner)
        if depth > MAX_CONFIG_DEPTH or num_values > MAX_CONFIG_VALUES:
            raise ConfigError(f"{source}: at most {MAX_CONFIG_VALUES} values in {MAX_CONFIG_DEPTH} levels, aliases unfolded")
        waiting.extend((value, depth + 1) for value in inner)


def _unshared(values: Any) -> Any:
    """The same values with every alias written out, so that an override of one place does not change another."""
    if isinstance(values, dict):
        return {key: _unshared(value) for key, value in values.items()}
    return [_unshared(value) for value in values] if isinstance(values, list) else values


def _merge(values: Any, overrides: Any) -> Any:
    if isinstance(values, dict) and isinstance(overrides, Mapping):
        return values | {key: _merge(values.get(key), value) for key, value in overrides.items()}
    return overrides


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Nested overrides as ``a.b.c`` and a value."""
    for key, value in values.items():
        place = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, place)
        else:
            yield place, value


def _forget_sizes(model: Any) -> None:
    """An override of model.size replaces the sizes written before, or a resolved experiment would never change its size."""
    if isinstance(model, dict):
        for key in next(iter(SIZES.values())):
            model.pop(key, None)


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b.0.c=value`` in place; the value is read as YAML, a number in the path indexes a list."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r}: write it as key=value, such as --set model.width=128")
    *parents, last = path.split(".")
    node: Any = values
    for key in parents:
        place = _index(node, key, path) if isinstance(node, list) else key
        if isinstance(node, dict) and node.get(key) is None:  # left out, or null as a resolved experiment writes it
            node[key] = {}
        node = node[place]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {path}: {key!r} holds a value, it has no keys inside")
    value = read_yaml(text, f"--set {path}: {_short(text)}")
    if path == "model.size":
        _forget_sizes(node)
    node[_index(node, last, path) if isinstance(node, list) else last] = value


def _index(items: list[Any], key: str, path: str) -> int:
    for position, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == key:
            return position
    if key.isdecimal() and len(key) < 6 and int(key) < len(items):
        return int(key)
    raise ConfigError(f"--set {path}: {key!r} is neither a name nor a position in a list of {len(items)}")


def _explain(error: ValidationError) -> Iterator[str]:
    """One sentence for each thing that is wrong: key, value, what is allowed."""
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield _unknown_key(key, str(problem["loc"][-1]))
        elif problem["type"] == "missing":
            yield f"{key} is missing; it must be given"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            yield f"{key}: {text}" if key else text
        else:
            yield f"{key} = {_short(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _unknown_key(key: str, name: str) -> str:
    near = difflib.get_close_matches(name, sorted(_known_keys()), n=1, cutoff=0.5)
    suggestion = f"did you mean {near[0]!r}?" if near else "`fedmix config schema` lists the known keys"
    return f"unknown key {key!r}; {suggestion}"


def _known_keys() -> set[str]:
    schema = Experiment.model_json_schema()
    return set(schema["properties"]).union(*(part.get("properties", {}) for part in schema["$defs"].values()))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
