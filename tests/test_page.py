"""results/report.html: one file, whole, that shows what the report says."""
import html.parser
import os

import fake_runs
import numpy as np
import pytest
import tiny
from PIL import Image

import plots
import report

VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """All text, all pictures, and whether every tag is closed in its order."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.pictures, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def read(tmp_path):
    def make():
        report.main(["html", "--results-dir", str(tmp_path)])
        reader = Reader()
        reader.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert not reader.open
        return reader
    return make


def test_one_file_holds_all(tmp_path, read):
    fake_runs.make_six(tmp_path, 3)
    plots.draw_curves(report.read_runs(tmp_path / "digits")[0][0]["history"],
                     tmp_path / "digits" / "kd-s0" / "curves.png")
    fake_runs.make_run(tmp_path, "odd<b>&\"-s0", 0, 50)     # a name from --run is only text
    page = read()
    assert "script" not in page.tags and "b" not in page.tags
    assert [picture["alt"] for picture in page.pictures] == ["all runs of digits", "kd-s0"]
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in page.pictures)
    for text in ("73.00 ±1.00", "kd - student alone", "+3.00 [+0.52, +5.48]", "helps",
                 'odd<b>&"'):
        assert text in "".join(page.text), text


def test_sweeps_are_shown(tmp_path, read):
    folder = tmp_path / "sweeps" / "distill-alpha"
    folder.mkdir(parents=True)
    (folder / "sweep.md").write_text("| alpha | n |  |\n| ---: | ---: | ---: |\n"
                                     "| 0.5 | 3 | best by validation |\n\nMean.\n")
    page = read()
    for text in ("distill-alpha", "best by validation", "0.5"):
        assert text in "".join(page.text)


@pytest.mark.parametrize("content", [
    b"", b"no table\n", b"\xff| a |\n", b"| a | b |\n| --- |\n| 1 ", None])
def test_a_sweep_of_before_there_were_checksums_that_is_cut_short(tmp_path, capsys, content):
    path = tmp_path / "sweeps" / "one" / "sweep.md"
    path.parent.mkdir(parents=True)
    if content is None:
        os.mkfifo(path)         # reading it would wait for ever
    else:
        path.write_bytes(content)
    tiny.refused(capsys, report, ["html", "--results-dir", tmp_path], path, "cut short or damaged")


def test_a_bomb_among_the_pictures_of_a_run(tmp_path, capsys):
    path = fake_runs.make_run(tmp_path, "kd-s0", 0, 73) / "curves.png"
    Image.new("1", (12_000, 12_000)).save(path)
    tiny.refused(capsys, report, ["html", "--results-dir", tmp_path], path, "exceeds limit")


@pytest.mark.parametrize("place", ["digits/kd-s0/curves.png", "sweeps/one/sweep.png"])
def test_a_picture_that_is_cut_short_is_named(tmp_path, read, capsys, place):
    run = fake_runs.make_run(tmp_path, "kd-s0", 0, 73)
    plots.draw_curves(report.read_runs(run.parent)[0][0]["history"], run / "curves.png")
    whole = (run / "curves.png").read_bytes()
    (tmp_path / "sweeps/one").mkdir(parents=True)
    (tmp_path / "sweeps/one/sweep.md").write_text("| a |\n| --- |\n| 1 |\n")
    (tmp_path / place).write_bytes(whole)
    read()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for wrong in (whole[:-2000], bytes(flipped), b""):
        (tmp_path / place).write_bytes(wrong)
        tiny.refused(capsys, report, ["html", "--results-dir", tmp_path], tmp_path / place,
                     "remove it")


def test_what_is_published_says_what_its_outputs_said(tmp_path, read):
    """They stay behind; a report of other runs says nothing of these."""
    for seed in (0, 1):
        run = fake_runs.make_run(tmp_path, f"kd-s{seed}", seed, 50)
        np.savez(run / "test.npz", logits=4 * np.eye(2), labels=np.array([0, seed]))
    report.main(["publish", "--results-dir", str(tmp_path)])
    whole = report.main(["--results-dir", str(tmp_path)])["rows"]
    assert whole[0]["beside"]["n"] == 2
    place = tmp_path / "published"
    assert report.main(["--results-dir", str(place)])["rows"] == whole
    report.main(["html", "--results-dir", str(place)])
    text = (place / "report.html").read_text(encoding="utf-8")
    assert "Beside accuracy" in text and "calibration and confusion of digits" in text
    path = place / "digits" / "report.json"
    known = path.read_text()
    for old, new in (('"calibration"', '"x"'), ('"n": 2', '"n": []'), ('"kd-s1"', '"kd-s2"'),
                     ('"classes": [\n', '"classes": [{},\n'), ("0.5", "0.6")):
        assert old in known
        path.write_text(known.replace(old, new))
        assert report.main(["--results-dir", str(place)])["rows"][0]["beside"] in (
            {}, whole[0]["beside"]), new


def test_claims_and_advice_are_shown(tmp_path, read, capsys):
    fake_runs.make_run(tmp_path, "kd-s0", 0, 73)
    (tmp_path / "advice.json").write_text(
        '[{"choice": "T", "advice": "<b>high", "measured": "8 - 1: +1"}]')
    page = read()
    assert "<b>high" in page.text and "b" not in page.tags and "Claims" not in page.text
    for text in ("[{}]", "[1]", "{", "[" * 10**5, "[]"):
        (tmp_path / "advice.json").write_text(text)
        tiny.refused(capsys, report, ["html", "--results-dir", tmp_path], "advice.json",
                     "make claims")


def test_nothing_to_show(tmp_path, capsys):
    tiny.refused(capsys, report, ["html", "--results-dir", tmp_path], tmp_path, "make all")
