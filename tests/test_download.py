"""The downloader against a server that cuts off, stalls and lies, and what a user reads then."""
import contextlib
import fcntl
import hashlib
import http.server
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torchvision.datasets

import common
import data
import download
import train_student

BODY = np.random.default_rng(0).bytes(200_000)


def md5(body):
    return hashlib.md5(body).hexdigest()


# ---- a server that does as it is told ---------------------------------------------------------

def send(to, body, start=0, status=None, length=None, stop=None, pause=0.0, **headers):
    """Answer with body from `start`; say that it is `length` long; after `stop` bytes, wait `pause`
    seconds and hang up."""
    to.send_response(status or (206 if start else 200))
    if start:
        to.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    if length != "none":
        to.send_header("Content-Length", str(len(body) - start if length is None else length))
    to.end_headers()
    with contextlib.suppress(ConnectionError):
        to.wfile.write(body[start:None if stop is None else start + stop])
        to.wfile.flush()
        time.sleep(pause)


def drip(to, body, start):
    """Send 10 kB every 30 ms."""
    to.send_response(206 if start else 200)
    to.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
    to.end_headers()
    with contextlib.suppress(ConnectionError):
        for i in range(start, len(body), 10_000):
            to.wfile.write(body[i:i + 10_000])
            time.sleep(0.03)


MOODS = {
    "well": lambda to, body, start: send(to, body, start),
    "cut": lambda to, body, start: send(to, body, start, stop=70_000),
    "cut-always": lambda to, body, start: send(to, body, stop=70_000),      # and ignores Range
    "cut-at-once": lambda to, body, start: send(to, body, start, stop=0),
    "cut-then-500": lambda to, body, start: MOODS["500" if start else "cut"](to, body, start),
    "no-range": lambda to, body, start: send(to, body),
    "stall": lambda to, body, start: send(to, body, start, stop=70_000, pause=5),
    "stall-at-once": lambda to, body, start: send(to, body, start, stop=0, pause=5),
    "drip": drip,
    "claims-less": lambda to, body, start: send(to, body, start, length=1000),
    "claims-more": lambda to, body, start: send(to, body, start, length=10**12),
    "sends-less": lambda to, body, start: send(to, body[:150_000], length="none"),
    "sends-more": lambda to, body, start: send(to, body + b"more", length="none"),
    "wrong": lambda to, body, start: send(to, body[::-1], start),
    "page": lambda to, body, start: send(to, b"<html>log in first</html>"),
    "404": lambda to, body, start: to.send_error(404),
    "500": lambda to, body, start: to.send_error(500),
    "416": lambda to, body, start: to.send_error(416),
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        mood, name = self.path.strip("/").split("/")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.server.asked.append((mood, start))
        MOODS[mood](self, self.server.bodies[name], start)

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def running():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02},
                     daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running, monkeypatch):
    """.asked: (mood, first byte) of each request; .bodies: what is served under a name."""
    running.asked, running.bodies = [], {"file": BODY}
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "STALL", 20)
    return running


def offered(server, *moods, name="file"):
    """A File that the server offers in these moods, an address each."""
    port, body = server.server_address[1], server.bodies[name]
    return download.File(name, len(body), md5(body), tuple(
        f"http://127.0.0.1:{port}/{mood}/{name}" for mood in moods))


def fetched(server, root, *moods):
    """Fetch the file; it must be whole, and nothing else must be left."""
    assert download.fetch(offered(server, *moods), root) == ()
    assert (root / "file").read_bytes() == BODY
    assert not any((root / ".download").iterdir())
    return server.asked


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data" / ".download").mkdir(parents=True)
    return tmp_path / "data"


# ---- fetching ---------------------------------------------------------------------------------

def test_a_good_server_is_asked_once(server, root, capsys):
    assert fetched(server, root, "well") == [("well", 0)]
    said = capsys.readouterr()
    assert "downloading file" in said.out and "127.0.0.1" in said.out and said.err == ""


def test_after_a_cut_it_goes_on_where_it_ended(server, root):
    assert fetched(server, root, "cut") == [("cut", 0), ("cut", 70_000), ("cut", 140_000)]


def test_after_a_stall_it_goes_on_where_it_ended(server, root, monkeypatch):
    monkeypatch.setattr(download, "STALL", 0.5)
    started = time.monotonic()
    assert fetched(server, root, "stall") == [("stall", 0), ("stall", 70_000), ("stall", 140_000)]
    assert 1 < time.monotonic() - started < 5           # two stalls of 0.5 s, none of 5 s


def test_what_an_earlier_call_brought_is_not_fetched_again(server, root):
    (root / ".download" / "file.part").write_bytes(BODY[:123_456])
    assert fetched(server, root, "well") == [("well", 123_456)]


def test_another_source_goes_on_where_the_first_ended(server, root):
    assert fetched(server, root, "cut-then-500", "well") == [
        ("cut-then-500", 0), ("cut-then-500", 70_000), ("well", 70_000)]


def test_a_server_without_range_sends_all_again(server, root):
    (root / ".download" / "file.part").write_bytes(BODY[:123_456])
    assert fetched(server, root, "no-range") == [("no-range", 123_456)]


def test_bytes_of_another_file_are_thrown_away(server, root):
    (root / ".download" / "file.part").write_bytes(BODY[1:50_000])
    assert fetched(server, root, "well") == [("well", 49_999), ("well", 0)]
    (root / "file").unlink()
    (root / ".download" / "file.part").write_bytes(BODY + b"more")      # longer than the file
    assert fetched(server, root, "well")[2:] == [("well", 0)]


@pytest.mark.parametrize("mood, reason", [
    ("404", "HTTP 404"), ("500", "HTTP 500"), ("416", "HTTP 416"),
    ("cut-always", "cut off after 70000 of 200000 bytes"),
    ("cut-at-once", "cut off after 0 of 200000 bytes"),
    ("stall-at-once", "no answer for 0.5 s"),
    ("claims-less", "offers 1000 bytes instead of 200000"),
    ("claims-more", "offers 1000000000000 bytes instead of 200000"),
    ("sends-less", "cut off after 150000 of 200000 bytes"),
    ("sends-more", "sends more than the 200000 bytes"),
    ("wrong", "wrong checksum"),
    ("page", "offers 25 bytes instead of 200000"),
])
def test_a_bad_source_is_named_and_the_next_one_taken(
        server, root, monkeypatch, mood, reason):
    if mood == "stall-at-once":
        monkeypatch.setattr(download, "STALL", 0.5)
    reasons = download.fetch(offered(server, mood), root)
    assert len(reasons) == 1 and reason in reasons[0] and "127.0.0.1" in reasons[0]
    assert not (root / "file").exists()
    assert len(server.asked) <= 2               # no endless asking
    fetched(server, root, mood, "well")


def test_a_login_page_does_not_cost_what_is_there(server, root):
    part = root / ".download" / "file.part"
    part.write_bytes(BODY[:123_456])
    for mood in ("page", "404", "claims-more"):
        assert download.fetch(offered(server, mood), root)
        assert part.read_bytes() == BODY[:123_456]


def test_a_slow_source_is_left_while_there_is_another(server, root, monkeypatch, capsys):
    monkeypatch.setattr(download, "PATIENCE", 0.1)
    monkeypatch.setattr(download, "SLOW", 10**7)
    asked = fetched(server, root, "drip", "well")
    assert asked[0] == ("drip", 0) and asked[1][0] == "well" and 0 < asked[1][1] < 100_000
    assert "kB a second" in capsys.readouterr().out

    (root / "file").unlink()
    asked = fetched(server, root, "drip", "404")[2:]    # and taken again where the other has none
    assert [mood for mood, start in asked] == ["drip", "404", "drip"]
    (root / "file").unlink()
    assert fetched(server, root, "drip")[5:] == [("drip", 0)]


# ---- what a user reads ------------------------------------------------------------------------

@pytest.fixture
def published(server, monkeypatch):
    """Publish a set of files under a data set's name: {file name: (body, moods)}."""
    def publish(name, **files):
        for file, (body, _) in files.items():
            server.bodies[file] = body
        monkeypatch.setitem(download.FILES, name, tuple(
            offered(server, *moods.split(), name=file) for file, (_, moods) in files.items()))
        return download.FILES[name]
    return publish


def words(root, name="svhn", *more):
    return ["--dataset", name, "--data-dir", root, *more]


def test_download_does_just_that(published, server, root, capsys):
    published("svhn", a=(BODY, "well"), b=(b"small", "well"))
    for _ in range(2):
        facts = data.main([str(w) for w in words(root, "svhn", "--download")])
        assert facts == {"dataset": "svhn", "root": str(root)}
        assert str(root) in capsys.readouterr().out
    assert len(server.asked) == 2               # nothing the second time
    assert (root / "a").read_bytes() == BODY and not (root / ".arrays").exists()


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_where_there_is_nothing_to_download(tmp_path, capsys, name):
    tiny.refused(capsys, data, words(tmp_path, name, "--download"), name, "cifar10")


def archive():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as bundle:
        bundle.writestr("tiny-imagenet-200/wnids.txt", BODY)
    return made.getvalue()


def test_an_archive_is_fetched_and_unpacked(published, server, root, capsys, monkeypatch):
    # What is in the folder is looked at in test_sets.
    monkeypatch.setattr(data.readers, "tiny_listing", lambda folder: None)
    published("tinyimagenet", **{"a.zip": (archive(), "404 cut")})
    facts = data.main([str(w) for w in words(root, "tinyimagenet", "--download")])
    assert facts == {"dataset": "tinyimagenet", "root": str(root)}
    assert (root / "tiny-imagenet-200" / "wnids.txt").read_bytes() == BODY
    assert [mood for mood, _ in server.asked] == ["404", "cut", "cut", "cut"]
    assert str(root / "tiny-imagenet-200") in capsys.readouterr().out
    (root / "a.zip").unlink()
    assert download.ensure("tinyimagenet", root / "tiny-imagenet-200") == root
    assert len(server.asked) == 4


def test_offline_the_message_names_files_checksums_addresses_and_places(
        published, tmp_path, capsys, monkeypatch):
    root = tmp_path / "new"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{free.getsockname()[1]}"       # bound, but not listening
        files = [file._replace(urls=(f"http://{nobody}/{file.name}",)) for file in published(
            "svhn", first=(BODY, "well"), second=(b"small", "well"))]
        monkeypatch.setitem(download.FILES, "svhn", files)
        for script in (data, train_student):
            tiny.refused(capsys, script, words(root), nobody, "refused", *(
                part for file in files for part in (
                    root / file.name, file.md5, file.urls[0], f"{file.size} bytes")))
    assert not root.exists()        # nothing came, and nothing is left for it


def test_a_folder_that_was_made_for_nothing_is_gone_but_not_one_that_was_there(tmp_path):
    """Also where another process waits for it: that makes it again."""
    (tmp_path / "mine").mkdir()
    with download.alone(tmp_path / "a/b/.download"), download.alone(tmp_path / "mine"):
        assert (tmp_path / "a/b/.download").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with download.alone(tmp_path / "a/b"):
        (tmp_path / "a/kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    with download.alone(tmp_path / "c"):
        code = ("import download, os, sys; from pathlib import Path; print(1, flush=True)\n"
                "with download.alone(Path(sys.argv[1])): Path(sys.argv[1], 'x').touch()")
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "c"], text=True,
                                 cwd=Path(common.__file__).parent, stdout=subprocess.PIPE)
        assert child.stdout.readline() and "waiting" in child.stdout.readline()
    child.communicate(timeout=30)
    assert child.returncode == 0 and (tmp_path / "c" / "x").exists()


def test_of_many_that_wait_for_a_folder_that_is_made_again_one_is_in(tmp_path):
    """The lock that the second gets may be that of a folder which is no more."""
    code = """if True:
        import download, pathlib, sys, time
        print(1, flush=True)
        for _ in range(40):
            with download.alone(pathlib.Path(sys.argv[1], "new")):
                mark = pathlib.Path(sys.argv[1], "inside")
                mark.touch(exist_ok=False)
                time.sleep(0.002)
                mark.unlink()"""
    children = [subprocess.Popen([sys.executable, "-c", code, tmp_path], text=True,
                                 cwd=Path(common.__file__).parent, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE) for _ in range(4)]
    told = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, told
    assert not any(tmp_path.iterdir())


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    calls, whole = [], os.makedirs

    def gone(path, **options):
        calls.append(path)
        if len(calls) == 1:     # there already; and a moment later it is not
            raise FileExistsError(17, "File exists", str(path))
        whole(path, **options)

    monkeypatch.setattr(os, "makedirs", gone)
    with download.alone(tmp_path / "new"):
        handle = os.open(tmp_path / "new", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    assert len(calls) == 2


def test_a_file_placed_by_hand_is_checked_and_named(published, server, root, capsys):
    file, = published("svhn", a=(BODY, "well"))
    for body, wrong in ((BODY[:-1], "cut short, 199999 of 200000"), (b"", "cut short, 0 of"),
                        (BODY + b"x", "200001 bytes"), (BODY[::-1], md5(BODY[::-1]))):
        (root / "a").write_bytes(body)
        for flags in (["--download"], []):
            tiny.refused(capsys, data, words(root, "svhn", *flags), root / "a", wrong, file.md5,
                         file.urls[0])
        assert (root / "a").read_bytes() == body        # it is the user's: never thrown away
    (root / "a").write_bytes(BODY)
    data.main([str(w) for w in words(root, "svhn", "--download")])
    assert server.asked == []


def test_a_file_that_cannot_be_read_is_named(published, root, capsys):
    (root / "a").mkdir()
    published("svhn", a=(bytes((root / "a").stat().st_size), "well"))
    tiny.refused(capsys, data, words(root, "svhn"), root / "a", "Is a directory")


def test_a_folder_that_cannot_be_written_is_named(published, tmp_path, capsys):
    published("svhn", a=(BODY, "well"))
    (tmp_path / "file").write_text("no folder")
    tiny.refused(capsys, data, words(tmp_path / "file", "svhn", "--download"), tmp_path / "file",
                 "cannot be written")


def test_addresses_and_checksums_are_those_of_torchvision():
    cifar, = download.FILES["cifar10"]
    official = torchvision.datasets.CIFAR10
    assert (cifar.name, cifar.md5, cifar.urls[0]) == (
        official.filename, official.tgz_md5, official.url)
    assert download.FOLDERS["cifar10"] == official.base_folder
    listed = {name: (md5, url) for url, name, md5 in torchvision.datasets.SVHN.split_list.values()}
    assert {file.name: (file.md5, file.urls[0]) for file in download.FILES["svhn-extra"]} == listed
    assert {file.name for file in download.FILES["svhn"]} == {"train_32x32.mat", "test_32x32.mat"}
    for file in (f for files in download.FILES.values() for f in files):
        assert all(url.endswith("/" + file.name) for url in file.urls)


ALONE = """
import sys
sys.path.insert(0, {code!r})
import download
download.FILES["tinyimagenet"] = (download.File(*{file!r}),)
download.only("tinyimagenet", {root!r})
"""


def test_two_processes_download_and_unpack_once(published, server, root, monkeypatch):
    go = threading.Event()
    monkeypatch.setitem(MOODS, "told", lambda to, body, start: go.wait(30) and send(to, body))
    file, = published("tinyimagenet", **{"a.zip": (archive(), "told")})
    code = ALONE.format(code=str(Path(common.__file__).parent), file=tuple(file), root=str(root))
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.stdout.readline() for process in both]      # one downloads, the other waits
    go.set()
    rest = [process.communicate(timeout=30) for process in both]
    said = [line + out for line, (out, _) in zip(said, rest, strict=True)]
    assert [process.returncode for process in both] == [0, 0], rest
    assert server.asked == [("told", 0)]
    assert (root / "tiny-imagenet-200" / "wnids.txt").read_bytes() == BODY
    for word in ("waiting", "downloading", "unpacking"):
        assert sorted(word in lines for lines in said) == [False, True], said
