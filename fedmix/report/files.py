"""JSON and text files of a run folder, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmix.disk import write_whole
from fedmix.errors import RunError


def read_json(path: Path) -> Any:
    """Parsed JSON, None where there is no such file; raises RunError if it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path.name}: {type(error).__name__}; expected one JSON document in UTF-8") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half; raises RunError on NaN or infinity."""
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RunError(f"{path.name}: {first_non_finite(data, '') or 'a value'} cannot be written as JSON; use null") from None
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON may spell half a character (a lone surrogate); it must not keep a report from being written.
    write_whole(path, text.encode("utf-8", errors="replace"))


def first_non_finite(value: Any, path: str) -> str | None:
    """Where in nested JSON values the first NaN or infinity is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    if isinstance(value, Mapping):
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{position}]", item) for position, item in enumerate(value)]
    else:
        return None
    return next((culprit for key, item in items if (culprit := first_non_finite(item, key))), None)
