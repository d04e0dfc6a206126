"""Dirty folders: each odd file is read, or refused with its path and how many there are, or left
out, counted and listed where --skip-bad asks for it."""
import io
import os
import shutil
import struct

import numpy as np
import pytest
import tiny
from PIL import EpsImagePlugin, Image

import data
import decode
import look
import readers
import train_student

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    return tiny.make_folder(tmp_path / "root", train=4, test=2)     # 24 files


def load(root, **options):
    return data.load("folder", root, image_size=8, val_fraction=0, **options)


def refused(capsys, root, *parts, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(root, **options)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1, line
    for part in parts:
        assert str(part) in line, f"{part!r} is not in {line!r}"


def floats(value):
    pixels = np.full((16, 16), 0.5, np.float32)
    pixels[3, 4] = value
    return pixels


def cut(path):
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[:-100])


BAD = {     # file -> (how it is written, what is said of it)
    "text.jpg": (lambda path: path.write_text("no image\n"), "of no known format"),
    "empty.png": (lambda path: path.write_bytes(b""), "empty"),
    "cut.jpg": (cut, "truncated"),
    "header.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "or cut short"),
    "cut.png": (cut, "truncated"),
    "cut.gif": (cut, "truncated"),
    "nan.tif": (lambda path: Image.fromarray(floats(np.nan)).save(path), "not finite, NaN"),
    "inf.tif": (lambda path: Image.fromarray(floats(-np.inf)).save(path), "not finite, inf"),
    "below.tif": (lambda path: Image.fromarray(floats(-3)).save(path), "from -3 to 0.5"),
    "deep.tif": (lambda path: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path),
                 "to 70000"),
    "program.eps": (lambda path: Image.fromarray(PIXELS).save(path), "PostScript"),
    "bomb.png": (lambda path: Image.new("L", (20, 15)).save(path), "decompression bomb"),
    "worse.png": (lambda path: Image.new("L", (50, 50)).save(path), "decompression bomb"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_path_and_reason(folder, capsys, monkeypatch, name):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 256)         # PIL warns up to twice as many
    path = folder / "test" / "green" / name
    write, reason = BAD[name]
    write(path)
    refused(capsys, folder, path, reason, "such files: 1 of 25", "--skip-bad")
    assert len(load(folder, skip_bad=True).test.labels) == 8


@pytest.mark.parametrize("inside", [1, 2])
def test_no_other_program_is_started(tmp_path, monkeypatch, inside):
    """PIL hands PostScript to Ghostscript, that inside of an IPTC file too, whatever its name."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    for _ in range(inside):
        fields = ((3, 60, b"\1\0"), (3, 20, b"\0\20"), (3, 30, b"\0\20"), (3, 120, b"\0\5"),
                  (8, 10, content + b"%" * 200), (8, 11, b""))
        content = b"".join(b"\x1c" + bytes(tag) + len(data).to_bytes(2, "big") + data
                           for *tag, data in fields)
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"a\.png"):
        decode.read_image(tmp_path / "a.png", 16, "resize")
    assert not (tmp_path / "started").exists()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)       # how it would be without our care
    monkeypatch.setattr(decode, "refuse_before_decoding", lambda *_: None)
    with pytest.raises(ValueError, match=r"a\.png"):
        decode.read_image(tmp_path / "a.png", 16, "resize")
    assert (tmp_path / "started").exists()


def test_other_damage_than_pil_knows_of_is_refused_too(folder, capsys, monkeypatch):
    def odd(*_):
        raise IndexError("list index out of range")

    monkeypatch.setattr(decode, "to_rgb", odd)
    refused(capsys, folder, folder / "train" / "blue" / "0.png", "list index", "24 of 24")


FORMATS = {      # where damage is more often met -> how a noisy image is written
    "png": {}, "jpg": dict(quality=90), "jp2": {}, "icns": {}, "gif": {}, "pcx": {}, "webp": {},
    "tif": dict(compression="tiff_deflate"), "bmp": {}, "tga": dict(compression="tga_rle"),
    "mpo": dict(save_all=True, append_images=[Image.new("RGB", (64, 64))]), "sgi": {}, "ppm": {}}


@pytest.mark.parametrize("ending", FORMATS)
def test_what_pil_cannot_decode_is_never_half_an_image(tmp_path, ending):
    """A bit turned, or the end cut off: where PIL raises, it is refused; what PIL has taken in
    until then must not pass for an image."""
    path, rng, bad = tmp_path / f"a.{ending}", np.random.default_rng(0), 0
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, **FORMATS[ending])
    whole = path.read_bytes()
    for turn in range(60):
        broken = bytearray(whole)
        if turn % 2:
            broken[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        else:
            del broken[rng.integers(1, len(whole)):]
        path.write_bytes(broken)
        try:
            with decode.decoding(), Image.open(path) as image:
                image.load()
        except Exception:       # of nearly any kind
            bad += 1
            with pytest.raises(ValueError, match=rf"a\.{ending}: not an image"), decode.decoding():
                decode.read_image(path, 64, "resize")
    assert bad >= 5


def test_a_bomb_inside_of_an_icon_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 256 * 256)
    inside = io.BytesIO()
    Image.new("RGB", (600, 600)).save(inside, "PNG")
    part = b"ic07" + (len(inside.getvalue()) + 8).to_bytes(4, "big") + inside.getvalue()
    (tmp_path / "a.icns").write_bytes(b"icns" + (len(part) + 8).to_bytes(4, "big") + part)
    with pytest.raises(ValueError, match=r"a\.icns.*bomb"), decode.decoding():
        decode.read_image(tmp_path / "a.icns", 8, "resize")


def scanned(count):
    """A progressive JPEG of so many scans, the last of which is there again and again."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", progressive=True)
    *_, last = parts = file.getvalue().split(b"\xff\xda")
    more = [last[:-2]] * (count - len(parts) + 2)
    return b"\xff\xda".join([*parts[:-1], *more]) + b"\xff\xd9"


@pytest.mark.parametrize("count, read", [(10, True), (100, True), (101, False)])
def test_a_jpeg_that_is_decoded_again_and_again_is_refused(tmp_path, count, read):
    """0.1 s for every 127 bytes, at the largest size; what lies behind its end counts nothing."""
    path = tmp_path / "a.jpg"
    path.write_bytes(scanned(count) + b"\xff\xda\0\2" * 500)
    assert decode.scans(path.read_bytes()) == count
    if read:
        assert decode.read_image(path, 16, "resize").std() > 10
    else:
        with pytest.raises(ValueError, match=r"a\.jpg.*101 scans, a bomb"):
            decode.read_image(path, 16, "resize")


@pytest.mark.parametrize("holds", [
    lambda jpeg: b"".join(b"\x1c" + bytes(tag) + len(part).to_bytes(2, "big") + part   # IPTC
                          for *tag, part in ((3, 60, b"\1\0"), (3, 20, b"\0\20"), (3, 30, b"\0\20"),
                                             (3, 120, b"\0\5"), (8, 10, jpeg), (8, 11, b""))),
    lambda jpeg: b"BLP1" + bytes(8) + (16).to_bytes(4, "little") * 2 + bytes(200) + jpeg])
def test_a_file_that_may_hold_others_is_not_opened(tmp_path, holds):
    """Theirs would be decoded without a look at them."""
    path = tmp_path / "a.jpg"
    path.write_bytes(holds(scanned(101)))
    with pytest.raises(ValueError, match=r"a\.jpg.*(IPTC|BLP), a format that is not read"):
        decode.read_image(path, 16, "resize")


def test_padding_hides_no_scans(tmp_path):
    path, jpeg = tmp_path / "a.jpg", scanned(101)
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    path.write_bytes(jpeg[:2] + 20 * comment + jpeg[2:])
    with pytest.raises(ValueError, match="101 scans, a bomb"):
        decode.read_image(path, 16, "resize")


def test_tiles_larger_than_a_picture_may_be(tmp_path):
    """16×16 pixels in one tile, which is decoded whole."""
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, 322: 45_008, 323: 45_008, 324: 8,
            325: 4}
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + struct.pack("<I4xH", 12, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4))
    with pytest.raises(ValueError, match="45008×45008 pixels, a bomb"):
        decode.read_image(path, 16, "resize")


@pytest.mark.parametrize("from_white", [False, True])
def test_grey_levels_of_16_bits_that_count_from_white_are_refused(tmp_path, from_white):
    """PIL passes over it, and would show the negative."""
    path = tmp_path / "a.tif"
    tags = {256: 4, 257: 4, 258: 16, 259: 1, 262: 0 if from_white else 1, 273: 8, 277: 1, 278: 4,
            279: 32}
    path.write_bytes(b"II*\0" + struct.pack("<I", 40) + np.full(16, 25 * 257, "<u2").tobytes()
                     + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()) + bytes(4))
    if from_white:
        with pytest.raises(ValueError, match="0 for white; convert it"):
            decode.read_image(path, 4, "resize")
    else:
        assert (decode.read_image(path, 4, "resize") == 25).all()


@pytest.mark.parametrize("words", ["decoder error -9 when reading image file", "out of memory"])
def test_memory_that_a_decoder_lacks_is_no_fault_of_the_file(folder, capsys, monkeypatch, words):
    def lacking(*_):
        raise OSError(words)

    monkeypatch.setattr(decode, "to_rgb", lacking)
    refused(capsys, folder, "its 16×16 pixels", "lower OMP_NUM_THREADS", skip_bad=True)
    assert not list(folder.glob(".arrays/*"))


def test_a_jpeg2000_is_read_whole_or_not_at_all(tmp_path):
    """Cut behind its header, PIL takes it for a black picture."""
    path = tmp_path / "a.jp2"
    Image.fromarray(PIXELS).save(path)
    whole = path.read_bytes()
    for size in range(1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.jp2"):
            decode.read_image(path, 16, "resize")


def test_a_strip_of_pixels_does_not_grow_without_end(folder, capsys):
    path = folder / "train" / "red" / "strip.png"
    Image.new("L", (2, 60_000)).save(path)
    with pytest.raises(ValueError, match="2×60000 pixels are too long"):
        decode.read_image(path, 128, "crop")
    for fit in ("resize", "pad"):
        assert decode.read_image(path, 128, fit).shape == (128, 128, 3)


@pytest.mark.parametrize("name, options, colour", [
    ("a.png", dict(format="JPEG"), (200, 90, 10)),              # mislabelled, but an image
    ("A.JPG", {}, (200, 90, 10)),
    ("a", dict(format="PNG"), (200, 90, 10)),
    ("moving.gif", dict(save_all=True, append_images=[Image.new("RGB", (4, 4))]), (200, 90, 10)),
    ("moving.tif", dict(save_all=True, append_images=[Image.new("RGB", (4, 4))]), (200, 90, 10))])
def test_an_odd_file_is_read(tmp_path, name, options, colour):
    Image.new("RGB", (4, 4), colour).save(tmp_path / name, **options)
    found = decode.read_image(tmp_path / name, 4, "resize")
    assert np.abs(found.astype(int) - colour).max() <= 6        # JPEG and GIF change colours


def test_floats_up_to_1_are_shares_of_white(tmp_path):
    Image.fromarray(floats(1.0)).save(tmp_path / "a.tif")
    found = decode.read_image(tmp_path / "a.tif", 16, "resize")
    assert (found[3, 4] == 255).all() and (found[0, 0] == 128).all()


@pytest.mark.parametrize("levels, shown", [((0, 199), 0.77), ((0, 250), 0.97), ((0, 300), 1.17),
                                           ((300, 32767), 127.5)])
@pytest.mark.parametrize("plain", [True, False])
def test_the_white_of_a_grey_map_is_what_its_header_says(tmp_path, levels, shown, plain):
    """Not what its brightest pixel suggests: Pillow gives a PGM of 16 bits as 32-bit integers."""
    pixels = np.full((4, 4), levels[1], np.uint16)
    pixels[0] = levels[0]
    header = f"P{2 if plain else 5}\n4 4\n65535\n".encode()
    body = " ".join(map(str, pixels.flat)).encode() if plain else pixels.astype(">u2").tobytes()
    (tmp_path / "a.pgm").write_bytes(header + body)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = decode.read_image(tmp_path / "a.pgm", 4, "resize")
    np.testing.assert_array_equal(found, decode.read_image(tmp_path / "a.png", 4, "resize"))
    assert abs(found[3, 3, 0] - shown) <= 0.5


def test_signed_16_bits_have_one_white(tmp_path):
    for high in (200, 16384):       # TIFF: SampleFormat 2
        path = tmp_path / f"{high}.tif"
        Image.fromarray(np.full((4, 4), high, np.uint16)).save(path, tiffinfo={339: 2})
        with Image.open(path) as image:
            assert image.mode == "I"
        found = decode.read_image(path, 4, "resize")
        assert (found == round(255 * high / 32767)).all()


# ---- --skip-bad -------------------------------------------------------------------------------

def spoil(folder, *names):
    for name in names:
        (folder / name).write_text("no image\n")


def test_all_bad_files_are_counted_and_left_out(folder, capsys):
    bad = ("train/blue/1.png", "train/red/3.png", "test/grey/0.png")
    whole = load(folder)
    spoil(folder, *bad)
    refused(capsys, folder, folder / bad[0], "such files: 3 of 24", "--skip-bad")
    splits = load(folder, skip_bad=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--skip-bad: 3 of 24 image files left out" and len(lines) == 4
    for line, name in zip(lines[1:], bad, strict=True):
        assert str(folder / name) in line and "of no known format" in line
    assert np.bincount(splits.train.labels).tolist() == [3, 4, 4, 3]
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 1, 2]
    # Those that stay are the ones that they were, with their labels.
    pairs = {(image.tobytes(), int(label)) for image, label in zip(*whole.train, strict=True)}
    left = {(image.tobytes(), int(label)) for image, label in zip(*splits.train, strict=True)}
    assert left < pairs and len(left) == 14 and splits.key != whole.key


def test_the_arrays_say_so_again_and_serve_no_other(folder, capsys, monkeypatch):
    path = folder / "train" / "blue" / "1.png"
    good = path.read_bytes()
    spoil(folder, "train/blue/1.png")
    first = load(folder, skip_bad=True)
    told, decoded = capsys.readouterr().out, []
    monkeypatch.setattr(decode, "read_image", lambda *words, whole=decode.read_image: (
        decoded.append(1) or whole(*words)))
    again = load(folder, skip_bad=True)
    assert capsys.readouterr().out == told and not decoded and again.key == first.key
    assert isinstance(again.train.images, np.memmap)
    refused(capsys, folder, path, "such files: 1 of 24")        # without the flag
    path.write_bytes(good)
    decoded.clear()
    whole = load(folder)
    assert len(decoded) == 24 and len(whole.train.labels) == 16
    decoded.clear()                         # where all are good, their arrays serve both
    assert load(folder, skip_bad=True).key == whole.key and not decoded
    assert capsys.readouterr().out == "" and len(list((folder / ".arrays").iterdir())) == 1


def test_a_long_list_is_cut_and_kept_whole(folder, capsys):
    for i in range(25):
        spoil(folder, f"train/blue/bad\n{i}.png")
    load(folder, skip_bad=True)
    lines = capsys.readouterr().out.splitlines()
    (listed,) = folder.glob(".arrays/*/skipped.txt")
    assert len(lines) == 22 and lines[0].startswith("--skip-bad: 25 of 49")
    assert lines[-1] == f"  ... and 5 more: {listed}"
    assert [f"  {folder}/{line}" for line in listed.read_text().splitlines()[:20]] == lines[1:21]
    assert len(listed.read_text().splitlines()) == 25
    shutil.rmtree(folder / ".arrays")
    (folder / ".arrays").write_text("in the way")       # nowhere to keep it: all are shown
    load(folder, skip_bad=True)
    assert len(capsys.readouterr().out.splitlines()) == 26


def test_files_left_out_are_listed_where_they_are_now(folder, capsys):
    spoil(folder, "train/blue/1.png")
    load(folder, skip_bad=True)
    told = capsys.readouterr().out
    moved = folder.rename(folder.with_name("moved"))
    load(moved, skip_bad=True)
    assert capsys.readouterr().out == told.replace(f"{folder}/", f"{moved}/") != told


@pytest.mark.parametrize("kind", ["nowhere", "circle", "pipe"])
def test_a_class_that_is_no_folder_is_not_left_out(folder, capsys, kind):
    """A disk that is not mounted would make two classes of three."""
    for split in ("train", "test"):
        path = folder / split / "green"
        shutil.rmtree(path, ignore_errors=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(
            path if kind == "circle" else "/nowhere/green")
    refused(capsys, folder, folder / "train" / "green",
            "neither a file nor a folder" if kind == "pipe" else "a link that leads nowhere")


def test_a_class_without_any_image_left_is_refused(folder, capsys):
    spoil(folder, "test/grey/0.png", "test/grey/1.png")
    refused(capsys, folder, "'grey' in test", folder / "test/grey/0.png", skip_bad=True)
    assert not list(folder.glob(".arrays/*"))


@pytest.mark.parametrize("error, part", [
    (OSError(5, "Input/output error"), "Input/output error"),
    (PermissionError(13, "Permission denied"), "Permission denied"),
    (MemoryError(), "lower OMP_NUM_THREADS, or remove")])
def test_what_is_no_fault_of_a_file_does_not_skip_it(folder, capsys, monkeypatch, error, part):
    def broken(path, *_, whole=Image.open, **__):
        if path.name == "2.png":
            raise error
        return whole(path)

    monkeypatch.setattr(Image, "open", broken)
    refused(capsys, folder, "2.png", part, skip_bad=True)
    assert not list(folder.glob(".arrays/*"))


def test_only_sets_of_image_files_have_the_flag(tmp_path, capsys):
    tiny.refused(capsys, data, ["--skip-bad", "--data-dir", tmp_path], "--skip-bad", "digits",
                 "leave it out")


def test_a_run_says_what_it_left_out_and_is_no_other(folder, tmp_path, capsys):
    """The data's key tells runs apart, so the flag alone does not."""
    final = tiny.run(train_student, folder, tmp_path, epochs=1)
    words = tiny.words(folder, tmp_path, epochs=1)
    assert train_student.main([*words, "--skip-bad"]) == final
    spoil(folder, "train/blue/1.png")
    tiny.refused(capsys, train_student, [*words, "--skip-bad"], "data_key", "--overwrite")
    tiny.run(train_student, folder, tmp_path, "--skip-bad", "--overwrite", epochs=1)
    said = tiny.said(capsys)
    assert "--skip-bad: 1 of 24 image files left out" in said and "11 train, 4 validation" in said
    assert look.main([str(tmp_path / "digits/student-s0"), "--images", "4"])["test_accuracy"] >= 0


# ---- folders ----------------------------------------------------------------------------------

def test_what_is_not_read_is_told(folder, capsys):
    load(folder)
    assert capsys.readouterr().out == ""
    (folder / "train" / "blue" / ".DS_Store").write_text("x")
    load(folder)
    hidden = folder / "train" / "blue" / ".DS_Store"
    assert capsys.readouterr().out == f"note: not read, as hidden or in no class folder: {hidden}\n"
    (folder / "train" / "stray.png").write_text("x")
    (folder / "val").mkdir()
    load(folder)
    assert f"{folder / 'val'} and 2 more" in capsys.readouterr().out
    shutil.copytree(folder / "train", folder / "Train")
    load(folder)        # beside train, not in it
    assert f"{folder / 'Train'} and 3 more" in capsys.readouterr().out


def test_files_that_are_none_are_refused(folder, capsys):
    os.mkfifo(folder / "train" / "red" / "pipe.png")        # reading it would wait for ever
    refused(capsys, folder, folder / "train" / "red" / "pipe.png", "neither a file nor a folder")


def test_folders_without_end_are_refused(folder, capsys):
    (folder / "train" / "red" / "/".join("d" * 150)).mkdir(parents=True)
    refused(capsys, folder, "more than 100 folders deep")


def test_a_file_that_goes_while_it_is_looked_at(folder, capsys, monkeypatch):
    def late(listing, whole=readers.fingerprint):
        (folder / "train" / "red" / "0.png").unlink()
        return whole(listing)

    monkeypatch.setattr(readers, "fingerprint", late)
    refused(capsys, folder, folder / "train" / "red" / "0.png", "No such file")


def test_one_image_a_class_is_enough(tmp_path):
    folder = tiny.make_folder(tmp_path / "root", train=1, test=1, side=2)
    final = tiny.run(train_student, folder, tmp_path, "--val-fraction", 0)
    assert final["val_accuracy"] is None and 0 <= final["test_accuracy"] <= 1


def test_memory_that_gives_out_is_not_taken_for_a_broken_exif(monkeypatch):
    def gives(error):
        def transpose(_):
            raise error
        monkeypatch.setattr(decode.ImageOps, "exif_transpose", transpose)

    image = Image.new("RGB", (2, 3))
    gives(ValueError("broken"))
    assert decode.upright(image) is image
    gives(MemoryError())
    with pytest.raises(MemoryError):
        decode.upright(image)
