"""The command's jobs, flags and errors."""

import sys

import pytest
from absl import flags

from caprl_jax.curate import __main__ as command
from caprl_jax.curate.trials import PRESETS, Settings


@pytest.fixture
def parsed(monkeypatch):
    """Parses a command line with flags of its own."""

    def parse(*arguments):
        own = flags.FlagValues()
        for module in (flags, command.flags):
            monkeypatch.setattr(module, "FLAGS", own)
        for name in ("string", "integer", "float", "bool", "enum"):
            define = getattr(flags, f"DEFINE_{name}")
            monkeypatch.setattr(
                flags,
                f"DEFINE_{name}",
                lambda *a, define=define, **k: define(*a, flag_values=own, **k),
            )
        job, *_ = command.parse_flags(["curate", *arguments])
        return job, own

    return parse


@pytest.mark.parametrize(
    "more, expected",
    [
        ([], PRESETS["paper"]),
        (["--preset=strict"], PRESETS["strict"]),
        (["--preset=strict", "--trials=8"], PRESETS["strict"] | {"trials": 8}),
        (["--visual=0.5"], PRESETS["paper"] | {"visual": 0.5}),
        (["--text_only=0"], PRESETS["paper"] | {"text_only": 0.0}),
    ],
)
def test_flags_change_a_preset(parsed, more, expected):
    job, given = parsed("filter", "--rows=r", "--model=m", "--out=o", "--nologprobs", *more)
    settings = command.filter_settings(given)
    assert job == "filter" and settings == Settings(**expected, logprobs=False)


def test_paraphrase_needs_no_model(parsed):
    job, given = parsed("paraphrase", "--images=i", "--out=o")
    assert job == "paraphrase" and "model" not in given


def test_generates_defaults_are_caprls(parsed):
    _, given = parsed("generate", "--images=i", "--model=m", "--out=o")
    assert (given.count, given.temperature, given.max_tokens) == (5, 0.1, 2048)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "name what to do"),
        (["filtr"], "did you mean 'filter'"),
        (["report"], "--dir"),
    ],
)
def test_what_is_missing_is_told(parsed, arguments, said):
    with pytest.raises(SystemExit) as caught:
        parsed(*arguments)
    assert said in str(caught.value) and "Traceback" not in str(caught.value)
    assert "caprl_jax.curate" in sys.modules
