"""Data sets, the order in which training sees them, and loading."""
from common.errors import UserError
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from data.image_folder import ImageFolderDataset


def build_dataset(data_path, image_size, max_bad_images=0, num_classes=None):
    """The data set that a path names: "digits", "fractals", one of them with "-held-out", or a folder of class folders.

    num_classes  of the fractals, which have as many as are asked for; None: as usual
    """
    name, split = parse_builtin_name(data_path)
    if name is None:
        return ImageFolderDataset(data_path, image_size, max_bad_images)
    if name == "fractals":
        from data.fractals import FractalsDataset
        return FractalsDataset(image_size, num_classes or BUILTIN_DATASETS[name]["num_classes"], split)
    from data.digits import DigitsDataset
    if image_size != DigitsDataset.image_size:
        raise UserError(f"--image-size {image_size}: the digits are {DigitsDataset.image_size} pixels wide, "
                        f"pass --image-size {DigitsDataset.image_size} or leave it out")
    return DigitsDataset(split)
