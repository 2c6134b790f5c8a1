"""Every encoding of one picture comes out upright, with the right polarity and to the pixel; what is odd is refused."""

import struct
from io import BytesIO

import numpy as np
import pytest
from pydicom import dcmread, uid
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from radiographs import GDCM_SYNTAXES, LOSSLESS, bare, dataset, file_of, jpeg, marked, open_data, written

from fedmix.data import dicom
from fedmix.data.images import ImageOptions, decode_grey, read_image
from fedmix.data.layouts.records import Picture
from fedmix.data.pictures import PictureReader
from fedmix.data.quarantine import REASONS, RefusedError
from fedmix.data.walls import Limits, Walls

LOOSE = dicom.Gates(secondary_capture=True)


def code_of(data, gates=None):
    with pytest.raises(RefusedError) as caught:
        dicom.read_pixels(data, gates=gates)
    assert caught.value.code in REASONS
    return caught.value.code


def assert_upright(grey, tolerance=12):
    """Levels fall from top left over top right and bottom left to bottom right."""
    rows, columns = (side // 2 for side in grey.shape)
    quadrants = [
        float(np.median(grey[row : row + rows, column : column + columns])) for row in (0, rows) for column in (0, columns)
    ]
    ends = marked(*grey.shape) / 4095
    low, high = np.percentile(ends, [0.5, 99.5])
    wanted = [
        float(np.median(((ends - low) / (high - low)).clip(0, 1)[row : row + rows, column : column + columns])) * 255
        for row in (0, rows)
        for column in (0, columns)
    ]
    assert quadrants == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_every_lossless_encoding_gives_the_same_upright_picture(syntax):
    plain = dicom.read_pixels(file_of(marked()))
    assert plain.shape == (60, 80)
    assert plain.dtype == np.uint8
    assert_upright(plain)
    assert np.array_equal(dicom.read_pixels(file_of(marked(), syntax=syntax)), plain)


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_monochrome1_is_inverted_once_whether_or_not_the_shape_says_so_too(syntax):
    plain = dicom.read_pixels(file_of(marked()))
    for shape in (None, "INVERSE"):
        inverted = file_of(4095 - marked(), syntax=syntax, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape=shape)
        assert np.array_equal(dicom.read_pixels(inverted), plain)
    assert np.array_equal(dicom.read_pixels(file_of(4095 - marked(), syntax=syntax, PresentationLUTShape="INVERSE")), plain)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
def test_copies_of_any_depth_come_out_alike(bits):
    eight = (marked() >> 4).astype(np.uint8)
    plain = dicom.read_pixels(file_of(eight, bits=8))
    assert_upright(plain)
    deeper = (eight.astype(np.uint16) << (bits - 8)) if bits > 8 else eight
    assert np.array_equal(dicom.read_pixels(file_of(deeper, bits=bits)), plain)


def test_signed_pixels_come_out_as_unsigned_ones_do():
    plain = dicom.read_pixels(file_of(marked()))
    signed = marked().astype(np.int16) - 2048
    for syntax in (uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless, uid.JPEG2000Lossless):
        assert np.array_equal(dicom.read_pixels(file_of(signed, syntax=syntax)), plain)


def test_bits_above_those_stored_are_not_part_of_the_image():
    plain = dicom.read_pixels(file_of(marked()))
    overlay = marked() | (np.arange(80) % 2 << 13).astype(np.uint16)
    assert np.array_equal(dicom.read_pixels(file_of(overlay)), plain)
    signed = ((marked().astype(np.int16) - 2048) & 0x0FFF).astype(np.int16)  # sign not carried into the unused bits
    assert np.array_equal(dicom.read_pixels(file_of(signed)), plain)


def test_jpeg_baseline_is_decoded_close_to_what_was_stored():
    eight = (marked() >> 4).astype(np.uint8)
    plain = dicom.read_pixels(file_of(eight, bits=8))
    lossy = dicom.read_pixels(file_of(eight, bits=8, syntax=uid.JPEGBaseline8Bit))
    assert np.abs(lossy.astype(int) - plain).mean() < 3
    assert_upright(lossy)


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble_or_meta_is_read_when_it_is_clearly_dicom(implicit):
    data = bare(marked(), implicit=implicit)
    assert not data.startswith(bytes(128))
    assert np.array_equal(dicom.read_pixels(data), dicom.read_pixels(file_of(marked())))
    without_class = bare(marked(), implicit=implicit, SOPClassUID=None)
    assert not dicom.is_dicom(without_class)
    assert code_of(without_class) == "image_format"


def test_a_missing_transfer_syntax_is_found_from_the_tags():
    built = dataset(marked())
    data = written(built)
    start = data.index(b"\x02\x00\x10\x00UI")
    length = struct.unpack_from("<H", data, start + 6)[0]
    assert np.array_equal(dicom.read_pixels(data[:start] + data[start + 8 + length :]), dicom.read_pixels(file_of(marked())))


def test_images_go_through_the_same_door_as_png_and_the_name_plays_no_part():
    options = ImageOptions(size=48)
    data = file_of(marked(), PhotometricInterpretation="MONOCHROME2")
    assert np.array_equal(decode_grey(data), dicom.read_pixels(data))
    square = read_image(data, options)
    assert square.shape == (48, 48)
    assert not square[:6].any()  # 60 x 80 between black bars
    capture = file_of(marked(), SOPClassUID=uid.SecondaryCaptureImageStorage)
    with pytest.raises(RefusedError, match="secondary capture"):
        read_image(capture, options)
    assert np.array_equal(read_image(capture, options, gates=LOOSE), square)
    polyglot = b"\x89PNG\r\n\x1a\n" + file_of(marked(), BurnedInAnnotation="YES")[8:]
    with pytest.raises(RefusedError, match="may show a name"):
        read_image(polyglot, options)


# ---- gates


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({"SOPClassUID": uid.CTImageStorage}, "dicom_class"),
        ({"SOPClassUID": uid.DigitalXRayImageStorageForProcessing}, "dicom_class"),
        ({"SOPClassUID": uid.DigitalMammographyXRayImageStorageForPresentation}, "dicom_class"),
        ({"SOPClassUID": uid.SecondaryCaptureImageStorage}, "dicom_secondary_capture"),
        ({"Modality": "MG"}, "dicom_modality"),
        ({"Modality": None}, "dicom_modality"),
        ({"BodyPartExamined": "SKULL"}, "dicom_body_part"),
        ({"BurnedInAnnotation": "YES"}, "dicom_burned_in"),
        ({"BurnedInAnnotation": "MAYBE"}, "dicom_burned_in"),
        ({"NumberOfFrames": 2}, "dicom_frames"),
        ({"NumberOfFrames": 0}, "dicom_frames"),
        ({"SamplesPerPixel": 3}, "dicom_colour"),
        ({"PhotometricInterpretation": "RGB"}, "dicom_colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "dicom_colour"),
        ({"Rows": 65535, "Columns": 65535}, "image_too_large"),
        ({"Rows": 10_001}, "image_too_large"),
        ({"Rows": 8_001, "Columns": 8_001}, "image_too_large"),
        ({"Rows": 15}, "image_too_small"),
        ({"Rows": None}, "image_too_small"),
        ({"Rows": 61}, "dicom_size_mismatch"),
        ({"Rows": 59}, "dicom_size_mismatch"),
        ({"BitsAllocated": 32}, "dicom_bits"),
        ({"BitsStored": 7, "HighBit": 6}, "dicom_bits"),
        ({"BitsStored": 17, "HighBit": 16}, "dicom_bits"),
        ({"HighBit": 15}, "dicom_bits"),
        ({"WindowCenter": 2000, "WindowWidth": 0}, "dicom_display"),
        ({"WindowCenter": 2000, "WindowWidth": 100, "VOILUTFunction": "CUBIC"}, "dicom_display"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "dicom_display"),
    ],
    ids=str,
)
def test_a_header_that_is_none_of_a_chest_radiograph_is_refused(tags, code):
    assert code_of(file_of(marked(), **tags)) == code


def test_what_the_site_allows_is_let_in_and_what_it_asks_for_is_asked():
    capture = file_of(marked(), SOPClassUID=uid.SecondaryCaptureImageStorage)
    assert dicom.read_pixels(capture, gates=LOOSE).shape == (60, 80)
    blank = file_of(marked(), BurnedInAnnotation=None)
    assert dicom.read_pixels(blank).shape == (60, 80)
    assert code_of(blank, dicom.Gates(unmarked=False)) == "dicom_unmarked"
    assert code_of(file_of(marked(), BurnedInAnnotation="YES"), LOOSE) == "dicom_burned_in"


def test_rows_of_a_type_that_the_standard_does_not_allow_are_refused():
    data = bytearray(file_of(marked()))
    at = data.index(b"\x28\x00\x10\x00US")
    data[at + 4 : at + 6] = b"SS"
    assert code_of(bytes(data)) == "image_too_small"


def test_a_codestream_of_another_size_than_the_header_never_reaches_its_decoder():
    for syntax in GDCM_SYNTAXES:
        built = dcmread(BytesIO(file_of(marked(), syntax=syntax)))
        built.Rows = 58
        assert code_of(written(built)) == "dicom_size_mismatch"
    eight = dataset((marked() >> 4).astype(np.uint8), bits=8)
    eight.PixelData = encapsulate([jpeg(marked(62, 80) >> 4)])
    assert code_of(written(eight, uid.JPEGBaseline8Bit)) == "dicom_size_mismatch"


def test_unknown_compressions_are_refused_by_name():
    for syntax in (uid.MPEG2MPML, uid.JPIPHTJ2KReferenced):
        built = dataset(marked())
        built.PixelData = encapsulate([bytes(100)])
        assert code_of(written(built, syntax)) == "dicom_transfer_syntax"


@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K, uid.JPEG2000Lossless, uid.JPEG2000])
def test_high_throughput_jpeg_2000_is_refused_with_what_to_do_also_where_it_is_called_jpeg_2000(syntax):
    rows, columns = marked().shape
    size = struct.pack(">H8IH3B", 0x4000, columns, rows, 0, 0, columns, rows, 0, 0, 1, 11, 1, 1)  # SIZ of ITU-T T.814
    built = dataset(marked())
    built.PixelData = encapsulate([b"\xff\x4f\xff\x51" + struct.pack(">H", 2 + len(size)) + size + b"\xff\xd9"])
    with pytest.raises(RefusedError, match="high-throughput JPEG 2000; export the DICOM file as JPEG 2000 or uncompressed"):
        dicom.read_pixels(written(built, syntax))


@pytest.mark.parametrize(
    ("syntax", "bits"), [(uid.JPEGExtended12Bit, 12), (uid.JPEGExtended12Bit, 8), (uid.JPEGBaseline8Bit, 8)]
)
def test_jpeg_of_twelve_bits_is_refused_with_what_to_do_also_where_it_is_called_eight(syntax, bits):
    frame = bytearray(jpeg(marked() >> 4))
    at = frame.index(b"\xff\xc0")
    frame[at + 1], frame[at + 4] = 0xC1, 12  # extended sequential, 12 bits a sample (ITU-T T.81, B.2.2)
    built = dataset(marked() if bits == 12 else (marked() >> 4).astype(np.uint8), bits=bits)
    built.PixelData = encapsulate([bytes(frame)])
    with pytest.raises(RefusedError, match="JPEG of 12 bits; export the DICOM file as JPEG lossless or uncompressed"):
        dicom.read_pixels(written(built, syntax))


def test_jpeg_of_the_extended_process_is_read_where_it_has_eight_bits():
    eight = (marked() >> 4).astype(np.uint8)
    frame = bytearray(jpeg(eight))
    frame[frame.index(b"\xff\xc0") + 1] = 0xC1
    built = dataset(eight, bits=8)
    built.PixelData = encapsulate([bytes(frame)])
    extended = dicom.read_pixels(written(built, uid.JPEGExtended12Bit))
    assert np.array_equal(extended, dicom.read_pixels(file_of(eight, bits=8, syntax=uid.JPEGBaseline8Bit)))


def test_dicomdir_and_files_without_pixels_or_of_other_kinds_are_refused():
    assert code_of(file_of(marked(), SOPClassUID=uid.MediaStorageDirectoryStorage)) == "dicom_directory"
    without = dataset(marked())
    del without.PixelData
    assert code_of(written(without)) == "dicom_no_pixels"
    for junk in (b"", b"DICM", bytes(200), b"hello" * 100, b"\x08\x00" + bytes(500)):
        assert not dicom.is_dicom(junk)
        assert code_of(junk) == "image_format"
    assert code_of(bytes(128) + b"DICM") in ("dicom_class", "dicom_broken")


@pytest.mark.parametrize("syntax", [*LOSSLESS, uid.JPEGBaseline8Bit], ids=lambda syntax: syntax.keyword)
def test_a_truncated_file_is_refused_wherever_it_ends(syntax):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    data = file_of(noise, bits=8, syntax=syntax)
    for end in range(0, len(data) - 40, max(1, len(data) // 60)):
        with pytest.raises(RefusedError):
            dicom.read_pixels(data[:end])


def test_blank_images_are_refused():
    assert code_of(file_of(np.full((40, 40), 900, np.uint16))) == "image_blank"
    assert code_of(file_of(np.full((40, 40), 900, np.uint16), PixelPaddingValue=900)) == "image_blank"


# ---- bombs


def test_a_deflated_bomb_is_refused_without_being_inflated():
    bomb = dataset(np.zeros((100, 100), np.uint16))
    bomb.add_new((0x0009, 0x0010), "LO", "BOMB")
    bomb.add_new((0x0009, 0x1001), "OB", bytes(300 << 20))
    data = written(bomb, uid.DeflatedExplicitVRLittleEndian)
    assert len(data) < 500_000
    assert code_of(data) == "dicom_inflates"


def test_sequences_nested_without_end_are_refused():
    opened = struct.pack("<HHI", 0x0008, 0x1140, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    head = bare(marked())[: bare(marked()).index(b"\x08\x00\x50\x00")]  # up to the accession number
    for depth in (900, 100_000):
        assert code_of(head + opened * depth) == "dicom_broken"


def test_an_rle_file_that_claims_a_huge_image_is_refused_by_its_header():
    built = dataset(np.zeros((16, 16), np.uint8), bits=8, Rows=65535, Columns=65535)
    built.PixelData = encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * 8])
    assert code_of(written(built, uid.RLELossless)) == "image_too_large"


def rle_bomb(rows, columns, packets):
    """A file of 8 bits whose every two bytes become 128."""
    built = dataset(np.zeros((16, 16), np.uint8), bits=8, Rows=rows, Columns=columns)
    built.PixelData = encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * packets])
    return written(built, uid.RLELossless)


def test_an_rle_bomb_is_refused_before_it_is_decoded():
    assert code_of(rle_bomb(64, 64, 4 << 20)) == "dicom_size_mismatch"
    assert code_of(rle_bomb(8000, 8000, 100)) == "dicom_broken"  # far fewer pixels than it says


def test_an_rle_bomb_that_is_no_longer_than_its_pixels_ends_at_the_wall(tmp_path):
    (tmp_path / "bomb.dcm").write_bytes(rle_bomb(2000, 2000, 3_900_000))
    assert (tmp_path / "bomb.dcm").stat().st_size < 8_000_000  # and 500 million when decoded
    reader = PictureReader(tmp_path, ImageOptions(size=32), frozenset({"PA"}))
    with Walls(reader, workers=1, limits=Limits(memory_bytes=128 << 20)) as walls:
        answer = walls.ask(Picture(("bomb.dcm",), view="PA"))
    assert isinstance(answer, RefusedError)
    assert answer.code in ("decoder_memory", "dicom_broken")  # pydicom hides why its decoder failed


def test_nothing_of_a_file_is_ever_logged(caplog, capfd):
    item = Dataset()
    with disable_value_validation():
        item.CodeMeaning = "CANARY" * 400
        coded = file_of(marked(), ViewCodeSequence=Sequence([item]), ViewPosition="CANARY VIEW TOO LONG")
        whole = file_of(marked(), syntax=uid.JPEG2000Lossless, PatientAge="CANARY-AGE")
    at = whole.index(b"\xff\x4f\xff\x51")
    damaged = whole[: at + 60] + bytes(len(whole) - at - 60)
    caplog.clear()
    dicom.read_header(coded)
    dicom.read_pixels(coded)
    dicom.read_header(damaged)
    with pytest.raises(RefusedError) as caught:
        dicom.read_pixels(damaged)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert "CANARY" not in str(caught.value)
    assert "CANARY" not in caplog.text
    assert capfd.readouterr() == ("", "")


# ---- real files


@pytest.mark.data
def test_all_real_files_come_out_upright_and_lossless_variants_to_the_pixel():
    files = {path.stem: path.read_bytes() for path in sorted((open_data() / "dicom").rglob("*.dcm"))}
    assert len(files) == 13
    grey = {name: dicom.read_pixels(data, gates=LOOSE) for name, data in files.items()}
    same = [name for name in grey if name.startswith("nih_") and not name.startswith("nih_dx")]
    assert len(same) == 7
    for name in same:
        assert np.array_equal(grey[name], grey["nih_explicitle_mono2"])
    pair = [grey[f"nema_rg1_cr_pa_mono1_{codec}"].astype(int) for codec in ("jpeg2000lossy", "jpegls_nearlossless")]
    assert np.abs(pair[0] - pair[1]).mean() < 1
    # Honoured, not guessed: this file's pixels were not inverted when its tag was.
    fake, true = grey.pop("rsna_cr_pa_mono1tag_jpegbaseline"), grey["rsna_cr_pa_mono2_jpegbaseline"]
    assert np.abs(255 - fake.astype(int) - true).max() <= 1
    for picture in grey.values():
        rows, columns = picture.shape
        middle = picture[int(0.3 * rows) : int(0.5 * rows)].astype(float)
        right, left, spine = (middle[:, int(at * columns) : int((at + 0.12) * columns)].mean() for at in (0.22, 0.66, 0.44))
        assert max(right, left) < spine  # lungs are dark on both sides of a bright spine
        heart = picture[int(0.5 * rows) : int(0.7 * rows)].astype(float)
        assert heart[:, columns // 2 : int(0.65 * columns)].mean() > heart[:, int(0.35 * columns) : columns // 2].mean()
