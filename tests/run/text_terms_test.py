"""Terms on text run between the programs on the right captions; a failure is no bad caption."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.data.records import Question, Record, parse, stored
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.models.hf import download as sources
from caprl_jax.parallel import mesh
from caprl_jax.rl.rewards import REWARDS, Term
from caprl_jax.rl.types import Batch
from caprl_jax.run import text_terms
from caprl_jax.run.text_terms import Numbered, TermFailed, TextTerms
from caprl_jax.run.through_text import Between, in_two_programs

from ..train_test import tiny
from . import two_steps

POLICY = sources.fetch("asset:tiny/policy")
HERE = "tests.run.text_terms_test"


def words_of(captions, record):
    """Words of each caption, a thousand for each image's hue."""
    return [1000.0 * record.extras["hue"] + len(c.split()) for c in captions]


def fussy(captions, record):
    """Raises for the image of hue 0; NaN for captions that say red."""
    if record.extras["hue"] == 0:
        raise RuntimeError("no hue")
    return [float("nan") if "red" in c else float(len(c.split())) for c in captions]


def broken(captions, record):
    return [1.0]


def commas(captions, record):
    return [0.1 * c.count(",") for c in captions]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(POLICY, 512)


@pytest.fixture(scope="module")
def source():
    question = Question("Which?", ("red", "blue"), 0)
    records = [Record(f"r-{i}", b"", (question,), extras={"hue": i}) for i in range(5)]
    return stored(records)


def written(tokenizer, groups):
    """(tokens [b, g, t], mask) of texts [b][g], each with a stop token at its end."""
    ids = [[[*tokenizer.encode(t), *tokenizer.encode("<|im_end|>")] for t in g] for g in groups]
    longest = max(len(i) for g in ids for i in g)
    tokens = np.zeros((len(ids), len(ids[0]), longest), np.int32)
    lengths = np.asarray([[[len(i)] for i in g] for g in ids])
    for b, g in np.ndindex(*tokens.shape[:2]):
        tokens[b, g, : lengths[b, g, 0]] = ids[b][g]
    return tokens, np.arange(longest) < lengths


def terms(**names):
    chosen = {n: REWARDS.choose(f"{HERE}:{t}" if t in globals() else t) for n, t in names.items()}
    return tuple(Term(n, c) for n, c in chosen.items())


def batch(numbers, valid=None):
    valid = np.ones(len(numbers), bool) if valid is None else np.asarray(valid)
    return Batch(None, None, None, valid, number=np.asarray(numbers, np.int32))


def test_a_source_that_tells_its_places(source):
    assert [parse(e).number for e in Numbered(source)] == list(range(5))
    assert parse(source[2]).number == -1 and len(Numbered(source)) == 5


def test_each_caption_is_read_with_its_own_record(tokenizer, source):
    groups = [["one two", "one"], ["a b c", "a b"], ["a", "a"]]
    compute = TextTerms(terms(words="words_of", form="format"), tokenizer, source)
    told = compute(batch([3, 0, 0], [True, True, False]), written(tokenizer, groups))
    values, failed = told["words"]
    assert values.tolist() == [[3002, 3001], [3, 2], [0, 0]] and not failed.any()
    assert told["form"][0].tolist() == [[0, 0]] * 3


def test_a_failure_has_the_mean_of_its_group_and_is_counted_and_logged(tokenizer, source, caplog):
    groups = [["a b", "red", "a b c d"], ["x", "y", "z"]]
    compute = TextTerms(terms(fussy="fussy"), tokenizer, source)
    with caplog.at_level(logging.WARNING):
        told = compute(batch([2, 0]), written(tokenizer, groups))
    values, failed = told["fussy"]
    assert values.tolist() == [[2, 3, 4], [0, 0, 0]]
    assert failed.tolist() == [[False, True, False], [True] * 3]
    assert "reward fussy failed for r-2: nan for the caption 'red'" in caplog.text
    assert "reward fussy failed for r-0: RuntimeError: no hue" in caplog.text
    valid = jnp.asarray([True, False])
    counted = text_terms.failures(jax.tree.map(jnp.asarray, told), valid)
    assert [int(x) for x in counted["text_failed/fussy"]] == [1, 3]
    for _ in range(9):
        compute(batch([2, 0]), written(tokenizer, groups))
    assert caplog.text.count("reward fussy failed") == 5


def test_a_term_that_fails_for_all_captions_ends_the_run_by_name(tokenizer, source):
    compute = TextTerms(terms(mine="broken"), tokenizer, source)
    with pytest.raises(TermFailed, match=r"reward 'mine' failed .*r-\d: 1 values for 2 captions"):
        compute(batch([2, 0]), written(tokenizer, [["a", "b"], ["a", "b"]]))
    nothing = compute(batch([2], [False]), written(tokenizer, [["a", "b"]]))
    assert not nothing["mine"][1].any()


def test_values_stay_with_their_images_on_eight_devices(tokenizer, source):
    rules = mesh.shard_rules(mesh.make_mesh({"data": 8}))
    numbers = [i % 5 for i in range(8)]
    tokens, mask = written(tokenizer, [["a b", "a"]] * 8)
    whole = mesh.put_batch((batch(numbers), tokens, mask), rules)
    compute = TextTerms(terms(words="words_of"), tokenizer, source)

    class State:
        step = jnp.zeros((), jnp.int32)

    class Drawn:
        tokens, mask = whole[1:]

    step = in_two_programs(lambda *_: Drawn, lambda *given: given[4], rules, Between(texts=compute))
    passed = step(None, State, whole[0], jax.random.key(0))
    assert passed.judge == passed.clip == ()
    values, failed = jax.device_get(passed.told["words"])
    assert values.tolist() == [[1000 * n + 2, 1000 * n + 1] for n in numbers] and not failed.any()
    assert len(passed.told["words"][0].sharding.device_set) == 8


@pytest.mark.slow
def test_a_term_on_text_trains_as_the_same_term_on_arrays(tmp_path, monkeypatch, tokenizer):
    """Commas, counted in the text and among the tokens: one program and two take the same steps."""
    [comma] = tokenizer.encode(",")

    def among_tokens(scored):
        real = scored.captions.mask & (scored.captions.tokens == comma)
        return 0.1 * jnp.sum(real, axis=-1)

    monkeypatch.setattr(f"{HERE}.among_tokens", among_tokens, raising=False)
    settings = {"sampling.max_tokens": 24, "steps": 2}

    def config(term):
        c = tiny(tmp_path, **settings)
        c.caprl.rewards.commas = {"term": f"{HERE}:{term}", "weight": 0.5}
        return c

    one, two = (two_steps.take(config(term)) for term in ("among_tokens", "commas"))
    failed = two.metrics.pop("text_failed/commas")
    assert failed[0] == 0 and failed[1] == 16
    assert one.metrics["reward/commas"][0] > 0
    two_steps.assert_same(one, two)
