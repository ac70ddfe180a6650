"""Downloads that are complete or absent."""
import hashlib
import http.client
import os
import urllib.request

from filelock import FileLock
from tqdm.auto import tqdm

from common.errors import UserError
from common.files import sha256_file

PRETRAINED_DIR = "pretrained_models"


def download(name, base_url, folder=PRETRAINED_DIR, sha256=None):
    """Fetch a file once, however many processes ask for it, and return its path.

    It is written under a temporary name, and gets its own when its length is the announced one and its SHA-256 the
    expected one. The expected one is `sha256`, or else what `NAME.sha256` beside the file recorded: the first
    complete download writes that, and every later one must agree.
    """
    path, url = os.path.join(folder, name), base_url.rstrip("/") + "/" + name
    sha256 = sha256 and sha256.lower()
    if os.path.exists(path):
        if sha256 and sha256_file(path) != sha256:
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
        expected = sha256 or _read_recorded_hash(record)
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


def _read_recorded_hash(path):
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read().strip()
