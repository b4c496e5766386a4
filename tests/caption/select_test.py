"""Selectors, by hand-worked numbers, and in the command."""

import json

import jax
import numpy as np
import pytest

import caprl_jax
from caprl_jax.caption import job, pictures
from caprl_jax.caption.job import Settings
from caprl_jax.caption.parts import Place
from caprl_jax.caption.select import SELECTORS, Candidates, best
from caprl_jax.data.digits import world as digits
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ConfigError, UserError
from caprl_jax.parallel import mesh


def scores(name, ids=((1,),), logp=None, lengths=None):
    count = len(ids)
    logp, lengths = logp or [0.0] * count, lengths or [1] * count
    return SELECTORS.choose(name)(Candidates([""] * count, ids, logp, lengths))


def test_logp_is_the_mean_over_tokens_with_the_stop_token():
    found = scores("logp", ids=[(1,), (2, 3)], logp=[-3.0, -4.0], lengths=[2, 4])
    assert found == [-1.5, -1.0]  # the longer one is likelier a token, though not in all


def test_consensus_is_the_mean_f1_with_the_others():
    """a b c and a b share 2 of 5 tokens' pairs: 2 * 2 / 5; d shares nothing."""
    found = scores("consensus", ids=[(1, 2, 3), (1, 2), (4,)])
    np.testing.assert_allclose(found, [0.4, 0.4, 0.0])
    # A token that both have twice counts twice: 2 * 2 / 5 with the pair, 2 * 1 / 4 alone.
    found = scores("consensus", ids=[(1, 1, 2), (1, 1), (1,)])
    np.testing.assert_allclose(found, [(0.8 + 0.5) / 2, (0.8 + 2 / 3) / 2, (0.5 + 2 / 3) / 2])


def test_consensus_of_empty_captions_and_of_one_alone():
    assert scores("consensus", ids=[(), (), (1,)]) == [0.5, 0.5, 0.0]
    assert scores("consensus", ids=[(1, 2)]) == [0.0]


def test_the_first_of_equal_scores_is_taken():
    assert best([0.5, 0.7, 0.7]) == 1
    assert best([0.0]) == 0


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"select": "consensus"}, "--select=consensus .* --group=1 draws one: give --group=8"),
        ({"select": "concensus", "group": 4}, "--select: 'concensus' is not one of"),
        ({"enrich": 3, "group": 4}, "--enrich=3 begins with one caption, and --group=4 draws"),
    ],
)
def test_settings_that_contradict_are_refused(given, reason):
    with pytest.raises(ConfigError, match=reason):
        Settings(Sampling(10), **given)


@pytest.fixture(scope="module")
def policy():
    return caprl_jax.load_policy("asset:tiny/policy", mesh=mesh.make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, record in enumerate(digits.scenes("train", 3, (3, 3), (2, 5))):
        (folder / f"{i}.png").write_bytes(record.image)
    return folder


def lines(policy, folder, out, **changes):
    settings = Settings(Sampling(max_tokens=10), batch=4, **{"group": 4} | changes)
    assert job.caption(policy, pictures.find(str(folder)), settings, Place(out))
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def everything(policy, folder, tmp_path_factory):
    """Lines with all candidates."""
    return lines(policy, folder, tmp_path_factory.mktemp("all") / "c.jsonl")


@pytest.mark.parametrize("select", ["logp", "consensus"])
def test_a_line_has_the_one_that_is_selected(policy, folder, everything, tmp_path, select):
    found = lines(policy, folder, tmp_path / "c.jsonl", select=select)
    for line, whole in zip(found, everything, strict=True):
        assert line["candidates"] == whole["captions"] and len(line["scores"]) == 4
        place = line["selected"]
        assert place == np.argmax(line["scores"]) and line["score"] == max(line["scores"])
        for name in ("captions", "tokens", "truncated", "logp"):
            assert line[name] == [whole[name][place]], name
        assert line["settings"]["select"] == select and "select" not in whole["settings"]
        if select == "logp":
            means = np.asarray(whole["logp"]) / whole["tokens"]
            np.testing.assert_allclose(line["scores"], means, atol=2e-4)


def test_an_enriched_line_has_what_was_asked(policy, folder, everything, tmp_path):
    """The tiny policy answers every prompt with a caption: one object, one answer, a caption."""
    found = lines(policy, folder, tmp_path / "c.jsonl", select="consensus", enrich=2)
    for line, whole in zip(found, everything, strict=True):
        assert line["first"] == whole["captions"][line["selected"]]
        assert len(line["captions"]) == len(line["tokens"]) == 1
        assert len(line["notes"]) <= 2 and all(
            {"object", "answer"} == n.keys() for n in line["notes"]
        )
        assert line["settings"]["enrich"] == 2
    assert any(line["notes"] for line in found)
    again = lines(policy, folder, tmp_path / "again.jsonl", select="consensus", enrich=2)
    assert again == found


def test_images_may_have_prompts_of_their_own(policy, folder):
    """Each row is that of the image alone, but for padding."""
    images, texts = (
        [folder / "0.png", folder / "1.png"],
        ["Describe.", "What is in the north west?"],
    )
    _, both = policy.inputs(images, texts)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        _, alone = policy.inputs([image], text)
        count = alone.mask.sum()
        assert both.mask[i].sum() == count
        for name in ("tokens", "positions", "feature"):
            found, expected = getattr(both, name)[i][:count], getattr(alone, name)[0][:count]
            np.testing.assert_array_equal(found, expected, name)
        assert both.next_position[i] == alone.next_position[0]
    with pytest.raises(UserError, match="1 prompts for 2 images: one each is needed"):
        policy.inputs(images, texts[:1])
