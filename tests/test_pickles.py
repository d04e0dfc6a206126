"""Checkpoints whose pickle these scripts would not have written: PyTorch's own care lets some of it
through that computes for hours, takes all memory, or ends Python without a word."""
import pickle
import struct
import time
import zipfile
import zlib
from collections import OrderedDict

import pytest
import tiny
import torch

import cards
import common
import distill
import files
import look
import models
import runs
import train_student


@pytest.fixture(scope="module")
def best(chain):
    return chain[0] / "digits" / "student-s0" / "best.pt"


def parts(best):
    with zipfile.ZipFile(best) as had:
        return {name: had.read(name) for name in had.namelist()}


def rewritten(best, path, change):
    """A copy of a checkpoint with another pickle: change(its bytes), or bytes."""
    with zipfile.ZipFile(path, "w") as made:
        for name, data in parts(best).items():
            if name.endswith("data.pkl"):
                data = change if isinstance(change, bytes) else change(data)
            made.writestr(name, data)
    return path


def called(module, name):
    return f"c{module}\n{name}\n".encode()


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def one_number(gradient=b"\x89", hooks=b""):
    """A pickle's operations for a tensor, whose hooks are number 1 of its memory."""
    return (called("torch._utils", "_rebuild_tensor_v2") + b"((X\7\0\0\0storage"
            + called("torch", "FloatStorage") + b"X\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQK\0))"
            + gradient + called("collections", "OrderedDict") + b")Rq\1" + hooks + b"tR")


DEEP = 2 * 10**5
ODD = {     # what it holds -> its pickle, what is said
    "a key of many tuples": (b"\x80\x02}(" + b")" + b"\x85" * DEEP + b"K\x01u.", "SETITEMS"),
    "one that is set alone": (b"\x80\x02})" + b"\x85" * DEEP + b"K\x01s.", "SETITEM"),
    "pairs of an OrderedDict": (b"\x80\x02" + called("collections", "OrderedDict") + b"]((K\x01K"
                                b"\x02te\x85R.", "REDUCE"),
    "a list of pairs of it": (b"\x80\x02" + called("collections", "OrderedDict") + b"]])" + b"\x85"
                              * DEEP + b"K\x01\x86aaR.", "REDUCE"),
    "the name of a storage": (b"\x80\x02(X\x07\0\0\0storage" + called("torch", "FloatStorage")
                              + b")" + b"\x85" * DEEP + b"X\x03\0\0\0cpuK\x01tQ.", "BINPERSID"),
    "a set of 3 GB": (b"\x80\x02" + called("builtins", "set") + called("builtins", "bytearray")
                      + number(3 * 10**9) + b"\x85R\x85R.", "builtins.set"),
    "1 TB": (b"\x80\x02" + called("builtins", "bytearray") + number(10**12) + b"\x85R.",
             "builtins.bytearray"),
    "a set": (b"\x80\x02\x8f.", "EMPTY_SET"),
    "another protocol": (b"\x80\x09}.", "PROTO"),
    "an object": (b"\x80\x02" + called("collections", "OrderedDict") + b")\x81.", "NEWOBJ"),
    "a name from the stack": (b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93.", "STACK_GLOBAL"),
    "attributes of a list": (b"\x80\x02]}b.", "BUILD"),
    "attributes in pairs": (b"\x80\x02" + called("collections", "OrderedDict") + b")R])"
                            + b"\x85" * DEEP + b"K\x01\x86ab.", "BUILD"),
    "attributes in a tuple of pairs": (
        b"\x80\x02" + called("collections", "OrderedDict") + b")R)" + b"q\0h\0\x86" * 60
        + b"K\x01\x86\x85b.", "BUILD"),
    "a storage as a value": (b"\x80\x02}X\1\0\0\0a(X\7\0\0\0storage" + called(
        "torch", "ByteStorage") + b"X\1\0\0\0" + b"0X\3\0\0\0cpuK\1tQs.", "SETITEM"),
    "a class as a value": (b"\x80\x02]" + called("torch", "ByteStorage") + b"a.", "APPEND"),
    "a class in tuples": (b"\x80\x02](" + called("torch", "ByteStorage") + b"\x85\x85e.",
                          "APPENDS"),
    # Hooks are called, or shown, when a tensor is written: of lists in one another for ever.
    "a gradient": (b"\x80\2" + one_number(gradient=b"\x88") + b".", "REDUCE"),
    "hooks": (b"\x80\2" + one_number(hooks=b"K\0]s") + b".", "REDUCE"),
    "attributes of hooks": (b"\x80\2" + one_number(hooks=b"}b") + b".", "REDUCE"),
    "hooks that come later": (b"\x80\2]" + one_number() + b"ah\1K\0]s.", "SETITEM"),
    "many lists": (b"\x80\x02](" + b"]" * cards.MOST[1] + b"e.", str(cards.MOST[1])),
    "many numbers": (b"\x80\x02](" + b"K\x01" * cards.MOST[0] + b"e.", str(cards.MOST[0])),
    "items of a number": (b"\x80\x02K\x01K\x02a.", "APPEND"),
    "lists in one another": (b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".", "one another"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_these_scripts_do_not_write_is_refused_at_once(best, tmp_path, capsys, kind):
    pickled, part = ODD[kind]
    path, started = rewritten(best, tmp_path / "odd.pt", pickled), time.process_time()
    tiny.refused(capsys, look, ["predict", path, "x.png"], path, "more than tensors", part)
    assert time.process_time() - started < 30


@pytest.mark.parametrize("pickled", [
    b"\x80\x02\x85.", b"\x80\x02(K\x01\x85\x85R.", b"\x80\x02h\x05.", b"\x80\x02e.", b"\x80\x02a.",
    b"\x80\x02K\x01", b"P", b"", b"\x80\x02}b.", b"\x80\x02K\x01Q."])
def test_a_pickle_that_is_none_is_named(best, tmp_path, capsys, pickled):
    path = rewritten(best, tmp_path / "odd.pt", pickled)
    tiny.refused(capsys, look, ["predict", path, "x.png"], path)


def test_a_list_in_itself_is_not_followed(best, tmp_path, capsys):
    held = []
    held.append(held)
    torch.save(tiny.load(best) | dict(classes=held), tmp_path / "odd.pt")
    tiny.refused(capsys, look, ["predict", tmp_path / "odd.pt", "x.png"], "one another")


def test_a_list_that_is_in_many_is_copied_once(best, tmp_path):
    """Ten to the fifteenth, if each were followed."""
    held = [1]
    for _ in range(15):
        held = [held] * 10
    torch.save(tiny.load(best) | dict(more=held), tmp_path / "odd.pt")
    assert common.load_checkpoint(tmp_path / "odd.pt")["recipe"] == "digits"


class Dressed:
    """A dict as an OrderedDict with attributes of its own, that shadow its methods."""

    def __init__(self, held, attributes):
        self.state = OrderedDict, (), attributes, None, iter(held.items())

    def __reduce__(self):
        return self.state


@pytest.mark.parametrize("attributes", [
    dict(items="x"), dict(keys="x"), dict(get="x"), dict(_metadata="x"),
    dict(_metadata={"features.0": 7})])
def test_attributes_of_a_dict_are_left_out(best, easy, tmp_path, capsys, attributes):
    card, path = tiny.load(best), tmp_path / "best.pt"
    torch.save(Dressed(card | dict(model=Dressed(card["model"], attributes),
                                   build=Dressed(card["build"], attributes)), attributes), path)
    network, read = models.load(path)
    assert {*map(type, (read, read["model"], read["build"]))} == {dict}
    assert tiny.same(dict(network.state_dict()), card["model"])
    tiny.run(train_student, easy, tmp_path / "r", "--init-from", path, epochs=1)
    spoiled = {name: torch.full_like(value, torch.nan) for name, value in card["model"].items()}
    torch.save(card | dict(model=Dressed(spoiled, attributes)), path)
    tiny.refused(capsys, look, ["predict", path, "x.png"], path, "not finite")


def test_what_a_plain_save_writes_is_read(tmp_path):
    """Of any network: state dicts with their metadata, BatchNorm's counts, an optimizer's state."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    kept = dict(model=network.state_dict(), optimizer=optimizer.state_dict(), shape=(1, 2, 3),
                many=list(range(300)), words={"é": None, 5: -1e300, "long": "x" * 300, "": 10**12},
                truth=[True, False], half=torch.ones(2).bfloat16(), whole=torch.arange(70000))
    torch.save(kept, tmp_path / "x.pt")
    back = common.load_checkpoint(tmp_path / "x.pt")
    assert tiny.same(back, kept) and type(back["model"]) is dict


@pytest.mark.parametrize("made", [
    lambda x: torch.nested.nested_tensor([x, x]), torch.Tensor.to_sparse, lambda x: x.to("meta"),
    lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), torch.nn.Parameter])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_named(best, easy, results, tmp_path, capsys, made):
    card, path = tiny.load(best), tmp_path / "odd.pt"
    weights = card["model"] | {"classifier.3.weight": made(torch.zeros(2))}
    torch.save(card | dict(model=weights), path)
    tiny.refused(capsys, distill, tiny.words(easy, results, "--teacher", path), path, "rebuild")


def overlapping(best, path, count):
    """A zip file with so many parts that are the same 100 kB."""
    name, data = b"best/data/x", bytes(10**5)
    with zipfile.ZipFile(best) as had:
        parts = [(info.filename.encode(), had.read(info)) for info in had.infolist()]
    body, listed = b"", b""
    for each, held in (*parts, (name, data)):
        size = len(held)
        facts = struct.pack("<HHHIIIHH", 0, 0, 0, zlib.crc32(held), size, size, len(each), 0)
        again = count if each == name else 1
        listed += (b"PK\1\2" + struct.pack("<HHH", 20, 20, 0) + facts
                   + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + each) * again
        body += b"PK\3\4" + struct.pack("<HH", 20, 0) + facts + each + held
    total = len(parts) + count
    path.write_bytes(body + listed + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, total, total,
                                                             len(listed), len(body), 0))
    return path


def test_parts_that_lie_in_one_place_are_not_read_each(best, tmp_path, capsys):
    assert files.damage(overlapping(best, tmp_path / "one.pt", 1)) is None
    path = overlapping(best, tmp_path / "many.pt", 20000)
    tiny.refused(capsys, look, ["predict", path, "x.png"], path, "overlap")


def test_two_pickles_are_one_too_many(best, tmp_path, capsys):
    path = tmp_path / "two.pt"
    path.write_bytes(best.read_bytes())
    with zipfile.ZipFile(path, "a") as bundle:
        bundle.writestr("other/data.pkl", b"\x80\x02}.")
    tiny.refused(capsys, look, ["predict", path, "x.png"], path, "or two")


def test_pytorch_is_given_the_pickle_that_was_searched(best, tmp_path, capsys):
    """Its own reader takes no notice of letters' case, and reads what stands before a zip file."""
    evil, held = ODD["a key of many tuples"][0], parts(best)
    with zipfile.ZipFile(tmp_path / "case.pt", "w") as made:
        for name, data in held.items():
            made.writestr(name.replace("data.pkl", "DATA.PKL"),
                          evil if name.endswith("data.pkl") else data)
        made.writestr("best/zz/data.pkl", b"\x80\x02}.")
    tiny.refused(capsys, look, ["predict", tmp_path / "case.pt", "x.png"], "case.pt")
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as made:
        for name, data in held.items():
            made.writestr(name, data)
        made.writestr(next(iter(held)).upper(), evil)
    tiny.refused(capsys, look, ["predict", tmp_path / "twice.pt", "x.png"], "two")
    old = 0x1950a86a20f9469cfc6c, 1001, dict(protocol_version=1001, little_endian=True)
    before = b"".join(pickle.dumps(part, 2) for part in old)
    (tmp_path / "both.pt").write_bytes(before + evil + best.read_bytes())
    assert tiny.same(common.load_checkpoint(tmp_path / "both.pt"), tiny.load(best))


def test_a_tensor_has_storage_sizes_and_nothing_else(best, easy, results, tmp_path, capsys):
    """A seventh argument may say that its numbers count as negative: not every operation can."""
    card, path = tiny.load(best), tmp_path / "odd.pt"
    model = {name: torch._neg_view(value) for name, value in card["model"].items()}
    torch.save(card | dict(model=model), path)
    tiny.refused(capsys, distill, tiny.words(easy, results, "--teacher", path), path, "REDUCE")
    name = called("torch._utils", "_rebuild_tensor_v2")
    held = next(data for key, data in parts(best).items() if key.endswith("data.pkl"))
    for given in (b")", b"(K\0K\0))\x89}t", b"(]]]]]]t"):
        rewritten(best, path, b"\x80\x02" + name + given + b"R.")
        tiny.refused(capsys, look, ["predict", path, "x.png"], path, "REDUCE")
    assert name in held


def test_numbers_of_a_tensor_are_not_printed(best, easy, tmp_path, capsys):
    """Four bytes that claim to be ten thousand million numbers, of which a summary shows most."""
    huge, card, path = torch.zeros(1).expand((7,) * 8), tiny.load(best), tmp_path / "odd.pt"
    for change in (dict(schema=huge), dict(build=card["build"] | dict(arch=huge)),
                   dict(epoch=[huge]), dict(classes=(huge,) * 4), dict(mean=[huge] * 3)):
        torch.save(card | change, path)
        started = time.process_time()
        tiny.refused(capsys, look, ["predict", path, "x.png"], path, "a tensor of 8 dimensions")
        assert time.process_time() - started < 5


def test_a_tensor_of_thousands_of_dimensions_is_not_made(best, tmp_path, capsys):
    """Each takes memory for its sizes, whatever it holds."""
    card, path = tiny.load(best), tmp_path / "odd.pt"
    torch.save(card | dict(more=torch.zeros((1,) * 20000)), path)
    tiny.refused(capsys, look, ["predict", path, "x.png"], path, "REDUCE")
    torch.save(card | dict(more=torch.zeros((1,) * 8)), path)
    assert common.load_checkpoint(path)["more"].dim() == 8


@pytest.mark.parametrize("key, value, part", [
    *(("epoch", value, "for epoch 1") for value in (torch.zeros(3), True, 1.0, "1")),
    ("val_accuracy", None, "None of val_accuracy in epoch 1"),
    ("ema_val_loss", 0.5, "0.5 of ema_val_loss in epoch 1"),        # there is no average
    ("images_per_second", -1.0, "-1.0 of images_per_second in epoch 1")])
def test_a_row_that_cannot_be_is_not_gone_on_from(easy, tmp_path, capsys, key, value, part):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    folder = tmp_path / "digits" / "student-s0"
    state = tiny.load(folder / "checkpoint.pt")
    state["history"][0][key] = value
    common.save_checkpoint(folder / "checkpoint.pt", state)
    for name in ("final.json", runs.SUMS):
        (folder / name).unlink()
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, "--resume", epochs=1),
                 folder / "checkpoint.pt", part)


def changed(name, change):
    """A change of one tensor of the first parameter's state."""
    return lambda state: state[0].update({name: change(state[0][name])})


def shared(state):
    for one in state.values():
        one["step"] = state[0]["step"]


@pytest.mark.parametrize("change, part", [
    (changed("step", lambda x: x - 70), "below 0"),
    (changed("exp_avg_sq", lambda x: x - 7), "below 0"),
    # One number, the last of its storage, in place of all: a fused kernel would write behind it.
    (changed("exp_avg", lambda x: torch.as_strided(
        torch.zeros(x.numel()), x.shape, [0] * x.dim(), x.numel() - 1)), "no plain tensor"),
    # The same numbers, but a fused kernel takes them as they lie.
    (changed("exp_avg", lambda x: x.contiguous()), "exp_avg in another order"),
    (shared, "two tensors in one place"), (lambda state: state.pop(3), "not of all"),
    (lambda state: state.update({99: state[0]}), "not of all")])
def test_an_optimizer_that_cannot_be_is_not_gone_on_with(easy, tmp_path, capsys, change, part):
    tiny.run(train_student, easy, tmp_path, epochs=1)
    folder = tmp_path / "digits" / "student-s0"
    state = tiny.load(folder / "checkpoint.pt")
    change(state["optimizer"]["state"])
    common.save_checkpoint(folder / "checkpoint.pt", state)
    for file in ("final.json", runs.SUMS):
        (folder / file).unlink()
    tiny.refused(capsys, train_student, tiny.words(easy, tmp_path, "--resume", epochs=1),
                 folder / "checkpoint.pt", part)


def test_what_is_beside_a_pickle_is_of_the_size_that_it_says(best, tmp_path, capsys):
    """An older PyTorch may read behind it. TorchScript's part is left out."""
    held, path = parts(best), tmp_path / "odd.pt"
    place = next(name for name in held if name.endswith("data.pkl")).removesuffix("data.pkl")
    for name, data in (("data/0", held[f"{place}data/0"][:-4]), ("data/0", None),
                       ("constants.pkl", b"\x80\2).")):
        with zipfile.ZipFile(path, "w") as made:
            for key, body in (held | {place + name: data}).items():
                if body is not None:
                    made.writestr(key, body)
        if name == "data/0":
            tiny.refused(capsys, look, ["predict", path, "x.png"], path, "data/0 is not of")
    assert tiny.same(common.load_checkpoint(path), tiny.load(best))
