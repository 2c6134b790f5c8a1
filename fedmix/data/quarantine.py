"""Why a row or file was left out: a closed list of reason codes, so that counts may be shown and content never is.

A code that is not listed here cannot be recorded, which keeps a file name or a line of a report from becoming one.
"""

from __future__ import annotations

from fedmix.errors import DataError

REASONS: dict[str, str] = {
    "row_malformed": "the row's cells do not match the header, or its quotes do not close",
    "patient_missing": "the patient cell is empty, so the row cannot be kept in one split with the patient's others",
    "label_unreadable": "a label cell is none of 1, 0, -1 and blank, or names a finding of more than 80 characters",
    "split_unknown": "the split cell is none of train, val and test",
    "split_conflict": "the same patient was already placed in another split",
    "no_image": "the row has no image, and the shard is to hold one for every study",
    "no_text": "the row has no text, and the shard is to hold one for every study",
    "no_image_no_text": "the row has neither an image nor a text",
    "path_control": "the path holds NUL, a control character or an invisible one",
    "path_backslash": "the path holds a backslash",
    "path_absolute": "the path is absolute, a drive or a URL; it has to be relative to the root folder",
    "path_parent": "the path climbs with '..'",
    "path_escape": "a symbolic link leads out of the root folder",
    "path_unexpected": "the path or identifier does not look like those of this data set",
    "path_too_long": "the path is longer than a file system allows",
    "file_missing": "there is no such file under the root folder",
    "file_not_regular": "the path is a folder, a device or a pipe",
    "file_unreadable": "the file cannot be read: permission or disk",
    "file_too_large": "the file is larger than the limit",
    "image_format": "the file is neither PNG, JPEG nor DICOM",
    "image_broken": "the image cannot be decoded to its end: truncated or damaged",
    "image_mode": "the image is neither grey, RGB nor palette (CMYK, for instance)",
    "image_too_large": "the image has more pixels than the limit",
    "image_too_small": "a side of the image is shorter than the limit",
    "image_blank": "every pixel of the image has the same value",
    "text_encoding": "the text is neither UTF-8 nor in the declared fallback encoding",
    "gzip_broken": "the gzip file cannot be unpacked to its end; fetch it again",
    "xml_broken": "the XML cannot be read to its end; fetch it again",
    "xml_forbidden": "the XML declares a document type, or is nested too deep",
    "view_lateral": "the image is a lateral view, and the shard takes frontal ones; see --views",
    "view_unknown": "nothing says which view the image is, and it is not guessed; see --views",
    "image_extra": "the study has another image in the shard already, with its report",
    "report_missing": "there is no report file for the study",
    "phi_date": "the text holds a date; de-identify the reports, or see --phi",
    "phi_phone": "the text holds a telephone number; de-identify the reports, or see --phi",
    "phi_email": "the text holds an e-mail or web address; de-identify the reports, or see --phi",
    "phi_record": "the text holds a record number; de-identify the reports, or see --phi",
    "phi_name": "the text holds a name after a title or heading; de-identify the reports, or see --phi",
    "not_dicom": "the file is no DICOM file",
    "text_nul": "the text holds NUL",
    "text_empty": "the text holds neither a letter nor a digit",
    "dicom_broken": "the DICOM file cannot be read to its end: truncated or damaged; export it again",
    "dicom_directory": "the file is a DICOMDIR, an index of others; point at the folder with the images",
    "dicom_inflates": "the deflated DICOM file grows beyond the limit; export it uncompressed if it is a real radiograph",
    "dicom_class": "the DICOM file is neither a CR image nor a DX image for presentation",
    "dicom_secondary_capture": "the DICOM file is a secondary capture, which may show a name; the site has to allow them",
    "dicom_modality": "the modality is neither CR nor DX",
    "dicom_body_part": "the DICOM file names another part of the body than the chest",
    "dicom_burned_in": "BurnedInAnnotation says that the pixels may show a name; have it removed at the archive",
    "dicom_unmarked": "the DICOM file does not say whether a name is burned in, and the site asks for it",
    "dicom_frames": "the DICOM file holds more than one frame, or says nothing sensible of how many",
    "dicom_colour": "the image is not grey (MONOCHROME1 or MONOCHROME2 with one sample a pixel)",
    "dicom_bits": "the pixels are not of 8 to 16 bits, stored from the lowest bit up",
    "dicom_transfer_syntax": "no decoder here knows the DICOM file's compression; export it as JPEG 2000 or uncompressed",
    "dicom_no_pixels": "the DICOM file holds no pixels",
    "dicom_size_mismatch": "the pixels of the DICOM file are not as many as its header says",
    "dicom_display": "the lookup table, rescale slope or window of the DICOM file means nothing",
    "decoder_crashed": "the process that decoded the file died; the file is damaged, or meant to do harm",
    "decoder_timeout": "decoding the file took longer than the limit",
    "decoder_memory": "decoding the file took more memory than the limit",
}


class RefusedError(DataError):
    """One row or file cannot be used; ``code`` says why and is all that may be counted, logged or shown."""

    def __init__(self, code: str) -> None:
        super().__init__(REASONS[code])
        self.code = code
