"""Downloads that are complete or absent."""
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm.auto import tqdm

from common.errors import UserError
from common.files import sha256_file

PRETRAINED_DIR = "pretrained_models"


def download(name, base_url, folder=PRETRAINED_DIR, sha256=None):
    """Download a file once, even if several processes ask for it at the same time, and return its path.

    Its SHA-256 must be `sha256`, by default that of an earlier download, as recorded in `NAME.sha256`.
    """
    path, url = os.path.join(folder, name), base_url.rstrip("/") + "/" + name
    if os.path.exists(path):
        if sha256 and sha256_file(path) != sha256.lower():
            raise UserError(f"{path} has another hash than {sha256}. Remove it to download it again.")
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
    """Download `url` to `path`, which appears after its length and hash were checked; record the hash."""
    partial, record = path + ".part", Path(path + ".sha256")
    try:
        expected = sha256 or (record.read_text().strip() if record.exists() else None)
        digest = _copy(url, partial)
        if expected and digest != expected.lower():
            source = "as required" if sha256 else f"of an earlier download, recorded in {record}"
            raise UserError(f"{url} has the SHA-256 {digest}, not {expected} {source}. The file was not kept.")
        record.write_text(f"{digest}\n")
        os.replace(partial, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot download {url} ({reason}). Without a network, download it elsewhere and put it at "
                        f"{os.path.abspath(path)}") from None
    finally:
        Path(partial).unlink(missing_ok=True)


def _copy(url, path, block=1 << 20):
    """Copy the content of `url` to a file and return its SHA-256; raise `OSError` if less arrives than announced."""
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
        length = int(response.headers.get("Content-Length", 0))
        with tqdm(total=length or None, unit="B", unit_scale=True, desc=os.path.basename(url)) as bar:
            while data := response.read(block):
                file.write(data)
                digest.update(data)
                bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
        if length and file.tell() != length:
            raise OSError(f"{file.tell()} of {length} bytes arrived; try again")
    return digest.hexdigest()
