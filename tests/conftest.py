"""Fixtures of all tests. Nothing here or below writes into the checkout: all goes to tmp_path."""
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # pytest alone, without -m

import tiny  # noqa: E402

import digits  # noqa: E402
import plots  # noqa: E402

torch.set_num_threads(1)        # these networks are so small that threads only wait for each other


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing the curves takes longer than a tiny run; a test that wants them draws them."""
    monkeypatch.setattr(plots, "draw_curves", lambda *args, **options: None)


@pytest.fixture(scope="session")
def easy(tmp_path_factory):
    """A folder of 160 + 80 images of 16×16, in which the colour tells the class."""
    return tiny.make_folder(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="session")
def noise(tmp_path_factory):
    """The same in grey noise: nothing tells the class."""
    return tiny.make_folder(tmp_path_factory.mktemp("noise"), easy=False)


@pytest.fixture(scope="session")
def chain(easy, tmp_path_factory):
    """The six runs of `make all` on the easy folder: (results folder, {run: final dict}). Read
    only: a test that runs something takes a folder of its own."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda *args, **options: None)
        finals = {name: tiny.run(script, easy, results, *flags, epochs=tiny.ENOUGH)
                  for name, (script, flags) in tiny.SIX.items()}
    return results, finals


@pytest.fixture
def results(chain, tmp_path):
    """A results folder that holds the chain's teacher and nothing else."""
    return tiny.copy_teacher(chain[0], tmp_path / "results")


@pytest.fixture
def few_digits(monkeypatch):
    """The digits, but 100 and 50 of them."""
    monkeypatch.setattr(digits, "splits",
                        lambda: {"train": digits.render(100, 0), "test": digits.render(50, 1)})


# ---- some of the real images --------------------------------------------------------

def shared(name):
    if not (tiny.SHARED / name).exists():
        pytest.skip(f"{name} is not there: real images are tested where the archives lie")
    return tiny.SHARED / name


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """The first 40 train and 10 test images of each class of CIFAR-10."""
    path = shared("cifar10-jpeg.tar.xz")
    root, counts = tmp_path_factory.mktemp("photographs"), Counter()
    with tarfile.open(path, "r|xz") as archive:
        for member in archive:
            split, name = Path(member.name).parts[1:3] if member.isfile() else (None, None)
            counts[split, name] += 1
            if counts[split, name] <= {"train": 40, "test": 10}.get(split, 0):
                archive.extract(member, root, filter="data")
    return root / "cifar10"


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Two classes of the real Tiny ImageNet: (folder, {wnid: names of its validation images}).
    These follow their class in the archive, so that val_annotations.txt is not needed to know."""
    path = shared("tiny-imagenet-200.part1of4.tar.xz")
    root, chosen = tmp_path_factory.mktemp("real"), {"n01443537": [], "n01629819": []}
    with tarfile.open(path, "r|xz") as archive:
        for info in archive:
            folder, kind, *rest = Path(info.name).parts + ("",)
            if kind == "train":
                current, number = rest[0], re.search(r"_(\d+)\.JPEG$", info.name)
                wanted = current in chosen and number and int(number[1]) < 20
            elif info.name.endswith(".JPEG"):
                wanted = current in chosen
                if wanted:
                    chosen[current].append(rest[1])
            else:
                wanted = info.name.endswith(".txt")
            if wanted:
                archive.extract(info, root, filter="data")
    return root / folder, chosen
