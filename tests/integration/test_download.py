"""Checkpoints by name: downloaded completely and once, or not at all; from a local server."""
import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

import download as command
from common.download import download
from common.errors import ArgumentError, UserError
from helpers import ROOT, call, free_port
from sampling.load_model import PUBLISHED_CHECKPOINTS, find_checkpoint, find_model, published_checkpoint_name

BODY = bytes(range(256)) * 5000  # more than one block
HASH = hashlib.sha256(BODY).hexdigest()


class Mirror:
    """Local server of `files` (name: bytes) at `url`, which lists the names of its `requests`.

    It announces `announce` bytes more than it sends; if `chunked`, it announces no length, and closes the connection
    before the last chunk. `arrived` is set when a request has arrived; an answer waits until `may_answer` is set.
    """

    def __init__(self):
        self.files, self.requests, self.announce, self.chunked = {"a.pt": BODY}, [], 0, False
        self.arrived, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                mirror.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/models/"
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01)).start()

    def answer(self, request):
        name = request.path.removeprefix("/models/")
        self.requests.append(name)
        self.arrived.set()
        self.may_answer.wait(60)
        if name not in self.files:
            return request.send_error(404)
        body = self.files[name]
        if self.chunked:
            request.protocol_version = "HTTP/1.1"
        request.send_response(200)
        if self.chunked:
            request.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n" % (len(body), body)
            request.close_connection = True
        else:
            request.send_header("Content-Length", str(len(body) + self.announce))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    mirror = Mirror()
    yield mirror
    mirror.may_answer.set()
    mirror.server.shutdown()
    mirror.server.server_close()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pretrained_models"


def kept(folder):
    """Names of the files of a download, without its lock."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def test_a_file_is_downloaded_once_and_its_hash_recorded(mirror, folder):
    for _ in range(2):
        path = download("a.pt", mirror.url, str(folder))
        assert path == str(folder / "a.pt")
        assert (folder / "a.pt").read_bytes() == BODY
    assert mirror.requests == ["a.pt"]
    assert kept(folder) == ["a.pt", "a.pt.sha256"]
    assert (folder / "a.pt.sha256").read_text().split() == [HASH]


def test_a_file_with_a_wrong_hash_is_not_kept(mirror, folder):
    with pytest.raises(UserError, match=rf"(?s){mirror.url}a\.pt.*{HASH}.*{'0' * 64}"):
        download("a.pt", mirror.url, str(folder), "0" * 64)
    assert kept(folder) == []
    download("a.pt", mirror.url, str(folder), HASH)
    assert kept(folder) == ["a.pt", "a.pt.sha256"]


def test_an_existing_file_must_have_the_hash(mirror, folder):
    download("a.pt", mirror.url, str(folder))
    assert download("a.pt", mirror.url, str(folder), HASH) == str(folder / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt has another hash"):
        download("a.pt", mirror.url, str(folder), "0" * 64)
    assert (folder / "a.pt").read_bytes() == BODY


def test_a_file_that_differs_from_an_earlier_download_is_not_kept(mirror, folder):
    """The recorded hash outlives the file."""
    download("a.pt", mirror.url, str(folder))
    os.remove(folder / "a.pt")
    mirror.files["a.pt"] = BODY + b"!"
    with pytest.raises(UserError, match=rf"{HASH}.*a\.pt\.sha256"):
        download("a.pt", mirror.url, str(folder))
    assert kept(folder) == ["a.pt.sha256"]
    mirror.files["a.pt"] = BODY
    download("a.pt", mirror.url, str(folder))
    assert (folder / "a.pt").read_bytes() == BODY


@pytest.mark.parametrize("fault", [dict(announce=1), dict(announce=5_000_000), dict(chunked=True)],
                         ids=["one byte short", "cut off", "cut off between chunks"])
def test_a_truncated_download_is_not_kept(mirror, folder, fault):
    vars(mirror).update(fault)
    with pytest.raises(UserError, match=r"cannot download .*a\.pt"):
        download("a.pt", mirror.url, str(folder))
    assert kept(folder) == []
    vars(mirror).update(announce=0, chunked=False)
    download("a.pt", mirror.url, str(folder))
    assert (folder / "a.pt").read_bytes() == BODY


def test_without_file_or_server_the_error_names_address_and_place(mirror, folder):
    for name, url in (("b.pt", mirror.url), ("a.pt", f"http://127.0.0.1:{free_port()}/")):
        with pytest.raises(UserError) as caught:
            download(name, url, str(folder))
        assert url + name in str(caught.value)
        assert f"put it at {folder / name}" in str(caught.value)
    assert kept(folder) == []


@pytest.mark.parametrize("url", ["mirror.example/DiT/", "http://127.0.0.1:port/"])
def test_an_invalid_address_is_an_error(folder, url):
    with pytest.raises(UserError, match=url):
        download("a.pt", url, str(folder))


def test_a_folder_that_cannot_be_made_is_an_error(mirror, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        download("a.pt", mirror.url, str(tmp_path / "file"))


def test_two_processes_download_a_file_once(mirror, folder):
    """The second one starts while the first one downloads, and finds its file."""
    mirror.may_answer.clear()
    code = "import sys; from common.download import download; print(download(*sys.argv[1:]))"
    first = subprocess.Popen([sys.executable, "-c", code, "a.pt", mirror.url, folder], cwd=ROOT,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert mirror.arrived.wait(60)
    threading.Timer(0.3, mirror.may_answer.set).start()  # both are waiting by then, or the second one finds the file
    assert download("a.pt", mirror.url, str(folder)) == str(folder / "a.pt")
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0 and out.strip() == str(folder / "a.pt"), err
    assert mirror.requests == ["a.pt"]
    assert (folder / "a.pt").read_bytes() == BODY


def test_published_checkpoints_have_published_names():
    assert [published_checkpoint_name("DiT-XL/2", size, 1000) for size in (512, 256)] == list(PUBLISHED_CHECKPOINTS)
    for wrong in (("DiT-XL/4", 256, 1000), ("DiT-XL/2", 128, 1000), ("DiT-XL/2", 256, 10)):
        with pytest.raises(ArgumentError) as caught:
            published_checkpoint_name(*wrong)
        assert tuple(caught.value.arguments.values()) == wrong


def test_published_names_are_files_here_then_in_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.mkdir()
    name = PUBLISHED_CHECKPOINTS[0]
    torch.save({"w": torch.ones(1)}, folder / name)
    assert find_checkpoint(name) == os.path.join("pretrained_models", name)
    assert find_model(name)["w"] == 1
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    assert find_model(name)["w"] == 0


def test_find_model_prints_which_weights_it_took(tmp_path, capsys):
    ones, zeros = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    torch.save(dict(model=zeros, ema={"module.w": ones["w"]}, args={}), tmp_path / "trained.pt")
    torch.save(ones, tmp_path / "bare.pt")
    save_file(ones, tmp_path / "bare.safetensors")
    for name, which in (("trained.pt", "ema"), ("bare.pt", "bare"), ("bare.safetensors", "bare")):
        weights = command.find_model(str(tmp_path / name))
        assert weights.keys() == {"w"} and weights["w"] == 1
        assert capsys.readouterr().out == f"{tmp_path / name}: {which} weights\n"
    with pytest.raises(UserError, match=r"none\.pt"):
        command.find_model(str(tmp_path / "none.pt"))


def test_the_command_downloads_the_published_checkpoints(mirror, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mirror.files |= dict.fromkeys(PUBLISHED_CHECKPOINTS, b"weights")
    call("download", "--base-url", mirror.url)
    assert sorted(mirror.requests) == sorted(PUBLISHED_CHECKPOINTS)
    assert [(folder / name).read_bytes() for name in PUBLISHED_CHECKPOINTS] == [b"weights"] * 2
    assert capsys.readouterr().out.split() == [f"pretrained_models/{name}" for name in PUBLISHED_CHECKPOINTS]
    call("download", "a.pt", "--base-url", mirror.url, "--folder", tmp_path / "other", "--sha256", HASH)
    assert (tmp_path / "other" / "a.pt").read_bytes() == BODY
    with pytest.raises(UserError, match="SHA-256"):
        call("download", "a.pt", "--base-url", mirror.url, "--folder", folder, "--sha256", "0" * 64)


@pytest.mark.parametrize("names", [[], ["a.pt", "b.pt"]])
def test_a_hash_needs_a_single_name(mirror, folder, names):
    with pytest.raises(ArgumentError, match="--sha256"):
        call("download", *names, "--base-url", mirror.url, "--folder", folder, "--sha256", HASH)
    assert mirror.requests == []
