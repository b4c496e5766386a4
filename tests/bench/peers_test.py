"""Comparisons with peers: the same work passes, other work is refused before a time is taken."""

import dataclasses
import functools
import importlib.util
import signal

import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.bench import generate_peer, machine, peers, torch_models, trl_peer
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.peers import Checked, Pairs, WorkDiffers
from caprl_jax.bench.turns import Turn, moved
from caprl_jax.commands import random_model
from caprl_jax.models.hf import sizes
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import load

TEXT = (
    "vocab_size=512",
    "num_hidden_layers=2",
    "hidden_size=128",
    "intermediate_size=64",
    "num_attention_heads=4",
)
TOWER = (
    "vision_config.depth=2",
    "vision_config.hidden_size=64",
    "vision_config.num_heads=2",
    "vision_config.intermediate_size=48",
    "vision_config.out_hidden_size=128",
    "vision_config.fullatt_block_indexes=[1]",
    "rope_scaling.mrope_section=[4,6,6]",
)
ids = functools.partial(random_model.changed, sizes.CONFIGS["peer-vl-50m"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two captions of 4 tokens of each of 8 images, which fill one window; 8 devices share them."""
    folder, c = tmp_path_factory.mktemp("models"), config_lib.default()
    c.policy.path, c.judge.path = str(folder / "policy"), str(folder / "judge")
    random_model.make(folder / "policy", ids([*TEXT, *TOWER]), dtype=np.float32)
    random_model.make(folder / "other", ids([*TEXT, *TOWER]), seed=1, dtype=np.float32)
    judge = random_model.changed(sizes.CONFIGS["peer-50m"], list(TEXT))
    random_model.make(folder / "judge", judge, dtype=np.float32)
    c.data.batch = c.eval.batch = 8
    c.data.max_windows, c.data.max_prompt, c.data.max_question = 1, 32, 38
    c.sampling.max_tokens, c.caprl.group, c.caprl.questions = 4, 2, 2
    c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
    return work_lib.make(c, folder)


@pytest.fixture(scope="module")
def ours(work):
    return generate_peer.Ours(work)


def test_both_sides_are_seen_to_do_the_same(work, ours):
    checked = generate_peer.checks(work, ours, generate_peer.Theirs(work))
    assert {"logits after the prompt, relative", "tokens drawn"} <= {c.what for c in checked}
    assert all(c.same for c in checked)


def test_all_of_their_ways_draw_what_was_asked_for(work):
    theirs = generate_peer.Theirs(work)
    del theirs.ways["num_return_sequences, static, torch.compile"]  # takes a minute to compile
    tried = generate_peer.try_ways(theirs, work)
    assert len(tried) == 3 and all(isinstance(t, generate_peer.Took) for t in tried.values())


def test_the_prompt_read_once_leads_to_the_same_tokens(work):
    theirs = generate_peer.Theirs(work)
    once = theirs.ways["prompt read once"](4, sample=False)
    np.testing.assert_array_equal(once, np.repeat(theirs.greedy(4), work.config.caprl.group, 0))


def test_other_weights_are_refused(work, ours):
    other = dataclasses.replace(work, policy_path=work.policy_path.parent / "other")
    with pytest.raises(WorkDiffers, match="logits after the prompt"):
        generate_peer.checks(work, ours, generate_peer.Theirs(other))


def test_padding_is_refused(work, ours):
    """Work that one side does and the other needn't."""
    longer = work.config.copy_and_resolve_references()
    longer.data.max_prompt = 33
    padded = work_lib.laid_out(longer, work.processor, work.filler, work.pictures)[1]
    with pytest.raises(WorkDiffers, match="prompt tokens with padding: ours 264, theirs 256"):
        generate_peer.checks(
            dataclasses.replace(work, prompt=padded), ours, generate_peer.Theirs(work)
        )


def test_the_judges_agree_letter_by_letter(work):
    captions = np.random.default_rng(0).integers(0, 512, (8, 2, 4))
    captions[0, 0, :2] = work.instruction.special[:2]  # which never reach a judge
    model, _ = load.read_model(str(work.judge_path), "", np.float32)
    params = load.load_frozen(
        model, work.judge_path, compile_lib.shard_rules(work.config), np.float32
    )
    found = work_lib.letters(work, params["decoder"], captions)
    theirs = torch_models.Letters(torch_models.judge(work), work)
    images = np.repeat(np.arange(8), 2).tolist()
    expected = theirs(captions.reshape(16, 4).tolist(), images).reshape(found.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found[0, 0, 0][:4]) > 1e-3


def test_what_a_peer_needs_is_named(monkeypatch):
    monkeypatch.setitem(peers.NEEDS, "trl", ("numpy", "no_such_library"))
    with pytest.raises(peers.PeerMissing, match=r"needs no_such_library, .*\[peer\]"):
        peers.require_installed("trl")


def test_ratios_are_of_pairs():
    whole, one = Pairs([2.0, 4.0], [6.0, 16.0]), Pairs([1.0, 2.0], [1.0, 2.0])
    assert whole.ratios == [3.0, 4.0]
    assert whole.minus(one).ratios == [5.0, 7.0]


def test_what_is_not_a_number_is_never_the_same():
    assert not peers.difference("x", [1.0], [float("nan")], 1.0).same
    assert not peers.difference("x", [[1.0]], [1.0], 1.0).same
    with pytest.raises(WorkDiffers, match="tokens: ours 1, theirs 2"):
        peers.require_same([Checked("tokens", 1, 2), Checked("images", 1, 1)])


def test_a_turn_that_is_killed_says_so():
    with pytest.raises(peers.ProcessDied, match="for want of memory"):
        peers.alone(signal.raise_signal, signal.SIGKILL)


def test_a_turn_that_fails_raises_what_it_raised():
    with pytest.raises(WorkDiffers, match="tokens: ours 1, theirs 2"):
        peers.alone(peers.require_same, [Checked("tokens", 1, 2)])


LETTERS = np.full((1, 1, 1, 4), 0.25)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"parameters": 2}, "parameters"),
        ({"moved": "some"}, "weights that TRL's first step moved"),
        ({"logits": np.ones((1, 8)) * 1.1}, "logits after the prompt"),
        ({"letters": LETTERS * 1.2}, "judge's letters"),
    ],
)
def test_a_step_that_does_something_else_is_refused(other, named):
    ours = Turn(1.0, 1, "all", logits=np.ones((1, 8)), letters=LETTERS)
    peers.require_same(trl_peer.compared(ours, ours))
    with pytest.raises(WorkDiffers, match=named):
        peers.require_same(trl_peer.compared(ours, dataclasses.replace(ours, **other)))


@pytest.mark.parametrize(
    ("after", "word"),
    [
        ([[0.0, 2.0], [3.0]], "all"),
        ([[0.0, 2.0], [2.0]], "some"),
        ([[0.0, np.nan], [3.0]], "some"),
        ([[0.0, 1.0], [2.0]], "none"),
    ],
)
def test_what_has_moved_is_told(after, word):
    before = [np.array([0.0, 1.0]), np.array([2.0])]
    assert moved(before, [np.array(a) for a in after]) == word


@pytest.mark.parametrize(
    ("key", "value"), [("caprl.updates", 2), ("caprl.kl", 0.1), ("sampling.top_k", 5)]
)
def test_a_step_that_trl_would_not_do_alike_is_refused(work, key, value, tmp_path):
    config = work.config.copy_and_resolve_references()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(WorkDiffers, match=f"{key}={value} "):
        trl_peer.compare(config, tmp_path, 1)


def test_both_libraries_rates_are_told(work):
    ours, theirs = machine.rates(size=64)
    assert 0 < ours < np.inf and 0 < theirs < np.inf
    assert machine.facts(work)["torch.get_num_threads()"] >= 1


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install '.[peer]'"
)
def test_a_step_of_trl_is_the_same_work(work, tmp_path):
    found = trl_peer.compare(work.config, tmp_path, 2)
    assert all(c.same for c in found.checks) and len(found.checks) == 11
    assert len(found.pairs[trl_peer.STEP].ratios) == 2
    assert found.facts["trl"]
