"""The teacher's outputs, computed once for all views: they change nothing but time."""
import shutil

import pytest
import tiny
import torch

import distill
import train_teacher

VIEWS = ("--views", 2)


def student(easy, results, name, *flags, epochs=5):
    tiny.run(distill, easy, results, "--run", name, *VIEWS, *flags, epochs=epochs)
    return tiny.outcome(results / "digits" / name)


def caches(results):
    return sorted((results / "digits" / ".teacher").glob("*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [
    (), ("--objective", "kd-only", "--labels", 40), ("--augment", "none"),
    ("--objective", "consistency", "--teacher", "{}", "--ramp-up", 0, "--ema-decay", 0.9)])
def test_a_student_learns_the_same_from_the_cache(easy, results, flags, precision):
    """Batches of 16 of 120 images leave a tail of 8, and a student that is fed it padded."""
    teacher = results / "digits/teacher-s0/best.pt"
    flags = [str(flag).format(teacher) for flag in flags] + ["--precision", precision]
    live = student(easy, results, "live", "--no-cache", *flags)
    assert not caches(results)
    kept = student(easy, results, "kept", "--cache", *flags)
    assert len(caches(results)) == 1
    for run in (live, kept):
        run["final"].pop("run")
    assert tiny.same(live, kept)
    again = student(easy, results, "again", "--cache", *flags)
    again["final"].pop("run")
    assert len(caches(results)) == 1 and tiny.same(live, again)


def test_fresh_views_are_kept_for_the_next_run_of_the_seed(easy, results):
    """With --views 0 the cache holds every epoch's view: kd fills it, kd-only reads it."""
    for objective in ("kd", "kd-only"):
        live, kept = (student(easy, results, name[2:], "--views", 0, name, "--objective", objective,
                              "--overwrite", epochs=3) for name in ("--no-cache", "--cache"))
        for run in (live, kept):
            run["final"].pop("run")
        assert tiny.same(live, kept)
    assert len(caches(results)) == 1
    student(easy, results, "longer", "--views", 0, "--cache", epochs=4)
    assert len(caches(results)) == 2


def test_two_threads_give_the_same_as_well(easy, tmp_path):
    """Images of 32×32 in batches of 64, so that the kernels have work to share."""
    flags = ("--image-size", 32, "--batch-size", 64, *VIEWS)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        tiny.run(train_teacher, easy, tmp_path, *flags)
        runs = []
        for name in ("--no-cache", "--cache"):
            tiny.run(distill, easy, tmp_path, *flags, name, "--run", name.strip("-"), epochs=4)
            runs.append(tiny.load(tmp_path / "digits" / name.strip("-") / "checkpoint.pt"))
    finally:
        torch.set_num_threads(threads)
    assert tiny.same(*(run["networks"] for run in runs))


def test_it_is_on_where_it_pays(easy, results, capsys):
    for flags, epochs, kept in ((VIEWS, 3, True), (VIEWS, 2, False), (("--views", 0), 3, False),
                                ((*VIEWS, "--no-cache"), 3, False),
                                ((*VIEWS, "--noise", "1,0,0.1,0"), 3, False)):
        tiny.run(distill, easy, results, *flags, "--overwrite", epochs=epochs)
        assert bool(caches(results)) is kept, flags
        said = tiny.said(capsys)
        assert ("cache 2 views of 120 images" in said) is kept, said
        shutil.rmtree(results / "digits/.teacher", ignore_errors=True)


def test_a_dry_run_computes_none(easy, results):
    tiny.run(distill, easy, results, *VIEWS, "--dry-run", epochs=3)
    assert not caches(results)


@pytest.mark.parametrize("flags", [
    ("--seed", 1, "--teacher", "{}"), ("--views", 3), ("--augment", "none"), ("--batch-size", 8),
    ("--precision", "bf16"), ("--val-fraction", 0.5), ("--normalise", "half")])
def test_it_is_never_used_for_anything_else(easy, results, flags):
    student(easy, results, "one", epochs=4)
    (first,) = caches(results)
    filled = first.stat().st_mtime_ns
    flags = [str(flag).format(results / "digits/teacher-s0/best.pt") for flag in flags]
    student(easy, results, "two", *flags, epochs=4)
    assert len(caches(results)) == 2 and first.stat().st_mtime_ns == filled


def test_another_teacher_has_its_own(easy, results):
    student(easy, results, "one", epochs=3)
    tiny.run(train_teacher, easy, results, "--overwrite", epochs=1)
    student(easy, results, "two", epochs=3)
    assert len(caches(results)) == 2


def test_one_that_was_cut_off_is_made_again(easy, results, monkeypatch):
    live = student(easy, results, "live", "--no-cache", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(distill.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            student(easy, results, "cut", epochs=3)
    assert [path.suffix for path in caches(results)] == [".part"]
    again = student(easy, results, "cut", epochs=3)
    assert tiny.same(live["state"], again["state"])
    assert [path.suffix for path in caches(results)] == [".npy"]


@pytest.mark.parametrize("flags, parts", [
    ((*VIEWS, "--noise", "1,0,0.1,0"), ["--cache", "--noise"]),
    ((*VIEWS, "--teacher", "ema"), ["--cache", "--teacher ema"]),
    ((*VIEWS, "--objective", "consistency"), ["--cache", "--teacher ema"])])
def test_it_is_refused_where_it_cannot_be(easy, results, capsys, flags, parts):
    tiny.refused(capsys, distill, tiny.words(easy, results, "--cache", *flags), *parts)


