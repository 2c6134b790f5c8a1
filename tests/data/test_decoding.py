"""A table may list DICOM files beside others: they are decoded by workers, never in the process that reads the table."""

import numpy as np
import pytest
from PIL import Image
from radiographs import file_of, marked

from fedmix.data import dicom
from fedmix.data.images import ImageOptions, read_image
from fedmix.data.layouts.records import Picture, Source
from fedmix.data.prepare.decoding import decoding
from fedmix.data.prepare.options import PrepareOptions
from fedmix.data.quarantine import RefusedError


def test_dicom_files_of_a_table_are_decoded_by_workers_and_plain_ones_are_not(tmp_path, monkeypatch):
    options = ImageOptions(size=32)
    data = file_of(marked())
    wanted = read_image(data, options)
    (tmp_path / "a.png").write_bytes(data)  # what a file is, its name does not say
    Image.fromarray((marked() >> 4).astype(np.uint8)).save(tmp_path / "b.dcm", "PNG")
    (tmp_path / "c.dcm").write_bytes(file_of(marked(), BurnedInAnnotation="YES"))
    (tmp_path / "d.dcm").write_bytes(b"GIF89a" + bytes(300))

    def never(*_, **__):
        raise AssertionError("decoded in this process")

    monkeypatch.setattr(dicom, "read_pixels", never)  # workers import their own
    source = Source(root=tmp_path, num_rows=4, label_names=(), records=lambda: iter(()))
    with decoding(source, PrepareOptions(image=options), workers=2) as decode:
        assert np.array_equal(decode(Picture(("a.png",), view="PA")).image, wanted)
        plain = decode(Picture(("b.dcm",), view="PA"))
        assert plain.view == "PA"
        assert np.array_equal(plain.image, read_image((tmp_path / "b.dcm").read_bytes(), options))
        for name, code in (("c.dcm", "dicom_burned_in"), ("d.dcm", "image_format"), ("e.dcm", "file_missing")):
            with pytest.raises(RefusedError) as caught:
                decode(Picture((name,), view="PA"))
            assert caught.value.code == code
