"""Archives of image folders are read as the folders would be."""

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from xar_cli.data.archives import is_archive, open_archive
from xar_cli.data.images import BadImageError, ImageFolder
from xar_cli.errors import UserError

NAMES = ("cat/1.png", "cat/deep/2.png", "dog/1.png")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images" / "README.txt").write_text("about")
    return tmp_path / "images"


def pack(folder, path, inside=""):
    files = sorted(file for file in folder.rglob("*") if file.is_file() or file.is_symlink())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, inside + file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(folder, inside or ".", recursive=False)
            for file in files:
                archive.add(file, inside + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("suffix", ["tar", "zip"])
@pytest.mark.parametrize("inside", ["", "./", "imagenet/train/"])
def test_an_archive_is_as_its_folder(folder, tmp_path, suffix, inside):
    archive = open_archive(pack(folder, tmp_path / f"x.{suffix}", inside))
    plain = ImageFolder(folder)
    assert (archive.class_names, archive.names) == (plain.class_names, plain.names)
    assert archive.labels.tolist() == plain.labels.tolist()
    for i in range(len(plain)):
        assert np.array_equal(archive.load(i, 8, 3), plain.load(i, 8, 3))


def test_a_tar_of_tars_has_a_class_per_tar(folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in ("cat", "dog"):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                inner.add(folder / name / "1.png", "1.png")
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = buffer.tell()
            buffer.seek(0)
            outer.addfile(member, buffer)
    archive = open_archive(tmp_path / "train.tar")
    assert archive.names == ["cat/1.png", "dog/1.png"]
    assert np.array_equal(archive.load(1, 8, 3), ImageFolder(folder).load(2, 8, 3))


def test_rubble_beside_the_inner_tars_is_passed_over(folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        rubble = tarfile.TarInfo("./._cat.tar")
        rubble.size = 300
        outer.addfile(rubble, io.BytesIO(bytes(range(100)) * 3))
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as inner:
            inner.add(folder / "cat" / "1.png", "1.png")
        member = tarfile.TarInfo("./cat.tar")
        member.size = buffer.tell()
        buffer.seek(0)
        outer.addfile(member, buffer)
    assert open_archive(tmp_path / "train.tar").names == ["cat/1.png"]


def link(folder, target, name):
    """A symbolic link as an archive member."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)


def test_links_in_a_tar_are_the_files_that_they_lead_to(folder, tmp_path):
    os.link(folder / "cat" / "1.png", folder / "dog" / "hard.png")
    link(folder, "../cat/deep/2.png", "dog/soft.png")
    link(folder, "soft.png", "dog/twice.png")
    link(folder, "../dog/hard.png", "elk/both.png")
    archive, plain = open_archive(pack(folder, tmp_path / "x.tar", "./")), ImageFolder(folder)
    assert len(archive) == 7
    assert (archive.class_names, archive.names) == (plain.class_names, plain.names)
    for i in range(len(plain)):
        assert np.array_equal(archive.load(i, 8, 3), plain.load(i, 8, 3))


@pytest.mark.parametrize("target", ["/nowhere/1.png", "../../1.png", "missing.png"])
def test_links_out_of_a_tar_are_refused(folder, tmp_path, target):
    with tarfile.open(pack(folder, tmp_path / "x.tar"), "a") as archive:
        for name in ("dog/a.png", "dog/b.png", "dog/._c.png"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    with pytest.raises(UserError, match=r"2 links of .*dog/a\.png"):
        open_archive(tmp_path / "x.tar")


def same_as_folder(folder, tmp_path):
    """The archive of a folder, with the same images in the same order."""
    archive, plain = open_archive(pack(folder, tmp_path / "x.tar", "./")), ImageFolder(folder)
    assert (archive.class_names, archive.names) == (plain.class_names, plain.names)
    for i in range(len(plain)):
        assert np.array_equal(archive.load(i, 8, 3), plain.load(i, 8, 3))
    return archive


@pytest.mark.parametrize("name", ["README", "dog/labels.txt"])
@pytest.mark.parametrize("target", ["../README", "/data/labels.txt"])
def test_links_that_are_no_images_may_lead_nowhere(folder, tmp_path, caplog, name, target):
    link(folder, target, name)
    same_as_folder(folder, tmp_path)
    assert (
        f"1 links of '{tmp_path / 'x.tar'}' lead to nothing in it and are left out, files or whole classes: {name}\n"
        in caplog.text
    )


def test_a_class_that_is_such_a_link_alone_is_refused_as_in_a_folder(folder, tmp_path):
    link(folder, "/data/images", "elk/images")
    for opened in (lambda: ImageFolder(folder), lambda: open_archive(pack(folder, tmp_path / "x.tar"))):
        with pytest.raises(UserError, match="hold no images: 'elk'"):
            opened()


def test_links_to_folders_in_a_tar_are_followed_as_in_a_folder(folder, tmp_path):
    link(folder, "cat", "latest")
    link(folder, "../cat/deep", "dog/more")
    link(folder, "../latest", "elk/all")
    link(folder, "../dog", "elk/dog")
    link(folder, "../latest/deep", "elk/deep")
    link(folder, "../elk/deep/2.png", "cat/through.png")
    assert "elk/dog/more/2.png" in same_as_folder(folder, tmp_path).names


@pytest.mark.parametrize("target", ["..", "../dog", "."])
def test_a_link_to_a_folder_above_it_is_refused_as_in_a_folder(folder, tmp_path, target):
    link(folder, target, "dog/again")
    for opened in (lambda: ImageFolder(folder), lambda: open_archive(pack(folder, tmp_path / "x.tar"))):
        with pytest.raises(UserError, match="leads back to a folder above it"):
            opened()


def test_a_circle_of_links_is_refused(folder, tmp_path):
    with tarfile.open(pack(folder, tmp_path / "x.tar"), "a") as archive:
        for name, target in (("dog/a.png", "b.png"), ("dog/b.png", "a.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    with pytest.raises(UserError, match="2 links"):
        open_archive(tmp_path / "x.tar")


def test_a_link_through_itself_leads_nowhere(folder, tmp_path):
    plain = ImageFolder(folder).names
    link(folder, "never/ends", "dog/never")
    assert open_archive(pack(folder, tmp_path / "x.tar")).names == plain


@pytest.mark.parametrize("suffix", ["tar", "zip"])
@pytest.mark.parametrize("inside", ["", "train/"])
@pytest.mark.parametrize("only", ["nothing", "notes.txt"])
def test_a_class_without_images_is_refused_as_in_a_folder(folder, tmp_path, suffix, inside, only):
    path = pack(folder, tmp_path / f"x.{suffix}", inside)
    (tmp_path / "cow").mkdir()
    (tmp_path / "cow" / "notes.txt").write_text("moo")
    file, name = ("cow", "cow") if only == "nothing" else ("cow/notes.txt", "cow/notes.txt")
    if suffix == "zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.write(tmp_path / file, inside + name)
    else:
        with tarfile.open(path, "a") as archive:
            archive.add(tmp_path / file, inside + name, recursive=False)
    with pytest.raises(UserError, match=r"1 class folders of .* hold no images: 'cow'"):
        open_archive(path)


def test_which_paths_are_archives(tmp_path):
    for name in ("a.tar", "a.zip", "a.tar.gz", "a.tgz", "a.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.tar").mkdir()
    names = ("a.tar", "a.zip", "a.tar.gz", "a.tgz", "a.png", "folder.tar", "b.tar")
    assert [is_archive(tmp_path / name) for name in names] == [True, True, True, True, False, False, False]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz"])
def test_a_compressed_tar_is_refused(folder, tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.add(folder, "")
    with pytest.raises(UserError, match="uncompressed tar"):
        open_archive(tmp_path / name)


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_damaged_archives_are_refused(folder, tmp_path, suffix):
    path = pack(folder, tmp_path / f"x.{suffix}")
    os.truncate(path, 900)
    with pytest.raises(UserError, match="cannot be read"):
        open_archive(path)
    (tmp_path / f"y.{suffix}").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        open_archive(tmp_path / f"y.{suffix}")


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_a_damaged_member_is_a_bad_image(folder, tmp_path, suffix):
    path = pack(folder, tmp_path / f"x.{suffix}")
    archive = open_archive(path)
    place = path.read_bytes().index(b"IDAT" if suffix == "tar" else b"cat/1.png") + 40
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 30)
    with pytest.raises(BadImageError, match=r"cat/1\.png"):
        archive.load(0, 8, 3)


def test_a_zip_bomb_is_a_bad_image(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", bytes(10_000_000))
    monkeypatch.setattr("xar_cli.data.archives.MAX_FILE_BYTES", 1_000_000)
    with pytest.raises(BadImageError, match="10000000 bytes"):
        open_archive(tmp_path / "x.zip").load(0, 8, 3)


def test_an_archive_without_images_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("README.txt", "nothing")
    with pytest.raises(UserError, match="no images"):
        open_archive(tmp_path / "x.zip")
