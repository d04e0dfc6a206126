"""Unpacking: whole or not at all, and nothing outside the folder, whatever the archive says."""
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

import download

FOLDER = "set"
BODY = bytes(range(256)) * 800


def tarred(*members, **files):
    """A .tar.gz of TarInfos and of files by name (their content in bytes)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(min(member.size, 1000))))
    return made.getvalue()


def member(name, kind=tarfile.REGTYPE, **more):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def zipped(*infos, **files):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as bundle:
        for name, body in files.items():
            bundle.writestr(name, body)
        for info in infos:
            bundle.writestr(info, "/etc/passwd")
    return made.getvalue()


def zip_link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def bomb():
    """A zip of 3 MB zeros that takes 3 kB."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr(f"{FOLDER}/zeros", bytes(3_000_000))
    return made.getvalue()


def lying_zip():
    """Its file of 3 MB says, in both headers, that it has 10 bytes."""
    body = bomb()
    assert body.count((3_000_000).to_bytes(4, "little")) == 2
    return body.replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))


def lying_tar():
    """Its first file has less than no bytes; the header's sum is right."""
    info = tarfile.TarInfo(f"{FOLDER}/a")
    info.size = -1024
    made = io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return made.getvalue()


GOOD = {f"{FOLDER}/a": b"first", f"{FOLDER}/deep/b": b"second"}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / ".download").mkdir(parents=True)
    return tmp_path / "data"


@pytest.mark.parametrize("name, archive", [("a.tar.gz", tarred(**GOOD)), ("a.zip", zipped(**GOOD))])
def test_a_good_archive_is_unpacked_whole(root, name, archive):
    (root / name).write_bytes(archive)
    (root / ".download" / f"{FOLDER}.part").mkdir()         # of a process that was killed
    (root / ".download" / f"{FOLDER}.part" / "stale").write_text("old")
    download.unpack(root / name, FOLDER)
    found = {str(path.relative_to(root)): path.read_bytes()
             for path in (root / FOLDER).rglob("*") if path.is_file()}
    assert found == GOOD and not any((root / ".download").iterdir())


@pytest.mark.parametrize("name, archive, reason", [
    ("a.tar.gz", tarred(**GOOD, **{"../evil": b"x"}), "'../evil' in it leads out"),
    ("a.tar.gz", tarred(**GOOD, **{f"{FOLDER}/../../evil": b"x"}), "leads out"),
    ("a.tar.gz", tarred(**GOOD, **{"/tmp/evil": b"x"}), "leads out"),
    ("a.tar.gz", tarred(member(f"{FOLDER}/l", tarfile.SYMTYPE, linkname="/etc"), **GOOD), "a link"),
    ("a.tar.gz", tarred(member(f"{FOLDER}/h", tarfile.LNKTYPE, linkname="../x"), **GOOD), "a link"),
    ("a.tar.gz", tarred(member(f"{FOLDER}/p", tarfile.FIFOTYPE), **GOOD), "a device"),
    ("a.tar.gz", tarred(member(f"{FOLDER}/c", tarfile.CHRTYPE, devmajor=1), **GOOD), "a device"),
    ("a.tar.gz", tarred(**GOOD, **{f"{FOLDER}/zeros": bytes(3_000_000)}), "larger than"),
    ("a.tar.gz", tarred(**GOOD, **{f"{FOLDER}/z": BODY})[:-600], "cannot be unpacked"),
    ("a.tar.gz", b"no archive at all", "cannot be unpacked"),
    ("a.tar.gz", tarred(other=b"x"), "cannot be unpacked"),        # without the folder
    ("a.zip", zipped(**GOOD, **{"../evil": b"x"}), "leads out"),
    ("a.zip", zipped(**GOOD, **{"/tmp/evil": b"x"}), "leads out"),
    ("a.zip", zipped(**GOOD, **{"..\\evil": b"x"}), "leads out"),
    ("a.zip", zipped(**GOOD, **{"C:evil": b"x"}), "leads out"),
    ("a.zip", zipped(zip_link(f"{FOLDER}/l"), **GOOD), "a link"),
    ("a.zip", bomb(), "larger than"),
    ("a.zip", zipped(**GOOD).replace(b"second", b"secund"), "CRC"),
    ("a.zip", b"no archive at all", "cannot be unpacked"),
    ("a.tar.gz", tarred(*(member(f"{FOLDER}/{i}") for i in range(30)), **GOOD), "more than 20"),
    ("a.zip", zipped(**{f"{FOLDER}/{i}": b"" for i in range(30)}, **GOOD), "more than 20"),
    ("a.tar.gz", tarred(*[member(f"{FOLDER}/d", tarfile.DIRTYPE)] * 30, **GOOD), "more than 20"),
    ("a.tar.gz", tarred(**GOOD, **{f"{FOLDER}/A": b"x"}), "'set/A' is in it twice"),
    ("a.zip", zipped(**GOOD, **{f"{FOLDER}/DEEP/b": b"x"}), "twice"),
    ("a.tar.gz", tarred(**GOOD, **{f"{FOLDER}/a\nb": b"x"}), "no plain name"),
    ("a.zip", zipped(**GOOD, **{f"{FOLDER}/\x1b[2J": b"x"}), "no plain name"),
    ("a.tar.gz", tarred(member(f"{FOLDER}/b", tarfile.BLKTYPE, devmajor=8), **GOOD), "a device"),
    ("a.tar.gz", lying_tar(), "larger than|cannot be unpacked"),     # the latter by Python 3.12
    ("a.zip", lying_zip(), "cannot be unpacked"),
    ("a.tar.gz", tarred(**GOOD, **{f"{FOLDER}/a/c": b"x"}), "cannot be unpacked"),
])
def test_a_strange_archive_is_refused(root, capsys, monkeypatch, name, archive, reason):
    monkeypatch.setattr(download, "LARGEST", 2_000_000)
    monkeypatch.setattr(download, "MOST", 20)
    (root / name).write_bytes(archive)
    before = sorted(root.parent.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        download.unpack(root / name, FOLDER)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert any(one in line for one in reason.split("|")), line
    assert str(root / name) in line
    assert sorted(root.parent.rglob("*")) == before and not Path("/tmp/evil").exists()


@pytest.mark.parametrize("filtered", [True, False])
def test_no_file_of_an_archive_gets_rights_that_matter(root, monkeypatch, filtered):
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    rights = member(f"{FOLDER}/tool", mode=0o6777)
    (root / "a.tar.gz").write_bytes(tarred(rights, **GOOD))
    download.unpack(root / "a.tar.gz", FOLDER)
    for path in (root / FOLDER).rglob("*"):
        assert not path.stat().st_mode & (0o6000 | (0o111 if path.is_file() else 0)), path


def test_an_archive_in_an_archive_stays_one(root):
    inner = bomb()      # made once: it holds the time
    (root / "a.zip").write_bytes(zipped(**GOOD, **{f"{FOLDER}/more.zip": inner}))
    download.unpack(root / "a.zip", FOLDER)
    assert (root / FOLDER / "more.zip").read_bytes() == inner


def test_a_process_killed_while_unpacking_leaves_no_half_folder(root, monkeypatch):
    (root / "a.zip").write_bytes(zipped(**GOOD))
    whole = zipfile.ZipFile.extract

    def killed(self, info, *more):
        if info.filename.endswith("b"):
            raise KeyboardInterrupt
        return whole(self, info, *more)

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extract", killed)
        with pytest.raises(KeyboardInterrupt):
            download.unpack(root / "a.zip", FOLDER)
    assert not (root / FOLDER).exists()
    download.unpack(root / "a.zip", FOLDER)
    assert (root / FOLDER / "deep" / "b").read_bytes() == b"second"
