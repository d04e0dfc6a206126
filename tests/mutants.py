"""Does a test notice when a number is wrong? `make mutants` changes one operator, constant or call
at a time in the functions that carry numbers and runs their tests: each mutant must fail one.

    python tests/mutants.py                      all of them, in some minutes
    python tests/mutants.py --only kd_loss       those of one function
    python tests/mutants.py --list               print them, run nothing

The tests pass once in this process, which has torch and all fixtures then; each mutant is a fork of
it that puts the changed code into the function, wherever that is imported, and runs its tests,
the quickest first, up to the first that fails. One that takes far too long fails as well.
"""
import argparse
import ast
import copy
import functools
import importlib
import inspect
import math
import os
import resource
import sys
import time
import types
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""     # what has met a GPU cannot be forked

import pytest  # noqa: E402

HERE = Path(__file__).resolve().parent
PATIENCE = 3        # a mutant may take so many times the CPU of its tests

# What is changed: file -> what is in it -> the tests that must notice, by the start of their name.
def tests(file, *names):
    return tuple(f"test_{file}.py::test_{name}" for name in names)


LOSSES, EMA, EPOCH = ("test_losses.py",), tests("common", "ema"), ("test_epoch.py",)
BATCHES = tests("processes", "shares_of_a_batch") + tests(
    "data", "iterating", "x_is", "crop", "flip", "where_a_view", "another_view", "an_epoch",
    "views_come", "a_view", "noise", "each_kind", "rows_left", "a_batch", "labelled_only",
    "few_unlabelled")
LABELS = tests("data", "labels", "no_more_labels", "the_seed_chooses")
START = tests("models", "init_against", "deviation", "batch_norm_starts", "the_same_seed")
PAIRS = tests("compare", "interval", "three_seeds", "pairs_share", "two_seeds", "one_seed",
              "no_conclusion", "only_the_row", "no_gap", "networks_of_different",
              "a_seed_that_is", "seeds_with_other", "a_teacher")
BESIDE = tests("beside", "calibration", "confusion", "agreement")
TARGETS = {
    "distill": dict.fromkeys((
        "kd_loss", "consistency_loss", "class_cost", "ramp_up", "taught", "kd_objective",
        "consistency_objective"), LOSSES) | {"frozen_teacher": tests("fit", "a_frozen")},
    "train_student": {"hard_loss": LOSSES},
    "common": {
        "seed_for": tests("common", "seeds"), "make_average": EMA, "ema_update_": EMA,
        "ema_decay": EMA, "ema_reached": EMA, "evaluate": tests("common", "evaluate"),
        "schedule": tests("common", "onecycle", "the_other_schedules"),
        "make_optimizer": tests("common", "optimizer", "sgd"),
        "train_epoch": EPOCH, "score": EPOCH,
        "fit": tests("fit", "a_fit"), "stop_unless_finite": tests("fit", "a_stop")},
    "runs": {"chance": tests("common", "chance"), "best_epoch": tests("common", "best_epoch")},
    "device": dict.fromkeys(("summed", "share_buffers_"), tests("processes", "a_sum")),
    "data": {"keep_labels": LABELS, **dict.fromkeys((
        "LABELLED_SHARE", "Batches.__init__", "Batches.__iter__", "Batches.labelled_of",
        "Batches.order", "Batches.epoch", "Batches.draw", "Batches.look", "disturb", "mirror"),
        BATCHES)},
    "models": {
        "INITS": START, "initialise_": START,
        "count_macs": tests("models", "multiply_adds_against", "counting_multiply_adds")},
    "compare": {
        **dict.fromkeys(("_figure", "interval", "compare", "same", "_difference", "add_gaps",
                         "mixed"), PAIRS),
        "verdict": tests("compare", "verdict"), **dict.fromkeys((
            "BINS", "log_softmax", "calibration", "confusion", "against"), BESIDE)},
    "calc": {"output_size": tests("calc", "output_size", "last_window")},
}
# Mutants that compute the same: no test can tell. "function: before -> after": why.
EQUIVALENT = {
    "Batches.epoch: enumerate(zip(order.to(place), order, strict=True)) -> "
    "enumerate(zip(order.to(place), order))": (TWICE := "both are the same rows"),
    "Batches.epoch: enumerate(zip(order.to(place), order, strict=True)) -> "
    "enumerate(zip(order.to(place), order, strict=False))": TWICE,
    "kd_objective: [1] -> [0]": (LIST := "only how long this list is counts, not what it holds"),
    "kd_objective: [1] -> [2]": LIST,
    "consistency_objective: [1] -> [0]": LIST,
    "consistency_objective: [1] -> [2]": LIST,
    "taught: silent.append(1) or len(silent) > 20 -> silent.append(0) or len(silent) > 20": LIST,
    "taught: silent.append(1) or len(silent) > 20 -> silent.append(2) or len(silent) > 20": LIST,
    "seed_for: 1 -> 2": "the first word is the same however many are drawn",
    "count_macs: torch.zeros(2, *image_shape, device='meta') -> torch.zeros(3, *image_shape, "
    "device='meta')": "the outputs of one image are counted",
    "verdict: 'helps' if low > 0 else 'hurts' -> 'helps' if low >= 0 else 'hurts'":
        "a low end of 0 has been told apart before",
    "train_epoch: optimizer.zero_grad(set_to_none=True) -> optimizer.zero_grad()":
        "the default since torch 2.0",
    "train_epoch: hits.append((logits.detach().argmax(1) == batch.y).sum()) -> "
    "hits.append((logits.argmax(1) == batch.y).sum())": "an argmax has no gradient",
    "Batches.look: x.to(self.device, non_blocking=True).float() * self.scale -> "
    "x.to(self.device, non_blocking=True) * self.scale": "uint8 times float32 is float32",
    "schedule: step <= peak -> step < peak": "at the peak both halves are 1",
    "fit: sum((p.detach().float().norm() for p in model.parameters())).item() -> "
    "sum((p.float().norm() for p in model.parameters())).item()": "item() is a number",
    "fit: {k: v.detach().cpu().clone() for k, v in network.state_dict().items()} -> "
    "{k: v.cpu().clone() for k, v in network.state_dict().items()}":
        "what a state_dict holds is detached",
    "fit: [value or 0.0] -> [value or 0.01]": "only whether it is finite counts",
}

# ---- what is changed --------------------------------------------------------------------------

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
COMPARISONS = {     # the boundary, where there is one, and the opposite
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,)}
SWAPPED = {         # names of functions, methods and keywords
    "min": "max", "max": "min", "argmax": "argmin", "ceil": "floor", "round": "int", "cos": "sin",
    "log_softmax": "softmax", "softmax": "log_softmax", "all": "any", "any": "all",
    "randn": "rand", "rand": "randn", "log": "exp", "mean": "sum"}
METHODS = {"sum": "mean", "mean": "sum"}
WORDS = {"sum": "mean", "mean": "sum", "batchmean": "mean"}       # reduction=…
DROPPED = {"detach", "float", "double", "abs", "clamp", "eval", "clip", "flip"}     # method calls
ELSEWHERE = {"device", "non_blocking"}      # keywords that only a second device would notice
SILENT = {"fail", "say", "detail"}      # what these print is no number that is computed


def changes(node, parent):
    """Yield what may stand in the place of a node."""
    make = functools.partial(changed, node)
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield make(op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.UAdd):
        yield node.operand
    elif isinstance(node, ast.BoolOp):
        yield make(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                yield make(ops=[*node.ops[:i], other(), *node.ops[i + 1:]])
    elif isinstance(node, ast.Constant) and getattr(parent, "arg", None) not in ELSEWHERE:
        summand = isinstance(parent, (ast.BinOp, ast.Compare))      # else −1: an axis, the last one
        yield from (make(value=value) for value in constants(node.value)
                    if summand or type(value) is not int or value >= 0)
    elif isinstance(node, ast.Name) and node.id in SWAPPED:
        yield make(id=SWAPPED[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in METHODS | SWAPPED:
        yield make(attr=(SWAPPED | METHODS)[node.attr])
    elif isinstance(node, ast.keyword) and node.arg in SWAPPED:
        yield make(arg=SWAPPED[node.arg])
    elif isinstance(node, ast.Slice):
        for name in ("lower", "upper"):
            bound = getattr(node, name)
            if bound is not None and not isinstance(bound, ast.Constant):
                yield make(**{name: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED:
            yield node.func.value
        if not (isinstance(node.func, ast.Name) and node.func.id == "dict"):
            for word in node.keywords:
                if word.arg not in ELSEWHERE:
                    yield make(keywords=[other for other in node.keywords if other is not word])
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare,
                                                                            ast.UnaryOp)):
        yield make(test=ast.UnaryOp(ast.Not(), node.test))


def changed(node, **fields):
    node = copy.copy(node)
    vars(node).update(fields)
    return node


def constants(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return sorted({value + 1, -value, *[0] * (value == 1)} - {value})
    if isinstance(value, float):
        return [value * 1.01 or 0.01] + [-value] * (value != 0)
    return [WORDS[value]] if value in WORDS else []


def places(node):
    """Yield (node, parents from the outside in, its parent's field, place in that or None) of all
    below a node, but for what only speaks and what only a GPU reaches."""
    def below(parents):
        for field, value in ast.iter_fields(parents[-1]):
            for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST) and not (
                        field in ("annotation", "returns", "decorator_list") or speaks(child)
                        or isinstance(child, ast.If) and "cuda" in ast.unparse(child.test)):
                    yield child, parents, field, i
                    yield from below([*parents, child])
    yield from below([node])


def speaks(node):
    """Whether a node is a docstring, or the message of an error."""
    node = node.value if isinstance(node, ast.Expr) else node
    called = getattr(node, "func", None)
    return (isinstance(node, (ast.Raise, ast.JoinedStr))
            or isinstance(node, ast.Constant) and isinstance(node.value, str)
            and node.value not in WORDS
            or getattr(called, "id", getattr(called, "attr", None)) in SILENT)


def source(module, name):
    """The statement that defines a name of a module, "Class.method" as well."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part or any(
            getattr(target, "id", None) == part for target in getattr(node, "targets", ())))
    return tree


def mutants(module, name):
    """Yield (line, before, after, the changed statement) of every mutant of a name."""
    whole = source(module, name)
    for number, (node, parents, *_) in enumerate(places(whole)):
        for change in changes(node, parents[-1]):
            tree = copy.deepcopy(whole)
            _, around, field, i = list(places(tree))[number]
            if i is None:
                setattr(around[-1], field, change)
            else:
                getattr(around[-1], field)[i] = change
            ast.fix_missing_locations(tree)
            # As much around it as makes one readable line.
            before, after = node, change
            for parent, new in zip(parents[::-1], around[::-1], strict=True):
                if not isinstance(parent, (ast.expr, ast.keyword, ast.Slice)) or len(
                        ast.unparse(parent)) > 70:
                    break
                before, after = parent, new
            text = [line.strip() for part in (before, after)
                    for line in (ast.unparse(part).split("\n")[0],)]
            line = next((n.lineno for n in (node, *parents[::-1]) if hasattr(n, "lineno")), 0)
            yield line, *text, tree


def install(module, name, tree):
    """Put a changed statement in the place of the one that defines a name, for all that hold it."""
    code = compile(ast.Module([tree], []), module.__file__, "exec")
    scope = dict(vars(module))
    if isinstance(tree, ast.Assign):
        exec(code, scope)
        if isinstance(scope[name], dict):
            vars(module)[name].update(scope[name])
        else:
            setattr(module, name, scope[name])
        return
    tree.decorator_list = []
    exec(compile(ast.Module([tree], []), module.__file__, "exec"), scope)
    old = inspect.unwrap(functools.reduce(getattr, name.split("."), module))
    new = scope[tree.name]
    old.__code__, old.__defaults__ = new.__code__, new.__defaults__


# ---- run --------------------------------------------------------------------------------------

def passes(items, last):
    """Run tests, quickest first, up to the first that fails; return whether none does."""
    from _pytest.runner import runtestprotocol

    for item, then in zip(items, [*items[1:], last], strict=True):
        reports = runtestprotocol(item, log=False, nextitem=then)
        if any(report.failed for report in reports):
            return False
    return True


def survives(items, change, seconds):
    """Fork, change, run the tests within so much CPU time; return whether they all pass."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        change()
        code = not passes(items, items[0])
    except BaseException:
        pass        # code that cannot even be installed, a test that ends the process
    finally:
        os._exit(code)


def chosen(items, starts):
    """The tests whose names begin as asked."""
    found = {start: [item for item in items if item.nodeid.split("/")[-1].startswith(start)]
             for start in starts}
    missing = [start for start, tests in found.items() if not tests]
    if missing:
        sys.exit(f"error: no test is called {missing[0]}…")
    return list(dict.fromkeys(item for tests in found.values() for item in tests))


def run(session, only, tell):
    """Run the tests as they are, then against every mutant; return the table and what is wrong."""
    items, took = chosen(session.items, {start for module in only.values()
                                         for starts in module.values() for start in starts}), {}
    for i, item in enumerate(items):
        before = time.process_time()
        if not passes([item], items[(i + 1) % len(items)]):
            sys.exit(f"error: {item.nodeid} fails without a mutant; see make test")
        took[item] = time.process_time() - before
    table, wrong, unused = [], [], {key for key in EQUIVALENT if key.split(": ")[0] in {
        name for module in only.values() for name in module}}
    for file, names in only.items():
        module = importlib.import_module(file)
        for name, starts in names.items():
            tests = sorted(chosen(items, starts), key=took.get)
            # What the last test in this process left set up, and these do not share, goes first.
            clear = functools.partial(session._setupstate.teardown_exact, tests[0])
            seconds = math.ceil(2 + PATIENCE * sum(took[test] for test in tests))
            if not survives(tests, clear, seconds):
                sys.exit(f"error: the tests of {name} fail in a fork without a mutant")
            counts = dict(mutants=0, killed=0, survived=0, equivalent=0)
            for line, before, after, tree in mutants(module, name):
                key = f"{name}: {before} -> {after}"
                alive = survives(tests, lambda change=(module, name, tree), clear=clear: (
                    clear(), install(*change)), seconds)
                same = key in EQUIVALENT
                unused.discard(key)
                kind = "equivalent" if alive and same else "survived" if alive else "killed"
                counts["mutants"] += 1
                counts[kind] += 1
                if alive != same:
                    wrong.append(f"{file}.py:{line}: {name}: {before} -> {after}"
                                 + ("" if alive else "   (listed as equivalent, but a test fails)"))
                    tell(wrong[-1])
            table.append((f"{file}.{name}", *counts.values()))
    wrong += [f"{key}   (listed as equivalent, but there is no such mutant)" for key in unused]
    return table, wrong


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="FUNCTION", help="of this name alone")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    args = parser.parse_args(argv)
    only = {file: {name: starts for name, starts in names.items()
                   if not args.only or {name, name.split(".")[-1]} & {*args.only}}
            for file, names in TARGETS.items()}
    only = {file: names for file, names in only.items() if names}
    if not only:
        parser.error(f"--only {args.only[0]}: there is no such function among the targets")
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    if args.list:
        for file, names in only.items():
            for name in names:
                for line, before, after, _ in mutants(importlib.import_module(file), name):
                    print(f"{file}.py:{line}: {name}: {before} -> {after}")
        return 0
    results, started = [], time.perf_counter()
    plugin = types.ModuleType("mutants")

    def pytest_runtestloop(session):
        tell = session.config.get_terminal_writer().line
        results.extend(run(session, only, lambda line: tell(f"survived {line}")))
        return True

    plugin.pytest_runtestloop = pytest_runtestloop
    files = {start.split("::")[0] for names in only.values() for starts in names.values()
             for start in starts}
    os.chdir(HERE.parent)
    code = pytest.main(["-q", "-p", "no:cacheprovider", *(f"tests/{file}" for file in
                                                          sorted(files))], plugins=[plugin])
    if not results:
        return code or 1
    table, wrong = results
    table.append(("all", *(sum(row[i] for row in table) for i in range(1, 5))))
    print(f"\n{'function':<32}{'mutants':>9}{'killed':>9}{'survived':>9}{'equivalent':>12}")
    for name, *counts in table:
        print(f"{name:<32}" + "".join(f"{n:>{w}}" for n, w in zip(counts, (9, 9, 9, 12),
                                                                    strict=True)))
    print(f"{time.perf_counter() - started:.0f} s")
    if wrong:
        print(f"\n{len(wrong)} to look at:", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
