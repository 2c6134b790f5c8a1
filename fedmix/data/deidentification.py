"""What a shard says of how its patients were protected, in the terms of DICOM PS3.15 Annex E.

fedmix does not rewrite DICOM files by the tables of that annex: it reads a short list of attributes and keeps grey values,
token ids, split, view and findings, and sex and age band where a site asks for them, so every attribute that is not named
here is gone (action code X). This is a statement of what was done, for those who judge whether it is enough; it is no claim
of conformity with a profile.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

# Action codes of PS3.15, table E.1-1a: U replaced by a consistent identifier, X removed.
_ACTIONS = {
    "PatientID": "U",
    "StudyInstanceUID": "U",
    "AccessionNumber": "X",
    "SOPInstanceUID": "X",
    "StudyDate and all other dates and times": "X",
    "all other attributes, private ones included": "X",
}
# What is said instead where a site keeps patient characteristics: K kept, C replaced by a value of similar meaning.
_KEPT_ACTIONS = {"PatientSex": "K", "PatientAge": "C"}
_KEPT_OPTION = {"Retain Patient Characteristics": "applied: sex is kept, age as one of five bands; size is removed"}
# Options of PS3.15, table E.1-1, by name.
_OPTIONS = {
    "Clean Pixel Data": "not applied",
    "Clean Recognizable Visual Features": "not applied",
    "Clean Graphics": "not needed: overlays are removed",
    "Clean Structured Content": "not needed: structured content is removed",
    "Clean Descriptors": "see texts",
    "Retain Longitudinal Temporal Information": "not applied: times are removed",
    "Retain Patient Characteristics": "not applied: age, sex and size are removed",
    "Retain Device Identity": "not applied",
    "Retain Institution Identity": "not applied",
    "Retain UIDs": "not applied",
    "Retain Safe Private": "not applied",
}


class Deidentification(BaseModel):
    """The statement; its defaults are what is true of every shard.

    ``identifiers``: how those of patients and studies were replaced. ``burned_in_not_stated``: what became of DICOM images
    whose BurnedInAnnotation is blank; those that say YES are always left out. ``texts``: what the search for dates, numbers
    and names did. ``texts_kept_with``: how many texts were kept in spite of it, by kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    standard: str = "DICOM PS3.15 Annex E"
    identifiers: str = "HMAC-SHA256, 128 bits, under a key that stays at the site"
    longitudinal_temporal_information_modified: Literal["REMOVED"] = "REMOVED"
    actions: dict[str, str] = Field(default_factory=lambda: dict(_ACTIONS))
    options: dict[str, str] = Field(default_factory=lambda: dict(_OPTIONS))
    burned_in_yes: Literal["left out"] = "left out"
    burned_in_not_stated: Literal["left out", "kept"] = "kept"
    pixels_searched: bool = False
    texts: Literal["not searched", "left out where the gate found something", "searched and kept"] = "not searched"
    texts_kept_with: dict[str, NonNegativeInt] = Field(default_factory=dict)

    def keeping_characteristics(self) -> Deidentification:
        """The statement of a shard that keeps sex and age band."""
        return self.model_copy(update={"actions": _KEPT_ACTIONS | self.actions, "options": self.options | _KEPT_OPTION})
