"""Which files below a folder are images: the one walk of training, the latent cache and evaluation."""
import functools
import os
from collections import Counter

from PIL import Image

from common.errors import UserError
from data.class_names import printable
from data.path_list import PathList

# Formats of pictures that Pillow decodes by itself; of each, all endings that Pillow knows are taken but .pfm, whose
# floating-point pixels have no agreed range.
FORMATS = {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
# What operating systems and network disks leave in folders, in lower case. Names that begin with a dot are hidden.
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "@recycle", "@tmp",
                "#recycle", "#snapshot", "lost+found", "$recycle.bin", "system volume information",
                "network trash folder", "temporary items"}
# Kinds of what is passed over; other kinds are endings.
HIDDEN, SYSTEM = "hidden files or folders", "files or folders of the operating system"
LINKED, OUTSIDE = "links to folders that are counted elsewhere", "images outside the class folders"
MAX_ENDINGS = 6  # named in a line


@functools.cache
def image_endings():
    """Return the endings of image files, in lower case: those that the installed Pillow opens."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in FORMATS) - {".pfm"}


def walk_images(root):
    """List the images below a folder. Each folder counts once, whatever links lead to it.

    A folder is entered by its real path first; links to folders outside are followed after all real folders. Links
    back up, or to a folder that is counted elsewhere, are passed over.

    Args:
        root (str): The folder.

    Returns:
        tuple[dict[str, PathList], Counter]: The images' names, sorted, of each folder (relative to the root, which is
        ""), and the number of what was passed over, by kind.
    """
    folders, passed_over, visited = {}, Counter(), _ancestors(root)
    pending, links = [""], []
    while pending:
        folder = pending.pop()
        identity = _identify(os.path.join(root, folder))
        if identity in visited:
            passed_over[LINKED] += 1
        else:
            visited.add(identity)
            names, subfolders, linked_folders = _scan(os.path.join(root, folder), passed_over)
            folders[folder] = PathList(sorted(names))
            pending += [os.path.join(folder, name) for name in subfolders]
            links += [os.path.join(folder, name) for name in linked_folders]
        if not pending:
            pending, links = sorted(links, reverse=True), []
    return folders, passed_over


def _scan(path, passed_over):
    """Return the names of images, real folders and links to folders in a folder; count the others."""
    names, subfolders, linked_folders, endings = [], [], [], image_endings()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                ending = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    passed_over[HIDDEN] += 1
                elif entry.name.lower() in SYSTEM_NAMES:
                    passed_over[SYSTEM] += 1
                elif _is_folder(entry):
                    (linked_folders if entry.is_symlink() else subfolders).append(entry.name)
                elif ending in endings:
                    names.append(entry.name)
                else:
                    passed_over[ending] += 1
    except OSError as error:
        raise UserError(f"cannot list the folder {path} ({error.strerror or error})") from None
    return names, subfolders, linked_folders


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identify(path):
    """Return what two paths of the same folder share."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot list the folder {path} ({error.strerror or error})") from None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _ancestors(root):
    """Return the identities of the folders above a folder: a link to one of them would lead out of the data set."""
    parents, path = set(), os.path.realpath(root)
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        parents.add(_identify(path))
    return parents


def describe_passed_over(passed_over):
    """Describe what a walk passed over, by kind and number; "" if that is nothing."""
    kinds = (OUTSIDE, HIDDEN, SYSTEM, LINKED)
    parts = [f"{kind}: {passed_over[kind]:,}" for kind in kinds if passed_over[kind]]
    endings = sorted((-count, ending) for ending, count in passed_over.items() if ending not in kinds)
    if endings:
        named = [f"{-count:,} {printable(ending) or 'without an ending'}" for count, ending in endings[:MAX_ENDINGS]]
        more = [f"{len(endings) - MAX_ENDINGS} more endings"] if len(endings) > MAX_ENDINGS else []
        total = -sum(count for count, _ in endings)
        parts.append(f"files with endings that are not read: {total:,} ({', '.join(named + more)})")
    return "; ".join(parts)
