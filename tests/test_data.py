"""Splits and batches against numpy: what a view may be is tried out shift by shift."""
import hashlib
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common
import data
import readers

SIDE, REACH = 16, 2         # a crop moves by up to an eighth of the side
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def split(n=40, classes=4, labelled=None, height=SIDE, width=SIDE, seed=0):
    """Random images, so that no two views of any are alike; only `labelled` rows have labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    labels[labelled if labelled is not None else n:] = -1
    return data.Split(rng.integers(0, 256, (n, height, width, 3), np.uint8), labels)


def batches(images, size=8, **options):
    return data.Batches(images, MEAN, STD, size, **options)


def stored(x):
    """Normalised (B, 3, H, W) back to the uint8 pixels it was made from, (B, H, W, 3)."""
    pixels = x.double().permute(0, 2, 3, 1).numpy() * STD + MEAN
    found = np.rint(pixels * 255)
    assert np.abs(pixels * 255 - found).max() < 1e-3
    return found.astype(np.uint8)


def views_of(image):
    """Every view of an image: shift and flip -> pixels. np.pad's reflect is a mirrored edge."""
    height, width = image.shape[:2]
    reach = height // 8, width // 8
    padded = np.pad(image, ((reach[0],) * 2, (reach[1],) * 2, (0, 0)), mode="reflect")
    found = {}
    for down in range(2 * reach[0] + 1):
        for right in range(2 * reach[1] + 1):
            crop = padded[down:down + height, right:right + width]
            found[down - reach[0], right - reach[1], False] = crop
            found[down - reach[0], right - reach[1], True] = crop[:, ::-1]
    return found


def which(image, seen):
    """The one view of an image that was seen."""
    names = [name for name, view in views_of(image).items() if np.array_equal(view, seen)]
    assert len(names) == 1, names
    return names[0]


def by_row(epoch):
    """Row -> image, of all the batches of an epoch."""
    return {int(row): x for batch in epoch for row, x in zip(batch.rows, batch.x, strict=True)}


def equal_epochs(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        torch.equal(p.x, q.x) and torch.equal(p.y, q.y) and torch.equal(p.rows, q.rows)
        for p, q in zip(a, b, strict=True))


# ---- what a batch holds -----------------------------------------------------------------------

def test_iterating_gives_every_row_once_in_order_as_stored():
    images = split(21)
    found = list(batches(images, 8, augment="flip-crop"))
    assert [len(b.y) for b in found] == [8, 8, 5]
    assert torch.cat([b.rows for b in found]).tolist() == list(range(21))
    np.testing.assert_array_equal(torch.cat([b.y for b in found]).numpy(), images.labels)
    np.testing.assert_array_equal(stored(torch.cat([b.x for b in found])), images.images)


@pytest.mark.parametrize("augment", ["none", "crop", "flip-crop"])
def test_x_is_normalised_and_channels_last(augment):
    images = split()
    for batch in batches(images, augment=augment).epoch(1):
        assert batch.x.shape == (8, 3, SIDE, SIDE) and batch.x.dtype == torch.float32
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        pixels = images.images[batch.rows.numpy()].astype(np.float64)
        if augment == "none":
            expected = (pixels / 255 - MEAN) / STD
            np.testing.assert_allclose(batch.x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
        assert batch.y.dtype == torch.int64
        np.testing.assert_array_equal(batch.y.numpy(), images.labels[batch.rows.numpy()])


def test_x_is_float32_whatever_mean_and_std_are():
    made = data.Batches(split(), np.array(MEAN), np.array(STD), 8)
    assert next(made.epoch(1)).x.dtype == torch.float32
    assert made.mine == slice(None)         # alone: every row, without a copy


@pytest.mark.parametrize("height, width", [(16, 16), (24, 8)])
def test_crop_is_a_shift_with_a_mirrored_edge(height, width):
    images = split(height=height, width=width)
    shifts = Counter()
    for epoch in range(1, 7):
        for row, x in by_row(batches(images, augment="crop").epoch(epoch)).items():
            down, right, flip = which(images.images[row], stored(x[None])[0])
            assert not flip
            shifts[down, right] += 1
    ways = (2 * (height // 8) + 1) * (width // 8 * 2 + 1)
    assert len(shifts) == ways                      # all are drawn, none far more than its share
    assert max(shifts.values()) < 3 * 240 / ways


def test_flip_crop_flips_half_of_the_images_and_looks_where_the_view_says():
    images, flips = split(), []
    made = batches(images, augment="flip-crop")
    for epoch in range(1, 6):
        view = made.draw("view", epoch)
        for row, x in by_row(made.epoch(epoch)).items():
            found = which(images.images[row], stored(x[None])[0])
            assert found == (*(int(part[row]) for part in view["shift"]), bool(view["flip"][row]))
            flips.append(found[2])
    assert len(flips) == 200 and 70 < sum(flips) < 130


def test_where_a_view_looks_is_drawn_from_its_own_generator():
    """Down, right, then who is flipped, each for all images: a cached view stays what it was."""
    made = batches(split(2000, height=24, width=8), seed=3)
    g = common.generator(3, "other view", 5)
    down, right = torch.randint(-3, 4, (2000,), generator=g), torch.randint(-1, 2, (2000,),
                                                                          generator=g)
    found = made.draw("other view", 5)
    assert torch.equal(found["shift"][0], down) and torch.equal(found["shift"][1], right)
    assert torch.equal(found["flip"], torch.rand(2000, generator=g) < 0.5)


def test_flip_needs_a_draw_below_a_half(monkeypatch):
    for value, flipped in ((0.5, False), (np.nextafter(np.float32(0.5), np.float32(0)), True)):
        monkeypatch.setattr(torch, "rand", lambda *size, value=value, **_: torch.full(
            size, float(value)))
        assert batches(split()).draw("view", 1)["flip"].tolist() == [flipped] * 40


def test_another_view_of_the_same_images_comes_beside():
    images = split()
    single = batches(images, augment="flip-crop").epoch(3)
    paired = list(batches(images, augment="flip-crop", pair=True).epoch(3))
    same_view = 0
    for batch in paired:
        for row, x, other in zip(batch.rows, batch.x, batch.other, strict=True):
            image = images.images[int(row)]
            names = [which(image, stored(v[None])[0]) for v in (x, other)]
            same_view += names[0] == names[1]
    assert same_view < 5                            # 1 in 50 by chance
    assert equal_epochs(single, paired)             # and x is what it is without a pair
    assert all(batch.other is None and batch.epoch == 3
               for batch in batches(images).epoch(3))


# ---- randomness without state -----------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(views=3), dict(pair=True)])
def test_an_epoch_drawn_twice_is_the_same_and_others_differ(options):
    images = split()
    first = batches(images, augment="flip-crop", seed=5, **options)
    again = batches(images, augment="flip-crop", seed=5, **options)
    later = list(first.epoch(4))
    torch.manual_seed(1)                            # nothing hangs on torch's own generator
    state = torch.get_rng_state()
    assert equal_epochs(first.epoch(2), again.epoch(2))     # after epoch 4, and fresh
    assert equal_epochs(later, again.epoch(4))
    assert equal_epochs(batches(images).epoch(1), batches(images, seed=0).epoch(1))
    assert torch.equal(state, torch.get_rng_state())        # and nothing is taken from it
    orders = [torch.cat([b.rows for b in again.epoch(e)]).tolist() for e in range(1, 6)]
    other = batches(images, augment="flip-crop", seed=6, **options)
    orders += [torch.cat([b.rows for b in other.epoch(e)]).tolist() for e in range(1, 6)]
    assert len(set(map(tuple, orders))) == 10
    mine, theirs = by_row(first.epoch(1)), by_row(other.epoch(1))
    assert sum(torch.equal(mine[row], theirs[row]) for row in mine) < 10


def test_views_come_back_and_order_does_not():
    images = split()
    made = batches(images, augment="flip-crop", views=3)
    epochs = {e: by_row(made.epoch(e)) for e in range(1, 8)}
    for e in range(1, 5):
        assert all(torch.equal(epochs[e][row], epochs[e + 3][row]) for row in range(40))
        assert list(epochs[e]) != list(epochs[e + 3])
        assert sum(torch.equal(epochs[e][row], epochs[e + 1][row]) for row in range(40)) < 10
    fresh = batches(images, augment="flip-crop")
    seen = [by_row(fresh.epoch(e)) for e in range(1, 8)]
    for i in range(7):
        for j in range(i):
            assert sum(torch.equal(seen[i][row], seen[j][row]) for row in range(40)) < 10


def test_a_view_does_not_hang_on_the_batch_size():
    images = split()
    found = [by_row(batches(images, size, augment="flip-crop").epoch(2)) for size in (8, 20)]
    assert all(torch.equal(found[0][row], found[1][row]) for row in range(40))


# ---- noise -------------------------------------------------------------------------------------

def test_noise_comes_on_top_of_the_same_views():
    images = split()
    clean = batches(images, augment="flip-crop", pair=True)
    noisy = batches(images, augment="flip-crop", pair=True, noise=(1, 0, 0.5, 0))
    some = batches(images, noise=(0.5, 0.5, 0.5, 0.5))
    for made in (noisy, some):
        assert equal_epochs(made.epoch(2), made.epoch(2))
    added = []
    for a, b in zip(clean.epoch(2), noisy.epoch(2), strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.y, b.y)
        assert b.x.is_contiguous(memory_format=torch.channels_last)
        added += [b.x - a.x, b.other - a.other]
    assert (added[0] - added[1]).std() > 0.5        # drawn afresh for the other view
    added = torch.stack(added)
    assert added.std().item() == pytest.approx(0.5, rel=0.02) and abs(added.mean()) < 0.01
    first = [next(noisy.epoch(e)).x - next(clean.epoch(e)).x for e in (1, 2)]
    assert (first[0] - first[1]).std() > 0.5        # and in every epoch
    seen = torch.cat([b.x for b in noisy])          # validation is left as it is
    assert torch.equal(seen, torch.cat([b.x for b in clean]))


def test_each_kind_of_noise_meets_its_share():
    images = split(400)
    clean = batches(images, 100)
    for noise, touched, share in (((0.3, 0, 1, 1), 0.3, 1.0), ((0, 0.3, 1, 0.25), 0.3, 0.25),
                                  ((0, 1, 1, 0.1), 1.0, 0.1), ((0, 0, 1, 1), 0.0, 0.0)):
        changed, total = [], 0
        for a, b in zip(clean.epoch(1), batches(images, 100, noise=noise).epoch(1), strict=True):
            pixels = (a.x != b.x).any(1).flatten(1)             # (B, H·W): in any channel
            changed += pixels.float().mean(1).tolist()
            if not noise[0]:        # erased: the data's mean in every channel
                assert (b.x.permute(0, 2, 3, 1)[pixels.view(-1, SIDE, SIDE)] == 0).all()
            total += len(pixels)
        hit = [c for c in changed if c > 0]
        assert abs(len(hit) / total - touched) < 0.08
        assert not hit or abs(np.mean(hit) - share) < 0.02


def test_noise_against_the_same_draws_one_image_at_a_time():
    """Who is below p gets it, who is at p does not; of a step's six images these are four."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    lots = torch.tensor([[0.2, 0.5, 0.7, 0.0], [0.4, 0.1, 0.0, 0.3]])
    mine = torch.tensor([0, 2, 3, 5])
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    found = data.disturb(x, (0.5, 0.4, 2.0, 0.3), lots, draws[0], 6, mine)
    bell = torch.randn(6, 3, 8, 8, generator=draws[1])
    erased = torch.rand(6, 1, 8, 8, generator=draws[1]) < 0.3
    expected = x.clone()
    for i, row in enumerate(mine):
        if i in (0, 3):
            expected[i] += 2 * bell[row]
        if i in (1, 2, 3):
            expected[i][:, erased[row, 0]] = 0
    assert torch.equal(found, expected)


def test_noise_erases_no_pixel_whose_draw_is_the_share(monkeypatch):
    """With a share of 0 none at all, a draw of exactly 0 or not."""
    x, lots = torch.ones(4, 3, 8, 8), torch.zeros(2, 4)
    for value, share, left in ((0.0, 0.0, 1), (0.25, 0.25, 1), (0.25, 0.5, 0)):
        monkeypatch.setattr(torch, "rand", lambda *size, value=value, **_: torch.full(size, value))
        found = data.disturb(x, (0, 1, 1, share), lots, torch.Generator(), 4, slice(None))
        assert (found == left).all()


# ---- who is in an epoch -----------------------------------------------------------------------

@pytest.mark.parametrize("n, size, steps", [(40, 8, 5), (43, 8, 5), (7, 8, 1), (16, 16, 1),
                                            (31, 1, 31)])
def test_an_epoch_holds_no_row_twice_and_is_cut_to_a_multiple_of_the_batch(n, size, steps):
    made = batches(split(n), size)
    assert made.steps() == steps
    for epoch in (1, 2):
        rows = [batch.rows for batch in made.epoch(epoch)]
        assert [len(r) for r in rows] == [min(n, size)] * steps
        flat = torch.cat(rows).tolist()
        assert len(set(flat)) == len(flat) and set(flat) <= set(range(n))


def test_rows_left_out_are_not_always_the_same():
    made = batches(split(43), 8)
    left = [set(range(43)) - set(by_row(made.epoch(e))) for e in range(1, 9)]
    assert all(len(rows) == 3 for rows in left) and len(set(map(frozenset, left))) > 4


def test_a_batch_holds_the_stated_share_of_labelled_rows():
    made = batches(split(100, labelled=20), 16)
    assert made.labelled.tolist() == list(range(20)) and data.LABELLED_SHARE == 0.25
    assert made.unlabelled.tolist() == list(range(20, 100))
    for epoch in (1, 2):
        found = list(made.epoch(epoch))
        assert len(found) == made.steps() == 6          # 80 unlabelled, 12 a batch
        # Labelled rows come first: several processes share them out by their place.
        assert all((b.y[:4] >= 0).all() and (b.y[4:] < 0).all() and len(b.y) == 16 for b in found)
        assert all((b.rows[b.y >= 0] < 20).all() and (b.rows[b.y < 0] >= 20).all() for b in found)
        times = Counter(torch.cat([b.rows for b in found]).tolist())
        assert all(times[row] <= 1 for row in range(20, 100))
        assert {times[row] for row in range(20)} == {1, 2}      # 24 places for 20 rows
        assert all(len(set(b.rows.tolist())) == 16 for b in found)


@pytest.mark.parametrize("labelled, size, taught", [
    (20, 2, 1), (20, 3, 1), (20, 7, 2), (50, 8, 4), (99, 8, 7), (0, 8, 0)])
def test_a_batch_has_a_quarter_or_the_labelled_share_but_one_of_each_at_least(labelled, size,
                                                                              taught):
    made = batches(split(100, labelled=labelled), size)
    assert made.taught == taught and int((next(made.epoch(1)).y >= 0).sum()) == taught


def test_labelled_only_sees_nothing_else():
    made = batches(split(100, labelled=20), 16, labelled_only=True)
    for batch in made.epoch(1):
        assert (batch.y >= 0).all() and (batch.rows < 20).all()
    assert made.steps() == 1


def test_few_unlabelled_rows_are_not_repeated_within_a_batch():
    made = batches(split(100, labelled=96), 16)
    for batch in made.epoch(1):
        rows = batch.rows.tolist()
        assert len(set(rows)) == len(rows)


# ---- splits -----------------------------------------------------------------------------------

def names(part):
    """What identifies an image: its pixels."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in part.images]


def load(folder, **options):
    return data.load("folder", folder, image_size=tiny.SIDE, **options)


def test_validation_does_not_hang_on_the_seed_and_overlaps_with_nothing(easy):
    first = load(easy, val_fraction=0.25, seed=0)
    for seed, labels in ((1, None), (2, 40)):
        other = load(easy, val_fraction=0.25, seed=seed, labels=labels)
        np.testing.assert_array_equal(first.val.images, other.val.images)
        np.testing.assert_array_equal(first.val.labels, other.val.labels)
        np.testing.assert_array_equal(first.test.images, other.test.images)
        np.testing.assert_array_equal(first.train.images, other.train.images)
        assert (first.mean, first.std, first.key) == (other.mean, other.std, other.key)
    train, val, test = (names(part) for part in first[:3])
    assert (len(train), len(val), len(test)) == (120, 40, 80)
    assert len(set(train + val + test)) == 240
    whole = load(easy, val_fraction=0)
    assert len(whole.val.labels) == 0 and set(names(whole.train)) == set(train + val)


@pytest.mark.parametrize("fraction, each", [(0.1, 4), (0.25, 10), (0.5, 20), (0.9, 36)])
def test_every_class_is_in_validation_in_proportion(easy, fraction, each):
    splits = load(easy, val_fraction=fraction)
    assert np.bincount(splits.val.labels).tolist() == [each] * 4
    assert np.bincount(splits.train.labels).tolist() == [40 - each] * 4


def test_classes_of_unequal_size_keep_their_share():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    order = readers.shuffled(labels)
    assert sorted(order) == list(range(1000))
    np.testing.assert_array_equal(order, readers.shuffled(labels))
    for part in np.split(labels[order], 10):        # the last of ten is the validation split
        assert np.abs(np.bincount(part, minlength=3) - [60, 30, 10]).max() <= 1
    rows = order[labels[order] == 0]                # shuffled within a class too
    assert (np.diff(rows) < 0).sum() > 200


def test_mean_and_std_are_of_the_whole_train_split(easy):
    pixels = np.stack([np.asarray(Image.open(path)) for path in easy.glob("train/*/*.png")]) / 255
    for fraction in (0, 0.5):
        splits = load(easy, val_fraction=fraction)
        np.testing.assert_allclose(splits.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
        np.testing.assert_allclose(splits.std, pixels.std((0, 1, 2)), rtol=1e-9)
    x = torch.cat([b.x for b in data.Batches(load(easy, val_fraction=0).train, splits.mean,
                                             splits.std, 50)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), rtol=1e-4, atol=0)


def test_normalise_half_is_a_mean_and_a_deviation_of_a_half(easy):
    half, own = load(easy, normalise="half"), load(easy)
    assert half.mean == half.std == (0.5, 0.5, 0.5) != own.mean
    assert load(easy, normalise="train")[3:] == own[3:] and half.key == own.key
    batch = next(iter(data.Batches(half.test, half.mean, half.std, 50)))
    expected = half.test.images[:50] / 127.5 - 1            # from −1 to 1
    np.testing.assert_allclose(batch.x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_a_constant_channel_does_not_divide_by_zero():
    images = np.zeros((5, 4, 4, 3), np.uint8)
    mean, std = readers.mean_and_std(images)
    assert mean == [0, 0, 0] and min(std) > 0


@pytest.mark.parametrize("count", [4, 40, 120])
def test_labels_keeps_the_same_number_in_each_class(easy, count):
    whole, kept = (load(easy, val_fraction=0.25, labels=n).train.labels for n in (None, count))
    assert np.bincount(kept[kept >= 0]).tolist() == [count // 4] * 4
    assert (kept == -1).sum() == 120 - count
    np.testing.assert_array_equal(kept[kept >= 0], whole[kept >= 0])


@pytest.mark.parametrize("count, fits", [(0, False), (3, True), (4, False), (6, True), (9, False)])
def test_no_more_labels_can_stay_than_the_smallest_class_has(count, fits, capsys):
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    if fits:
        kept = data.keep_labels(labels, count, "abc", 0)
        assert np.bincount(kept[kept >= 0]).tolist() == [count // 3] * 3
        return
    with pytest.raises(SystemExit):
        data.keep_labels(labels, count, "abc", 0)
    assert "from 3 to 6" in capsys.readouterr().err
    with pytest.raises(SystemExit):         # a class without any image has none to keep
        data.keep_labels(labels, 4, "abcd", 0)


def test_the_seed_chooses_who_keeps_a_label(easy):
    kept = [load(easy, labels=40, seed=seed).train.labels for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(kept[0], kept[1])
    assert len({tuple(np.flatnonzero(rows >= 0)) for rows in kept}) == 3
    splits = load(easy, labels=40, seed=1)
    assert (splits.val.labels >= 0).all() and (splits.test.labels >= 0).all()


# ---- the command ------------------------------------------------------------------------------

def test_the_command_prints_what_the_data_holds_and_draws_it(easy, tmp_path, capsys):
    facts = data.main(["--dataset", "folder", "--data-dir", str(easy), "--image-size", "16",
                       "--augment", "flip-crop", "--show", "12", "--out", str(tmp_path / "a.png")])
    assert (facts["train"], facts["val"], facts["test"]) == (144, 16, 80)
    printed = capsys.readouterr().out
    for word in ("144", "16×16×3", *tiny.COLOURS, f"{facts['mean'][0]:.4f}"):
        assert word in printed
    picture = Image.open(tmp_path / "a.png")
    assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10 ** 6)) > 500
