"""Sweeps: arms are checked first, finished runs aren't repeated, failed ones don't stop the others.

Runs are scripted, without training, but for the slow test at the end.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
from xml.etree import ElementTree

import pytest

from caprl_jax.errors import ConfigError
from caprl_jax.parallel.processes import Stopped
from caprl_jax.sweep import arms, figures, plot, runs
from caprl_jax.sweep.arms import Sweep
from caprl_jax.sweep.runs import Failure, Outcome

from ..shipped import CONFIGS

FILE = """
from caprl_jax.config import default
from caprl_jax.recipes import choose
from caprl_jax.sweep.arms import Sweep

ARMS = {"base": {}, "few": {"caprl.questions": 1}, "many": {"caprl.questions": 8}}


def get_sweep():
    return Sweep({"questions": {"1": "few", "4": "base", "8": "many"}}, seeds=(0, 1))


def get_config(arm="base"):
    [arm] = choose(arm, tuple(ARMS))
    c = default()
    c.update_from_flattened_dict(ARMS[arm])
    return c
"""
ALL = ("base", "few", "many")


@pytest.fixture
def sweep_file(tmp_path):
    """Writes a sweep's file, with words of it replaced."""

    def write(*replaced):
        text = FILE
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "my_sweep.py"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def planned(sweep_file, tmp_path):
    """The six runs of the sweep."""
    value = sweep_file()
    return arms.runs(value, arms.load(value), tmp_path / "out", ["--config.steps=7"])


def test_runs_are_ordered_by_seed_and_have_the_arms_keys(planned, tmp_path):
    assert [(r.arm, r.seed) for r in planned] == [(a, s) for s in (0, 1) for a in ALL]
    last = planned[-1]
    assert (last.config.caprl.questions, last.config.seed, last.config.steps) == (8, 1, 7)
    assert planned[0].config.caprl.questions == 4
    value = f"--config={tmp_path / 'my_sweep.py'}:many"
    assert last.flags == (value, "--config.steps=7", "--config.seed=1")


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (('"caprl.questions": 1', '"caprl.qestions": 1'), "arm 'few': .*did you mean 'questions'"),
        (('"caprl.questions": 1', '"caprl.questions": 0'), "arm 'few': .*questions=0"),
        (('"1": "few"', '"1": "fwe"'), "arm 'fwe': .*'fwe' is none of base, few, many"),
        (('"1": "few"', '"1": "a/b"'), "'a/b' can't name a directory"),
        (("seeds=(0, 1)", 'base="bass"'), "base='bass' is no arm; .*did you mean 'base'"),
        (("(0, 1)", "(1, 1)"), r"seeds=\(1, 1\) must be different"),
        (("get_sweep", "get_seep"), "defines no function get_sweep"),
        (("return Sweep(", "return dict("), "get_sweep .*(TypeError|returned a dict)"),
    ],
)
def test_a_wrong_sweep_is_refused_by_name(replaced, message, sweep_file, tmp_path):
    value = sweep_file(replaced)
    with pytest.raises(ConfigError, match=message):
        arms.runs(value, arms.load(value), tmp_path)


def test_every_wrong_arm_is_named(sweep_file, tmp_path):
    value = sweep_file(('questions": 1', 'questions": 0'), ('questions": 8', 'questions": -8'))
    with pytest.raises(ConfigError, match=r"arm 'few': .*; arm 'many': "):
        arms.runs(value, arms.load(value), tmp_path)
    with pytest.raises(ConfigError, match=r"^arms 'base', 'few', 'many': .*did you mean 'group'"):
        arms.runs(sweep_file(), arms.load(value), tmp_path, ["--config.caprl.gruop=4"])


def test_flags_that_name_no_arm_or_seed_are_refused(sweep_file):
    sweep = arms.load(sweep_file())
    assert arms.chosen(sweep, []) == ALL and arms.chosen(sweep, ["many", "few"]) == ALL[1:]
    with pytest.raises(ConfigError, match=r"--only=mayn is no arm; .*did you mean 'many'"):
        arms.chosen(sweep, ["few", "mayn"])
    assert arms.with_seeds(sweep, ["3"]).seeds == (3,) and arms.with_seeds(sweep, []) is sweep
    with pytest.raises(ConfigError, match="--seeds=1,x must be whole numbers"):
        arms.with_seeds(sweep, ["1", "x"])
    with pytest.raises(ConfigError, match=r"takes no argument; .*--only=few"):
        arms.load("tiny_ablations:few")


class Script:
    """A start that trains nothing: writes a run's summary, or fails as told."""

    def __init__(self, **told):
        """Stores what happens by the run's name."""
        self.told, self.started = told, []

    def __call__(self, run):
        self.started.append(run.name)
        runs.log(run).write_text("a\r 50%|##\n\nthe last words\n")
        told = self.told.get(run.name.replace("-", "_"), 0)
        if isinstance(told, Exception):
            raise told
        if not told:
            after = {"base": 0.8, "few": 0.6, "many": 0.9}[run.arm] + run.seed / 100
            found = {"heldout_accuracy_before": 0.5, "heldout_accuracy_after": after}
            found["fact_recall_after"] = after / 2
            (run.workdir / "summary.json").write_text(json.dumps(found))
            lines = ({"step": i, "kl": i / 10, "seconds_step": s} for i, s in ((1, 9), (2, 3)))
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run.workdir / "metrics.jsonl").write_text(text)
        return told


def carried_out(planned, start, only=ALL, **figures):
    return list(runs.carry_out(planned, start, Sweep({}, **figures), only))[-1]


def test_finished_runs_are_not_repeated(planned):
    first, again = Script(), Script()
    ended = carried_out(planned, first)
    assert first.started == [r.name for r in planned]
    assert [(e.arm, e.seed, e.after) for e in ended][-1] == ("many", 1, 0.91)
    assert carried_out(planned, again) == ended and again.started == []


def test_a_failed_run_is_listed_and_tried_again(planned):
    ended = carried_out(planned, Script(few_0=3))
    [failure] = [e for e in ended if isinstance(e, Failure)]
    assert (failure.arm, failure.seed) == ("few", 0) and len(ended) == 6
    assert failure.said.startswith("exit code 3") and failure.said.endswith("the last words")
    assert "50%" in failure.said and "\r" not in failure.said
    again = Script()
    assert all(isinstance(e, Outcome) for e in carried_out(planned, again))
    assert again.started == ["few-0"]


def test_a_run_without_the_figure_fails_by_name(planned):
    ended = carried_out(planned[:1], Script(), figure="fact_recall")
    assert "has no figure 'fact_recall_before'; it has 'heldout_accuracy_before'" in ended[0].said


def test_other_figures_stand_beside_the_compared_one(planned):
    """They come from summary, last step or median step; a missing one is left out."""
    names = ("fact_recall", "kl", "seconds_step", "entropy")
    [found] = carried_out(planned[:1], Script(), beside=names)
    assert found.beside == {"fact_recall": 0.4, "kl": 0.2, "seconds_step": 6}


def test_a_stopped_sweep_goes_on_where_it_was(planned):
    with pytest.raises(Stopped):
        carried_out(planned, Script(many_0=Stopped("now")))
    again = Script()
    assert len(carried_out(planned, again)) == 6
    assert again.started == ["many-0", "base-1", "few-1", "many-1"]


def test_only_starts_the_chosen_arms_and_keeps_what_others_have(planned):
    carried_out(planned, Script(), only=("base",))
    again = Script()
    ended = carried_out(planned, again, only=("few",))
    assert again.started == ["few-0", "few-1"]
    assert [e.arm for e in ended] == ["base", "few"] * 2


def test_a_directory_of_another_config_is_refused_before_any_start(planned):
    carried_out(planned[3:4], Script())
    with planned[3].config.unlocked():
        planned[3].config.caprl.kl = 0.5
    start = Script()
    with pytest.raises(ConfigError, match=r"base-1 holds .*caprl\.kl was 0\.0, is 0\.5"):
        carried_out(planned, start)
    assert start.started == []
    (planned[3].workdir / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sweep\.json can't be read .*delete"):
        carried_out(planned, start)


def test_a_process_that_fails_leaves_its_words_in_the_log(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", program(tmp_path, 'echo "error: $3"; exit 5'))
    [failure] = carried_out(planned[:1], runs.in_a_process)
    assert failure.said.startswith("exit code 5")
    assert re.search(r"error: --config=.*my_sweep.py:base$", failure.said)


def test_sigterm_reaches_the_run_which_can_write_its_checkpoint(planned, monkeypatch, tmp_path):
    body = "trap 'echo written; exit 75' TERM; touch $(dirname $0)/up; while :; do sleep 0.05; done"
    monkeypatch.setattr(sys, "executable", program(tmp_path, body))

    def when_up():
        while not (tmp_path / "up").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=when_up, daemon=True).start()
    with pytest.raises(Stopped, match="base-0"):
        carried_out(planned, runs.in_a_process)
    assert runs.log(planned[0]).read_text() == "written\n"
    assert signal.getsignal(signal.SIGTERM) == before


def program(folder, body):
    path = folder / "program"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_spread_is_students_interval():
    # Standard deviation 0.1; t is 4.302653 with two degrees of freedom: 4.302653 * 0.1 / sqrt(3).
    found = figures.spread([0.8, 1.0, 0.9])
    assert found["mean"] == pytest.approx(0.9)
    assert found["high"] - 0.9 == pytest.approx(0.248414, abs=1e-6)
    assert 0.9 - found["low"] == pytest.approx(0.248414, abs=1e-6)
    assert figures.spread([0.4]) == {"mean": 0.4, "low": None, "high": None}


SWEEP = Sweep({"questions": {"1 & less": "few", "4": "base"}, "other": {"x": "lost"}})
ENDED = [
    Outcome("base", 0, 0.5, 0.80, 60),
    Outcome("base", 1, 0.5, 0.90, 60),
    Outcome("few", 1, 0.5, 0.70, 30),
    Outcome("few", 0, 0.5, 0.62, 30),
    Outcome("few", 2, 0.5, 0.10, 0),
    Failure("base", 2, "exit code 1"),
]


def test_differences_are_paired_by_seed():
    results = figures.compare(SWEEP, ENDED)
    few = results["arms"]["few"]
    # Seed 2 has no base run. Differences -0.18 and -0.20: t 12.7062 * 0.0141421 / sqrt(2) = 0.127.
    assert few["difference"]["mean"] == pytest.approx(-0.19)
    assert few["difference"]["high"] == pytest.approx(-0.19 + 0.127062, abs=1e-5)
    assert few["after"]["mean"] == pytest.approx(1.42 / 3)
    assert results["arms"]["base"]["difference"] is None and "lost" not in results["arms"]
    assert results["cpu_seconds"] == 180
    assert results["failed"] == [{"arm": "base", "seed": 2, "said": "exit code 1"}]


def test_the_table_has_a_line_for_each_arm():
    text = figures.table(json.loads(json.dumps(figures.compare(SWEEP, ENDED))))
    lines = text.splitlines()
    assert lines[1].strip() == "questions" and lines[2].startswith("  1 & less ")
    assert lines[2].split()[3:6] == ["3", "0.500", "0.473"] and "-0.190" in lines[2]
    assert lines[3].split()[-1] == "base" and lines[5].split() == ["x", "0"]
    assert lines[6] == "heldout_accuracy; 95%, Student's t over seeds; 3 CPU minutes"
    assert lines[7] == "failed: base, seed 2: exit code 1"


def test_the_table_shows_other_figures_where_runs_have_them():
    sweep = dataclasses.replace(SWEEP, beside=("kl", "fact_recall"))
    ended = [
        Outcome("base", 0, 0.5, 0.80, 60, {"kl": 0.1, "fact_recall": 0.5}),
        Outcome("base", 1, 0.5, 0.90, 60, {"kl": 0.3}),
        Outcome("few", 1, 0.5, 0.70, 30, {"fact_recall": 0.25}),
    ]
    lines = figures.table(json.loads(json.dumps(figures.compare(sweep, ended)))).splitlines()
    assert lines[0].split()[-2:] == ["kl", "fact_recall"]
    assert lines[2].split()[-1] == "0.250" and lines[3].split()[-2:] == ["0.200", "0.500"]


def test_the_plot_shows_every_seed_and_orders_the_means():
    root = ElementTree.fromstring(plot.draw(figures.compare(SWEEP, ENDED)))
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}circle")) == 5
    means = [e for e in root.findall(f"{tag}line") if e.get("stroke-width") == "3"]
    few, base = (float(e.get("x1")) for e in means)
    width = float(root.get("viewBox").split()[2])
    assert 0 < few < base < width
    words = [e.text for e in root.findall(f"{tag}text")]
    assert "1 & less" in words and "questions" in words and "x" in words
    ElementTree.fromstring(plot.draw(figures.compare(SWEEP, [])))


def test_every_arm_of_the_ablations_differs_from_the_base(tmp_path):
    value = str(CONFIGS / "tiny_ablations.py")
    planned = arms.runs(value, arms.with_seeds(arms.load(value), ["0"]), tmp_path)
    texts = [run.config.to_json() for run in planned]
    assert len(set(texts)) == len(texts) == 16


@pytest.mark.slow
def test_a_sweep_trains_by_rl_and_by_sft(tmp_path):
    """Two arms, one seed, two steps, on one device: then nothing is left to do."""
    command = [
        *(sys.executable, "-m", "caprl_jax.sweep"),
        *(f"--config={CONFIGS / 'tiny_ablations.py'}", f"--out={tmp_path / 'out'}"),
        *("--only=base,sft_complete", "--seeds=1", "--config.steps=2"),
        *("--config.eval.images=8", "--config.eval.batch=8"),
        f"--config.data.data_dir={tmp_path / 'data'}",
    ]
    unset = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    options = {"capture_output": True, "text": True, "timeout": 1200, "cwd": CONFIGS.parent}
    first = subprocess.run(command, env=unset | {"JAX_PLATFORMS": "cpu"}, **options)
    assert first.returncode == 0, first.stdout + first.stderr[-4000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["arms"]
    assert found.keys() == {"base", "sft_complete"} and not results["failed"]
    # Both start from the same policy, and are judged by the same questions.
    assert found["base"]["before"] == found["sft_complete"]["before"]
    assert found["base"]["after"]["mean"] != found["base"]["before"]["mean"]
    again = subprocess.run(command, env=unset | {"JAX_PLATFORMS": "cpu"}, **options)
    assert again.stdout == first.stdout and "finished before: 2 of" in again.stderr
