"""The verifier's answers are those of whole sequences, read one by one, on any mesh."""

import jax
import numpy as np
import pytest

from caprl_jax.data.reference_captions import ReferencePrompt
from caprl_jax.data.tokens import pad
from caprl_jax.models.vlm import Prompt
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.rewards import REWARDS, Term, reward
from caprl_jax.rl.sentences import Endings
from caprl_jax.rl.types import Captions, Scored
from caprl_jax.rl.verify import PROMPT, Verifier, verify

from . import runs

FULL, STOP, VOCAB = 7, 5, 60
YES, NO = 11, 12
QUESTION = np.asarray([20, 21, 22], np.int32)


def tables():
    """Token 7 is a full stop, token 5 the end; every other begins with white space."""
    ids = np.arange(VOCAB)
    return Endings(ids < 0, ids == FULL, ids != FULL, ids == STOP, (ids != FULL) & (ids != STOP))


def verifier(world, sentences=4, length=5):
    """The world's policy, held to be a verifier."""
    answers = np.asarray([YES, NO], np.int32)
    return Verifier(world.policy, world.params, tables(), QUESTION, answers, sentences, length)


def captions(images=4, group=2, t=12):
    """Random captions of unequal lengths, mostly of two or three sentences; one is empty."""
    rng = np.random.default_rng(0)
    tokens = rng.choice(np.r_[13:50, [FULL] * 12], (images, group, t)).astype(np.int32)
    length = rng.integers(3, t + 1, (images, group))
    length[0, 0] = 1
    mask = np.arange(t) < length[..., None]
    np.put_along_axis(tokens, length[..., None] - 1, STOP, axis=-1)
    return Captions(tokens * mask, mask)


def naive_sentences(tokens):
    """Lists of tokens, cut after full stops; those without a word belong to the one before."""
    out, current = [], []
    for token in tokens:
        if token == STOP:
            continue
        if token == FULL:
            (out[-1] if out and not current else current).append(token) if out or current else None
            if current:
                out, current = [*out, current], []
        else:
            current.append(token)
    return [*out, current] if current else out


RUN = jax.jit(verify)


@jax.jit
def asked(policy_params, images, whole):
    """p(yes) after a whole sequence."""
    policy, params = policy_params.policy, policy_params.params
    logits = policy.logits(params, policy.trunk(params, images, whole).last)[0]
    return jax.nn.sigmoid(logits[YES] - logits[NO])


def naive(world, caption, image, prompts=None):
    """p(yes) of each sentence, by one forward pass over prompt, sentence and question."""
    own = world.batch.images, world.batch.prompt if prompts is None else prompts
    images, prompt = jax.tree.map(lambda a: a[image : image + 1], own)
    real, length, found = prompt.mask[0], 48, []
    for sentence in naive_sentences(caption):
        more = np.asarray([*sentence, *QUESTION], np.int32)
        places = prompt.next_position[0] + np.arange(len(more))
        parts = [
            (prompt.tokens[0][real], more),
            (prompt.positions[0][real], np.repeat(places[:, None], 3, 1)),
            (prompt.feature[0][real], np.full(len(more), -1, np.int32)),
        ]
        tokens, positions, feature = (pad(np.concatenate(p), length)[None] for p in parts)
        mask = np.arange(length)[None] < real.sum() + len(more)
        whole = Prompt(tokens, mask, positions, feature, prompt.next_position)
        found.append(float(asked(verifier(world), images, whole)))
    return found


@pytest.fixture(scope="module")
def answered(world):
    """(captions, the verifier's answers about them)."""
    return captions(), jax.device_get(RUN(verifier(world), world.batch, captions()))


def assert_exact(world, given, found, prompts=None):
    """Compares all answers with those of whole sequences."""
    counted = 0
    for i, j in np.ndindex(4, 2):
        expected = naive(world, given.tokens[i, j][given.mask[i, j]].tolist(), i, prompts)
        cut = [p for p, ok in zip(found.p_yes[i, j], found.valid[i, j], strict=True) if ok]
        assert found.count[i, j] == len(expected)
        if found.unread[i, j]:  # a sentence of six tokens, or a fifth one
            continue
        np.testing.assert_allclose(cut, expected, atol=1e-5)
        counted += len(expected)
    assert counted >= 8 and np.std(found.p_yes[found.valid]) > 0.05


def test_answers_are_those_of_whole_sequences(world, answered):
    assert_exact(world, *answered)


@pytest.fixture(scope="module")
def referring(world):
    """The batch with reference captions of unequal lengths in the verifier's prompts."""
    rng, reference = np.random.default_rng(1), ReferencePrompt(None, (), (), 1, 6, 6)
    each = (jax.tree.map(lambda a, i=i: a[i], world.batch.prompt) for i in range(4))
    made = [reference(prompt, rng.integers(13, 50, 3 + i)) for i, prompt in enumerate(each)]
    prompts = jax.tree.map(lambda *a: np.stack(a), *made)
    return world.batch.replace(extras={PROMPT: prompts})


@pytest.fixture(scope="module")
def beside(world, referring):
    """(captions, the verifier's answers about them beside the reference captions)."""
    return captions(), jax.device_get(RUN(verifier(world), referring, captions()))


def test_answers_beside_a_reference_are_those_of_whole_sequences(
    world, answered, referring, beside
):
    given, found = beside
    assert_exact(world, given, found, referring.extras[PROMPT])
    assert np.max(np.abs(found.p_yes - answered[1].p_yes)[found.valid]) > 1e-3


def test_a_reference_is_read_once_an_image(world, answered, referring):
    """It costs what as long a prompt does, and the prompt without it is not read."""
    given, own = answered[0], verifier(world)
    longer = world.batch.replace(prompt=referring.extras[PROMPT])
    flops = [RUN.lower(own, b, given).cost_analysis()["flops"] for b in (longer, referring)]
    assert flops[0] == flops[1] > 0


def correctness(world, given):
    """The reward of given captions."""
    scored = Scored(world.batch, given, None, {"verifier": verifier(world)})
    terms = (Term("true", REWARDS.choose("correctness")),)
    return jax.jit(lambda scored: reward(terms, scored))(scored)


def test_correctness_is_the_mean_over_sentences(world, answered):
    given, answers = answered
    found = correctness(world, given)
    for i, j in np.ndindex(4, 2):
        own = answers.p_yes[i, j][answers.valid[i, j]]
        assert float(found.total[i, j]) == pytest.approx(own.mean() if len(own) else 0, abs=1e-6)
    assert float(found.total[0, 0]) == 0  # the empty caption states nothing
    np.testing.assert_array_equal(found.told["true_sentences"], answers.count)
    np.testing.assert_array_equal(found.told["true_unread"], answers.unread)


def test_what_is_said_again_does_not_count(world):
    given = captions()
    tokens, mask = np.zeros_like(given.tokens), np.zeros_like(given.mask)
    first, second = [20, 21, FULL], [30, FULL]
    for i, said in enumerate(([*first, *second], [*first, *second, *first, *first])):
        tokens[:, i, : len(said) + 1] = [*said, STOP]
        mask[:, i, : len(said) + 1] = True
    found = correctness(world, Captions(tokens, mask))
    np.testing.assert_allclose(found.total[:, 0], found.total[:, 1], atol=1e-6)
    np.testing.assert_array_equal(found.told["true_repeated"], [[0, 2]] * 4)


def test_the_image_decides(world, answered):
    given, found = answered
    turned = world.batch.replace(images=jax.tree.map(lambda a: a[::-1], world.batch.images))
    other = RUN(verifier(world), turned, given)
    assert np.max(np.abs(found.p_yes - other.p_yes)[found.valid]) > 1e-3


def test_eight_devices_answer_as_one(world, referring, beside):
    """In two slices too, of half of the images each."""
    given, single = beside
    rules = mesh.shard_rules(mesh.make_mesh({"data": 2, "tensor": 4}))
    boxed = jax.eval_shape(world.policy.init, jax.random.key(0))
    params = jax.device_put(world.params, mesh.param_shardings(boxed, rules))
    own = verifier(world).replace(params={})
    own = jax.device_put(own, mesh.replicated(rules)).replace(params=params)
    placed = mesh.put_batch((referring, given), rules)
    found = jax.jit(bind(verify, rules, Slices(score=2)))(own, *placed)
    np.testing.assert_allclose(found.p_yes, single.p_yes, atol=1e-5)
    np.testing.assert_array_equal(found.count, single.count)


def test_a_run_binds_only_the_models_that_its_terms_need(world):
    run = runs.make_run(world, reference=None).replace(frozen={"verifier": verifier(world)})
    state = runs.start(world)
    assert run.models(state) == {}
    true = Term("true", REWARDS.choose("correctness"))
    run = run.replace(rewards=(true,))
    assert run.models(state) == {"verifier": run.frozen["verifier"]}
    # A reference that moves lies in the state, and is the verifier where no other is named.
    moving = run.replace(frozen={"verifier": verifier(world).replace(params=None)})
    found = moving.models(state.replace(reference={"own": 1}))["verifier"]
    assert found.params == {"own": 1}


@pytest.mark.slow
def test_a_step_adds_the_term_to_the_reward(world):
    run = runs.make_run(world, reference=None, kl=0.0, updates=1)
    terms = (*runs.ACCURACY, Term("true", REWARDS.choose("correctness"), weight=0.5))
    asking = run.replace(rewards=terms, frozen={"verifier": verifier(world)})
    args = runs.start(world), world.batch, jax.random.key(0)
    _, metrics = jax.jit(runs.step())(asking, *args)
    total, count = jax.device_get(metrics["reward/true"])
    assert 0 < total / count < 1
    _, plain = jax.jit(runs.step())(run, *args)
    parts = [jax.device_get(m["reward"])[0] for m in (metrics, plain)]
    assert parts[0] - parts[1] == pytest.approx(0.5 * total, rel=1e-5)
