"""XML from outside, read without the parts of XML that attack: no document type, hence no entities and nothing fetched.

What defusedxml does with ``forbid_dtd``, on expat itself, so that one reader needs no further dependency.
"""

from __future__ import annotations

from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from fedmix.data.quarantine import RefusedError

MAX_BYTES = 1024 * 1024  # a hundred times the longest report of Open-i
MAX_DEPTH = 100


def parse(data: bytes) -> Element:
    """The root element. Raises ``RefusedError`` ("xml_broken", "xml_forbidden", "file_too_large")."""
    if len(data) > MAX_BYTES:
        raise RefusedError("file_too_large")
    tree, depth = TreeBuilder(), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise RefusedError("xml_forbidden")
        tree.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        tree.end(name)

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _forbid
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, tree.data
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError, ValueError):  # the last two: an encoding that Python does not have
        raise RefusedError("xml_broken") from None  # expat's own message is harmless, a chained one may quote
    return tree.close()


def _forbid(*_: object) -> NoReturn:
    raise RefusedError("xml_forbidden")
