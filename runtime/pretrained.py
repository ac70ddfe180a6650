"""Checkpoints by name: the published ones are downloaded, anything else is a path."""
import hashlib
import http.client
import os
import urllib.request

from filelock import FileLock
from tqdm.auto import tqdm

from . import checkpoint, checksum
from .errors import UserError

PUBLISHED = ("DiT-XL-2-512x512.pt", "DiT-XL-2-256x256.pt")
BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
FOLDER = "pretrained_models"


def published_name(model_name, image_size, num_classes):
    """The published checkpoint that fits these flags; a `UserError` where there is none."""
    if model_name != "DiT-XL/2" or image_size not in (256, 512) or num_classes != 1000:
        raise UserError("there are published weights of DiT-XL/2 alone, at --image-size 256 and 512 with 1000 classes, "
                        f"not of {model_name} at {image_size} with {num_classes}: name yours with --ckpt")
    return f"DiT-XL-2-{image_size}x{image_size}.pt"


def find_checkpoint(name):
    """The path of a checkpoint: a published name is downloaded to `pretrained_models/` first if need be."""
    if name in PUBLISHED and not os.path.exists(name):
        return download(name)
    return name


def find_model(name):
    """State dictionary of a published checkpoint (downloaded if need be), or of a `.pt` or `.safetensors` file.

    A training checkpoint gives its EMA weights; which weights were taken is printed.
    """
    path = find_checkpoint(name)
    state_dict, which = checkpoint.weights_of(checkpoint.load(path), path)
    print(f"{path}: {which} weights")
    return state_dict


def download(name, folder=FOLDER, base_url=BASE_URL, sha256=None):
    """Fetch a file once, however many processes ask for it, and return its path.

    It is written under a temporary name, and gets its own when its length is the announced one and its SHA-256 the
    expected one. The expected one is `sha256`, or else what `NAME.sha256` beside the file recorded: the first
    complete download writes that, and every later one must agree.
    """
    path, url = os.path.join(folder, name), base_url.rstrip("/") + "/" + name
    sha256 = sha256 and sha256.lower()
    if os.path.exists(path):
        if sha256 and checksum.of_file(path) != sha256:
            raise UserError(f"{path} does not have the SHA-256 {sha256}: remove it to fetch it again")
        return path
    try:
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(path + ".lock").acquire()  # one process downloads, the others wait and find the file
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({error})") from None
    with lock:
        if os.path.exists(path):
            return path
        temporary, record = path + ".part", path + ".sha256"
        expected = sha256 or _recorded(record)
        try:
            found = _fetch(url, temporary)
            if expected and found != expected:
                source = "what --sha256 says" if sha256 else f"what {record} recorded of an earlier download"
                raise UserError(f"{url} gave a file with the SHA-256 {found}: not kept, since it is not {expected}, "
                                f"{source}")
            with open(record, "w") as file:
                file.write(found + "\n")
            os.replace(temporary, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"cannot fetch {url} ({reason}). Without a network, fetch it elsewhere and put it at "
                            f"{os.path.abspath(path)}") from None
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)
    return path


def _fetch(url, path, block=1 << 20):
    """Copy `url` to `path`; returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        with tqdm(total=int(length) if length else None, unit="B", unit_scale=True, desc=os.path.basename(url)) as bar:
            while data := response.read(block):
                file.write(data)
                digest.update(data)
                bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
        if length and file.tell() != int(length):
            raise OSError(f"{file.tell()} of {length} bytes arrived; try again")
    return digest.hexdigest()


def _recorded(path):
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read().strip()
