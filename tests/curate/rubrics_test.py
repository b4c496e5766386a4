"""Rubrics are written, read strictly, and kept where the image alone demands them."""

import json

import pytest

from caprl_jax.caption import pictures
from caprl_jax.commands.import_data import import_data
from caprl_jax.curate import filter as filtering
from caprl_jax.curate import folder, generate, parse, report, rubrics, trials
from caprl_jax.curate.trials import Settings
from caprl_jax.data import array_record, records
from caprl_jax.data.rubrics import Rubric
from caprl_jax.data.sources.prepared import opened
from caprl_jax.endpoint import Endpoint, Limits

from ..endpoint_server import serving
from . import filter_test, scripted

QUICK = Limits(concurrency=16, timeout=5.0, tries=2)
GOOD = (
    "Criterion: The caption says that the door is red.\nWeight: 3\n\n"
    "Criterion: The caption says that there are two boats.\nWeight: 1\n"
)


@pytest.mark.parametrize(
    ("text", "found", "reasons"),
    [
        (GOOD, 2, ()),
        ("**Criterion 1:** It says so.\n**Weight:** 2\n", 1, ()),
        ("1. Criterion: It says so\n   and more.\nWeight: 2.\n---\n", 1, ()),
        ("", 0, (rubrics.EMPTY,)),
        ("I can't help with that.", 0, (rubrics.OUTSIDE,)),
        (f"Here you are.\n\n{GOOD}", 2, (rubrics.OUTSIDE,)),
        (f"{GOOD}\nI hope this helps!", 2, (rubrics.OUTSIDE,)),
        (GOOD.replace("Weight: 1", "Weight: 4"), 1, (rubrics.NO_WEIGHT,)),
        (GOOD.replace("Weight: 3", ""), 1, (rubrics.NO_WEIGHT,)),
        (GOOD.replace("Weight: 3", "Weight: high"), 1, (rubrics.NO_WEIGHT,)),
        (GOOD.replace("The caption says that the door is red.", ""), 1, (rubrics.NO_TEXT,)),
        (GOOD.replace("there are two boats", "the DOOR is red"), 1, (rubrics.DUPLICATE,)),
        (GOOD.replace("two boats", "two \ud800"), 1, (rubrics.UNUSABLE,)),
    ],
)
def test_an_answer_is_read_strictly(text, found, reasons):
    usable, rejects = rubrics.parse(text)
    assert len(usable) == found and tuple(r.reason for r in rejects) == reasons
    assert set(reasons) <= set(rubrics.REASONS)


def test_what_is_read_is_what_was_written():
    usable, _ = rubrics.parse(GOOD.replace("red.\n", "red\n and  old.\n"))
    assert usable == (
        Rubric("The caption says that the door is red and  old.", 3.0),
        Rubric("The caption says that there are two boats.", 1.0),
    )
    _, rejects = rubrics.parse(GOOD[: GOOD.index("two")], truncated=True)
    assert [r.reason for r in rejects] == [parse.CUT]


def test_the_prompts_own_form_is_the_parsers():
    form = rubrics.prompt(8).partition("nothing else:\n\n")[2]
    assert len(rubrics.parse(form.replace("3, 2 or 1", "3"))[0]) == 1


def test_rubrics_are_written_beside_the_questions_of_rows(tmp_path):
    names = scripted.crops(tmp_path, 4)
    asked = filter_test.question("seen", 1)
    rows = [{"id": n, "image": n, "questions": [asked], "extras": {"hue": 1}} for n in names]
    del rows[1]["questions"], rows[3]["questions"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = folder.open_folder(str(tmp_path / "out"), generate.ROWS, 0, 1)

    willing = [scripted.pixels((tmp_path / n).read_bytes()) for n in names[:2]]

    def answer(request):
        assert "criteria" in request["messages"][-1]["content"][1]["text"]
        return GOOD if scripted.picture(request) in willing else "No."

    with serving(answer) as server:
        model, found = Endpoint(server.url, limits=QUICK), pictures.find(str(tmp_path / "in.jsonl"))
        assert generate.generate(model, found, generate.Settings(), place, generate.RUBRICS)
    written = scripted.lines(tmp_path / "out" / "rows.jsonl")
    # The third keeps its questions; the fourth has neither.
    assert [r["id"] for r in written] == names[:3] and written[0]["extras"] == {"hue": 1}
    assert ["questions" in r for r in written] == [True, False, True]
    assert ["rubrics" in r for r in written] == [True, True, False]
    assert written[0]["rubrics"][0] == {
        "rubric": "The caption says that the door is red.",
        "weight": 3.0,
    }
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    counts = {"with_rubrics": 2, "without_rubrics": 2, "rubrics": 4, "rejects": 2, "failed": 0}
    assert counts.items() <= about.items() and about["settings"]["job"] == "rubrics"
    assert about["repeated_from_other_images"] == 2
    page = report.write(tmp_path / "out").read_text()
    assert "Rubrics that a model wrote" in page and "the door is red. (weight 3)" in page


KINDS = {"seen": None, "guessed": trials.BLIND, "hidden": trials.WRONG, "backwards": trials.BOTH}


def answers(request):
    """The letter of "yes" where the rubric's kind says so, else that of "no"."""
    content, seen = request["messages"][-1]["content"], scripted.picture(request)
    text = content if seen is None else content[1]["text"]
    kind = next(k for k in (*KINDS, "broken") if f"is {k}" in text)
    if kind == "broken":
        return {"choices": []}
    assert "meet this criterion?\nThe caption says" in text
    says = kind in (("seen", "guessed") if seen else ("guessed", "backwards"))
    yes = next(x for x in "AB" if f"{x}) yes" in text)
    return yes if says else "AB".replace(yes, "")


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """Rows filtered: all kinds; a bad one and one that fails; no rubrics; none that is kept."""
    place = tmp_path_factory.mktemp("filtered")
    names = scripted.crops(place, 4)

    def criteria(*kinds):
        return [{"rubric": f"The caption says it is {k}.", "weight": 2} for k in kinds]

    question = filter_test.question("seen", 1)
    rows = [
        {"questions": [question], "rubrics": criteria(*KINDS)},
        {"rubrics": [{"rubric": ""}, *criteria("broken", "seen")]},
        {"questions": [question]},
        {"questions": [question], "rubrics": criteria("hidden")},
    ]
    rows = [{"id": n, "image": n} | row for n, row in zip(names, rows, strict=True)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder.open_folder(str(place / "out"), filtering.KEPT, 0, 1)
    with serving(answers) as server:
        model = Endpoint(server.url, limits=QUICK)
        found = pictures.find(str(place / "rows.jsonl"))
        assert filtering.filter_questions(model, found, Settings(), out, "rubrics")
    return place


def test_rubrics_are_kept_where_the_image_demands_them_and_nothing_else_does(filtered):
    out = filtered / "out"
    kept, dropped = (scripted.lines(out / f"{n}.jsonl") for n in ("kept", "dropped"))
    assert [[r["rubric"][23:-1] for r in row["rubrics"]] for row in kept] == [
        ["seen"],
        ["seen"],
        [],
        [],
    ]
    assert kept[0]["verdicts"] == [{"question": 1, "visual": 1.0, "text_only": 0.0}]
    assert kept[1]["verdicts"][0]["question"] == 3 and "questions" not in kept[1]
    assert all(len(kept[i]["questions"]) == 1 for i in (0, 2, 3))  # to train on
    why = {
        r["rubric"][23:-1]: v["why"] for r, v in zip(dropped[0]["rubrics"], dropped[0]["verdicts"])
    }
    assert why == {k: w for k, w in KINDS.items() if w}
    assert dropped[1]["malformed"][0]["question"] == 1
    failed = scripted.lines(out / "failed.jsonl")
    assert [len(f["rubrics"]) for f in failed] == [1]
    about = json.loads((out / "about.json").read_text())
    counts = {"rows": 4, "rubrics": 8, "kept": 2, "dropped": 5, "failed_rubrics": 1, "failed": 0}
    assert counts.items() <= about.items() and about["with_kept"] == 2
    page = report.write(out).read_text()
    assert "Rubrics that need the image" in page and "chance is 50.0%" in page


def test_import_data_keeps_the_rubrics(filtered, tmp_path):
    rows = filtered / "out" / "kept.jsonl"
    lines = rows.read_text().splitlines()[1:3]  # one without questions, one without rubrics
    (tmp_path / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))
    summary = import_data(str(tmp_path / "in.jsonl"), tmp_path / "to", 1, str(filtered))
    assert summary["records"] == 2 and not summary["rows_set_aside"]
    made = opened(str(tmp_path / "to"))
    read = [records.parse(array_record.source(made, s)[0]) for s in ("train", "heldout")]
    assert sorted(r.rubrics for r in read) == [(), (Rubric("The caption says it is seen.", 2.0),)]


def test_filtering_questions_keeps_a_rows_rubrics(tmp_path):
    [name] = scripted.crops(tmp_path, 1)
    own = [{"rubric": "The caption says so.", "weight": 2.0}]
    row = {"id": name, "image": name, "questions": [filter_test.question("seen", 1)]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row | {"rubrics": own}) + "\n")
    place = folder.open_folder(str(tmp_path / "out"), filtering.KEPT, 0, 1)
    with serving(filter_test.answers) as server:
        model, found = Endpoint(server.url, limits=QUICK), pictures.find(str(tmp_path / "in.jsonl"))
        assert filtering.filter_questions(model, found, Settings(), place)
    assert scripted.lines(tmp_path / "out" / "kept.jsonl")[0]["rubrics"] == own


def test_a_rubric_with_options_of_its_own_is_a_question_already():
    own = Rubric("Which color is north?", 2.0, ("red", "blue"))
    asked = rubrics.question(own)
    assert (asked.text, asked.choices, asked.answer) == (own.text, own.options, 0)
