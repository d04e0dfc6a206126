"""A run on real photographs, where they are there: CIFAR-10 as JPEG files."""

import numpy as np
import tiny
from PIL import Image

import data
import distill
import train_student
import train_teacher

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def test_photographs_are_read_as_pil_reads_them(photographs):
    splits = data.load("folder", photographs, val_fraction=0.1)
    assert splits.classes == CLASSES
    assert splits.train.images.shape == (360, 32, 32, 3) and len(splits.val.labels) == 40
    for label, name in enumerate(CLASSES):
        paths = sorted((photographs / "test" / name).iterdir())
        mine = splits.test.images[splits.test.labels == label]
        for path, image in zip(paths, mine, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    # all of CIFAR-10 has mean 0.491 0.482 0.447 and deviation 0.247 0.243 0.262
    np.testing.assert_allclose(splits.mean, (0.491, 0.482, 0.447), atol=0.03)
    np.testing.assert_allclose(splits.std, (0.247, 0.243, 0.262), atol=0.03)


def test_the_chain_on_photographs(photographs, tmp_path, capsys):
    def run(script, *flags):
        return tiny.run(script, photographs, tmp_path, "--recipe", "cifar10-he-max", "--image-size",
                        32, "--lr", 0.005, *flags, epochs=5)

    # The recipe's own networks are too large for a test: checked, then smaller ones are trained.
    run(train_teacher, "--dry-run")
    assert "cifar10-he-max-teacher" in capsys.readouterr().out
    finals = [run(script, "--arch", f"digits-{arch}") for script, arch in (
        (train_teacher, "teacher"), (train_student, "student"), (distill, "student"))]
    for final in finals:
        rows = tiny.metrics(tmp_path / "cifar10-he-max" / final["run"])
        assert float(rows[-1]["train_loss"]) < 0.95 * float(rows[0]["train_loss"])
        assert final["test_accuracy"] > 0.14, final     # of 100 images; chance is 0.1
    assert [final["run"] for final in finals] == ["teacher-s0", "student-s0", "kd-s0"]
