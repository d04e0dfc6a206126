"""Train the teacher alone, on the labels. The same loop as the student's, with a bigger network.

    python train_teacher.py                                       the embedded digits, in a minute
    python train_teacher.py --recipe cifar10-he-max --dataset folder --data-dir data/cifar10
"""
from flags import launch  # noqa: I001  first: it answers Ctrl-C while PyTorch loads
import train_student


def main(argv=None):
    return train_student.main(argv, role="teacher", doc=__doc__)


if __name__ == "__main__":
    launch(main)
