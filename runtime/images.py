"""Image files as people have them, as RGB pixels of one size."""
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

# Pillow refuses 0.18 gigapixels, taking them for an attack. Scans and panoramas are larger, and the files are the
# user's own. It refuses twice this number: 0.54 gigapixels, which take 6 GB to read.
Image.MAX_IMAGE_PIXELS = 1 << 28

# What undoes each value of EXIF's orientation tag.
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

LONGEST = 16  # times the shorter side


@dataclass
class BadImage:
    """A file that holds no image, or half of one. Worker processes hand it over as a value, not as a traceback.

    reason      one line
    is_damaged  False where the machine is at fault (no permission, a broken disk, no memory): such an image may be
                there the next time, so that it is never skipped
    """
    path: str
    reason: str
    is_damaged: bool = True


def read_image(path, size):
    """The file's image as (size, size, 3) uint8, upright, its centre cropped; or a `BadImage`.

    size  None: as large as it is, (H, W, 3)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata: not the picture
            with Image.open(path) as file:
                file.load()
                image = to_rgb(upright(file))
                return np.array(image if size is None else center_crop(image, size))
    except Exception as error:  # a damaged file fails in many ways; each means the same
        not_its_fault = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return BadImage(path, reason, is_damaged=not not_its_fault)


def upright(image):
    """Turn a loaded image as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata that cannot be read turns nothing
        orientation = None
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


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
    longest = LONGEST * min(image.size)
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
