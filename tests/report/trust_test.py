"""The report's panel about the judge: what was measured, and marks where a look is due."""

import pytest

from caprl_jax.report import html, trust

HONEST = {
    "heldout_blind": 0.1,
    "heldout_chance": 0.2,
    "heldout_elsewhere_before": 0.05,
    "heldout_elsewhere_after": 0.22,
    "heldout_consistent_after": 0.97,
    "heldout_abstained_after": 0.5,
    "heldout_abstained_where_is_after": 0.75,
    "heldout_accuracy_shortest_after": 0.25,
    "heldout_accuracy_longest_after": 1.0,
    "heldout_letters_after": 0.01,
    "heldout_quoted_after": 0.0,
    "heldout_praise_after": 0.0,
}


def rows(summary):
    cells = {name: (before, after) for name, before, after in html._rows(summary)}
    return {row["title"]: row for row in trust.checks(summary, cells)}


def test_every_figure_has_a_row_and_honest_ones_no_mark():
    found = rows(HONEST)
    assert len(found) == len(trust.LABELS)
    assert not any(row["marked"] for row in found.values())
    other = found["Accuracy with another image's caption"]
    assert (other["before"], other["after"]) == ("5.0%", "22.0%")
    assert "where is 75.0%" in found["Answers 'cannot tell'"]["meaning"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heldout_blind", 0.3),
        ("heldout_elsewhere_after", 0.3),
        ("heldout_consistent_after", 0.8),
        ("heldout_letters_after", 0.1),
        ("heldout_quoted_after", 0.1),
        ("heldout_praise_after", 0.1),
    ],
)
def test_a_figure_that_calls_for_a_look_is_marked(name, value):
    marked = [title for title, row in rows(HONEST | {name: value}).items() if row["marked"]]
    (label,) = {trust.LABELS[n] for n in trust.LABELS if name.startswith(n)}
    assert [title.lower() for title in marked] == [label.lower()]


def test_the_page_shows_the_panel_of_runs_that_measured_it_only(tmp_path):
    history = [{"step": 2, "eval/accuracy_greedy": 0.5, "eval/elsewhere": 0.22}]
    for summary, lines, shown in ((HONEST, history, True), ({"ceiling": 0.9}, history[:0], False)):
        html.write_report(tmp_path / "r.html", html.Content("a", summary, lines, [], [], ""))
        text = (tmp_path / "r.html").read_text("utf-8")
        assert ("Can the judge be trusted?" in text) is shown
        assert ("Accuracy by what the judge reads" in text) is shown
        assert "look</span>" not in text
