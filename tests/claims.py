"""What the five reports claim, and what is measured here; and what we advise: `make claims`.

    python tests/claims.py        # writes claims.json and advice.json into results/published, for
                                  # the README's tables

A claim about networks is held against the paired comparisons of the published runs, which say
helps, hurts, or cannot tell. A claim that is an error in the sums is shown by doing the sum.
"""
import csv
import json
import math
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import calc  # noqa: E402
import common  # noqa: E402
import compare  # noqa: E402
import distill  # noqa: E402
import models  # noqa: E402
from files import write_whole  # noqa: E402

PUBLISHED = ROOT / "results" / "published"


# ---- sums that can be done here ---------------------------------------------------------------

def unbounded():
    """Gradient descent on the cross-entropy with raw scores as target, and with a softmax."""
    scores = 4 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, target in (("raw", scores), ("softmax", F.softmax(scores, 1))):
        logits = torch.zeros_like(scores, requires_grad=True)
        for step in range(1, 1001):
            loss = -(target * F.log_softmax(logits, 1)).sum(1).mean()
            (gradient,) = torch.autograd.grad(loss, logits)
            logits = (logits - 64 * gradient).detach().requires_grad_()
            found[name, step] = loss.item()
    least = -(target * target.log()).sum(1).mean()
    return (f"against raw scores {found['raw', 10]:.0f}, {found['raw', 100]:.0f}, "
            f"{found['raw', 1000]:.0f} after 10, 100, 1000 steps; against their softmax "
            f"{found['softmax', 1000]:.2f}, and {least:.2f} is the least there is")


def kl_of_200():
    """How much weaker KLDivLoss is as it comes."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (F.log_softmax(torch.randn(64, 200, generator=g), 1) for _ in range(2))
    with warnings.catch_warnings():     # torch's, about this very trap
        warnings.simplefilter("ignore")
        mean = F.kl_div(student, teacher, log_target=True)
    batch = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return f"batch mean / mean = {batch / mean:.0f}"


def temperature():
    """The gradient's size at T = 5, with and without T², as a share of that at T = 1."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 512, 200, generator=g)
    sizes = {}
    for t in (1.0, 5.0):
        logits = student.clone().requires_grad_()
        loss = distill.kd_loss(logits, teacher, torch.zeros(512, dtype=torch.int64), t, 1.0)
        sizes[t] = torch.autograd.grad(loss, logits)[0].norm().item()
    return (f"gradient at T = 5 / at T = 1: {sizes[5] / sizes[1]:.2f} with T², "
            f"{sizes[5] / sizes[1] / 25:.3f} without")


def twelve_convs():
    """How far apart the outputs of 12 convs are for different images, before training."""
    spread = {}
    for init in ("xavier-gain1", "xavier"):
        torch.manual_seed(0)
        net = models.build("tinyimagenet-teacher", 200, (3, 64, 64), init, "avg")
        with torch.no_grad():
            noise = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            spread[init] = net(noise).std(0).mean().item()
    return (f"ln 200 = {math.log(200):.4f}; deviation of 12 convs' outputs over images: "
            f"{spread['xavier-gain1']:.2g} as printed, {spread['xavier']:.2g} with the ReLU gain")


def pools():
    """The side of an image after each conv (k3 p1) and 2×2 pool."""
    sides = [32]
    while sides[-1] and len(sides) <= 8:
        sides.append(calc.output_size(calc.output_size(sides[-1], 3, padding=1), 2, stride=2)
                     if sides[-1] > 1 else 0)
    return " → ".join(map(str, sides))


# ---- comparisons of published runs ------------------------------------------------------------

def reports(folder=PUBLISHED):
    """Recipe -> its published report."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(folder).glob("*/report.json"))}


def points(title, mean, low, high, n):
    """A difference and its interval in words."""
    bounds = "one seed" if low is None else f"{low:+.2f} to {high:+.2f}, n {n}"
    return f"{title} {mean:+.2f} ({bounds})"


def compared(known, title, sign, words=("holds", "the reverse holds")):
    """Return (what every recipe measured, the verdict on a claim that the difference has a sign):
    of the best epoch, and of the last where that says something else.
    """
    def told(entry):
        clear = entry["verdict"] != "cannot tell"
        return words[(entry["verdict"] == "helps") != (sign > 0)] if clear else entry["verdict"]

    texts, verdicts, later = [], {}, {}
    for recipe, report in known.items():
        found = next((c for c in report["comparisons"] if c["title"] == title), None)
        if not found or not found["best"]["n"] or found["best"]["verdict"] == "no conclusion":
            continue
        best, last = found["best"], found["last"]
        texts.append(points(recipe, best["mean"], best["low"], best["high"], best["n"]))
        verdicts.setdefault(told(best), []).append(recipe)
        if last["verdict"] not in (best["verdict"], "not recorded"):
            texts.append(points(f"{recipe}, last epoch", last["mean"], last["low"], last["high"],
                                last["n"]))
            later.setdefault(f"{told(last)} at the last epoch", []).append(recipe)
    if not texts:
        return "not measured", "not measured"
    verdict = "; ".join(f"{word}: {', '.join(names)}" if len(verdicts) + len(later) > 1 else word
                        for word, names in (verdicts | later).items())
    return f"points of test accuracy, {title}: " + "; ".join(texts), verdict


def overfit(known):
    """Train minus test accuracy of the teacher of report 002's recipe, at its last epoch."""
    gaps = []
    for path in sorted((PUBLISHED / "cifar10-he-max").glob("teacher-s*/final.json")):
        last = path.with_name("metrics.csv").read_text().splitlines()[-1].split(",")
        gaps.append(100 * (float(last[2]) - json.loads(path.read_text())["last_test_accuracy"]))
    if not gaps:
        return "not measured", "not measured"
    told = ", ".join(f"{gap:.1f}" for gap in gaps)
    return ("points between train and test with augmentation, cifar10-he-max's teachers, last "
            f"epoch: {told}; epochs chosen on a tenth of train"), "mended"


def own_average(known):
    """kd from the student's own EMA, beside kd from a random network that stays as it is (what the
    claim was held against), and against the labels alone."""
    rows, learned = (swept("random-teacher", figure=figure)
                     for figure in ("test_accuracy", "learned"))
    (random,) = rows.keys() - {"ema"}
    own, none = (100 * sum(rows[key].values()) / len(rows[key]) for key in ("ema", random))
    text, told = compared(known, "kd-ema - student alone", 1, ("better", "worse"))
    silent = f"learned nothing, {len(rows[random])} seeds" if not any(
        learned[random].values()) else "learned"
    return (f"digits, test %: from its own EMA {own:.2f}, from a random network {none:.2f} "
            f"({silent}); {text}",
            f"no conclusion, where a side learned nothing; {told} than no teacher")


def claims(known):
    """Return a dict for each claim of the reports: report, claim, printed, measured, verdict."""
    lines = (
        ("000", "a student that learns the teacher's raw outputs by cross-entropy",
         "loss −1.5 million", unbounded(), "wrong: no lower bound"),
        ("000", "with EMA against without", "the same test figures in all 10 epochs",
         *compared(known, "mean teacher, average - no EMA", 1, ("EMA is better", "it is worse"))),
        ("000", "accuracy", "0.0003, where chance is 0.005",
         "correct / N, exact for 20 million rows (tests)", "wrong divisor"),
        ("000", "T = 5 on the teacher's side only, without T²", "-", temperature(),
         "wrong: T on both sides, and T²"),
        ("000, 001", "networks that are compared with others", "loss 5.2983, 5.2994",
         twelve_convs(), "they had learned nothing"),
        ("001", "the student is better than the teacher", "2.95 against 0.61",
         *compared(known, "kd - teacher", 1)),
        ("001", "KLDivLoss() as it comes", "-", kl_of_200(),
         "wrong: 200 times too weak for 200 classes"),
        ("001", "with EMA", "loss 3.7088 and 2.95 % in every epoch",
         f"0.7·ln 200 = {0.7 * math.log(200):.4f}, the loss at chance; "
         + compared(known, "kd, average - kd", 1)[0],
         "wrong: not what was trained was scored"),
        ("002", "kd alone is worse than kd with the labels", "50.58 against 48.85, the reverse",
         *compared(known, "kd-only - kd", -1)),
        ("002", "best epochs, chosen on test", "94.45 on train, 54.06 on test", *overfit(known)),
        ("002", "EMA as the teacher, from random weights", "47.24, without 45.76",
         *own_average(known)),
        ("003", "a teacher improves the student drastically", "10.5 → 68.5",
         *compared(known, "kd - student alone", 1, ("better, by far less", "worse"))),
        ("003", "EMA improves the student", "68.5 → 72.65, of another architecture",
         *(" and ".join(pair) if pair[0] != pair[1] else pair[0] for pair in zip(
             compared(known, "mean teacher, student - no EMA", 1),
             compared(known, "mean teacher, average - teacher", 1), strict=True))),
        ("004", "8 convs, each with a 2×2 pool, on 32×32", "-", pools(),
         "impossible: the sixth pool has nothing left"),
        ("004", "test loss", "0.000013 at 88 %", f"0.000013 · 26032 = {0.000013 * 26032:.2f}",
         "wrong: divided twice"),
        ("004", "better than the same student without the teacher", "no number",
         *compared({k: v for k, v in known.items() if k == "svhn-xavier-avg"},
                   "kd - student alone", 1)))
    names = ("report", "claim", "printed", "measured", "verdict")
    return [dict(zip(names, line, strict=True)) for line in lines]


# ---- advice -----------------------------------------------------------------------------------

def swept(name, folder=PUBLISHED, figure="test_accuracy"):
    """Setting -> {seed: test accuracy, or another figure} of a published sweep over one flag."""
    found = {}
    with open(Path(folder) / "sweeps" / name / "sweep.csv", newline="") as file:
        for line in csv.DictReader(file):
            setting = next(iter(line.values())).split("+")[0]
            setting = setting.split("epochs=")[-1].split("-s{seed}")[0]     # of a teacher's path
            value = {"True": 1, "False": 0}.get(line[figure], line[figure])
            found.setdefault(setting, {})[line["seed"]] = float(value)
    return found


def above(title, ours, theirs):
    """Return (points of test accuracy by which one setting is above another, the verdict)."""
    seeds = sorted(ours.keys() & theirs.keys())
    mean, low, high = compare.interval([100 * (ours[seed] - theirs[seed]) for seed in seeds])
    return points(title, mean, low, high, len(seeds)), compare.verdict(low, high)


def chosen(name, *pairs, unit=""):
    """above() of pairs of settings of one sweep."""
    rows = swept(name)
    return [above(f"{a}{unit} - {b}{unit}:", rows[a], rows[b]) for a, b in pairs]


def in_report(known, title, *recipes):
    """above(), of comparisons that reports have made already."""
    found = []
    for recipe in recipes:
        entry = next(c["best"] for c in known[recipe]["comparisons"] if c["title"] == title)
        found.append((points(f"{recipe}, {title}:", entry["mean"], entry["low"], entry["high"],
                             entry["n"]), entry["verdict"]))
    return found


def advice(known):
    """Return a dict for each choice: choice, advice, measured. The words were written for the
    verdicts beside them: where a run changes one, they must be written anew."""
    sizes, alone = swept("epochs-student"), swept("labels-student")
    reached = [f"{common.ema_reached(decay):,}" for decay in (0.97, 0.99, 0.999)]
    lines = (
        ("temperature T", "The digits cannot tell: from 1 to 16 none was told from another, nor "
         "from the labels alone (α = 0). With the teachers of an earlier sweep (commit c0d7cd1) 8 "
         "and 16 were above 1 and above the labels alone, which did not come again. 4, which most "
         "recipes have, was the best by validation. With T² in the loss nothing else has to "
         "change (Hinton et al. 2015).",
         "cannot tell, cannot tell, cannot tell, cannot tell, cannot tell, cannot tell",
         chosen("distill-temperature", ("8", "1"), ("4", "1"), ("8", "4"), ("16", "8"))
         + [above(f"T {t} - α 0:", swept("distill-temperature")[t], swept("distill-alpha")["0"])
            for t in ("4", "8")]),
        ("α, the teacher's weight", "Anything from 0.3 to 1: on the digits none was told from the "
         "labels alone, and of these ten pairs one was told apart, 0.7 above 0.3 (with the "
         "teachers of an earlier sweep another, 1 above 0.7: of ten pairs one may differ by "
         "chance); 0.1 was below 0.7, and told from no other. 0.8, 0.9 and 1 are better than the "
         "labels alone on CIFAR-10. α = 1 (kd-only) reads no labels at all.",
         "helps, cannot tell, helps, cannot tell, cannot tell, helps, helps, helps",
         chosen("distill-alpha", ("0.7", "0.3"), ("0.9", "0.3"), ("0.7", "0.1"), ("0.7", "0"),
                ("1", "0"))
         + in_report(known, "kd - student alone", "cifar10-xavier-avg", "cifar10-he-max")
         + in_report(known, "kd-only - student alone", "cifar10-he-max")),
        ("how good a teacher", "Above the student alone: at α = 0.9 a much worse one leaves the "
         "student far below the labels alone, though above that teacher. What students make of 16 "
         "epochs of the teacher was not told from what they make of 8, though it is a better "
         "teacher.", "hurts, cannot tell, helps, cannot tell, helps",
         [above(f"kd from a teacher of {n} epochs - alone:", sizes[n], alone["all"])
          for n in ("2", "4")]
         + [above("kd from a teacher of 2 epochs - that teacher:", sizes["2"],
                  swept("epochs-teacher")["2"])]
         + [above("kd from 16 epochs - from 8:", sizes["16"], sizes["8"]),
            above("the teachers themselves, 16 - 8:", *map(swept("epochs-teacher").get,
                                                           ("16", "8")))]),
        ("λ, the labels' weight in mean teacher", "0.02 is worse than 0.1, and 0.9 was not told "
         "from that. The sweep is of 500 labels and the network of 19.7 k weights, which mean "
         "teacher itself was not told to help (below); 0.05, of one recipe, is not in it.",
         "helps, cannot tell", chosen("lambda", ("0.1", "0.02"), ("0.9", "0.1"))),
        ("ramp-up", "Ramp up over a quarter of the run, or half of it: 5 and 10 of 20 epochs are "
         "better than none, 10 was not told from 5, on the network and labels of λ. At the start "
         "two views of an untrained network agree on nothing worth having (Laine & Aila 2017; "
         "Tarvainen & Valpola 2017).",
         "helps, helps, cannot tell", chosen("ramp-up", ("5", "0"), ("10", "0"), ("10", "5"))),
        ("EMA decay", "Accuracies cannot tell: with all labels none of them was told from none. "
         "One that the run does not reach is not what its name says: with the warm-up here 0.97 "
         f"is reached at update {reached[0]}, 0.99 at {reached[1]}, 0.999 at {reached[2]} (the "
         "sweep's runs have 840).", "cannot tell, cannot tell, cannot tell",
         chosen("distill-ema-decay", ("0.9", "0"), ("0.97", "0"), ("0.99", "0"))),
        ("views", "Draw a fresh view each epoch (Beyer et al. 2022): one view is worse for kd. For "
         "the labels alone, and of four, the digits cannot tell; on CIFAR-10 all of these are "
         "worse (one seed; tables above).", "cannot tell, hurts, cannot tell, cannot tell",
         [(f"{who}, {text}", verdict) for views in ("1", "4")
          for who, name in (("alone", "views-student"), ("kd", "views-kd"))
          for text, verdict in chosen(name, (views, "0"))]),
        ("which network to ship", "Of an average and its student either: which is better was not "
         "told. The teacher, where its cost can be paid: it is above the student, alone and "
         "distilled. A distilled student says what it is sure of less truly than one trained "
         "alone, on CIFAR-10: measure its calibration before its confidence is used.",
         "cannot tell, cannot tell, cannot tell, cannot tell, hurts, hurts, hurts, hurts, helps",
         in_report(known, "average - its student", "digits", "digits-500-labels",
                   "cifar10-1000-labels", "cifar10-xavier-avg")
         + in_report(known, "student alone - teacher", "digits")
         + in_report(known, "kd - teacher", "digits", "cifar10-he-max", "cifar10-xavier-avg")
         + [above("cifar10-xavier-avg, points of calibration error, kd - student alone:",
                  *(dict(enumerate(row["beside"]["calibration"]["values"]))
                    for name in ("kd", "student") for row in known["cifar10-xavier-avg"]["rows"]
                    if row["key"] == name))]),
        ("few labels", "Mean teacher, where the network is large enough for the task and labels "
         "are few: it helps, on CIFAR-10 with more steps than the labels alone (5 496 against "
         "700), and on the digits without the EMA too. What the EMA adds was not told.",
         "helps, helps, helps, cannot tell",
         in_report(known, "mean teacher, student - alone", "digits-500-labels",
                   "cifar10-1000-labels")
         + in_report(known, "mean teacher, no EMA - alone", "digits-500-labels")
         + in_report(known, "mean teacher, student - no EMA", "digits-500-labels")),
        ("when it does not help", "kd on the digits, at T = 4: not told from the labels alone. kd "
         "from a teacher that is worse than the student alone (above). Mean teacher on a very "
         "small network (19.7 k weights): with "
         "1 000 and 2 000 labels it is worse than fewer steps on the labels alone, which see "
         "each label more often; with 500 and with all the two were not told apart. With all "
         "labels it was not told from them on a large network either (21.6 M weights, CIFAR-10).",
         "cannot tell, cannot tell, hurts, hurts, cannot tell, cannot tell",
         in_report(known, "kd - student alone", "digits")
         + [above(f"{n} labels, mean teacher - alone:", swept("labels-mean-teacher")[n], alone[n])
          for n in ("500", "1000", "2000", "all")]
         + in_report(known, "mean teacher, average - teacher", "cifar10-xavier-avg")),
        ("its own EMA as the teacher", "Not as kd from the start, with α 0.9 and all labels: it "
         "held the student back, and the average with it. In mean teacher, ramped up, it helped "
         "where labels were few. The two differ in more than that, and what of it matters was "
         "not told apart.", "hurts, cannot tell, helps",
         in_report(known, "kd-ema - student alone", "cifar10-he-max")
         + in_report(known, "kd-ema, average - kd-ema", "cifar10-he-max")
         + in_report(known, "mean teacher, student - alone", "cifar10-1000-labels")),
    )
    for choice, _, expected, measured in lines:
        told = [verdict for _, verdict in measured]
        if told != expected.split(", "):
            raise ValueError(f"the advice on {choice} was written for {expected}; the runs say "
                             f"{', '.join(told)}: write it anew")
    return [dict(choice=choice, advice=words, measured="; ".join(text for text, _ in measured))
            for choice, words, _, measured in lines]


def main(folder=PUBLISHED):
    known = reports(folder)
    found = dict(claims=claims(known), advice=advice(known))
    for name, entries in found.items():
        write_whole(Path(folder) / f"{name}.json",
                    (json.dumps(entries, indent=1) + "\n").encode())
        for one in entries:
            first, *others = one.items()
            print(f"{first[0]}: {first[1]}")
            for key, text in others:
                print(f"  {key:9} {text}")
    return found


if __name__ == "__main__":
    main()
