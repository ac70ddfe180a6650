"""Downloads that are complete or absent."""
import http.client
import os
import shutil
import urllib.request

from filelock import FileLock
from tqdm.auto import tqdm

from common.errors import ArgumentError, UserError
from common.files import atomic_write, sha256_file

PRETRAINED_DIR = "pretrained_models"


def download(name, base_url, folder=PRETRAINED_DIR, sha256=None):
    """Download a file once, even if several processes ask for it at the same time.

    Args:
        name (str): Name of the file.
        base_url (str): Address of the folder that holds it.
        folder (str): Where to keep it.
        sha256 (str): Expected SHA-256. Default: that of an earlier download, as recorded in `NAME.sha256`.

    Returns:
        str: Path of the file.

    Raises:
        ArgumentError: If the file does not have the SHA-256 `sha256`.
        UserError: If it cannot be downloaded completely, or differs from an earlier download.
    """
    path, url = os.path.join(folder, name), base_url.rstrip("/") + "/" + name
    sha256 = sha256 and sha256.lower()
    if os.path.exists(path):
        if sha256 and sha256_file(path) != sha256:
            raise ArgumentError(f"{path} has another hash. Remove it to download it again.", sha256=sha256)
        return path
    try:
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(path + ".lock").acquire()
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({error})") from None
    with lock:
        if not os.path.exists(path):  # no other process downloaded it in the meantime
            _download(url, path, sha256)
    return path


def _download(url, path, sha256):
    """Download `url` to `path`, check its length and hash, and record the hash."""
    record = path + ".sha256"
    recorded = open(record).read().strip() if os.path.exists(record) else None
    with atomic_write(path) as file:
        try:
            _copy(url, file)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {url} ({getattr(error, 'reason', error)}). Without a network, download it "
                            f"elsewhere and put it at {os.path.abspath(path)}") from None
        digest = sha256_file(file.name)
        if sha256 and digest != sha256:
            raise ArgumentError(f"{url} has the SHA-256 {digest}. The file was not kept.", sha256=sha256)
        if recorded and not sha256 and digest != recorded:
            raise UserError(f"{url} has the SHA-256 {digest}, but an earlier download had {recorded} ({record}). "
                            "The file was not kept.")
        with atomic_write(record) as record_file:
            record_file.write(f"{digest}\n".encode())


def _copy(url, file):
    """Copy the content of `url` to a file, with a progress bar; raise `OSError` if it is shorter than announced."""
    with urllib.request.urlopen(url, timeout=60) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm.wrapattr(file, "write", total=total, desc=os.path.basename(url)) as output:
            shutil.copyfileobj(response, output, 1 << 20)
    file.flush()
    if total and file.tell() != total:
        raise OSError(f"{file.tell()} of {total} bytes arrived; try again")
