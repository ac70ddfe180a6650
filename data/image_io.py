"""Image files as RGB pixels of one size, and images as files: grids, uint8 conversion."""
import json
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from common.errors import UserError
from data.corrupt_images import CorruptImage

UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> (N, H, W, 3) uint8 by the rule of published sample sets: 127.5 x + 128, truncated.

    One channel is repeated to three. raise: UserError for what is not finite, which would come out black.
    """
    if not torch.isfinite(images).all():
        raise UserError("the model makes images that are not finite: its weights are spoilt")
    images = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return images.expand(*images.shape[:3], 3) if images.shape[3] == 1 else images


# Tiles of tiny images are enlarged to this, so that a person can see them.
MIN_TILE_PIXELS = 64


def make_image_grid(images, columns):
    """(N, C, H, W) in [-1, 1] -> one (3, H', W') image in [0, 1], `columns` images a row."""
    enlarge = max(1, MIN_TILE_PIXELS // images.shape[-1])
    images = images.float().cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    return make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))


def save_image_grid(images, columns, path, record=None):
    """Write images (N, C, H, W) in [-1, 1] as one picture, `columns` a row.

    record  a dictionary to keep inside a PNG, as its text "DiT"
    """
    picture, info = to_pil(make_image_grid(images, columns)), PngInfo()
    if record:
        info.add_text("DiT", json.dumps(record))
    try:
        picture.save(path, pnginfo=info)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from None


def to_pil(grid):
    """(3, H, W) in [0, 1] -> a PIL image, rounded to 8 bits as the published picture is."""
    return Image.fromarray((grid * 255 + 0.5).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy())


# Pillow refuses 0.18 gigapixels, taking them for an attack. Scans and panoramas are larger, and the files are the
# user's own. It refuses twice this number: 0.54 gigapixels, which take 6 GB to read.
Image.MAX_IMAGE_PIXELS = 1 << 28
# What undoes each value of EXIF's orientation tag.
EXIF_TRANSPOSES = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}
MAX_ASPECT_RATIO = 16  # times the shorter side


def read_image(path, size):
    """The file's image as (size, size, 3) uint8, upright, its centre cropped; or a `CorruptImage`.

    size  None: as large as it is, (H, W, 3)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata: not the picture
            with Image.open(path) as file:
                file.load()
                image = to_rgb(apply_exif_orientation(file))
                return np.array(image if size is None else center_crop(image, size))
    except Exception as error:  # a damaged file fails in many ways; each means the same
        not_its_fault = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return CorruptImage(path, reason, is_damaged=not not_its_fault)


def apply_exif_orientation(image):
    """Turn a loaded image as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata that cannot be read turns nothing
        orientation = None
    return image.transpose(EXIF_TRANSPOSES[orientation]) if orientation in EXIF_TRANSPOSES else image


def to_rgb(image):
    """Any kind of image as RGB: grey is repeated, 16 bits become 8, alpha is dropped as published loaders drop it."""
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut off what is above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no agreed range")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """ADM's preprocessing: a PIL image -> the `size` x `size` centre of it, its shorter side scaled to `size`.

    Halved by box filtering while twice as large as needed, then scaled bicubically: sharper than one bicubic step and
    free of aliasing (the published latents and reference statistics are made so).
    """
    longest = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) > longest:  # a thread of an image would grow beyond any memory, for ends that are cut off
        width, height = (min(side, longest) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
