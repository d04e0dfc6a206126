"""report.py on run folders made in fake_runs.py: its files, pictures, README and refusals."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import SIX, make_run, make_six, refused, rows_of, run
from PIL import Image

import compare
import plots
import report

HOUSE = Path(report.__file__).parent


# ---- what is written --------------------------------------------------------------------------

def test_files_and_terminal(tmp_path, capsys):
    folder = make_six(tmp_path, 3)
    make_run(tmp_path, "a-name-that-nobody-would-want-to-type-s0", 0, 70, 71)
    result = run("--results-dir", tmp_path)
    out = capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text()) == result
    assert [line for line in out.splitlines()
            if len(line) > 80 and not line.startswith(("report ", "picture "))] == []
    assert out.endswith(f"report   {folder / 'report.md'}\npicture  {folder / 'comparison.png'}\n")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert ("| kd | 3 | 45.7 k | 3.2 M | 6 | 75.00 ±1.00 | 74.00 ±1.00 | 73.50 ±1.00 | 30 % | 42 |"
            in text)
    assert ("| kd - student alone | does the teacher help? | 3 | +3.00 [+0.52, +5.48] | helps | "
            "+3.00 [+0.52, +5.48] | helps |") in text
    assert "a-name-that-nobody-would-want-to-type" in text
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    run("--results-dir", tmp_path)
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def size_of(png):
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 200_000
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_pictures(tmp_path):
    folder = make_six(tmp_path, 3, epochs=40)
    make_run(tmp_path, "kd-ema-s0", 0, 10, 10, learned=False, epochs=1)
    run("--results-dir", tmp_path)
    assert size_of(folder / "comparison.png")[0] > 1000
    history = compare.read_runs(folder)[0][0]["history"]
    history[0]["val_loss"] = None  # as before the first validation, and where there is none
    plots.draw_curves(history, tmp_path / "curves.png", "teacher-s0", chance=0.1)
    wide, high = size_of(tmp_path / "curves.png")
    assert wide > 2 * high
    plots.draw_curves(history[:1], tmp_path / "one.png")
    above_the_legend = Image.open(tmp_path / "one.png").convert("HSV").crop((0, 0, 1500, 500))
    assert sum(above_the_legend.getchannel("S").histogram()[100:]) > 50  # one epoch is seen, too


def test_losses_of_another_scale_have_a_panel_of_their_own(monkeypatch):
    history = [dict(epoch=e, train_loss=9 / e, val_loss=1 / e, train_accuracy=0.5, val_accuracy=0.6)
               for e in (1, 2, 3)]
    monkeypatch.setattr(plots, "save", lambda figure, path: path.append(figure))

    def panels(**how):
        plots.draw_curves(history, found := [], **how)
        return {axes.get_ylabel(): [list(line.get_ydata()) for line in axes.lines]
                for axes in found[0].axes}

    train, val = ([row[key] for row in history] for key in ("train_loss", "val_loss"))
    assert panels()["loss (cross-entropy)"] == [train, val]
    apart = panels(objective="kd")
    assert apart.pop("accuracy (%)") == [[50.0] * 3, [60.0] * 3]
    assert apart == {"training loss\n(kd)": [train], "validation loss\n(cross-entropy)": [val]}


@pytest.mark.parametrize("third, last, bottom, said", [
    (40, 80, 35, "chance: 10 %"), (11, 12, 6, "chance")])
def test_a_comparison_has_room_for_what_lies_close_together(monkeypatch, third, last, bottom, said):
    """All above 40 % after a third of the epochs: nothing below 35 % is drawn; chance in words."""
    runs = [dict(name=f"{key}-s0", history=[
        dict(epoch=e + 1, train_accuracy=value / 100, val_accuracy=value / 100, val_loss=1.0)
        for e, value in enumerate((10, 20, third, last, last, last))])
        for key in ("teacher", "student")]
    rows = [dict(key=key, label=key, prefix="", runs=[f"{key}-s0"], seeds=[0], learned=True,
                 test_accuracy=dict(values=[last / 100])) for key in ("teacher", "student")]
    monkeypatch.setattr(plots, "save", lambda figure, path: path.append(figure))
    plots.draw_comparison(rows, runs, found := [], chance=0.1)
    axes = next(axes for axes in found[0].axes if "training" in axes.get_ylabel())
    assert axes.get_ylim()[0] == pytest.approx(bottom)
    assert [text.get_text() for text in axes.texts] == [said]


@pytest.mark.parametrize("more, lines", [(6, 8), (7, 2)])
def test_of_many_rows_only_the_chains_have_lines(monkeypatch, more, lines):
    keys = ["teacher", "student", *(f"try{i}" for i in range(more))]
    runs = [dict(name=f"{key}-s0", history=[
        dict(epoch=e, train_accuracy=0.5, val_accuracy=0.5, val_loss=1.0) for e in (1, 2)])
        for key in keys]
    rows = [dict(key=key, label=key, prefix="", runs=[f"{key}-s0"], seeds=[0], learned=True,
                 test_accuracy=dict(values=[0.5])) for key in keys]
    monkeypatch.setattr(plots, "save", lambda figure, path: path.append(figure))
    plots.draw_comparison(rows, runs, found := [], "x")
    (loss,) = (axes for axes in found[0].axes if "loss" in axes.get_ylabel())
    (test,) = (axes for axes in found[0].axes if "test accuracy" in axes.get_xlabel())
    assert len(loss.lines) == lines and len(test.get_yticks()) == len(keys)
    assert ("own rows" in found[0].get_suptitle()) is (lines < len(keys))


def test_lines_of_a_picture_can_be_told_apart():
    styles = [plots.style(key, 0) for key in compare.ROWS]
    styles += [plots.style("another", number) for number in range(10)]
    assert len({str(style) for style in styles}) == len(styles)


def test_no_torch():
    code = "import sys, report; assert 'torch' not in sys.modules; sys.exit(7)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOUSE).returncode == 7


def test_publish_copies_the_small_files_only(tmp_path, capsys):
    folder = make_six(tmp_path)
    for name, size in (("best.pt", 9), ("checkpoint.pt", 9), ("curves.png", 1999)):
        (folder / "kd-s0" / name).write_bytes(b"x" * size)
    (folder / "teacher-s0" / "curves.png").write_bytes(b"x" * 200_000)
    (folder / "kd-only-s1").mkdir()  # unfinished
    target = tmp_path / "published" / "digits"
    (target / "gone\x1b[2J-s0").mkdir(parents=True)
    result = run("publish", "--results-dir", tmp_path)
    three = {"config.json", "metrics.csv", "final.json"}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {"report.md", "report.json", "comparison.png", "kd-s0/curves.png"} | {
        f"{name}-s0/{file}" for name in SIX for file in three}
    assert (target / "kd-s0/final.json").read_bytes() == (folder / "kd-s0/final.json").read_bytes()
    assert json.loads((target / "report.json").read_text()) == result
    assert rf"{target}/gone\x1b[2J-s0 is not among these runs" in capsys.readouterr().out
    # the published folder has the layout of any other, so a report can be made of it
    again = run("--results-dir", tmp_path / "published")
    assert rows_of(again) == rows_of(result)


# ---- README -----------------------------------------------------------------------------------

def test_readme_is_filled_and_checked(tmp_path, capsys):
    make_six(tmp_path)
    run("publish", "--results-dir", tmp_path)
    page = tmp_path / "README.md"
    words = ("readme", "--results-dir", tmp_path, "--readme", page)
    page.write_text("# Tutor\n<!-- table:digits -->\nold\n<!-- /table -->\nmiddle <!-- plain -->\n"
                    "<!-- comparisons:digits --><!-- /comparisons -->\nend\n", encoding="utf-8")
    capsys.readouterr()
    assert "is stale" in refused(capsys, *words, "--check", code=1)
    assert "old" in page.read_text(encoding="utf-8")
    assert run(*words)["changed"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Tutor\n<!-- table:digits -->\n\n| run | n | parameters |")
    assert "| kd | 1 | 45.7 k | 3.2 M | 6 | 74.00 | 73.00 | 72.50 | 30 % | 42 |" in text
    assert "\n\n<!-- /table -->\nmiddle <!-- plain -->\n<!-- comparisons:digits -->\n\n| c" in text
    assert text.endswith("<!-- /comparisons -->\nend\n") and "old" not in text
    assert run(*words) == {"readme": str(page), "changed": False}
    assert not run(*words, "--check")["changed"]
    page.write_text(text.replace("73.00", "93.00"), encoding="utf-8")  # typed by hand
    refused(capsys, *words, "--check", code=1)


@pytest.mark.parametrize("text, told", [
    ("<!-- tabel:digits --><!-- /tabel -->", "unknown marker tabel:digits (choose from table"),
    ("<!-- table:digits -->", "the last table is not closed by <!-- /table -->"),
    ("<!-- table:digits --> <!-- table:digits --> <!-- /table -->", "<!-- /table --> should be"),
    ("<!-- /table -->", "where a marker that opens should be"),
    ("<!-- table:svhn --><!-- /table -->", "`make publish RECIPE=svhn` makes it")])
def test_readme_with_wrong_markers_is_left_alone(tmp_path, capsys, text, told):
    make_six(tmp_path)
    run("publish", "--results-dir", tmp_path)
    capsys.readouterr()
    page = tmp_path / "README.md"
    page.write_text(text)
    assert told in refused(capsys, "readme", "--results-dir", tmp_path, "--readme", page)
    assert page.read_text() == text


# ---- refusals ---------------------------------------------------------------------------------

@pytest.mark.parametrize("words, told", [
    (["--recipe", "digtis"], "digtis"), (["--recip", "digits"], "--recip"),
    (["--colour"], "--colour"), (["--check"], "--check"),
    (["readme", "--recipe", "digits"], "--recipe"),
    (["pubish"], "unknown command 'pubish' (choose from report, publish, readme, sweep, html)"),
    (["readme", "--readme", "no/such.md"], "such.md: No such file")])
def test_wrong_words(capsys, words, told):
    assert told in refused(capsys, *words)


def test_no_finished_run(tmp_path, capsys):
    line = refused(capsys, "--results-dir", tmp_path)
    assert f"`python train_teacher.py --recipe digits --results-dir {tmp_path}`" in line
    assert "`make all RECIPE=digits`" in line
    (tmp_path / "digits" / "teacher-s0").mkdir(parents=True)
    assert "(unfinished: teacher-s0)" in refused(capsys, "--results-dir", tmp_path)


def change(**changes):
    def edit(path):
        final = json.loads(path.read_text())
        final.update(changes)
        path.write_text(json.dumps({k: v for k, v in final.items() if v != "drop"}))
    return edit


@pytest.mark.parametrize("file, edit, told", [
    ("final.json", lambda path: path.write_text(path.read_text()[:99]), "cut short"),
    ("final.json", lambda path: path.write_text("[]"), "not a mapping"),
    ("final.json", change(seed="drop"), "lacks 'seed'"),
    ("final.json", change(recipe="drop"), "lacks 'recipe'"),
    ("final.json", change(recomputed_val_accuracy="x"), "recomputed_val_accuracy cannot be 'x'"),
    ("config.json", lambda path: path.write_text("[[1, 2]]"), "not a mapping"),
    ("config.json", change(dataset=[5]), "dataset cannot be [5]"),
    ("final.json", change(learned="drop"), "lacks 'learned'"),
    ("final.json", change(test_accuracy=None), "test_accuracy cannot be None"),
    ("final.json", change(test_accuracy=70.5), "test_accuracy cannot be 70.5"),
    ("final.json", change(macs="many"), "macs cannot be 'many'"),
    ("final.json", change(parameters=10**400), "parameters cannot be 1000"),
    ("final.json", change(epochs=10**14), "not its 100000000000000 epochs"),
    ("final.json", change(seconds=math.nan), "seconds cannot be nan"),
    ("final.json", lambda path: path.write_text("[" * 100_000), "cut short"),
    ("config.json", change(class_names=5), "class_names cannot be 5"),
    ("config.json", change(classes="x"), "classes cannot be x"),
    ("config.json", change(objective="kd"), "temperature cannot be None"),
    ("metrics.csv", lambda path: path.write_text(path.read_text() + "9" * 200_000), "cut short"),
    ("config.json", lambda path: path.unlink(), "missing or cut short"),
    ("metrics.csv", lambda path: path.write_text(path.read_text()[:-20]), "cut short"),
    ("metrics.csv", lambda path: path.write_text("epoch,loss\n1,2\n"), "the column 'train_loss'"),
    ("metrics.csv", lambda path: path.write_text("".join(path.open().readlines()[:4])),
     "not its 6 epochs")])
def test_broken_files_are_named(tmp_path, capsys, file, edit, told):
    folder = make_six(tmp_path) / "kd-s0"
    edit(folder / file)
    line = refused(capsys, "--results-dir", tmp_path)
    file = "metrics.csv" if "not its" in told else file
    assert str(folder / file) in line and told in line
    assert f"train this run again with --overwrite, or remove {folder}" in line
