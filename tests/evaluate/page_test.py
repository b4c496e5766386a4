"""The page of an evaluation: it holds every figure, escapes all text, and stays small."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import mcq, means, page, results
from caprl_jax.evaluate.page import Run
from tests.report.html_test import HOSTILE, Page

RTL = "\u202eصورة\u202d \u202e تحت"


def row(name, accuracy, **more):
    """An image as mcq.measure returns it, with one question."""
    question = {"text": "Where?", "type": "place", "truth": "left", "expected": 0.25}
    question |= {"right": accuracy, "abstained": 1 - accuracy, "blind": 0.0, "elsewhere": 1.0}
    told = {"id": name, "caption": "a cat", "accuracy": accuracy, "words": 2.0, "letters": 0.0}
    return told | {"questions": [question]} | more


def measured(rows, **more):
    told = {"protocol": "mcq", "images": len(rows), "without": {}, "judge": "a judge"}
    told |= {"data": "rows.jsonl", "captions": "captions.jsonl", "summary": mcq.summary(rows)}
    return (
        told | {"groups": mcq.groups(rows), "by_length": mcq.by_length(rows), "each": rows} | more
    )


def png(color=(200, 30, 30), size=(8, 8)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def written(tmp_path, *runs, images=lambda ids: {}):
    """The parsed page of runs, compared with the first."""
    first, others = runs[0], dict(zip("bcd", runs[1:], strict=False))
    if others:
        first = first | {"against": results.compare(first, others)}
    every = [Run(name, own) for name, own in zip("abcd", [first, *runs[1:]], strict=False)]
    page.write(tmp_path / "report.html", every, images)
    return Page((tmp_path / "report.html").read_text("utf-8"))


def shown_ids(parsed):
    """Ids of the images of a page, in order."""
    text = parsed.text[
        parsed.text.index("Images where" if "Images where" in parsed.text else "Worst") :
    ]
    return re.findall(r"img-\d+", text)


def test_images_are_those_where_runs_differ_most_and_only_they_are_read(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, (2, 100)) / 4
    runs = [measured([row(f"img-{i:03d}", v) for i, v in enumerate(own)]) for own in values]
    asked = []

    def images(ids):
        asked.extend(ids)
        return {i: png() for i in ids if i != "img-007"}

    parsed = written(tmp_path, *runs, images=images)
    spread = np.abs(values[0] - values[1])
    expected = [f"img-{i:03d}" for i in np.argsort(-spread, kind="stable")[:40]]
    assert shown_ids(parsed) == expected
    assert sorted(asked) == sorted(expected)
    shown = [a for t, a in parsed.tags if t == "img"]
    assert len(shown) == 40 - ("img-007" in expected)
    assert parsed.text.count("this image can’t be read") == ("img-007" in expected)


def test_one_run_shows_its_worst_and_its_best_images(tmp_path):
    rows = [row(f"img-{i:03d}", i / 100) for i in np.random.default_rng(0).permutation(100)]
    shown = shown_ids(written(tmp_path, measured(rows)))
    assert shown == [f"img-{i:03d}" for i in (*range(20), *range(80, 100))]


def test_runs_that_agree_show_no_image(tmp_path):
    one = measured([row("img-1", 0.5)])
    parsed = written(tmp_path, one, one)
    assert "have the same accuracy on each" in parsed.text
    assert not shown_ids(parsed)


def test_a_difference_whose_interval_holds_zero_has_no_star(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random(200) / 2
    noise = rng.normal(0, 0.05, 200)
    worse = measured([row(f"{i}", v, expected=v) for i, v in enumerate(base)])
    better = [
        row(f"{i}", v + 0.2, expected=v + n - np.mean(noise))
        for i, (v, n) in enumerate(zip(base, noise, strict=True))
    ]
    parsed = written(tmp_path, measured(better), worse)
    certain = [a for a in parsed.having("value") if "certain" in a["class"]]
    assert len(certain) == 1  # accuracy's; not those of expected, words and letters


def test_signs_are_shown_with_the_words_around_them(tmp_path):
    caption = "long " * 300 + "The answer is B. " + "tail " * 300
    rows = [row("img-1", 0.5, caption=caption, letters=1.0), row("img-2", 0.5)]
    path = tmp_path / "report.html"
    parsed = written(tmp_path, measured(rows))
    assert "<mark>answer is B</mark>" in path.read_text()
    assert "Names letters a img-1 … long" in parsed.text


def test_hostile_text_is_escaped_and_kept_within_bounds(tmp_path):
    texts = [HOSTILE, "W" * 6000, RTL, "\ud800x\x00", "", "word " * 20_000]
    own = {"letters": 1.0, "quoted": 1.0, "praise": 0.0}
    sides = []
    for side in (0, 1):
        rows = [
            row(t, (i + side) % 2 * 0.5, caption=t, source=t, **own) for i, t in enumerate(texts)
        ]
        for told in rows:
            told["questions"] = [
                told["questions"][0] | {"text": t, "type": t, "truth": t} for t in texts
            ]
        sides.append(
            measured(rows, judge=HOSTILE, data=RTL, protocol=HOSTILE, without={HOSTILE: 3})
        )
    parsed = written(tmp_path, *sides)
    assert parsed.text.count(" ".join(HOSTILE.split())) >= 20
    assert not {t for t, _ in parsed.tags} & {"script", "link", "iframe", "object", "base"}
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert "49" not in parsed.text
    (policy,) = [a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert max(map(len, parsed.text.split())) <= 3000
    assert "97,000 more characters" in parsed.text
    # Text of either direction stays within its element.
    captions = [(t, a) for t, a in parsed.tags if a.get("class") == "text"]
    assert captions and all(a.get("dir") == "auto" for _, a in captions)
    ids = re.findall(r"<code><bdi>", (tmp_path / "report.html").read_text("utf-8"))
    assert len(ids) >= len(texts)
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_ten_thousand_images_give_a_small_page(tmp_path, monkeypatch):
    monkeypatch.setattr(means, "_RESAMPLES", 20)  # the intervals don't matter here
    rng, sizes = np.random.default_rng(0), []
    photo = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (480, 640, 3), np.uint8)).save(photo, "JPEG")
    caption = "a red car stands beside an old house " * 20
    for count in (100, 10_000):
        runs = []
        for values in rng.random((2, count)):
            rows = [
                row(f"img-{i}", v, caption=caption, source=f"source {i % 500}")
                for i, v in enumerate(values)
            ]
            runs.append(measured(rows))
        parsed = written(tmp_path, *runs, images=lambda ids: {i: photo.getvalue() for i in ids})
        assert ("81" if count > 100 else "80") + " more, in results.json" in parsed.text
        sizes.append((tmp_path / "report.html").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0] < 10e6  # of which noise, which no format makes small, is 40 x
    assert sizes[1] - 40 * len(photo.getvalue()) * 4 / 3 < 500_000


def test_a_photograph_is_scaled_and_a_small_picture_stays_sharp(tmp_path):
    pictures = {"img-0": png(size=(2000, 1000)), "img-1": png(size=(84, 84))}
    rows = [row("img-0", 0.0), row("img-1", 1.0)]
    parsed = written(tmp_path, measured(rows), images=lambda ids: pictures)
    large, small = (a for t, a in parsed.tags if t == "img")
    assert large["src"].startswith("data:image/jpeg;base64,") and "class" not in large
    assert small["src"].startswith("data:image/png;base64,") and small["class"] == "pixelated"
    assert (large["width"], small["width"]) == ("320", "252")
    encoded = base64.b64decode(large["src"].partition(",")[2])
    assert Image.open(io.BytesIO(encoded)).size == (480, 240)


def test_results_of_another_form_are_refused(tmp_path):
    good = measured([row("a", 0.5)])
    results.write(tmp_path, good)
    file = tmp_path / "results.json"
    assert results.read(str(file)) == json.loads(json.dumps(good))
    bad = (
        "[]",
        "{",
        json.dumps(good | {"each": []}),
        json.dumps(good | {"each": [{"id": 1}]}),
        json.dumps(good | {"summary": {"accuracy": {"mean": None, "low": 0, "high": 1}}}),
    )
    for text in bad:
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"--against=.*results\.json is no results\.json: "):
            results.read(str(file))
    with pytest.raises(ConfigError, match="--against=b: no image is in both"):
        results.compare(good, {"b": measured([row("z", 0.5)])})
    with pytest.raises(ConfigError, match="no figure is in both: is it another protocol's"):
        results.compare(good, {"b": {"each": [{"id": "a", "score": 1.0}]}})


def test_results_of_other_protocols_have_a_page_too(tmp_path):
    """Prism has several captions of an image, CaptionQA scores and categories."""
    answers = [{"text": "Sum?", "answer": "42", "said": s, "score": s == "42"} for s in ("42", "7")]
    rows = [
        {"id": f"img-{i}", "captions": ["a", "b"], "mean_of_four": i / 9, "questions": answers}
        for i in range(9)
    ]
    without = {"captions": {"2": 9}, "failed": 0}
    told = {
        "protocol": "prism",
        "images": 3,
        "as_released": True,
        "summary": mcq.summary(rows),
        "each": rows,
        "without": without,
    }
    told["groups"] = {"source": {"charts": {"questions": 9} | told["summary"]["mean_of_four"]}}
    parsed = written(tmp_path, told)
    assert "Cannot tell" not in parsed.text
    for text in ("images 3", "a mean over the rows", "as released yes"):
        assert text in parsed.text
    for text in ("Mean of four", "protocol prism", "captions 2: 9", "charts 9 questions 44.4%"):
        assert text in parsed.text
    assert shown_ids(parsed) == [f"img-{i}" for i in range(9)]
    assert "Sum? truth: 42 ✓ right: 42" in parsed.text and "✗ wrong: 7" in parsed.text
    assert "without a caption" not in parsed.text.lower()  # this protocol has no such check
    question = {"text": "What?", "category": "objects", "answer": "x", "said": "y", "score": 0.25}
    row = {"id": "img-1", "captions": ["a"], "score": 0.25, "questions": [question]}
    told = {"protocol": "captionqa", "summary": mcq.summary([row]), "each": [row]}
    told["groups"] = {"category": {"objects": {"questions": 1} | told["summary"]["score"]}}
    parsed = written(tmp_path, told)
    assert "By category" in parsed.text and "objects 1 question 25.0%" in parsed.text
    assert "objects ; truth: x ~ partly: y score 0.25" in parsed.text
    question |= {"score": 0.55, "right": 0.0, "abstained": 1.0}  # of two options
    told["each"] = [row | {"questions": [question]}]
    parsed = written(tmp_path, told)
    assert "truth: x ? abstained: y score 0.55" in parsed.text
    assert "a mean over the questions" in parsed.text and "? abstained: cannot tell" in parsed.text
    assert "“Cannot tell” is always an option" not in parsed.text


def test_runs_that_cant_be_compared_are_told(caplog):
    ours = measured([row("a", 0.5)], as_released=False, orders=4)
    other = ours | {"protocol": "prism"}
    with pytest.raises(ConfigError, match="--against=b: its protocol is prism, not mcq"):
        results.compare(ours, {"b": other})
    results.compare(ours, {"b": ours})
    assert not caplog.records
    other = ours | {"judge": "another", "as_released": True, "orders": 2, "data": "x"}
    results.compare(ours, {"b": other})
    told = " ".join(r.message for r in caplog.records)
    for text in ("judge", "as_released", "orders", "data", "another, not a judge"):
        assert text in told
    assert len(caplog.records) == 1 and "captions" not in told  # these are what is compared


def test_runs_of_one_folder_are_named_by_their_files():
    assert results.names(["x/a/before.json", "x/a/results.json"]) == ["a/before", "a/results"]
    assert results.names(["a/b.json", "a/c.json", "d/a/b.json"]) == ["a/b", "a/c", "d/a/b"]


def test_folders_name_runs_unless_two_have_the_same_name():
    assert results.names(["x/a/results.json", "y/b/results.json"]) == ["a", "b"]
    assert results.names(["x/a/results.json", "y/a/results.json"]) == ["x/a", "y/a"]
