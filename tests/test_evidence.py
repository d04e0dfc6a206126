"""The pages of results/published: current, complete, and refused where a verdict changed."""
import json
import shutil

import evidence
import pytest

PUBLISHED = evidence.PUBLISHED


@pytest.fixture
def copy(tmp_path):
    """A copy of what is published, without pictures."""
    folder = tmp_path / "published"
    shutil.copytree(PUBLISHED, folder, ignore=shutil.ignore_patterns("*.png"))
    return folder


@pytest.fixture(scope="module")
def pages():
    return evidence.make_pages(PUBLISHED)


def change(file, edit):
    """Change a JSON file by a function of its contents."""
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_pages_are_current(capsys):
    assert evidence.main(["--check"]) == []


def test_stale_page_is_named_and_written(copy, capsys):
    (copy / "advice.md").write_text("# Advice\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        evidence.main(["--check", "--published", str(copy)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: stale: advice.md;")
    assert evidence.main(["--published", str(copy)]) == ["advice.md"]
    assert (copy / "advice.md").read_text() == (PUBLISHED / "advice.md").read_text()


def verdicts_of(content, claim):
    """Return the verdicts of a claim's first comparison, in the contents of reports.json."""
    claims = {entry["claim"]: entry for entry in content["claims"]}
    return claims[claim]["evidence"][0]["verdicts"]


def expect_helps(content):
    verdicts_of(content, "a teacher improves the student drastically")["digits"] = "helps"


def forget_digits(content):
    del verdicts_of(content, "the student is better than the teacher")["digits"]


def expect_lower(content):
    content["temperature T"]["evidence"][0]["verdict"] = "lower"


@pytest.mark.parametrize("file, edit, words", [
    ("reports.json", expect_helps,
     "written for 'helps', but kd - student alone of digits says 'cannot tell'"),
    ("reports.json", forget_digits, "digits answers it too, with 'hurts'"),
    ("advice.json", expect_lower,
     "written for 'lower', but T 8 - 1 of distill-temperature says 'cannot tell'"),
])
def test_changed_verdict_is_refused(copy, capsys, file, edit, words):
    change(copy / file, edit)
    (copy / "README.md").unlink()
    with pytest.raises(SystemExit) as stop:
        evidence.main(["--published", str(copy)])
    assert stop.value.code == 1
    assert words in capsys.readouterr().err
    assert not (copy / "README.md").exists()


def test_every_recipe_and_sweep_is_listed(pages):
    recipes = {file.parent.parent.name for file in PUBLISHED.glob("*/*/final.json")}
    sweeps = {file.parent.name for file in PUBLISHED.glob("sweeps/*/sweep.csv")}
    assert len(recipes) > 5 and len(sweeps) > 14
    for recipe in recipes:
        assert f"## {recipe}\n" in pages["README.md"]
        assert f"]({recipe}/report.md)" in pages["README.md"]
    for sweep in sweeps:
        assert f"](sweeps.md#{sweep})" in pages["README.md"]
        assert f"## {sweep}\n" in pages["sweeps.md"]


def test_every_note_is_on_a_page(pages):
    notes = json.loads((PUBLISHED / "notes.json").read_text(encoding="utf-8"))
    text = "".join(pages.values())
    for key, paragraphs in notes.items():
        for paragraph in paragraphs:
            assert paragraph in text, key


def test_links_lead_to_files(pages):
    for name, text in pages.items():
        if not name.endswith(".md"):
            continue
        for part in text.split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            assert (PUBLISHED / name).parent.joinpath(target).exists(), f"{name}: {target}"
