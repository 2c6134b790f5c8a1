"""XML from outside, read by defusedxml without a document type: hence no entities, and nothing is fetched."""

from __future__ import annotations

from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from fedmix.data.quarantine import RefusedError

MAX_BYTES = 1024 * 1024  # a hundred times the longest report of Open-i


def parse(data: bytes) -> Element:
    """The root element. Raises ``RefusedError`` ("xml_broken", "xml_forbidden", "file_too_large")."""
    if len(data) > MAX_BYTES:
        raise RefusedError("file_too_large")
    try:
        root: Element = fromstring(data, forbid_dtd=True)
    except DefusedXmlException:
        raise RefusedError("xml_forbidden") from None
    except (ParseError, LookupError, ValueError):  # the last two: an encoding that Python does not have
        raise RefusedError("xml_broken") from None  # not chained: a message may quote the document
    return root
