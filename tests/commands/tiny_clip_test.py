"""The command that trains the tiny CLIP: its captions, its loss, and what it writes."""

import json
import shutil

import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.commands import tiny_clip
from caprl_jax.data.digits import world as digits
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.errors import ConfigError, ModelDirectoryError
from caprl_jax.models.hf import download
from caprl_jax.run import clip as clip_lib

POLICY = download.fetch("asset:tiny/policy")


def test_loss_by_hand():
    """Two images, their texts, and a text of neither: each softmax is a ratio of whole numbers."""
    ratios = np.asarray([[3.0, 1.0], [1.0, 1.0], [2.0, 4.0]])
    texts, images = (3 / 4, 1 / 2), (3 / 6, 1 / 6)
    expected = -np.mean(np.log([*texts, *images]))
    np.testing.assert_allclose(tiny_clip.loss(np.log(ratios)), expected, rtol=1e-6)


def test_captions_are_true_or_false_in_one_statement():
    rng, counts = np.random.default_rng(0), set()
    for record in digits.scenes("train", 200, (3, 3), (2, 5)):
        true, false = tiny_clip.describe(record, rng)
        right, said, *_ = digits.precision_recall(true, record.facts)
        assert right == said
        assert digits.precision_recall(false, record.facts)[:2] == (said - 1, said)
        counts.add(said)
    assert counts == {1, 2, 3, 4, 5, 6}


def test_a_caption_has_as_many_facts_as_asked_for():
    rng = np.random.default_rng(0)
    for record in digits.scenes("heldout", 20, (3, 3), (2, 5)):
        assert len(digits.stated(tiny_clip.describe(record, rng, 2)[0])) == 2


@pytest.mark.slow
def test_what_it_writes_is_a_clip_of_the_policys_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_clip, "GROUPS", 4)
    monkeypatch.setattr(tiny_clip, "BATCH", 8)
    tiny_clip.make(tmp_path / "clip", "asset:tiny/policy", 2)
    c = config_lib.default()
    c.clip.path = str(tmp_path / "clip")
    found = clip_lib.read(c, Tokenizer.from_pretrained(POLICY, 512))
    assert found.policy is None and found.clip.start != found.clip.end
    with pytest.raises(ConfigError, match="holds a model already: give another --out"):
        tiny_clip.make(tmp_path / "clip", "asset:tiny/policy", 2)


def without(directory, file, *keys):
    """A copy of the policy whose file lacks keys; without keys, the file itself is gone."""
    shutil.copytree(POLICY, directory)
    content = json.loads((directory / file).read_text())
    (directory / file).unlink()
    if keys:
        kept = {key: value for key, value in content.items() if key not in keys}
        (directory / file).write_text(json.dumps(kept))
    return directory


def test_pixels_that_the_policy_leaves_open_stay_open(tmp_path):
    open_ = ("do_convert_rgb", "rescale_factor", "resample")
    policy = without(tmp_path / "policy", "preprocessor_config.json", *open_)
    whole, found = (tiny_clip.untrained(p)["preprocessor_config.json"] for p in (POLICY, policy))
    assert found == {key: value for key, value in whole.items() if key not in open_}


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        ("config.json", ["vocab_size"], r"config\.json has no vocab_size"),
        ("tokenizer.json", [], r"policy/tokenizer\.json is not valid JSON: it is not a regular"),
    ],
)
def test_a_policy_that_lacks_something_is_named(tmp_path, file, keys, message):
    policy = without(tmp_path / "policy", file, *keys)
    with pytest.raises(ModelDirectoryError, match=message):
        tiny_clip.make(tmp_path / "clip", str(policy), 1)
    assert not (tmp_path / "clip").exists()


def test_scenes_of_a_group_share_places_and_colours():
    for group in tiny_clip.scenes(5):
        inks = {tuple(fact[:2] for fact in record.facts) for record in group}
        assert len(inks) == 1 and len({tuple(record.facts) for record in group}) > 1
        assert len({record.image for record in group}) == len(group)
