"""Data sets that need no files."""
# The data sets that need no files, with their sizes where nothing else is asked for. NAME-held-out is for measuring.
BUILTIN_DATASETS = dict(digits=dict(image_size=8, num_classes=10), fractals=dict(image_size=32, num_classes=100))


def parse_builtin_name(data_path):
    """The name and the split ("train", "held-out") of an embedded data set; (None, None) of any other path."""
    name = (data_path or "").removesuffix("-held-out")
    return (name, "train" if name == data_path else "held-out") if name in BUILTIN_DATASETS else (None, None)
