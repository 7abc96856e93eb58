"""Every file below a named folder is a row, an error or a note, whatever it is called and however it is reached."""

from __future__ import annotations

import io
import os
import sys
import types
from pathlib import Path

import pytest
from helpers import lock_folder
from PIL import Image

from im2json.data.listing import list_tree
from im2json.data.pictures import count_pages, decode_picture, list_pictures
from im2json.data.stored import read_file
from im2json.errors import UserError

ODD_NAMES = [
    "a[1]",
    "a*",
    "a?",
    "{a,b}",
    "~",
    "~nobody",
    " a b ",
    "a#b",
    "50%",
    "-a",
    "a:b",
    "a::b",
    "file:",
    "é",
    "a\\b",
]
BYTES_NAME = os.fsdecode(b"a\xe9\xff")
HEIC = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(200)


def picture_bytes(form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), "white").save(stream, form, **options)
    return stream.getvalue()


def write(root: Path, *names: str, data: bytes = b"") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data or picture_bytes())


def listed(root: Path, *given: str) -> tuple[list[str], list[str]]:
    """The names within a folder that are listed of it, and the notes."""
    notes: list[str] = []
    found = list_pictures([str(root / name) for name in given] or [str(root)], notes)
    return [os.path.relpath(name, root) for name in found], notes


@pytest.mark.parametrize("name", [*ODD_NAMES, BYTES_NAME])
def test_a_folder_is_taken_literally(tmp_path, name):
    write(tmp_path, f"{name}/{name}.png", f"{name}/deep/1.png", "a/1.png", "a1/1.png", "ab/1.png", "b/1.png")
    found, notes = listed(tmp_path, name)
    assert sorted(found) == sorted([f"{name}/deep/1.png", f"{name}/{name}.png"])
    assert notes == []


def test_a_pattern_below_a_folder_whose_name_looks_like_one(tmp_path):
    write(tmp_path, "a[1]/x.png", "a[1]/deep/y.png", "a1/z.png")
    assert listed(tmp_path, "a[1]/**/*.png")[0] == ["a[1]/deep/y.png", "a[1]/x.png"]
    assert listed(tmp_path, "a[12]/*.png")[0] == ["a1/z.png"]


def test_linked_files_and_folders_are_followed_once(tmp_path):
    write(tmp_path / "store", "1.png", "deep/2.png")
    inbox = tmp_path / "inbox"
    write(inbox, "own/3.png")
    for link, target in {
        "today": "../store",
        "again": "../store/deep",
        "alias": "own",
        "own/loop": ".",
        "up": "..",
        "x.png": "own/3.png",
    }.items():
        (inbox / link).symlink_to(target)
    found, notes = listed(inbox)
    assert found == ["again/2.png", "own/3.png", "today/1.png", "x.png"]
    assert sorted(notes) == [
        f"{inbox}/alias: its files are listed once, in {inbox}/own",
        f"{inbox}/own/loop: its files are listed once, in {inbox}/own",
        f"{inbox}/today/deep: its files are listed once, in {inbox}/again",
        f"{inbox}/up: link not followed, as it leads to a folder that holds {inbox}",
    ]
    assert listed(inbox, "**/*.png")[0] == ["again/2.png", "own/3.png", "today/1.png", "x.png"]


def test_what_cannot_be_reached_is_listed_to_get_its_error(tmp_path):
    write(tmp_path, "1.png", "locked/2.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "folder").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe.png")
    found, _ = listed(tmp_path)
    assert found == ["1.png", "folder", "gone.png", "locked/2.png", "loop", "pipe.png"]
    for name, problem in {
        "folder": "x: is a link to nowhere, which is not there",
        "gone.png": "x: is a link to nowhere.png, which is not there",
        "loop": "x: cannot be read (Too many levels of symbolic links)",
        "pipe.png": "x: is not a file",
        "locked": "x: is not a file",
    }.items():
        with pytest.raises(UserError) as caught:
            read_file(tmp_path / name, "x")
        assert str(caught.value) == problem


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, "1.png", "locked/2.png")
    lock_folder(monkeypatch, "locked")
    assert list_tree(tmp_path).unread == ("locked",)
    assert listed(tmp_path)[0] == ["1.png", "locked"]
    with pytest.raises(UserError, match=r"^x: cannot be read \(Permission denied\)$"):
        read_file(tmp_path / "locked", "x")


def test_documents_that_no_suffix_or_a_wrong_one_names(tmp_path):
    write(tmp_path, "scan", "scan.bak", "SCAN.JPG", "x.JPEG")
    write(tmp_path, "photo.dat", data=picture_bytes("WEBP"))
    write(tmp_path, "fax.bin", data=picture_bytes("BMP"))
    write(tmp_path, "IMG_1", data=HEIC)
    write(tmp_path, "clip.mov", data=b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    write(tmp_path, "notes.txt", "Thumbs.db", "e.dat", ".DS_Store", data=b"\n")
    write(tmp_path, "__MACOSX/._x.jpg", "deep/._y.jpg", ".old/z.jpg", ".w.png")
    found, notes = listed(tmp_path)
    assert found == ["IMG_1", "SCAN.JPG", "fax.bin", "photo.dat", "scan", "scan.bak", "x.JPEG"]
    assert notes == [
        f"{tmp_path}: files passed over that are no pictures: 3 (1 .mov, 1 .dat, 1 .txt: clip.mov, e.dat, notes.txt)",
        f"{tmp_path}: hidden files passed over: 2 (1 .jpg, 1 .png: .old/z.jpg, .w.png)",
    ]


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    write(tmp_path, "a.csv", "b.csv", data=b"1")
    with pytest.raises(UserError, match=r"no picture there .*passed over that are no pictures: 2 \(2 \.csv: a\.csv, b"):
        list_pictures([str(tmp_path)])


# --- kinds


def tiff_with(tags: dict[int, int]) -> bytes:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    info = ImageFileDirectory_v2()
    for tag, value in tags.items():
        info.tagtype[tag] = 4
        info[tag] = value
    return picture_bytes("TIFF", tiffinfo=info)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.HEIC", HEIC, "a HEIC picture; run `pip install pillow-heif` to have it read, or convert it"),
        ("a.jpg", HEIC, "a HEIC picture; "),
        ("a.pdf", b"\n%PDF-1.7", "a PDF, not a picture; render its pages"),
        ("a.svg", b'<?xml version="1.0"?>\n<svg xmlns="">', "an SVG drawing"),
        ("a.docx", b"PK\3\4...", "an Office document or a ZIP archive"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
        ("a.jxl", b"\xff\x0a\xfa", "a JPEG XL picture"),
        ("a.cr2", b"II*\0\x10\0\0\0CR\2\0", "a raw photograph"),
        ("a.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1", "a raw photograph"),
        ("a.dng", tiff_with({50706: 1}), "a raw photograph"),
        ("a.nef", tiff_with({254: 1, 330: 8}), "a raw photograph"),
        ("a.djvu", b"AT&TFORM", "a DjVu document"),
    ],
)
def test_documents_that_cannot_be_read_are_listed_and_say_what_they_are(tmp_path, name, data, problem):
    write(tmp_path, name, data=data)
    assert listed(tmp_path) == ([name], [])
    with pytest.raises(UserError) as caught:
        decode_picture(data, "x")
    assert str(caught.value).startswith(f"x: is {problem}")


def test_avif_and_codecs_that_this_pillow_lacks(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "avif")
    with pytest.raises(UserError, match="x: is an AVIF picture, which this build of Pillow cannot read; convert"):
        decode_picture(b"\0\0\0\x1cftypavif\0\0\0\0mif1avif" + bytes(99), "x")

    def missing(*_: object) -> None:
        raise OSError("decoder jpeg2k not available")

    data = picture_bytes("JPEG2000")
    monkeypatch.setattr("PIL.Image._getdecoder", missing)
    with pytest.raises(UserError, match=r"x: this build of Pillow cannot read such a picture \(decoder jpeg"):
        decode_picture(data, "x")


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch):
    """With a stand-in that reads every such file as one of two small pictures."""

    class Stub(Image.Image):
        format = "HEIF"
        n_frames = 2

        def __init__(self, *_: object) -> None:
            super().__init__()
            self._size, self._mode, self.im = (3, 2), "RGB", Image.new("RGB", (3, 2), "red").im

    registered: list[str] = []

    def register_heif_opener() -> None:
        registered.append("HEIF")
        Image.register_open("HEIF", Stub, lambda start: start[4:8] == b"ftyp")

    for table in ("OPEN", "ID"):
        monkeypatch.setattr(Image, table, getattr(Image, table).copy())
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    assert decode_picture(picture_bytes(), "x").size == (6, 4)
    assert not registered  # only a HEIC file needs it
    assert [decode_picture(HEIC, "x").getpixel((0, 0)) for _ in range(2)] == [(255, 0, 0)] * 2
    assert registered == ["HEIF"]
    assert count_pages(HEIC) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["TIFF", "GIF", "WEBP", "MPO", "PNG"])
def test_pages_are_counted(form):
    pages = [Image.new("RGB", (6, 4), colour) for colour in ("blue", "white")]
    data = picture_bytes(form, save_all=True, append_images=pages)
    assert count_pages(data) == 3
    assert count_pages(picture_bytes(form)) == 1
    assert decode_picture(data, "x").getpixel((0, 0)) == (255, 255, 255)
    for end in range(0, len(data), 7):
        assert 1 <= count_pages(data[:end]) <= 3
