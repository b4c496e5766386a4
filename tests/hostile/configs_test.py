"""Hostile configs: files that make none, and values that no run can use."""

import pytest

from caprl_jax import config as config_lib
from caprl_jax.commands import cli
from caprl_jax.errors import ConfigError

from .case import Case, Refused, check

FILE, VALUE = "config file", "config value"
DEFAULT = "from caprl_jax.config import default\n"


def of_file(content: str | bytes):
    def run(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "own.py").write_bytes(data)
        try:
            return cli.load_config(str(folder / "own.py"))
        except ConfigError as e:
            assert str(folder / "own.py") in str(e) and "\n" not in str(e)
            raise

    return run


def returning(expression):
    return of_file(f"{DEFAULT}def get_config():\n  return {expression}\n")


def setting(statement):
    return of_file(f"{DEFAULT}def get_config():\n  c = default()\n  {statement}\n  return c\n")


FILES = {
    "empty": (of_file(""), "defines no function get_config"),
    "of bytes": (of_file(b"\xff\xfe\x00"), "own.py"),
    "with a zero byte": (of_file(b"x = 1\0"), "own.py"),
    "a text": (of_file("# A title\n\nIt's text.\n"), "SyntaxError"),
    "cut short": (of_file("def get_config(:"), "SyntaxError"),
    "of 100,000 brackets": (of_file("(" * 100_000), "own.py"),
    "that imports what is not there": (of_file("import no_such_module\n"), "No module named 'no_"),
    "that fails": (returning("1 / 0"), "line 3: ZeroDivisionError"),
    "that recurs": (returning("get_config()"), "RecursionError"),
    "that exits": (of_file("import sys\nsys.exit(3)\n"), "it ends the process"),
    "whose get_config is a number": (of_file("get_config = 3\n"), "no function get_config"),
    "that needs an argument": (of_file("def get_config(x):\n  return x\n"), "needs an argument"),
    "that returns nothing": (of_file("def get_config():\n  pass\n"), "returned a NoneType"),
    "that returns a dict": (returning("{'steps': 3}"), "returned a dict, not a ConfigDict"),
    "that returns an empty config": (returning("type(default())()"), "is missing from"),
    "that misspells a key": (setting("c.stpes = 3"), "no key 'stpes': did you mean 'steps'"),
    "that gives a number a text": (setting("c.steps = 'many'"), "TypeError"),
    "with an unknown reward": (setting("c.caprl.rewards.x = {'term': 'no'}"), "'no' is not one"),
    "with a reward of no module": (
        setting("c.caprl.rewards.x = {'term': 'no.such:reward'}"),
        "the module no.such can't be imported",
    ),
    "with a reward that is no reward": (
        setting("c.caprl.rewards.x = {'term': 'os:system'}"),
        "must take",
    ),
    "with a sink of no module": (setting("c.sinks.x = {'sink': 'no_such:sink'}"), "no_such"),
    "with an import path of dots": (setting("c.caprl.rewards.x = {'term': '..:x'}"), "'..:x'"),
    "with an import path of nothing": (setting("c.caprl.rewards.x = {'term': ':'}"), "':'"),
}
NAN, INFINITE = float("nan"), float("inf")
VALUES = [
    ("objective", "capr", "did you mean 'caprl'"),
    ("steps", 0, "config.steps=0 must be positive"),
    ("steps", True, "config.steps=True must be a whole number"),
    ("log_every", 0, "config.log_every=0"),
    ("dtype", "float8", "config.dtype='float8' is not one of"),
    ("most_skipped", -1, "config.most_skipped=-1"),
    ("policy.init", "zeros", "config.policy.init='zeros'"),
    ("policy.remat", "half", "config.policy.remat='half'"),
    ("judge.mode", "argmax", "config.judge.mode='argmax'"),
    ("judge.temperature", NAN, "config.judge.temperature=nan"),
    ("judge.max_caption", -1, "config.judge.max_caption=-1"),
    ("sampling.max_tokens", 0, "config.sampling.max_tokens=0"),
    ("sampling.temperature", INFINITE, "config.sampling.temperature=inf"),
    ("sampling.top_p", 1.5, "config.sampling.top_p=1.5 must be above 0, at most 1"),
    ("sampling.top_p", NAN, "config.sampling.top_p=nan"),
    ("caprl.group", 1, "config.caprl.group=1 must be at least 2"),
    ("caprl.questions", 0, "config.caprl.questions=0"),
    ("caprl.advantage", "grp0", "did you mean 'grpo'"),
    ("caprl.loss", "", "config.caprl.loss"),
    ("caprl.kl", -0.1, "config.caprl.kl=-0.1"),
    ("caprl.kl", NAN, "config.caprl.kl=nan must be a finite number"),
    ("caprl.kl_estimator", "k9", "config.caprl.kl_estimator"),
    ("caprl.updates", 0, "config.caprl.updates=0"),
    ("caprl.micro_batches", 3, "not a multiple"),
    ("caprl.usual_tokens", -1, "config.caprl.usual_tokens=-1"),
    ("caprl.rewards.accuracy.wight", 1, "did you mean 'weight'"),
    ("caprl.rewards.accuracy.weight", NAN, "weight=nan must be a number, and finite"),
    ("caprl.rewards.more", 1.0, "must be a dict of term, weight, mask, options"),
    ("caprl.loss_options.clp", 1, "config.caprl.loss_options.clp is unknown"),
    ("caprl.loss_options.clip", NAN, "clip=nan must be a finite number"),
    ("sinks.csv", "csv", "config.sinks.csv='csv' must be a dict"),
    ("sinks.tensorboard.sink", "aim", "'aim' is not one of"),
    ("optimizer.learning_rate", NAN, "config.optimizer.learning_rate=nan"),
    ("optimizer.learning_rate", INFINITE, "config.optimizer.learning_rate=inf"),
    ("data.source", "parquet", "'parquet' is not one of 'digits', 'files'"),
    ("data.batch", 0, "config.data.batch=0"),
    ("data.heldout", 0, "config.data.heldout=0"),
    ("data.threads", 0, "config.data.threads=0"),
    ("data.max_question", 0, "config.data.max_question=0"),
    ("data.max_pixels", -1, "config.data.max_pixels=-1"),
    ("eval.images", 0, "config.eval.images=0"),
    ("eval.group", 0, "config.eval.group=0"),
    ("checkpoint.keep", 0, "config.checkpoint.keep=0"),
    ("export.when", "always", "config.export.when='always'"),
    ("export.dtype", "int8", "config.export.dtype='int8'"),
    ("alarms.reward_std", NAN, "config.alarms.reward_std=nan"),
]


def of_value(key, value):
    def run(_):
        c = config_lib.default()
        parent, _, last = key.rpartition(".")
        with c.ignore_type(), c.unlocked():
            (config_lib.get(c, parent) if parent else c)[last] = value
        return config_lib.validate(c)

    return run


CASES = [
    *(Case(FILE, n, Refused(p, ConfigError), run, program=True) for n, (run, p) in FILES.items()),
    *(
        Case(VALUE, f"{key}={value!r}", Refused(phrase, ConfigError), of_value(key, value))
        for key, value, phrase in VALUES
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}: {c.name}")
def test_it_ends_as_promised(case, tmp_path):
    check(case, tmp_path)
