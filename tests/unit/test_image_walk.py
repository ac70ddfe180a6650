"""Which files of a folder are images and which folders are classes, for training, the latent cache and evaluation."""
import json
import os

import numpy as np
import pytest
from PIL import Image

from common.errors import ArgumentError, UserError
from data.dataset import describe_dataset
from data.image_folder import ImageFolderDataset, list_image_folder
from data.image_walk import describe_passed_over, image_endings, walk_images
from evaluation.image_sources import FolderImages

GOOD = ["ape/0.png", "ape/1.png", "bat/0.png", "bat/wild/0.png", "cow/0.png"]


@pytest.fixture
def root(tmp_path):
    """Three classes with five images of 4 x 4 pixels."""
    for number, name in enumerate(GOOD):
        save(tmp_path / "data" / name, number)
    return tmp_path / "data"


def save(path, gray=0, size=(4, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (gray, gray, gray)).save(path, **options)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no image")


def listed(root):
    """List the images that training and evaluation find, which must be the same."""
    paths = list(list_image_folder(str(root)).paths)
    assert sorted(paths) == FolderImages(str(root)).names
    return paths


def notes(root):
    return "\n".join(list_image_folder(str(root)).notes)


# ---------------------------------------------------------------- what is no image

@pytest.mark.parametrize("name, kind", [
    (".git/0.png", "hidden files or folders: 1"),
    ("ape/.ipynb_checkpoints/0-copy.png", "hidden files or folders: 1"),
    (".cat.png", "hidden files or folders: 1"),
    ("ape/._0.png", "hidden files or folders: 1"),
    (".DS_Store", "hidden files or folders: 1"),
    ("__MACOSX/ape/._0.png", "of the operating system: 1"),
    ("bat/@eaDir/0.png/SYNOPHOTO.jpg", "of the operating system: 1"),
    ("lost+found/1.png", "of the operating system: 1"),
    ("ape/Thumbs.db", "of the operating system: 1"),
    ("$RECYCLE.BIN/S-1/0.png", "of the operating system: 1"),
    ("ape/DESKTOP.INI", "of the operating system: 1"),
    ("cow/0.heic", "not read: 1 (1 .heic)"),
    ("cow/0.PNG.part", "not read: 1 (1 .part)"),
    ("cow/0", "not read: 1 (1 without an ending)"),
    ("README.md", "not read: 1 (1 .md)"),
    ("0.png", "images outside the class folders: 1"),
])
def test_what_is_no_image_is_left_out_and_counted(root, name, kind):
    touch(root / name)
    assert list(list_image_folder(str(root)).paths) == GOOD
    assert kind in notes(root) and str(root) in notes(root)


def test_evaluation_leaves_out_the_same_and_says_so(root, capsys):
    for name in ("ape/._0.png", ".git/0.png", "__MACOSX/0.png", "ape/notes.txt"):
        touch(root / name)
    assert listed(root) == GOOD
    out = capsys.readouterr().out
    assert "hidden files or folders: 2" in out and "operating system: 1" in out and "1 .txt" in out


def test_good_folder_has_no_notes(root, capsys):
    assert notes(root) == "" and len(FolderImages(str(root))) == 5 and capsys.readouterr().out == ""


def test_many_endings_are_summed_up(root):
    for number in range(9):
        touch(root / "ape" / f"0.x{number}")
    for number in range(3):
        touch(root / "ape" / f"{number}.svg")
    assert "not read: 12 (3 .svg, 1 .x0," in notes(root) and "4 more endings)" in notes(root)


def test_names_that_do_not_print_are_quoted(root):
    touch(root / "ape" / "0.a\nb")
    (line,) = list_image_folder(str(root)).notes
    assert "\n" not in line and r"'.a\nb'" in line


# ---------------------------------------------------------------- what is an image

def test_endings_are_those_that_pillow_opens():
    """All that were read before; and nothing that needs another program or has no picture in it."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    assert {*IMG_EXTENSIONS, ".jfif", ".gif", ".jp2"} <= image_endings()
    assert not {".pdf", ".eps", ".h5", ".mpg", ".wmf", ".grib", ".pfm"} & image_endings()


@pytest.mark.parametrize("ending, options", [
    (".gif", {}), (".jfif", dict(format="JPEG")), (".jp2", {}), (".JPEG", {}), (".Png", {}), (".tga", {}), (".pgm", {}),
    (".bmp", {}), (".webp", {}), (".pcx", {}), (".avif", {}), (".qoi", {}), (".MPO", dict(format="JPEG")),
])
def test_pictures_of_all_endings_are_trained_on_and_evaluated(root, ending, options):
    if ending not in Image.registered_extensions() and not options and ending == ending.lower():
        pytest.skip(f"this Pillow does not write {ending}")
    save(root / "ape" / f"2{ending}", 128, **options)
    data = ImageFolderDataset(str(root), 4)
    assert listed(root) == [*GOOD[:2], f"ape/2{ending}", *GOOD[2:]]
    np.testing.assert_allclose(data.read(2).numpy(), 0, atol=0.1)


# ---------------------------------------------------------------- links

@pytest.mark.parametrize("link, target", [
    ("ape/up", ".."), ("ape/self", "."), ("bat/wild/up", "../.."), ("ape/above", "../.."), ("here", "."), ("up", ".."),
    ("ape/bats", "../bat"), ("ape/wild", "../bat/wild"), ("twin", "ape"), ("ape/loop", "../cow/loop"),
])
def test_each_folder_counts_once(root, link, target):
    """A link leads up, to the folder itself, to another class or in a circle of links."""
    (root / "cow" / "loop").symlink_to("../ape/loop")
    (root / link).symlink_to(target)
    assert listed(root) == GOOD
    assert list_image_folder(str(root)).class_names == ["ape", "bat", "cow"]


def test_links_to_folders_and_files_elsewhere_are_followed(root, tmp_path):
    save(tmp_path / "elsewhere" / "dog" / "0.png")
    save(tmp_path / "elsewhere" / "big" / "0.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "cow" / "big").symlink_to(tmp_path / "elsewhere" / "big")
    (root / "cow" / "again").symlink_to(tmp_path / "elsewhere" / "big")
    (root / "ape" / "2.png").symlink_to(root / "cow" / "0.png")
    assert listed(root) == ["ape/0.png", "ape/1.png", "ape/2.png", *GOOD[2:], "cow/again/0.png", "dog/0.png"]
    assert "links to folders that are counted elsewhere: 1" in notes(root)


def test_root_may_be_a_link_and_end_in_a_slash(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    for path in (tmp_path / "link", f"{root}/", f"{root}/../data"):
        assert listed(path) == GOOD


def test_folder_that_cannot_be_listed_is_an_error(root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("wild"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"bat/wild.*Permission denied"):
        list_image_folder(str(root))


def test_walk_describes_nothing_if_nothing_was_passed_over(root):
    folders, passed_over = walk_images(str(root))
    assert sorted(folders) == ["", "ape", "bat", "bat/wild", "cow"] and describe_passed_over(passed_over) == ""


# ---------------------------------------------------------------- classes

def test_empty_class_is_refused_with_what_is_in_it(root):
    touch(root / "dog" / "0.heic")
    with pytest.raises(ArgumentError, match=r"--data-path .*dog.*1 \.heic"):
        list_image_folder(str(root))


def test_archive_and_flat_folder_are_told_apart(root, tmp_path):
    touch(tmp_path / "data.zip")
    with pytest.raises(ArgumentError, match=r"--data-path .*Unpack"):
        list_image_folder(str(tmp_path / "data.zip"))
    with pytest.raises(ArgumentError, match=r"no class folders .*images outside the class folders: 1"):
        list_image_folder(str(root / "cow"))


def test_log_shows_numbers_and_names_of_classes(root):
    (line,) = describe_dataset(ImageFolderDataset(str(root), 4))
    assert line == "Classes: 0 ape, 1 bat, 2 cow"
    for number in range(30):
        save(root / f"{number:02d}" / "0.png")
    lines = describe_dataset(ImageFolderDataset(str(root), 4))
    assert "0 00, 1 01" in lines[0] and "..., 32 cow" in lines[0] and len(lines[0]) < 120


@pytest.mark.parametrize("names, words", [
    (["train", "val"], ["train", "val", "above"]),
    (["Train", "test"], ["Train", "above"]),
    (["caf\u00e9", "cafe\u0301"], ["0 and 1", "look the same"]),
    (["Cat", "cat ", "dog"], ["0 and 1", "look the same"]),
])
def test_suspicious_class_names_are_told(tmp_path, names, words):
    for name in names:
        save(tmp_path / name / "0.png")
    if len(os.listdir(tmp_path)) < len(names):
        pytest.skip("a file system that takes the names for one")
    (line,) = list_image_folder(str(tmp_path)).notes
    assert line.startswith("WARNING") and all(word in line for word in words)


# ---------------------------------------------------------------- dataset.json

def shards(root, labels, name="dataset.json"):
    """Write six images in two numbered folders, and labels beside them."""
    for number in range(6):
        save(root / f"{number % 2:05d}" / f"img{number:08d}.png", 20 * number)
    text = labels if isinstance(labels, str) else json.dumps(dict(labels=labels))
    (root / name).write_text(text)
    return str(root)


def entries(values):
    return [[f"{number % 2:05d}/img{number:08d}.png", value] for number, value in enumerate(values)]


@pytest.mark.parametrize("labels", [
    entries([2, 0, 1, 1, 0, 2]), dict(entries([2, 0, 1, 1, 0, 2])), entries([2.0, 0.0, 1.0, 1.0, 0.0, 2.0]),
    [[name.replace("/", "\\"), value] for name, value in reversed(entries([2, 0, 1, 1, 0, 2]))],
], ids=["pairs", "dictionary", "floats", "backslashes"])
def test_labels_of_numbered_shards_are_the_classes(tmp_path, labels):
    data = ImageFolderDataset(shards(tmp_path, labels), 4)
    assert data.class_names == ["0", "1", "2"] and data.labels.tolist() == [2, 1, 0, 0, 1, 2]
    assert data.paths[0] == "00000/img00000000.png" and data.paths[3] == "00001/img00000001.png"
    assert "dataset.json" in notes(tmp_path)


def test_labels_beside_images_in_one_folder_are_read(tmp_path):
    for number in range(3):
        save(tmp_path / f"{number}.png")
    (tmp_path / "dataset.json").write_text(json.dumps(dict(labels=[["0.png", 1], ["1.png", 0], ["2.png", 1]])))
    listing = list_image_folder(str(tmp_path))
    assert listing.labels.tolist() == [1, 0, 1] and list(listing.paths) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("labels", [
    *(entries([0, 1, 0, 1, 0, value]) for value in ("1", -1, 0.5, True, [0, 1], 10**9, float("nan"), float("inf"))),
    entries([0, 1, 0, 1, 0]), [*entries([0] * 6), *entries([1])], [0, 1, 0, 1, 0, 1], "text", "{",
    '{"labels": "text"}',
], ids=str)
def test_labels_that_cannot_be_used_are_refused(tmp_path, labels):
    with pytest.raises(ArgumentError, match=r"dataset\.json") as caught:
        list_image_folder(shards(tmp_path, labels))
    assert caught.value.arguments == {"data_path": str(tmp_path)}


def test_gaps_in_the_labels_are_told(tmp_path):
    text = "\n".join(list_image_folder(shards(tmp_path, [*entries([0, 3, 0, 3, 0, 3]), ["00009/x.png", 1]])).notes)
    assert "1 files that are not there" in text and "2 of 4 class numbers have no image" in text


def test_labels_that_are_not_read_are_told(root, tmp_path):
    """A data set without labels; one whose folders have names."""
    listing = list_image_folder(shards(tmp_path / "shards", None))
    assert listing.class_names == ["00000", "00001"] and "WARNING: dataset.json is not read" in listing.notes[0]
    (root / "dataset.json").write_text("{")
    assert listed(root) == GOOD and "WARNING: dataset.json is not read" in notes(root)
