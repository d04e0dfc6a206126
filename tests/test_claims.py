"""The table of the reports' claims: verdicts from intervals, and the sums done another way."""
import itertools
import json
import math

import claims
import numpy as np
import pytest


def known(low, high, verdict, title="kd - student alone", n=5, last=None):
    mean = None if low is None else (low + high) / 2
    best = dict(n=n, mean=mean, low=low, high=high, verdict=verdict)
    return {"comparisons": [dict(title=title, best=best, last=last or best)]}


@pytest.mark.parametrize("sign, verdict, expected", [
    (1, "helps", "holds"), (1, "hurts", "the reverse holds"), (-1, "hurts", "holds"),
    (-1, "helps", "the reverse holds"), (1, "cannot tell", "cannot tell")])
def test_a_verdict_follows_from_the_sign(sign, verdict, expected):
    text, told = claims.compared({"digits": known(0.5, 1.5, verdict)}, "kd - student alone", sign)
    assert told == expected and "digits +1.00 (+0.50 to +1.50, n 5)" in text


def test_recipes_that_disagree_are_named():
    text, told = claims.compared({
        "a": known(0.5, 1.5, "helps"), "b": known(-3, -1, "hurts"), "c": known(0.1, 2, "helps"),
        "d": known(0, 0, "no conclusion"), "e": known(0, 0, "helps", "another")},
        "kd - student alone", 1)
    assert told == "holds: a, c; the reverse holds: b" and "; d " not in text


def test_a_last_epoch_that_says_something_else_is_told():
    (comparison,) = known(1, 3, "helps")["comparisons"]
    text, told = claims.compared({"a": known(-1, 1, "cannot tell", last=comparison["best"])},
                                 "kd - student alone", -1)
    assert told == "cannot tell: a; the reverse holds at the last epoch: a"
    assert text.endswith("a +0.00 (-1.00 to +1.00, n 5); a, last epoch +2.00 (+1.00 to +3.00, n 5)")


def test_what_no_run_compares_is_not_measured():
    assert claims.compared({}, "kd - student alone", 1) == ("not measured", "not measured")


def test_sides_are_those_of_repeated_halving():
    assert claims.pools() == " → ".join(str(32 // 2 ** i) for i in range(7))


def test_the_gradient_with_and_without_the_square():
    """Softmax differences by hand, in NumPy."""
    import torch
    g = torch.Generator().manual_seed(0)
    s, t = (x.double().numpy() for x in torch.randn(2, 512, 200, generator=g))

    def size(temperature):
        p, q = (np.exp(x / temperature) for x in (s, t))
        return np.linalg.norm(p / p.sum(1, keepdims=True) - q / q.sum(1, keepdims=True)) * (
            temperature)         # T²·(p − q)/T

    ratio = size(5) / size(1)
    assert f"{ratio:.2f} with T²" in claims.temperature()
    assert f"{ratio / 25:.3f} without" in claims.temperature()


def test_the_published_table_is_that_of_the_published_runs():
    kept = json.loads((claims.PUBLISHED / "claims.json").read_text())
    assert len(kept) == 16 and f"{0.7 * math.log(200):.4f}" == "3.7088"
    for old, new in zip(kept, claims.claims(claims.reports()), strict=True):
        if "points of" in new["measured"] or "not measured" in new["measured"]:
            assert old == new, "stale: make claims readme"


# ---- advice -----------------------------------------------------------------------------------

def test_advice_is_held_against_pairs_of_seeds(tmp_path):
    """By hand: seeds 0 and 2 are in both settings; of a path the number of epochs counts."""
    folder = tmp_path / "sweeps" / "x"
    folder.mkdir(parents=True)
    (folder / "sweep.csv").write_text(
        "teacher,seed,test_accuracy\nr/epochs=1-s{seed}/best.pt,0,0.5\n"
        "r/epochs=1-s{seed}/best.pt,2,0.6\nr/epochs=8-s{seed}/best.pt,0,0.52\n"
        "r/epochs=8-s{seed}/best.pt,2,0.62\nr/epochs=8-s{seed}/best.pt,3,0.1\n")
    found = claims.swept("x", tmp_path)
    assert found == {"1": {"0": 0.5, "2": 0.6}, "8": {"0": 0.52, "2": 0.62, "3": 0.1}}
    assert claims.above("8 - 1:", found["8"], found["1"]) == (
        "8 - 1: +2.00 (+2.00 to +2.00, n 2)", "cannot tell")        # its spread was not seen


def test_a_run_that_changes_a_verdict_stops_the_advice():
    """Of one comparison alone: what was told as an advantage is none any more."""
    known = claims.reports()
    for comparison in known["digits-500-labels"]["comparisons"]:
        comparison["best"]["verdict"] = "hurts"
    with pytest.raises(ValueError, match="write it anew"):
        claims.advice(known)


def test_the_published_advice_is_that_of_the_published_runs():
    kept = json.loads((claims.PUBLISHED / "advice.json").read_text())
    assert kept == claims.advice(claims.reports()), "stale: make claims readme"


def test_of_all_pairs_of_alpha_two_are_told():
    rows = claims.swept("distill-alpha")
    pairs = itertools.combinations(("0.1", "0.3", "0.5", "0.7", "0.9", "1"), 2)
    told = [(a, b) for a, b in pairs if claims.above("", rows[a], rows[b])[1] != "cannot tell"]
    assert told == [("0.1", "0.7"), ("0.3", "0.7")]
    assert all(claims.above("", rows[a], rows["0"])[1] == "cannot tell" for a in rows if a != "0")


def test_no_pair_of_temperatures_is_told():
    rows, alone = claims.swept("distill-temperature"), claims.swept("distill-alpha")["0"]
    pairs = [*itertools.combinations(rows.values(), 2), *((row, alone) for row in rows.values())]
    assert len(pairs) == 15 and {claims.above("", *pair)[1] for pair in pairs} == {"cannot tell"}


def test_no_advice_rests_on_a_network_that_did_not_learn():
    names = ("distill-temperature", "distill-alpha", "epochs-student", "epochs-teacher", "lambda",
             "ramp-up", "distill-ema-decay", "views-student", "views-kd", "labels-student",
             "labels-mean-teacher")
    silent = {(name, setting) for name in names
              for setting, runs in claims.swept(name, figure="learned").items()
              if 0 in runs.values()}
    assert silent == {("epochs-teacher", "1")}
    told = " ".join(line["measured"] for line in claims.advice(claims.reports()))
    assert "a teacher of 1 epochs" not in told
