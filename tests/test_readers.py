"""The folder reader on images that the test writes: modes, sizes, links, and the arrays kept."""
import json
import mmap
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

import data
import decode
import digits
import readers

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def read(path, size=4, fit="resize"):
    pixels = decode.read_image(path, size, fit)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    return pixels


def load(root, size=tiny.SIDE, **options):
    return data.load("folder", root, image_size=size, **options)


# ---- modes and sizes --------------------------------------------------------------------------

def palette(colours, **options):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([v for colour in colours for v in colour])
    return image, options


@pytest.mark.parametrize("name, image, colour", [
    ("rgb.png", Image.new("RGB", (4, 4), (10, 200, 30)), (10, 200, 30)),
    ("grey.png", Image.new("L", (4, 4), 77), (77, 77, 77)),
    ("palette.png", palette([RED, (1, 2, 3)])[0], (1, 2, 3)),
    ("rgba.png", Image.new("RGBA", (4, 4), (255, 100, 0, 255)), (255, 100, 0)),
    ("half.png", Image.new("RGBA", (4, 4), (200, 100, 0, 128)), (100, 50, 0)),
    ("clear.png", Image.new("RGBA", (4, 4), (200, 100, 0, 0)), BLACK),
    ("la.png", Image.new("LA", (4, 4), (90, 255)), (90, 90, 90)),
    ("cmyk.tif", Image.new("CMYK", (4, 4), (255, 0, 0, 0)), (0, 255, 255)),
    ("bits.png", Image.new("1", (4, 4), 1), (255, 255, 255)),
    ("deep.png", Image.fromarray(np.full((4, 4), 32768, np.uint16)), (128, 128, 128)),
    ("dark.png", Image.fromarray(np.full((4, 4), 200, np.uint16)), (1, 1, 1)),
    ("float.tif", Image.fromarray(np.full((4, 4), 51.2, np.float32)), (51, 51, 51)),
])
def test_any_mode_becomes_rgb(tmp_path, name, image, colour):
    found = read(save(tmp_path / name, image))
    assert np.abs(found.astype(int) - colour).max() <= 1, found[0, 0]


def test_a_transparent_palette_entry_is_black(tmp_path):
    image, _ = palette([RED, (90, 2, 3)])
    path = save(tmp_path / "a.png", image, transparency=1)
    assert (read(path) == 0).all()


def test_an_image_of_the_right_size_is_kept_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(pixels))
    for fit in decode.FITS:
        np.testing.assert_array_equal(read(path, 16, fit), pixels)


def bands(wide=True):
    """Three 8×8 squares, red, green, blue: 24 pixels wide (or high)."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    for i, colour in enumerate((RED, GREEN, BLUE)):
        pixels[:, 8 * i:8 * i + 8] = colour
    return pixels if wide else pixels.swapaxes(0, 1)


@pytest.mark.parametrize("wide", [True, False])
def test_what_each_fit_keeps(tmp_path, wide):
    path = save(tmp_path / "a.png", Image.fromarray(bands(wide)))
    turn = (lambda pixels: pixels) if wide else (lambda pixels: pixels.swapaxes(0, 1))

    cut = read(path, 8, "crop")                     # the middle, at its own scale
    assert (cut == GREEN).all()

    whole = turn(read(path, 24, "pad"))             # all of it, black around
    np.testing.assert_array_equal(whole[8:16], bands())
    assert (whole[:8] == 0).all() and (whole[16:] == 0).all()

    flat = turn(read(path, 8, "resize")).astype(int)    # all of it, squeezed to a third
    assert (flat == flat[:1]).all()
    for column, colour in ((0, RED), (4, GREEN), (7, BLUE)):
        assert np.abs(flat[0, column] - colour).max() < 60
    scaled = turn(read(path, 6, "pad"))             # a quarter: 6×2 between two black bars
    assert (scaled[:2] == 0).all() and (scaled[4:] == 0).all() and (scaled[2:4].max(2) > 120).all()


@pytest.mark.parametrize("fit", decode.FITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (51, 3), (17, 16), (300, 299)])
def test_any_size_fits(tmp_path, fit, size):
    path = save(tmp_path / "a.png", Image.new("RGB", size, (50, 60, 70)))
    inside = (read(path, 16, fit) == (50, 60, 70)).all(2)
    width, height = (max(1, round(16 * side / max(size))) for side in size)
    assert inside.sum() == (width * height if fit == "pad" else 256)


def test_a_folder_of_mixed_images_is_read_whole(tmp_path):
    for part in ("train", "val"):
        for name, value in (("b-dark", 20), ("a-light", 220)):
            for i, mode in enumerate(("RGB", "L", "CMYK")):
                image = Image.new("L", (20 + i, 30), value).convert(mode)
                save(tmp_path / part / name / "deeper" / f"{i}.{'jpg' if i else 'png'}", image)
    (tmp_path / "train" / "b-dark" / ".hidden").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "notes.txt").write_text("no class")
    splits = load(tmp_path, val_fraction=0)         # val/ serves where there is no test/
    assert splits.classes == ("a-light", "b-dark")
    for part in (splits.train, splits.test):
        assert part.images.shape == (6, 16, 16, 3) and sorted(part.labels) == [0, 0, 0, 1, 1, 1]
        assert ((part.images.mean((1, 2, 3)) < 128) == (part.labels == 1)).all()


# ---- links ------------------------------------------------------------------------------------

def test_links_to_files_and_folders_are_followed(tmp_path):
    source = tiny.make_folder(tmp_path / "source", train=3, test=2)
    root = tmp_path / "root"
    (root / "train").mkdir(parents=True)
    (root / "test").symlink_to(source / "test")
    for name in tiny.COLOURS:
        (root / "train" / name).symlink_to(source / "train" / name)
    (source / "train" / "red" / "again.png").symlink_to(source / "train" / "red" / "0.png")
    splits = load(root, val_fraction=0)
    assert np.bincount(splits.train.labels).tolist() == [3, 3, 3, 4]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../train/red"])
def test_a_circle_of_links_is_refused_by_path(tmp_path, capsys, target):
    root = tiny.make_folder(tmp_path / "root", train=1, test=1)
    (root / "train" / "red" / "loop").symlink_to(target)
    with pytest.raises(SystemExit) as stop:
        load(root)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    # and not what lies behind it, which is no link
    assert f"{root / 'train' / 'red' / 'loop'}: a link that leads back to" in line


def test_a_link_that_leads_nowhere_is_refused_by_path(tmp_path, capsys):
    root = tiny.make_folder(tmp_path / "root", train=1, test=1)
    (root / "train" / "red" / "gone.png").symlink_to("nothing")
    with pytest.raises(SystemExit):
        load(root)
    assert str(root / "train" / "red" / "gone.png") in capsys.readouterr().err


# ---- the arrays kept --------------------------------------------------------------------------

@pytest.mark.parametrize("lack", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_a_lack_of_memory_is_no_damage(tmp_path, capsys, monkeypatch, lack):
    load(tiny.make_folder(tmp_path / "root", train=1, test=1))
    capsys.readouterr()

    def lacking(*_):
        raise lack

    monkeypatch.setattr(readers, "read_array", lacking)
    with pytest.raises(MemoryError):
        load(tmp_path / "root")
    assert capsys.readouterr().out == ""


@pytest.fixture
def folder(tmp_path):
    return tiny.make_folder(tmp_path / "root", train=3, test=2)


def kept(folder):
    return sorted(path.name for path in (folder / ".arrays").iterdir())


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that were decoded."""
    names, whole = [], decode.read_image

    def spy(path, *more):
        names.append(path.name)
        return whole(path, *more)

    monkeypatch.setattr(decode, "read_image", spy)
    return names


def test_the_second_load_decodes_nothing(folder, decoded):
    first = load(folder)
    assert len(decoded) == 20
    decoded.clear()
    again = load(folder)
    assert decoded == []
    for a, b in zip(first[:3], again[:3], strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert first[3:] == again[3:]
    assert isinstance(again.train.images, np.memmap)    # nothing is copied to make the splits


@pytest.mark.parametrize("change", ["rewritten", "touched", "added", "removed", "renamed"])
def test_a_changed_folder_is_noticed(folder, decoded, change):
    before, old = load(folder), kept(folder)
    path = folder / "train" / "red" / "0.png"
    if change == "rewritten":
        Image.new("RGB", (16, 16), "white").save(path)
    elif change == "touched":
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    elif change == "added":
        Image.new("RGB", (16, 16), "white").save(path.with_name("new.png"))
    elif change == "removed":
        path.unlink()
    else:
        path.rename(path.with_name("0b.png"))       # its place in the order stays
    decoded.clear()
    after = load(folder)
    assert len(decoded) == {"added": 21, "removed": 19}.get(change, 20)
    assert (before.key == after.key) == (change in ("touched", "renamed"))
    assert kept(folder) != old and len(kept(folder)) == 1       # the old arrays are gone


def test_arrays_larger_than_the_memory_are_read_without_their_neighbours(folder, monkeypatch):
    before, asked = load(folder), []

    class Spy(np.memmap):
        @property
        def _mmap(self):
            return SimpleNamespace(madvise=asked.append)

        @_mmap.setter
        def _mmap(self, _):
            pass

    monkeypatch.setattr(readers, "read_array",
                        lambda path, whole=readers.read_array: whole(path).view(Spy))
    load(folder)
    assert not asked
    monkeypatch.setattr(readers, "memory", lambda: before.train.images.nbytes)
    load(folder)
    assert set(asked) == {mmap.MADV_RANDOM}


def test_labels_are_checked_however_large_the_arrays_are(folder, decoded, monkeypatch, capsys):
    before = load(folder)
    monkeypatch.setattr(readers, "CHECKED", 0)
    load(folder)
    assert len(decoded) == 20
    path = next((folder / ".arrays").glob("*/test_labels.npy"))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    again = load(folder)
    assert "damaged" in capsys.readouterr().out and len(decoded) == 40
    np.testing.assert_array_equal(before.test.labels, again.test.labels)


def test_the_way_to_the_folder_does_not_matter(folder, decoded, monkeypatch):
    load(folder)
    count = len(decoded)
    monkeypatch.chdir(folder.parent)
    load(Path(folder.name))
    moved = folder.rename(folder.with_name("moved"))
    load(moved)
    assert len(decoded) == count > 0


def test_other_sizes_and_fits_have_arrays_of_their_own(folder, decoded):
    keys = [load(folder, size, fit=fit).key for size, fit in ((16, "pad"), (8, "pad"), (8, "crop"))]
    assert len(set(keys)) == 2 and len(kept(folder)) == 3   # square images: crop and pad agree
    decoded.clear()
    assert load(folder, 8, fit="crop").train.images.shape == (11, 8, 8, 3)
    assert decoded == []


def test_an_image_that_cannot_be_decoded_leaves_no_arrays(folder, capsys):
    path = folder / "train" / "red" / "0.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(SystemExit):
        load(folder)
    assert str(path) in capsys.readouterr().err
    assert not (folder / ".arrays").exists() or not kept(folder)
    path.write_bytes(whole)
    assert len(load(folder).test.labels) == 8


@pytest.mark.parametrize("name", ["meta.json", "train_images.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_damaged_arrays_are_made_again(folder, name, damage, capsys):
    before = load(folder)
    path = folder / ".arrays" / kept(folder)[0] / name
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":       # a digit of the mean, a bit of a pixel: still read without it
        data = bytearray(path.read_bytes())
        at = data.index(b'"mean"') + 12 if name == "meta.json" else len(data) - 5
        data[at] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(path.read_bytes()[:-100])
    after = load(folder)
    assert after.key == before.key and after.mean == before.mean
    np.testing.assert_array_equal(after.train.images, before.train.images)
    assert "made anew" in capsys.readouterr().out
    load(folder)
    assert "made anew" not in capsys.readouterr().out


@pytest.mark.parametrize("harm", [
    dict(classes=5), dict(classes=["a"]), dict(classes=[["a"], ["b"]]), dict(mean="abc"),
    dict(mean=[float("nan")] * 3), dict(mean=[0.5, 0.5]), dict(mean=[10**400, 0.5, 0.5]),
    dict(std=[0, 0, 0]), dict(skipped=7), dict(skipped={"a": 1}), dict(skipped=[1]),
    dict(skipped=None), "[" * 10**5])
def test_facts_of_arrays_that_cannot_be_are_made_again(folder, harm, capsys):
    """Also where they fit their own checksum, as whoever changed them may write a new one."""
    before = load(folder)
    path = folder / ".arrays" / kept(folder)[0] / "meta.json"
    facts = json.loads(path.read_text())
    if isinstance(harm, dict):
        harm = facts | harm
        harm = json.dumps(harm | dict(sum=readers.sum_of(harm)))
    path.write_text(harm)
    after = load(folder)
    assert (after.mean, after.std, after.classes) == (before.mean, before.std, before.classes)
    assert "made anew" in capsys.readouterr().out and json.loads(path.read_text()) == facts


def test_what_was_left_out_cannot_be_anything(folder, capsys):
    (folder / "train" / "red" / "0.png").write_text("no image")
    load(folder, skip_bad=True)
    path = folder / ".arrays" / kept(folder)[0] / "meta.json"
    facts = json.loads(path.read_text())
    for changed in (facts | dict(skipped=7), {k: v for k, v in facts.items() if k != "skipped"}):
        path.write_text(json.dumps(changed | dict(sum=readers.sum_of(changed))))
        capsys.readouterr()
        load(folder, skip_bad=True)
        assert "made anew" in capsys.readouterr().out and json.loads(path.read_text()) == facts


def test_what_a_killed_process_had_begun_to_write_is_removed(folder, capsys):
    before, whole = load(folder), folder / ".arrays" / kept(folder)[0]
    for process in (1, os.getpid()):        # a container gives the same number again
        shutil.copytree(whole, whole.with_name(f"{whole.name}.{process}.part"))
    shutil.rmtree(whole)
    assert load(folder).key == before.key and kept(folder) == [whole.name]
    assert "not kept" not in capsys.readouterr().err


def test_making_the_digits_spares_what_else_lies_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "splits", lambda: {
        part: (np.zeros((n, 32, 32, 3), np.uint8), np.arange(n) % 10)
        for part, n in (("train", 40), ("test", 20))})
    mine = tiny.make_folder(tmp_path / "digits-photographs", train=1, test=1)
    splits = data.load("digits", tmp_path)
    assert splits.train.images.shape == (36, 32, 32, 3) and len(splits.classes) == 10
    assert len(list(mine.glob("*/*/*.png"))) == 8


def test_a_phone_picture_is_set_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 200                             # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                # orientation: turn a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "lying.png", exif=exif)
    read = decode.read_image(tmp_path / "lying.png", 8, "resize")
    assert (read[:4] == 200).all() and (read[4:] == 0).all()        # bright on top
