"""Image files that cannot be read: what is known of them, and how many a run tolerates."""
import os
from dataclasses import dataclass

from common.errors import UserError


class CorruptImageLog:
    """Counts and names the images of a run that could not be read; one too many ends the run.

    They are listed in a file, which all processes of a run and all its restarts share.
    limit  --max-bad-images
    path   of the list: a line is the image's path, a tab, and the reason
    warn   called with a sentence for every new one
    """

    def __init__(self, limit, path, warn):
        self.limit, self.path, self.warn = limit, path, warn

    def add(self, bad):
        """Count a batch's `CorruptImage`s; raises a `UserError` for one too many, and for one that is not damaged."""
        for image in bad:
            raise_if_unreadable(image)
            known = self._known()
            if image.path in known:
                continue
            if len(known) >= self.limit:
                raise UserError(too_many_corrupt(image, len(known) + 1, self.limit))
            with open(self.path, "ab") as file:  # appended in one write: lines of several processes do not mix
                file.write(f"{image.path}\t{image.reason}\n".encode(errors="surrogateescape"))
            self.warn(f"WARNING: skipped the image {image.path} ({image.reason}), "
                      f"{len(known) + 1} of {self.limit} that --max-bad-images allows")

    def _known(self):
        if not os.path.exists(self.path):
            return set()
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            return {line.split("\t")[0] for line in file}


def raise_if_unreadable(image):
    """A file that cannot be read is no damaged image: what a run sees must not hang on the state of a disk."""
    if not image.is_damaged:
        raise UserError(f"cannot read {image.path} ({image.reason})")


def too_many_corrupt(image, count, limit):
    """The sentence that ends a run at a bad image."""
    met = f", number {count} in all; --max-bad-images {limit} allows no more" if limit else ""
    return f"cannot read the image {image.path} ({image.reason}){met}. Repair it, or allow more with --max-bad-images"


@dataclass
class CorruptImage:
    """A file that holds no image, or half of one. Worker processes hand it over as a value, not as a traceback.

    reason      one line
    is_damaged  False where the machine is at fault (no permission, a broken disk, no memory): such an image may be
                there the next time, so that it is never skipped
    """
    path: str
    reason: str
    is_damaged: bool = True
