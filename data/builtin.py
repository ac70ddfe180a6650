"""Names of the data sets that need no files."""
# Each with its default sizes. NAME is the training set, NAME-held-out the validation set.
BUILTIN_DATASETS = dict(digits=dict(image_size=8, num_classes=10), fractals=dict(image_size=32, num_classes=100))


def parse_builtin_name(data_path):
    """Split a path into the name and the split ("train", "held-out") of a built-in data set; (None, None) of others."""
    name = (data_path or "").removesuffix("-held-out")
    if name not in BUILTIN_DATASETS:
        return None, None
    return name, "train" if name == data_path else "held-out"
