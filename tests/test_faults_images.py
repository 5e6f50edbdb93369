"""Image datasets with surprises: tones that get lost, unreadable folders, masks, reserved words."""

import io

import numpy as np
import pytest
from PIL import Image

from densecl.data.decode import CorruptImageError, decode_image

RAMP = np.linspace(0, 1, 4096).reshape(64, 64)  # 4096 levels from black to white


def as_bytes(values, kind="TIFF", **options):
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def unsigned_32_bit_tiff():
    """Pillow writes only signed ones."""
    file = io.BytesIO()
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(file, np.round(RAMP * (2**32 - 1)).astype(np.uint32))
    return file.getvalue()


TONES = {
    "float 0..1": lambda: as_bytes(RAMP.astype(np.float32)),
    "float 0..255": lambda: as_bytes((RAMP * 255).astype(np.float32)),
    "float -1..1": lambda: as_bytes((2 * RAMP - 1).astype(np.float32)),
    "float with a missing value": lambda: as_bytes(
        np.where(RAMP == 0, np.nan, RAMP).astype(np.float32)
    ),
    "float, a portable map": lambda: as_bytes(RAMP.astype(np.float32), "PPM"),
    "10 bits in 16": lambda: as_bytes((RAMP * 1023).astype(np.uint16), "PNG"),
    "12 bits in 16": lambda: as_bytes((RAMP * 4095).astype(np.uint16), "PNG"),
    "12 bits in 16, big endian": lambda: as_bytes((RAMP * 4095).astype(">u2")),
    "16 bits": lambda: as_bytes((RAMP * 65535).astype(np.uint16), "PNG"),
    "a narrow range of 16 bits": lambda: as_bytes((30000 + RAMP * 1023).astype(np.uint16), "PNG"),
    "signed": lambda: as_bytes((RAMP * 4095 - 2048).astype(np.int32)),
    "32 bits": lambda: as_bytes((RAMP * (2**31 - 1)).astype(np.int32)),
    "unsigned 32 bits": unsigned_32_bit_tiff,
}


@pytest.mark.parametrize("kind", TONES)
def test_a_ramp_keeps_its_tones_in_every_number_format(kind):
    gray = np.asarray(decode_image(TONES[kind]()))[..., 0].astype(int)
    assert len(np.unique(gray)) > 200, np.unique(gray)
    assert gray.max() > 250 and gray.min() < 5
    assert (np.diff(gray.ravel()) >= 0).all()  # from black to white, without a wrap


@pytest.mark.parametrize("level, expected", [(0, 0), (128 * 257, 128), (65535, 255)])
def test_an_image_of_one_tone_keeps_it(level, expected):
    flat = np.full((8, 8), level, np.uint16)
    assert decode_image(as_bytes(flat, "PNG")).getpixel((0, 0)) == (expected,) * 3


def test_values_without_any_tone_are_corrupt():
    with pytest.raises(CorruptImageError, match="x.tif: .*no finite"):
        decode_image(as_bytes(np.full((8, 8), np.nan, np.float32)), "x.tif")


def color_16_bit(high):
    """A 16-bit RGB image whose values end at `high`, as OpenCV writes it."""
    cv2 = pytest.importorskip("cv2")
    values = np.round(RAMP[..., None] * [high, high, high]).astype(np.uint16)
    return cv2.imencode(".png", values)[1].tobytes()


def test_color_in_the_low_bits_of_16_is_corrupt_since_pillow_drops_them():
    assert decode_image(color_16_bit(65535)).getextrema() == ((0, 255),) * 3
    with pytest.raises(CorruptImageError, match="low.png: .*16 bits.*convert"):
        decode_image(color_16_bit(4095), "low.png")
