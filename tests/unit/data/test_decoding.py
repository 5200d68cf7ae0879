"""Every kind of image file that data sets hold, and every way in which one is broken."""

import contextlib
import io
import pickle
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from xar_cli.data.images import BadImageError, decode_image, load_image

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, channels: int = 3) -> np.ndarray:
    return decode_image(data, "x", 8, channels)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_lossless_formats_give_the_pixels(kind):
    image = Image.fromarray(RAMP if kind == "GIF" else RGB)
    expected = np.stack([RAMP] * 3, axis=-1) if kind == "GIF" else RGB
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encoded(image, kind, **options)), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_near(kind):
    smooth = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    decoded = decode(encoded(Image.fromarray(smooth), kind, quality=95))
    assert np.abs(decoded.astype(int) - smooth.transpose(2, 0, 1)).max() <= 4


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma():
    assert np.array_equal(decode(encoded(Image.fromarray(RAMP))), np.stack([RAMP] * 3))
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert (decode(encoded(red), channels=1) == 76).all()  # ITU-R 601: 0.299 * 255


def test_palette_is_resolved():
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    expected = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)])
    assert np.array_equal(decode(encoded(image)), expected)


def test_transparency_is_dropped():
    rgba = np.concatenate([RGB, RAMP[..., None]], axis=-1)
    assert np.array_equal(decode(encoded(Image.fromarray(rgba))), RGB.transpose(2, 0, 1))


def test_one_bit_images_are_black_and_white():
    image = Image.fromarray(RAMP).convert("1", dither=Image.Dither.NONE)
    assert set(np.unique(decode(encoded(image)))) == {0, 255}


def test_cmyk_is_converted():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # full magenta and yellow: red
    red, green, blue = decode(encoded(cmyk, "JPEG", quality=95)).reshape(3, -1).mean(1)
    assert red > 200
    assert green < 60
    assert blue < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(kind):
    deep = RAMP.astype(np.uint16) * 256 + 255  # a plain 8-bit conversion would clip all but the first to 255
    assert np.array_equal(decode(encoded(Image.fromarray(deep), kind), channels=1), RAMP[None])


@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are defined
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_every_exif_orientation_is_as_pillow_turns_it(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(data), upright.transpose(2, 0, 1))


def test_an_odd_exif_entry_makes_no_bad_image():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Canon"
    entries = bytearray(exif.tobytes())
    entries[17] = 0  # the maker's tag becomes one that is text where a number belongs
    image = Image.fromarray(np.dstack([RAMP // 16 * 16] * 3))
    turned = decode(encoded(image, "JPEG", quality=95, exif=bytes(entries)))
    assert np.array_equal(turned, np.rot90(decode(encoded(image, "JPEG", quality=95)), -1, axes=(1, 2)))


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    assert np.array_equal(decode(data), np.rot90(RGB, turn).transpose(2, 0, 1))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data, channels=1), RAMP[None])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_truncated_files_are_bad_images(kind, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(BadImageError):
        decode(data[: int(len(data) * kept)])


@pytest.mark.filterwarnings("ignore")
def test_noise_is_a_bad_image_and_nothing_else():
    rng = np.random.default_rng(0)
    whole = {kind: encoded(Image.fromarray(RGB), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
    for data in whole.values():
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 8):
                damaged[place] = rng.integers(0, 256)
            with contextlib.suppress(BadImageError):
                assert decode(bytes(damaged)).shape == (3, 8, 8)


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that claim to be a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 9_000)])
def test_decompression_bombs_are_refused(size):
    with pytest.raises(BadImageError, match=r"pixels|bomb"):
        decode(png_of_size(*size))


def test_an_aspect_ratio_that_would_fill_the_memory_is_refused():
    line = encoded(Image.new("L", (100_000, 1)))
    with pytest.raises(BadImageError, match="pixels"):
        decode_image(line, "x", 256, 3)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadImageError, match=r"folder\.png.*directory"):
        load_image(tmp_path / "folder.png", 8)


def test_the_error_survives_a_process_border_and_names_no_address():
    with pytest.raises(BadImageError) as caught:
        decode(b"not an image")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name) == (str(caught.value), "x")
    assert "0x" not in str(again)


def test_threads_decode_alike():
    data = [encoded(Image.fromarray(np.roll(RGB, i, axis=0)), "PNG") for i in range(16)]
    expected, got = [decode(one) for one in data], [None] * 16
    threads = [threading.Thread(target=lambda i=i: got.__setitem__(i, decode(data[i]))) for i in range(16)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
