"""Reading image files of every kind: crop, mode, orientation, damage."""
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.corrupt_images import CorruptImage
from data.image_io import center_crop, read_image
from run_files import picture, write_images


@pytest.mark.parametrize("width, height", [(8, 8), (9, 8), (5, 3), (3, 5), (15, 40), (40, 15), (16, 16), (100, 33)])
def test_crop_has_the_requested_size(width, height):
    assert center_crop(Image.fromarray(picture(height, width, 3)), 8).size == (8, 8)


@pytest.mark.parametrize("portrait", [False, True])
def test_crop_halves_and_takes_the_center(portrait):
    """40 x 20 to 10: halved to 20 x 10 (a ramp of 2x becomes 4x + 1), of which columns 5 .. 14 are kept."""
    ramp = np.tile(2 * np.arange(40, dtype=np.uint8), (20, 1))
    expected = np.tile(4 * np.arange(5, 15, dtype=np.uint8) + 1, (10, 1))
    cropped = np.array(center_crop(Image.fromarray(ramp.T if portrait else ramp), 10))
    assert np.array_equal(cropped, expected.T if portrait else expected)


@pytest.mark.parametrize("size", [12, 24, 30])
def test_crop_scales_and_takes_the_center(size):
    """Up or down: the mean of a ramp does not change, and its slope follows the scale."""
    ramp = Image.fromarray(np.tile(4 * np.arange(60, dtype=np.uint8), (18, 1)))
    cropped = np.array(center_crop(ramp, size)).astype(float)
    assert cropped.mean() == pytest.approx(4 * 29.5, abs=1.5)
    assert (cropped[:, -1] - cropped[:, 0]).mean() == pytest.approx(4 * 18 * (size - 1) / size, abs=3)


@pytest.mark.parametrize("width, start", [(8, 0), (11, 1)])
def test_crop_removes_the_larger_half_on_the_right(width, start):
    pixels = picture(8, width, 3)
    assert np.array_equal(center_crop(Image.fromarray(pixels), 8), pixels[:, start:start + 8])


def test_crop_halves_by_box_means():
    """Four times as large: each pixel is the mean of its block, exactly; no bicubic step could do that."""
    means = np.random.default_rng(0).integers(10, 246, (8, 8))
    within = np.kron([[-8, 4], [8, -4]], np.ones((2, 2), int))
    blocks = np.kron(means, np.ones((4, 4), int)) + np.tile(within, (8, 8))
    assert np.array_equal(center_crop(Image.fromarray(blocks.astype(np.uint8)), 8), means)


def test_crop_halves_only_while_twice_as_large():
    def bicubic(image):
        return np.array(image.resize((8, 8), Image.Resampling.BICUBIC))

    once, not_quite = Image.fromarray(picture(24, 24)), Image.fromarray(picture(15, 15))
    assert np.array_equal(center_crop(once, 8), bicubic(once.resize((12, 12), Image.Resampling.BOX)))
    assert np.array_equal(center_crop(not_quite, 8), bicubic(not_quite))


def test_crop_of_a_very_long_image_needs_little_memory(monkeypatch):
    """An image of 1 x 4000 pixels: the middle of it, by way of no more than 16 times its width."""
    pixels, sizes, resize = np.arange(4000)[:, None] // 16, [], Image.Image.resize
    def noted(self, size, *how):
        sizes.append(size)
        return resize(self, size, *how)

    monkeypatch.setattr(Image.Image, "resize", noted)
    cropped = np.array(center_crop(Image.fromarray(pixels.astype(np.uint8)), 64))
    assert cropped.shape == (64, 64) and set(cropped.flat) <= {124, 125} and sizes == [(64, 16 * 64)]


def test_crop_of_a_long_image_is_as_published():
    """Up to 16 times as long as wide, nothing is cut before the scaling."""
    image = Image.fromarray(picture(4, 64, 3))
    expected = np.array(image.resize((128, 8), Image.Resampling.BICUBIC))[:, 60:68]
    assert np.array_equal(center_crop(image, 8), expected)


def stored(tmp_path, image, name="1.png", **how):
    image.save(tmp_path / name, **how)
    return str(tmp_path / name)


def test_every_mode_becomes_rgb(tmp_path):
    rgb = Image.fromarray(picture(8, 8, 3))
    clear = Image.fromarray(picture(8, 8, seed=1))
    grey, palette, alpha, grey_alpha = rgb.convert("L"), rgb.quantize(16), rgb.copy(), rgb.convert("LA")
    alpha.putalpha(clear)
    grey_alpha.putalpha(clear)
    one_clear, many_clear = palette.copy(), palette.copy()
    one_clear.info["transparency"], many_clear.info["transparency"] = 3, bytes(range(16))
    two = grey.convert("1")
    for image, want in ((two, two), (grey, grey), (grey_alpha, grey), (palette, palette), (one_clear, palette),
                        (many_clear, palette), (alpha, rgb)):
        path = stored(tmp_path, image)
        with Image.open(path) as again:
            assert again.mode == image.mode
        assert np.array_equal(read_image(path, 8), want.convert("RGB")), image.mode


def test_cmyk_becomes_rgb(tmp_path):
    colors = Image.new("RGB", (8, 8), (200, 40, 90))
    path = stored(tmp_path, colors.convert("CMYK"), "1.jpg", quality=100)
    with Image.open(path) as again:
        assert again.mode == "CMYK"
    assert abs(read_image(path, 8).astype(int) - (200, 40, 90)).max() < 6


@pytest.mark.parametrize("name", ["1.png", "1.tif", "big-endian.tif", "1.pgm"])
def test_16_bit_gray_keeps_its_range(tmp_path, name):
    values = np.linspace(0, 65535, 64).round().astype("<u2").reshape(8, 8)
    if name.startswith("big"):
        image = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values)
    path = stored(tmp_path, image, name)
    assert np.array_equal(read_image(path, 8)[..., 1], np.round(values / 257))


def test_16_bit_color_keeps_its_range(tmp_path):
    """Encoded here, since Pillow cannot write one."""
    values = np.random.default_rng(0).integers(0, 65536, (4, 4, 3)).astype(">u2")
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    raw = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
           + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    write_images(tmp_path, {"1.png": raw})
    assert abs(read_image(str(tmp_path / "1.png"), 4).astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(tmp_path, dtype):
    path = stored(tmp_path, Image.fromarray(np.full((4, 4), 70000, dtype)), "1.tif")
    assert isinstance(image := read_image(path, 4), CorruptImage) and "no agreed range" in image.reason


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(picture(2, 3, 3, seed=2), np.ones((8, 8, 1), np.uint8))
    path = stored(tmp_path, Image.fromarray(blocks), f"1.{kind}", exif=exif)
    with Image.open(path) as image:
        want = np.array(center_crop(ImageOps.exif_transpose(image).convert("RGB"), 16))
    turned = read_image(path, 16)
    assert np.array_equal(turned, want)
    plain = read_image(stored(tmp_path, Image.fromarray(blocks), f"plain.{kind}"), 16)
    assert np.array_equal(turned, plain) == (orientation == 1)


def test_broken_metadata_is_ignored(tmp_path):
    pixels = picture(8, 8, 3)
    path = stored(tmp_path, Image.fromarray(pixels), "1.png", exif=b"Exif\0\0 not at all")
    assert np.array_equal(read_image(path, 8), pixels)


def test_one_pixel_is_enlarged(tmp_path):
    assert (read_image(stored(tmp_path, Image.new("RGB", (1, 1), (9, 8, 7))), 32) == (9, 8, 7)).all()


def test_image_above_pillows_default_limit_is_read(tmp_path):
    path = stored(tmp_path, Image.new("1", (30000, 6000), 1), compress_level=1)
    assert (read_image(path, 8) == 255).all()


def test_image_above_our_limit_is_corrupt(tmp_path, monkeypatch):
    path = stored(tmp_path, Image.new("RGB", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 // 2 - 1)
    assert isinstance(image := read_image(path, 8), CorruptImage) and "DecompressionBomb" in image.reason


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.95])
def test_truncated_files_are_corrupt(tmp_path, kind, kept):
    path = stored(tmp_path, Image.fromarray(picture(40, 40, 3)), f"1.{kind}")
    with open(path, "r+b") as file:
        size = file.seek(0, 2)
        file.truncate(kept if kept > 1 else int(kept * size))
    image = read_image(path, 8)
    assert isinstance(image, CorruptImage) and image.path == path and image.is_damaged and image.reason


def test_odd_metadata_gives_no_warning(tmp_path, recwarn):
    path = stored(tmp_path, Image.fromarray(picture(8, 8, 3)), "1.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\1")
    assert isinstance(read_image(path, 8), np.ndarray)
    assert not [warning for warning in recwarn if "EXIF" in str(warning.message)]


def test_lack_of_memory_is_not_damage(tmp_path, monkeypatch):
    path = stored(tmp_path, Image.new("RGB", (8, 8)))
    monkeypatch.setattr(Image.Image, "resize", lambda *args: (_ for _ in ()).throw(MemoryError()))
    assert isinstance(image := read_image(path, 4), CorruptImage) and not image.is_damaged and image.path == path


def test_files_that_cannot_be_opened_are_not_damaged(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name in ("missing.png", "folder.png"):
        image = read_image(str(tmp_path / name), 8)
        assert isinstance(image, CorruptImage) and not image.is_damaged
