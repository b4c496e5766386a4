"""Two programs through text give what one program gives, where the tokenizers are the same."""

import json
import logging
import shutil

import numpy as np
import pytest

from caprl_jax.data.digits.world import JUDGE_PROMPT
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.models.hf import download as sources
from caprl_jax.run.through_text import Retokeniser

from ..train_test import tiny
from . import two_steps

POLICY, JUDGE = sources.fetch("asset:tiny/policy"), sources.fetch("asset:tiny/judge")


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory):
    """The shipped judge with the ids of two ordinary tokens exchanged, weights accordingly."""
    import safetensors.numpy

    directory = tmp_path_factory.mktemp("models") / "judge"
    shutil.copytree(JUDGE, directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = vocab["Ġred"], vocab["Ġblue"]
    vocab["Ġred"], vocab["Ġblue"] = second, first
    path.write_text(json.dumps(content))
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][[first, second]] = tensors[name][[second, first]]
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def test_retokenising_gives_the_judges_ids_and_says_what_it_cut(renumbered):
    policy, other = (Tokenizer.from_pretrained(d, 512) for d in (POLICY, renumbered))
    texts = ["digits: west red three", "digits: east blue one, west red two, total two"]
    ids = [[*policy.encode(t), *policy.encode("<|im_end|>")] for t in texts]
    tokens = np.zeros((1, 2, 16), np.int64)
    for i, own in enumerate(ids):
        tokens[0, i, : len(own)] = own
    mask = np.arange(16) < np.asarray([[[len(i)] for i in ids]])
    found, real, cut = Retokeniser(policy, other, 8)(tokens, mask)
    expected = [other.encode(t) for t in texts]
    assert found.shape == (1, 2, 8) and len(expected[0]) <= 8 < len(expected[1])
    assert found[0, 0][real[0, 0]].tolist() == expected[0] != policy.encode(texts[0])
    assert found[0, 1].tolist() == expected[1][:8]
    assert cut.tolist() == [[False, True]]


@pytest.mark.slow
def test_two_programs_equal_one(tmp_path, renumbered, caplog):
    """With the same judge under other ids, a step through text is the step on device."""
    # Greedy letters and captions that stop early: nothing is cut or drawn in between.
    settings = {"sampling.max_tokens": 24, "steps": 2, "judge.max_caption": 40}
    one = two_steps.take(tiny(tmp_path, **settings))
    with caplog.at_level(logging.WARNING):
        two = two_steps.take(tiny(tmp_path, **settings, **{"judge.path": str(renumbered)}))
    assert "tokenizers differ" in caplog.text and "two programs" in caplog.text
    cut = two.metrics.pop("captions_cut")
    assert cut[0] == 0 and cut[1] == 16
    two_steps.assert_same(one, two)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "programs_kept")
def test_splicing_is_measured_and_catches_a_boundary_that_moves(tmp_path):
    """The shipped prompt splices cleanly; one with a space before the caption does not."""
    c = tiny(tmp_path)
    task, state = two_steps.built(c)
    found, _ = task.evaluate(state.params)
    assert found["splice_ids_differ"] == 0 and found["splice_letters_differ"] == 0
    # A space joins the word after it, in whole text.
    c.judge.prompt = JUDGE_PROMPT.replace("\n{caption}", " {caption}")
    task, state = two_steps.built(c)
    found, _ = task.evaluate(state.params)
    assert found["splice_ids_differ"] > 0.5
