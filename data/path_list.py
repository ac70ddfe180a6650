"""A long list of file names in little memory."""
import os
from array import array
from collections.abc import Sequence


class PathList(Sequence):
    """Sequence of path strings in one buffer: 8 bytes a path in addition to its characters.

    A list of a million strings takes ten times as much, and again in every worker process, since reading a string
    writes its reference count.
    """

    def __init__(self, paths=()):
        self._buffer, self._offsets = bytearray(), array("q", [0])
        self.extend(paths)

    def extend(self, paths):
        """Append paths."""
        for path in paths:
            self._buffer += os.fsencode(path)
            self._offsets.append(len(self._buffer))

    def __len__(self):
        return len(self._offsets) - 1

    def __getitem__(self, index):
        index = range(len(self))[index]  # negative indices, IndexError
        return os.fsdecode(bytes(self._buffer[self._offsets[index]:self._offsets[index + 1]]))
