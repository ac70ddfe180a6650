"""Image files: reading them as RGB pixels of one size, and writing grids."""
import json
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.Image import Transpose
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from common.errors import UserError
from data.corrupt_images import CorruptImage

UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"
MIN_TILE_PIXELS = 64  # tiles of smaller images are enlarged in a grid

# Pillow refuses images above 0.18 gigapixels by default; scans and panoramas are larger. It raises above twice this
# number: 0.54 gigapixels take 6 GB to read.
Image.MAX_IMAGE_PIXELS = 1 << 28
# The transposition that undoes each value of EXIF's orientation tag.
EXIF_TRANSPOSES = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}
MAX_ASPECT_RATIO = 16


# ---------------------------------------------------------------- tensors to pictures

def to_uint8(images):
    """Convert images to bytes by the rule of published sample sets: 127.5 x + 128, truncated.

    Args:
        images (Tensor): Images in [-1, 1], shape (N, C, H, W); one channel is repeated to three. A non-finite value,
            which would come out black, is a `UserError`.

    Returns:
        Tensor: Pixels, shape (N, H, W, 3), uint8.
    """
    if not torch.isfinite(images).all():
        raise UserError("the model makes images that are not finite. Use an earlier checkpoint")
    pixels = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return pixels.expand(*pixels.shape[:3], 3) if pixels.shape[3] == 1 else pixels


def make_image_grid(images, columns):
    """Arrange images in [-1, 1], shape (N, C, H, W), as one of shape (3, H', W') in [0, 1], `columns` in a row."""
    factor = max(1, MIN_TILE_PIXELS // images.shape[-1])
    images = images.float().cpu().repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))


def save_image_grid(images, columns, path, metadata=None):
    """Write images in [-1, 1], shape (N, C, H, W), as one picture; its extension is the format.

    Plain values of `metadata` (dict) are kept in a PNG, as its text "DiT".
    """
    picture, info = to_pil(make_image_grid(images, columns)), PngInfo()
    if metadata:
        info.add_text("DiT", json.dumps(metadata))
    try:
        picture.save(path, pnginfo=info)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from None


def to_pil(grid):
    """Convert an image in [0, 1], shape (3, H, W), to a PIL image, rounded to 8 bits as the published picture is."""
    return Image.fromarray((grid * 255 + 0.5).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy())


# ---------------------------------------------------------------- files to pixels

def read_image(path, size):
    """Read an image file as RGB, upright, center-cropped to `size` pixels a side (None: as large as it is).

    Returns:
        ndarray | CorruptImage: Pixels, shape (H, W, 3), uint8, or what is wrong with the file.
    """
    def read(file):
        image = to_rgb(load_upright(file))
        return np.array(image if size is None else center_crop(image, size))

    return _read_file(path, read)


def read_image_size(path):
    """Read (height, width) of an image file, upright, from its header if possible, or return the `CorruptImage`."""
    def read(file):
        is_plain = file.width == file.height or exif_transpose(file) is None
        return (file if is_plain else load_upright(file)).size[::-1]

    return _read_file(path, read)


def _read_file(path, read):
    """Return `read(file)` of an open image file, or the `CorruptImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd metadata
            with Image.open(path) as file:
                return read(file)
    except Exception as error:  # a damaged file fails in many ways
        machine_failed = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return CorruptImage(path, reason, is_damaged=not machine_failed)


def load_upright(file):
    """Decode an open PIL image file, and rotate or mirror it upright by its EXIF orientation."""
    file.load()
    transpose = exif_transpose(file)
    return file if transpose is None else file.transpose(transpose)


def exif_transpose(image):
    """Return the transposition that turns a PIL image upright, None if it is, or if its metadata cannot be read."""
    try:
        return EXIF_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        return None


def to_rgb(image):
    """Convert a PIL image of any mode to RGB: gray is repeated, 16 bits become 8, alpha is dropped as in torchvision.

    32-bit and floating-point pixels, which have no agreed range, are a ValueError.
    """
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no agreed range")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """Scale and crop a PIL image to `size` x `size` pixels as ADM's preprocessing does.

    It is halved by box filtering while it is at least twice as large as needed, then scaled bicubically: sharper than
    one bicubic step and free of aliasing. Published latents and reference statistics are made so.
    """
    max_side = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) > max_side:  # scaling a very long image would need any amount of memory for what is cut off
        image = _crop_center(image, *(min(side, max_side) for side in image.size))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _crop_center(image, size, size)


def _crop_center(image, width, height):
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
