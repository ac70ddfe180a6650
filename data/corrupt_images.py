"""Image files that cannot be read: what is known of them, and how many a run tolerates."""
import os
from dataclasses import dataclass

from common.errors import ArgumentError, UserError


@dataclass
class CorruptImage:
    """An image file that cannot be read. Worker processes return it as a value instead of raising."""

    path: str
    reason: str  # one line
    # False if the machine is at fault (no permission, a failing disk): readable the next time, so never skipped.
    is_damaged: bool = True


class CorruptImageLog:
    """List of the corrupt images of a run, shared by its ranks and its restarts; one too many ends the run.

    Args:
        max_bad_images (int): Number of different images that may be corrupt.
        path (str): File of the list; a line is the image's path, a tab, and the reason.
        warn (callable): Called with a sentence for every new image.
    """

    def __init__(self, max_bad_images, path, warn):
        self.max_bad_images, self.path, self.warn = max_bad_images, path, warn

    def add(self, images):
        """Count the `CorruptImage`s of a batch; raises a `UserError` if one is too many, or unreadable."""
        for image in images:
            raise_if_unreadable(image)
            known_paths = self._read_paths()
            if image.path in known_paths:
                continue
            count = len(known_paths) + 1
            if count > self.max_bad_images:
                raise corrupt_image_error(image, count, self.max_bad_images)
            with open(self.path, "ab") as file:  # one appending write: lines of several processes do not mix
                file.write(f"{image.path}\t{image.reason}\n".encode(errors="surrogateescape"))
            self.warn(f"WARNING: skipped the image {image.path} ({image.reason}), "
                      f"{count} of {self.max_bad_images} corrupt ones that are allowed")

    def _read_paths(self):
        if not os.path.exists(self.path):
            return set()
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return {line.split("\t")[0] for line in file}


def raise_if_unreadable(image):
    """Raise a `UserError` unless the image is damaged: what a run sees must not depend on the state of a disk."""
    if not image.is_damaged:
        raise UserError(f"cannot read {image.path} ({image.reason})")


def corrupt_image_error(image, count, max_bad_images):
    """Return the error for the corrupt image number `count`, which is one too many."""
    number = f", number {count} in all" if max_bad_images else ""
    return ArgumentError(f"cannot read the image {image.path} ({image.reason}){number}. Repair it, or allow more "
                         "corrupt images", max_bad_images=max_bad_images)
