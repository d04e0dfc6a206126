"""Train the teacher alone, on the labels. The same loop as the student's, with a bigger network.

    python train_teacher.py                                       the embedded digits, in a minute
    python train_teacher.py --recipe cifar10-he-max --dataset folder --data-dir data/cifar10
"""
import train_student
from flags import launch


def main(argv=None):
    return train_student.main(argv, role="teacher", doc=__doc__)


if __name__ == "__main__":
    launch(main)
