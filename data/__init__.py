"""Data sets, the order in which training sees them, and loading."""
from common import distributed
from common.errors import ArgumentError
from data.builtin import BUILTIN_DATASETS, parse_builtin_name
from data.image_folder import ImageFolderDataset, list_image_folder


def build_dataset(data_path, image_size, max_bad_images=0, num_classes=None, collective=False):
    """Build the data set that a path names.

    Args:
        data_path (str): "digits", "fractals", either with "-held-out" for its validation set, or a folder with one
            folder of images per class.
        image_size (int): Pixels a side.
        max_bad_images (int): Number of corrupt images in a batch above which it cannot be read.
        num_classes (int): Number of classes of the fractals. Default: as in `BUILTIN_DATASETS`.
        collective (bool): Whether all ranks make this call together. If so, only rank 0 lists the folder.

    Raises:
        ArgumentError: For a folder that is not a data set, for digits of another size than theirs, and for fractals
            that the memory cannot hold.
    """
    name, split = parse_builtin_name(data_path)
    if name is None:
        listing = distributed.run_on_rank0_and_broadcast(lambda: list_image_folder(data_path)) if collective else None
        return ImageFolderDataset(data_path, image_size, max_bad_images, listing)
    if name == "fractals":
        from data.fractals import FractalsDataset, check_sizes
        num_classes = num_classes or BUILTIN_DATASETS[name]["num_classes"]
        check_sizes(image_size, num_classes)
        return FractalsDataset(image_size, num_classes, split)
    from data.digits import DigitsDataset
    if image_size != DigitsDataset.image_size:
        raise ArgumentError(f"the digits are {DigitsDataset.image_size} pixels wide. Pass {DigitsDataset.image_size}, "
                            "or leave the flag out", image_size=image_size)
    return DigitsDataset(split)
