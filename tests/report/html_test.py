"""The report shows a run's results, escapes all text, and loads nothing."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from caprl_jax.report import html as report
from caprl_jax.report.html import Answer, Caption, Sample

HOSTILE = '<script>alert(1)</script>"\' onload="x()" {{ 7 * 7 }} {% raw %} ]]> </style> --> &amp;'
NAN = float("nan")


class Page(HTMLParser):
    """Parsed HTML: tags with their attributes, visible text, and style sheets."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.style, self._text, self._in_style = [], "", [], False
        self.feed(html)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self.style += data
        else:
            self._text.append(data)

    def having(self, name):
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def _png(size=(4, 4), form="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 99, np.uint8)).save(out, form)
    return out.getvalue()


def _answer(question="Which color is it?", letter="B", truth="B", abstained=False, options=None):
    options = options or ["A) red", "B) blue", "C) cannot tell"]
    return Answer(question, options, letter, truth, abstained, 0.25)


def _caption(text="a blue seven", answers=(), accuracy=0.5):
    return Caption(text, 17, accuracy, list(answers))


def _sample(before=None, after=None, image=None):
    return Sample(_png() if image is None else image, before or _caption(), after or _caption())


def _page(tmp_path, **given):
    arguments = {
        "title": "a run",
        "summary": {},
        "history": [],
        "samples": [],
        "set_aside": [],
        "config_text": "",
    }
    report.write_report(tmp_path / "report.html", report.Content(**(arguments | given)))
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text("utf-8"))


def _everything(text, steps=3):
    """Fields of a report's content in which every string is the given text."""
    answer = Answer(text, [f"A) {text}", f"B) {text}"], text[:1], "B", False, 0.5)
    caption = _caption(text, [answer])
    return {
        "title": text,
        "summary": {text: text, "heldout_accuracy_before": 0.5, "steps": text, "ceiling": text},
        "history": [{"step": i, "reward": 0.1 * i, text: 1.0} for i in range(steps)],
        "samples": [_sample(caption, caption)],
        "set_aside": [{"id": text, "reason": text}],
        "config_text": text,
    }


def test_hostile_text_is_shown_and_escaped(tmp_path):
    page = _page(tmp_path, **_everything(HOSTILE))
    expected = " ".join(HOSTILE.split())
    assert page.text.count(expected) >= 10
    assert not any(tag == "script" for tag, _ in page.tags)
    names = {name for _, attrs in page.tags for name in attrs}
    assert not any(name.startswith("on") for name in names)
    assert "49" not in page.text  # the text is no template either


def test_page_loads_nothing_from_elsewhere(tmp_path):
    page = _page(tmp_path, **_everything("see https://example.com/x.png"))
    loading = {"src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"}
    loaded = [v for _, attrs in page.tags for name, v in attrs.items() if name in loading]
    assert loaded and all(v.startswith("data:image/png;base64,") for v in loaded)
    styles = page.style + "".join(attrs.get("style") or "" for _, attrs in page.tags)
    assert page.style and not re.search(r"url\(|@import|https?:|//", styles)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def test_samples_show_their_questions_options_and_both_answers(tmp_path):
    questions = [f"Which digit is at place {i}?" for i in range(9)]
    samples = []
    for i in range(0, 9, 3):
        before = [_answer(q, "A", "B", options=["A) two", "B) nine"]) for q in questions[i : i + 3]]
        after = [_answer(q, "A", "A", options=["A) nine", "B) two"]) for q in questions[i : i + 3]]
        samples.append(_sample(_caption(f"old {i}", before), _caption(f"new {i}", after)))
    page = _page(tmp_path, samples=samples)
    for i, question in enumerate(questions):
        assert page.text.count(question) == 1  # once, with the answers side by side
        shown = page.text.split(question)[1][:160]
        before = " ✗ judge A, truth B p(truth) 0.25 A) two B) nine"
        after = " ✓ judge A, truth A p(truth) 0.25 A) nine B) two"
        assert shown.startswith(before + after), (i, shown)
    for i in (0, 3, 6):
        assert f"old {i}" in page.text and f"new {i}" in page.text


@pytest.mark.parametrize(
    ("letter", "abstained", "verdict", "mark"),
    [("B", False, "right", "✓"), ("A", False, "wrong", "✗"), ("C", True, "abstained", "?")],
)
def test_verdicts_differ_in_colour_and_symbol(tmp_path, letter, abstained, verdict, mark):
    answer = _answer(letter=letter, abstained=abstained)
    assert answer.verdict == verdict
    page = _page(tmp_path, samples=[_sample(_caption(answers=[answer]))])
    assert len([a for t, a in page.tags if t == "td" and verdict in (a.get("class") or "")]) == 1
    assert f"{mark} judge {letter}, truth B" in page.text
    colors = {
        v: re.search(rf"--{v}: (#\w+)", page.style)[1] for v in ("right", "wrong", "abstained")
    }
    assert len(set(colors.values())) == 3


def test_answers_to_different_questions_are_shown_without_a_partner(tmp_path):
    old = [_answer("Q1?"), _answer("Q1?", "A"), _answer("Q2?")]
    new = [_answer("Q3?"), _answer("Q1?")]
    assert report._pairs(old, new) == [
        (old[0], new[1]),
        (old[1], None),
        (old[2], None),
        (None, new[0]),
    ]
    page = _page(tmp_path, samples=[_sample(_caption(answers=old), _caption(answers=new))])
    assert page.text.count("not asked") == 3


def test_empty_run_has_a_report(tmp_path):
    page = _page(tmp_path)
    assert "No step was logged" in page.text
    assert "supervision" not in page.text and "reinforcement" not in page.text


def test_report_without_history_shows_the_figures(tmp_path):
    page = _page(tmp_path, summary={"heldout_accuracy_before": 0.25, "heldout_accuracy_after": 0.5})
    assert "No step was logged" in page.text and "25.0% → 50.0%" in page.text


def test_intro_says_how_the_model_was_trained(tmp_path):
    reinforced = _page(tmp_path, history=[{"step": 1, "reward": 0.5}]).text
    supervised = _page(tmp_path, history=[{"step": 1, "loss": 0.5}]).text
    assert "never sees the image" in reinforced and "supervision" not in reinforced
    assert "supervision" in supervised and "never sees the image" not in supervised


def test_headline_shows_the_accuracies_on_one_scale(tmp_path):
    summary = {
        "heldout_accuracy_before": 0.262,
        "heldout_accuracy_after": 0.851,
        "heldout_accuracy_sampled_before": 0.9,
        "heldout_accuracy_sampled_after": 0.3,
        "ceiling": 0.972,
        "fact_recall_before": 0.22,
        "fact_recall_after": 0.887,
        "judge_lookup_disagreement": 0.03,
        "steps": 60,
        "wall_seconds": 252.4,
    }
    page = _page(tmp_path, summary=summary)
    accuracies = ("26.2% → 85.1%", "90.0% → 30.0%", "ceiling 97.2%")
    for figure in (*accuracies, "22.0% → 88.7%", "3.0%", "60 steps", "wall time 4 min 12 s"):
        assert figure in page.text
    bars = [(a["class"], a["style"]) for t, a in page.tags if t == "b" and "style" in a]
    # The shorter bar comes last: the longer one would hide it.
    greedy = [("after", "width: 85.10%"), ("before", "width: 26.20%")]
    sampled = [("before", "width: 90.00%"), ("after", "width: 30.00%")]
    assert bars == greedy + sampled
    assert [a["style"] for t, a in page.tags if t == "u"] == ["left: 97.20%"] * 2


@pytest.mark.parametrize("missing", ["heldout_accuracy_before", "heldout_accuracy_after"])
def test_missing_half_of_a_pair_is_a_dash(tmp_path, missing):
    summary = {"heldout_accuracy_before": 0.25, "heldout_accuracy_after": 0.5}
    del summary[missing]
    text = _page(tmp_path, summary=summary | {"caption_length_after": NAN, "ceiling": None}).text
    assert ("– → 50.0%" if missing.endswith("before") else "25.0% → –") in text
    assert "not finite" in text


def test_only_measured_curves_appear(tmp_path):
    history = [{"step": i, "reward": 0.5, "kl": None, "eval/accuracy_greedy": 0.5} for i in (1, 2)]
    page = _page(tmp_path, history=history, summary={"ceiling": 0.97})
    assert [a["aria-label"] for t, a in page.tags if t == "svg" and "aria-label" in a] == [
        "Reward and held-out accuracy",
        "KL to the initial policy",
    ]
    for label in ("training reward", "held-out accuracy, greedy", "ceiling", "× not finite: 2"):
        assert label in page.text
    assert "Gradient norm" not in page.text


def test_invalid_unicode_is_replaced(tmp_path):
    page = _page(tmp_path, samples=[_sample(_caption("before\ud800after\x00 \u202e ✓"))])
    assert "before?after" in page.text


def test_empty_caption_is_marked(tmp_path):
    assert "(an empty caption)" in _page(tmp_path, samples=[_sample(_caption(" \n"))]).text


def _shown_image(page):
    (attrs,) = [a for t, a in page.tags if t == "img"]
    data = base64.b64decode(attrs["src"].removeprefix("data:image/png;base64,"))
    return attrs, Image.open(io.BytesIO(data))


def test_small_images_are_enlarged_by_whole_pixels(tmp_path):
    attrs, image = _shown_image(_page(tmp_path, samples=[_sample(image=_png((84, 56)))]))
    assert image.size == (84, 56)
    assert attrs["width"] == str(84 * 3) and attrs["class"] == "pixelated"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_photographs_become_png_of_moderate_size(tmp_path, form):
    attrs, image = _shown_image(_page(tmp_path, samples=[_sample(image=_png((2000, 1000), form))]))
    assert image.format == "PNG" and image.size == (768, 384)
    assert "class" not in attrs and int(attrs["width"]) <= 320


@pytest.mark.parametrize("broken", [b"", b"no image", _png((84, 84))[:60]])
def test_unreadable_image_leaves_the_rest_of_the_report(tmp_path, broken):
    page = _page(tmp_path, samples=[_sample(_caption("still here"), image=broken)])
    assert "can’t be read" in page.text and "still here" in page.text
    assert not any(tag == "img" for tag, _ in page.tags)


def test_records_set_aside_are_counted_and_the_first_listed(tmp_path):
    assert "None: every record" in _page(tmp_path).text
    single = _page(tmp_path, set_aside=[{"id": "r7", "reason": "has no questions"}]).text
    assert "1 record couldn’t" in single and "1 record set aside" in single
    assert "r7 has no questions" in single
    many = [{"id": f"r{i:04d}", "reason": "broken"} for i in range(1000)]
    text = _page(tmp_path, set_aside=many).text
    assert "1000 records" in text and "800 more" in text
    assert "r0199" in text and "r0200" not in text


def test_report_shows_the_config_and_every_figure(tmp_path):
    summary = {"my_own_figure": 1234567, "odd": {"a": [1]}, "flag": True, "learning_rate": 2e-4}
    text = _page(tmp_path, summary=summary, config_text='{"steps": 60}').text
    for part in ("my_own_figure", "1,234,567", '{"a": [1]}', "true", "0.0002", '{"steps": 60}'):
        assert part in text


def test_summary_table_sets_before_and_after_side_by_side():
    table = report.summary_table(
        {
            "extra_after": 2.5,
            "wall_seconds": 3725.0,
            "caption_length_after": 20.66,
            "heldout_accuracy_sampled_after": 0.8,
            "heldout_accuracy_before": 0.262,
            "heldout_accuracy_after": 0.851,
            "ceiling": 0.972,
            "extra_before": None,
            "steps": 1800,
        }
    )
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert rows == [
        ["before", "after"],
        ["held-out accuracy", "26.2%", "85.1%"],
        ["held-out accuracy (sampled captions)", "80.0%"],
        ["ceiling: accuracy with complete true captions", "97.2%"],
        ["caption length, tokens", "20.66"],
        ["steps", "1,800"],
        ["wall time", "1 h 02 min"],
        ["extra", "–", "2.5"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1  # figures are aligned right


def test_empty_summary_gives_a_table_without_rows():
    assert report.summary_table({}).split() == ["before", "after"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (59.4, "59.4 s"),
        (59.96, "1 min 00 s"),
        (60, "1 min 00 s"),
        (3600, "1 h 00 min"),
    ],
)
def test_durations_have_readable_units(seconds, shown):
    assert report._shown("wall_seconds", seconds) == shown


def test_the_report_of_a_long_run_is_as_small_as_that_of_a_short_one(tmp_path):
    rng, sizes = np.random.default_rng(0), []
    for steps in (2_000, 40_000):
        values = rng.random((steps, 3))
        history = [
            {"step": s, "reward": r, "loss": loss if s % 7 else None, "eval/accuracy_greedy": a}
            for s, (r, loss, a) in enumerate(values.tolist(), start=1)
        ]
        set_aside = [{"id": f"record {i}", "reason": "no image"} for i in range(steps)]
        _page(tmp_path, history=history, set_aside=set_aside)
        sizes.append((tmp_path / "report.html").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0] < 300_000


def test_memory_and_open_files_are_drawn(tmp_path):
    history = [{"step": s, "host_rss_bytes": 3e9 + s, "open_files": 40.0} for s in (1, 2)]
    text = _page(tmp_path, history=history).text
    assert "Host memory" in text and "Open files" in text
    assert "Host memory" not in _page(tmp_path, history=[{"step": 1, "reward": 0.5}]).text


def test_captions_that_no_judge_read_come_with_those_that_the_image_had(tmp_path):
    """A supervised run: no share of right answers, and no word of a judge or of its signs."""
    caption = _caption("a blue seven", accuracy=None)
    sample = Sample(_png(), caption, caption, given=("a <b> two", "total one"))
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "eval/loss": 0.3}]
    summary = {
        "heldout_loss_before": 0.7,
        "heldout_loss_after": 0.3,
        "heldout_perplexity_after": 1.35,
    }
    page = _page(tmp_path, samples=[sample], history=history, summary=summary)
    assert "The image came with: “a <b> two” “total one”" in page.text
    assert "right choice" not in page.text and "% right" not in page.text
    assert "trained under supervision" in page.text and "Its reward comes" not in page.text
    assert "Loss nats, mean over tokens" in page.text
    assert "loss of held-out images' own captions, nats a token heldout_loss 0.7 0.3" in page.text
