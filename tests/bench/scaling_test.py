"""The growth of cost, as the bench tells it."""

import pytest

from caprl_jax.bench import scaling, synthetic
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.plan import shapes

from .. import shipped
from ..rl.work_test import judge_flops


@pytest.fixture
def small():
    """configs/tiny.py with less to do."""
    config = shipped.module("tiny").get_config()
    config.update_from_flattened_dict(
        {"data.batch": 1, "caprl.group": 2, "sampling.max_tokens": 8, "caprl.updates": 1}
    )
    return config


@pytest.mark.slow
def test_captions_are_read_once_however_many_questions_there_are(small, one_device):
    seen = []
    found = scaling.measure(
        small, "questions", 1, sizes=(1, 3), done=lambda sweep: seen.append(list(sweep.sizes))
    )
    c = families.build(shapes.model_config(small.judge.path)).decoder.config
    s, t, g = shapes.INSTRUCTION, small.sampling.max_tokens, small.caprl.group
    captions = g * judge_flops(c, t, s, ends=0)
    assert scaling.line(found.sizes, found.flops("score"))[0] == pytest.approx(captions)
    for phase in ("prefill", "decode", "update"):
        assert len(set(found.flops(phase))) == 1
    assert seen == [[1], [1, 3]]
    assert all(f"| {n} |" in scaling.tell(found) for n in (1, 3))
    [drawn] = scaling.as_json({"questions": found}).values()
    assert drawn["seconds"]["step"] == found.seconds("step")


@pytest.mark.parametrize("tokens", scaling.SWEEPS["image"][2])
def test_an_images_tokens_are_as_many_as_asked_for(small, tokens):
    config = scaling.changed(small, "image", tokens)
    vision = families.build(shapes.model_config(config.policy.path)).vision.config
    rows, columns = synthetic.grid_for(config, vision)
    assert rows * columns == tokens * vision.merge**2
    assert small.data.max_prompt != config.data.max_prompt  # a copy was changed


def test_an_image_that_is_no_square_is_refused(small):
    with pytest.raises(ConfigError, match="200 tokens is no square"):
        scaling.changed(small, "image", 200)


@pytest.mark.parametrize("name", scaling.SWEEPS)
def test_a_sweep_changes_one_size(small, name):
    before = small.to_dict()
    size = scaling.SWEEPS[name][2][1]
    after = scaling.changed(small, name, size).to_dict()
    differ = {
        f"{section}.{key}"
        for section, values in after.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != before[section][key]
    }
    expected = {
        "group": {"caprl.group"},
        "caption": {"sampling.max_tokens"},
        "questions": {"caprl.questions"},
        "image": {"data.max_prompt", "data.max_windows"},
    }
    assert differ == expected[name] and small.to_dict() == before
