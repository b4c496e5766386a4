"""Any --config.KEY=VALUE: a value of the key's own kind within its range, or one named error."""

import contextlib
import io

import pytest
from absl import flags
from hypothesis import example, given
from hypothesis import strategies as st

from caprl_jax import config as config_lib
from caprl_jax.commands import cli, config_keys
from caprl_jax.errors import ConfigError

from ..shipped import CONFIGS
from .strategies import texts, values

TINY = f"--config={CONFIGS / 'tiny.py'}"
KEYS = sorted(key for key, _, _ in config_keys.rows(cli.load_config(str(CONFIGS / "tiny.py"))))
literals = st.one_of(
    values.map(repr),
    texts,
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "", "True", "false", "none", "None", "1e9", "0x10", "1_000", "nan", "inf", "-1", "()",
            "(1,)", "(1,2)", "[1]", "('a','b')", "grpo", "rloo", "clipped", "files", "sft",
            "{}", "{'a': 1}", "digits", "(((((", "(" * 300, "os:getcwd", "no_such:x", ":", "a:",
            ".a:b", "1e400", "9" * 5000, "'", '"', "\\", "a,b", "1,2", "lambda: 1", "*", "**",
            "__import__('os')",
        ]
    ),
)  # fmt: skip
names = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS),
    st.sampled_from(KEYS).map(lambda k: k[:-1]),
    st.sampled_from(
        [
            "caprl", "data", "", ".", "caprl.", ".steps", "caprl.rewards.new.term", "sinks.x.sink",
            "caprl.rewards.accuracy.wight", "caprl.rewards.accuracy.options.x", "steps.x",
            "caprl.loss_options.clip", "data.path", "data.root", "sft.task", "caprl[0]", "steps[0]",
            "data.extras[0]", "mesh.rules.batch", "mesh.rules.x", "caprl.rewards", "sinks", "a b",
            "caprl.rewards.accuracy.term", "data.source", "caprl.rewards.x.y.term", "__class__",
            "lock", "items", "_fields", "data.keys",
        ]
    ),
    texts,
)  # fmt: skip
arguments = st.builds(
    lambda dashes, name, sign, value: f"{dashes}config.{name}{sign}{value}",
    st.sampled_from(["--", "--", "--", "-", "---"]),
    names,
    st.sampled_from(["=", "=", "=", "", " "]),
    literals,
)


@contextlib.contextmanager
def own_flags():
    """Removes the flags that a parse defines."""
    before = set(flags.FLAGS)
    try:
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        cli._CONFIG_NAME.clear()


def parsed(*overrides):
    """The checked config of a command's arguments, or its error's one paragraph."""
    with own_flags(), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.parse_config_flags(["main", TINY, *overrides])
            config = flags.FLAGS.config
            with cli.in_one_paragraph():
                config_lib.validate(config)
            return config
        except SystemExit as e:
            return str(e.code)


def kind(value):
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


@given(st.lists(arguments, min_size=1, max_size=2))
@example(["--config.steps=" + "(" * 300])
@example(["--config.steps[0]="])
@example(["--config.data.extras[0]=5"])
@example(["--config.alarms.grad_norm=\n\n"])
@example(["--config.data.extras=((((("])
@example(["--config.data.extras=" + "(" * 9000])
@example(["--config.caprl.loss=:"])
@example(["--config.caprl.rewards.x.term=accuracy"])
@example(["--config.steps=1e400"])
@example(["--config.caprl.rewards.accuracy.weight=nan"])
@example(["--config.steps=" + "9" * 5000])
def test_any_override_is_a_value_of_its_key_or_an_error_that_names_it(given_arguments):
    result = parsed(*given_arguments)
    if isinstance(result, str):
        assert result.startswith("error: ") and "\n\n" not in result
        assert len(result) < 600 + 3 * max(map(len, given_arguments))
        return
    usual = config_lib.complete(config_lib.default(result.objective, result.data.source))
    for key, value, _ in config_keys.rows(result):
        try:
            before = config_lib.get(usual, key)
        except (KeyError, AttributeError):
            continue  # of an entry that the override chose
        assert before is None or kind(value) is kind(before) or hasattr(before, "items")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("steps", "7", 7), ("caprl.kl", "1e-3", 1e-3), ("data.extras", "('a',)", ("a",))],
)
def test_an_override_is_heard(key, text, value):
    """Or the property above would say nothing."""
    assert config_lib.get(parsed(f"--config.{key}={text}"), key) == value


@given(st.sampled_from(KEYS), values)
@example("steps", 10**400)
@example("caprl.loss", "\ud83d")
@example("caprl.loss", [])
@example("caprl.loss", ".relative:loss")
@example("caprl.loss", "builtins:dict")
@example("data.source", None)
@example("data.source", 3)
@example("data.digits", [])
@example("objective", {})
@example("sampling.top_p", float("nan"))
@example("optimizer.learning_rate", float("inf"))
def test_any_value_that_a_config_file_sets_is_checked(key, value):
    config = config_lib.complete(config_lib.default())
    section, _, last = key.rpartition(".")
    with config.unlocked():
        try:
            (config_lib.get(config, section) if section else config)[last] = value
        except (TypeError, ValueError, OverflowError):
            return  # ml_collections refuses it, which load_config names by its line
    try:
        config_lib.validate(config)
    except ConfigError as e:
        assert "config" in str(e)
        return
    found = config_lib.get(config, key)
    if isinstance(value, int | float | str):
        assert found == value or value != value or found == float(value)
