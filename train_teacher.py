"""Train the teacher alone, on the labels: the student's loop, with a bigger network.

    python train_teacher.py                 the embedded digits, in a minute
    python train_teacher.py --recipe cifar10-he-max
    python train_teacher.py --dataset folder --data-dir PHOTOS
"""
import train_student


def main(argv=None):
    return train_student.main(argv, role="teacher", doc=__doc__)


if __name__ == "__main__":
    main()
