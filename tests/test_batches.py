"""The batches of an epoch against a plain reimplementation with NumPy, one image at a time."""
from collections import Counter

import numpy as np
import pytest
import torch

import data

SIDE = 16       # a crop moves by up to an eighth of the side: 2
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NOISE = (0.5, 0.5, 0.5, 0.1)


def make_split(count=40, labelled=None, height=SIDE, width=SIDE):
    """Random images, so that no two views are alike; the first `labelled` have labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    labels = np.arange(count) % 4
    if labelled is not None:
        labels[labelled:] = -1
    return data.Split(images, labels)


def make_batches(split, size=8, augment="flip-crop", **options):
    return data.Batches(split, MEAN, STD, size, augment=augment, **options)


def by_row(batches):
    """Return {row: image} of some batches."""
    found = {}
    for batch in batches:
        for row, image in zip(batch.rows.tolist(), batch.x, strict=True):
            found[row] = image
    return found


def count_same(a, b):
    """Return how many images are the same in two results of by_row."""
    same = 0
    for row in a.keys() & b.keys():
        same += torch.equal(a[row], b[row])
    return same


def check_same(a, b):
    """Assert that two epochs are the same bit for bit."""
    for ours, theirs in zip(a, b, strict=True):
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.y, theirs.y)
        assert torch.equal(ours.x, theirs.x)


# ---- what a batch holds -------------------------------------------------------------

def plain_view(image, down=0, right=0, flip=False):
    """Move the window over an image whose edges are mirrored, turn it round, normalise."""
    height, width = image.shape[:2]
    padded = np.pad(image, [(height, height), (width, width), (0, 0)], mode="reflect")
    top, left = height + down, width + right
    window = padded[top:top + height, left:left + width]
    if flip:
        window = window[:, ::-1]
    return (window / 255 - MEAN) / STD


def plain_views(split, augment, seed, stream, view):
    """Return every image in one view, drawn from the generator of this use and view."""
    g = torch.Generator().manual_seed(data.seed_for(seed, stream, view))
    count, height, width, _ = split.images.shape
    down = torch.randint(-(height // 8), height // 8 + 1, (count,), generator=g)
    right = torch.randint(-(width // 8), width // 8 + 1, (count,), generator=g)
    flip = torch.rand(count, generator=g) < 0.5
    found = []
    for row, image in enumerate(split.images):
        if augment == "none":
            look = plain_view(image)
        elif augment == "crop":
            look = plain_view(image, down[row], right[row])
        else:
            look = plain_view(image, down[row], right[row], flip[row])
        found.append(look)
    return np.array(found)


def check_images(found, expected):
    """Compare (B, 3, H, W) of a batch with (B, H, W, 3)."""
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("height, width", [(16, 16), (24, 8)])
@pytest.mark.parametrize("augment", data.AUGMENTS)
@pytest.mark.parametrize("views, view", [(0, 5), (3, 2)])
def test_epoch_5_against_numpy(height, width, augment, views, view):
    """Of 3 views it has that of epoch 2."""
    split = make_split(height=height, width=width)
    batches = make_batches(split, augment=augment, views=views, seed=3, pair=True)
    first = plain_views(split, augment, 3, "view", view)
    second = plain_views(split, augment, 3, "other view", view)
    found = list(batches.epoch(5))
    assert len(found) == batches.steps() == 5
    for batch in found:
        check_images(batch.x, first[batch.rows])
        check_images(batch.other, second[batch.rows])
        np.testing.assert_array_equal(batch.y, split.labels[batch.rows])
        assert len(batch.y) == 8 and batch.epoch == 5


def test_iterating_gives_every_row_once_in_order_and_unaugmented():
    split = make_split(21)
    found = list(make_batches(split))
    assert [len(batch.y) for batch in found] == [8, 8, 5]
    rows = torch.cat([batch.rows for batch in found])
    assert rows.tolist() == list(range(21))
    for batch in found:
        expected = (split.images[batch.rows] / 255 - MEAN) / STD
        check_images(batch.x, expected)
        np.testing.assert_array_equal(batch.y, split.labels[batch.rows])


def test_every_offset_and_flip_is_drawn_about_as_often():
    draw = make_batches(make_split(5000)).draw("view", 1)
    columns = torch.stack([*draw["shift"], draw["flip"]], 1)
    kinds, counts = columns.unique(dim=0, return_counts=True)
    assert len(kinds) == 5 * 5 * 2
    assert counts.min() > 60 and counts.max() < 150     # 100 on average


# ---- randomness without state -------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(views=3), dict(noise=NOISE)])
def test_an_epoch_is_the_same_whenever_it_is_drawn(options):
    first = make_batches(make_split(), seed=5, **options)
    again = make_batches(make_split(), seed=5, **options)
    list(first.epoch(4))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    check_same(first.epoch(2), again.epoch(2))
    assert torch.equal(state, torch.get_rng_state())
    other = make_batches(make_split(), seed=6, **options)
    assert count_same(by_row(first.epoch(1)), by_row(other.epoch(1))) < 10
    orders = set()
    for batches in (first, other):
        for epoch in range(1, 6):
            orders.add(tuple(by_row(batches.epoch(epoch))))
    assert len(orders) == 10


def test_streams_and_epochs_are_independent():
    seeds = set()
    for seed in range(5):
        for stream in data.STREAMS:
            for epoch in range(60):
                seeds.add(data.seed_for(seed, stream, epoch))
    assert len(seeds) == 5 * len(data.STREAMS) * 60


def test_views_come_back_and_the_order_does_not():
    batches = make_batches(make_split(), views=3)
    first, second, fourth = (by_row(batches.epoch(epoch)) for epoch in (1, 2, 4))
    assert count_same(first, fourth) == 40
    assert list(first) != list(fourth)
    assert count_same(first, second) < 10
    fresh = make_batches(make_split())
    assert count_same(by_row(fresh.epoch(1)), by_row(fresh.epoch(4))) < 10


def test_a_view_does_not_depend_on_the_batch_size_or_on_a_pair():
    expected = by_row(make_batches(make_split()).epoch(2))
    larger = make_batches(make_split(), 20)
    assert count_same(expected, by_row(larger.epoch(2))) == 40
    pair = list(make_batches(make_split(), pair=True).epoch(2))
    assert count_same(expected, by_row(pair)) == 40
    for batch in pair:
        assert not torch.equal(batch.x, batch.other)


# ---- noise --------------------------------------------------------------------------

def test_noise_comes_on_top_of_the_same_views():
    clean = make_batches(make_split(), pair=True)
    noisy = make_batches(make_split(), pair=True, noise=(1, 0, 0.5, 0))
    added = []
    for epoch in (1, 2):
        for a, b in zip(clean.epoch(epoch), noisy.epoch(epoch), strict=True):
            assert torch.equal(a.rows, b.rows)
            added += [b.x - a.x, b.other - a.other]
    added = torch.stack(added)
    assert added.std().item() == pytest.approx(0.5, rel=0.02)
    assert added.mean().abs() < 0.01
    # Drawn afresh for the other view, in every step and in every epoch.
    for other in (1, 2, 10):
        assert (added[0] - added[other]).std() > 0.5
    check_same(clean, noisy)        # validation is left as it is


@pytest.mark.parametrize("noise, touched, share", [
    ((0.3, 0, 1, 1), 0.3, 1.0), ((0, 0.3, 1, 0.25), 0.3, 0.25), ((0, 1, 1, 0.1), 1.0, 0.1)])
def test_each_kind_of_noise_meets_its_share(noise, touched, share):
    clean = next(make_batches(make_split(400), 400).epoch(1))
    noisy = next(make_batches(make_split(400), 400, noise=noise).epoch(1))
    changed = (clean.x != noisy.x).any(1)           # (B, H, W): in any channel
    shares = changed.float().mean((1, 2))
    hit = shares[shares > 0]
    assert len(hit) / 400 == pytest.approx(touched, abs=0.08)
    assert hit.mean().item() == pytest.approx(share, abs=0.02)
    if not noise[0]:        # erased: the data's mean in every channel
        assert (noisy.x.permute(0, 2, 3, 1)[changed] == 0).all()


# ---- who is in an epoch -------------------------------------------------------------

@pytest.mark.parametrize("count, size, steps", [(40, 8, 5), (43, 8, 5), (7, 8, 1), (9, 1, 9)])
def test_an_epoch_holds_no_row_twice_and_is_cut_to_whole_batches(count, size, steps):
    batches = make_batches(make_split(count), size)
    assert batches.steps() == steps
    seen = set()
    for epoch in range(1, 9):
        rows = by_row(batches.epoch(epoch)).keys()
        assert len(rows) == steps * min(size, count)
        seen.update(rows)
    assert len(seen) == count       # those left out are not always the same


def test_a_batch_holds_a_fixed_share_of_labelled_rows():
    batches = make_batches(make_split(100, labelled=20), 16)
    assert batches.steps() == 6             # 80 unlabelled, 12 a batch
    times = Counter()
    for batch in batches.epoch(1):
        # Labelled rows come first: several ranks share them out by their place.
        assert (batch.y[:4] >= 0).all() and (batch.y[4:] < 0).all()
        times.update(batch.rows.tolist())
    assert {times[row] for row in range(20)} == {1, 2}      # 24 places for 20 rows
    assert max(times[row] for row in range(20, 100)) == 1


@pytest.mark.parametrize("labelled, size, per_batch", [
    (20, 2, 1), (20, 3, 1), (50, 8, 4), (99, 8, 7), (0, 8, 0), (100, 8, 8)])
def test_a_batch_has_a_quarter_labelled_or_more(labelled, size, per_batch):
    """... or the share of all images that are; but of both kinds one at least."""
    batches = make_batches(make_split(100, labelled=labelled), size)
    assert batches.labelled_per_batch == per_batch
    batch = next(batches.epoch(1))
    assert (batch.y >= 0).sum() == per_batch
    assert len(batch.rows.unique()) == size


def test_labelled_only_sees_nothing_else():
    batches = make_batches(make_split(100, labelled=20), 16, labelled_only=True)
    (batch,) = batches.epoch(1)
    assert (batch.y >= 0).all() and (batch.rows < 20).all()


# ---- several ranks ------------------------------------------------------------------

@pytest.mark.parametrize("labelled", [None, 20])
def test_ranks_take_slices_that_make_the_batch(labelled):
    split = make_split(100, labelled=labelled)
    whole = make_batches(split, 16, pair=True, noise=NOISE)
    first, second = (make_batches(split, 16, pair=True, noise=NOISE, rank=rank, world=2)
                     for rank in range(2))
    for batch, *parts in zip(whole.epoch(2), first.epoch(2), second.epoch(2), strict=True):
        seen = []
        for part in parts:
            assert (part.y >= 0).sum() == (batch.y >= 0).sum() / 2
            places = [batch.rows.tolist().index(row) for row in part.rows.tolist()]
            assert torch.equal(part.y, batch.y[places])
            assert torch.equal(part.x, batch.x[places])
            assert torch.equal(part.other, batch.other[places])
            seen += places
        assert sorted(seen) == list(range(16))      # disjoint, and all of them


def test_ranks_score_disjoint_rows():
    split = make_split(43)
    rows = []
    for rank in range(3):
        for batch in make_batches(split, rank=rank, world=3):
            rows += batch.rows.tolist()
    assert sorted(rows) == list(range(43))
