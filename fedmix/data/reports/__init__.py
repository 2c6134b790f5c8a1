"""Reports: bytes to text, text to sections, and sections to the one line that is learned from."""

from fedmix.data.reports.sections import DEFAULT_SECTIONS, SECTIONS, pick, sections_of
from fedmix.data.reports.text import MAX_BYTES, clean, decode, has_words

__all__ = ["DEFAULT_SECTIONS", "MAX_BYTES", "SECTIONS", "clean", "decode", "has_words", "pick", "sections_of"]
