"""Fixtures of all tests. Nothing here or below writes into the checkout: all goes to tmp_path."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # pytest alone, without -m

import tiny  # noqa: E402

torch.set_num_threads(1)        # these networks are so small that threads only wait for each other


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
    return results, {name: tiny.run(script, easy, results, *flags, epochs=tiny.ENOUGH)
                     for name, (script, flags) in tiny.SIX.items()}


@pytest.fixture
def results(chain, tmp_path):
    """A results folder that holds the chain's teacher and nothing else."""
    return tiny.copy_teacher(chain[0], tmp_path / "results")
