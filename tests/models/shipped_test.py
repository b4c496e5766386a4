"""The shipped tiny models on their own data equal transformers, end to end."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2ForCausalLM

from caprl_jax import config as config_lib
from caprl_jax.data.digits import world as digits
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models import families
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Decoding
from caprl_jax.run import load

from ..serving import served

POLICY, JUDGE = sources.fetch("asset:tiny/policy"), sources.fetch("asset:tiny/judge")


@pytest.fixture(scope="module")
def scenes():
    """PIL images of scenes, cropped to four unequal sizes."""
    crops = [(0, 0, 84, 84), (0, 0, 84, 56), (0, 28, 56, 84), (28, 0, 84, 60)]
    records = digits.scenes("heldout", len(crops), (3, 3), (2, 5))
    return [Image.open(io.BytesIO(r.image)).crop(c) for r, c in zip(records, crops, strict=True)]


@pytest.fixture(scope="module")
def ours(scenes):
    """(policy, parameters, batched images and prompts, tokenizer)."""
    c = config_lib.default()
    c.data.max_windows, c.data.max_prompt = 4, 40
    policy, directory = load.read_model(c.policy.path, "", np.float32)
    tokenizer = Tokenizer.from_pretrained(directory, 512)
    inputs = load.image_prompt(c, policy, directory, tokenizer)
    rows = []
    for image in scenes:
        data = io.BytesIO()
        image.save(data, "PNG")
        rows.append(inputs(digits.Record("x", data.getvalue(), ())))
    batch = jax.tree.map(lambda *a: np.stack(a), *rows)
    return policy, hf.load_params(directory, policy), batch, tokenizer


@pytest.fixture(scope="module")
def theirs(scenes):
    """(model, inputs of each image), made by transformers alone."""
    model, inputs, _ = served(POLICY, scenes)
    return model, inputs


def test_policy_logits_equal_transformers(ours, theirs):
    policy, params, batch, _ = ours
    model, inputs = theirs

    def logits(params):
        trunk = policy.trunk(params, batch["images"], batch["prompt"])
        return policy.logits(params, trunk.hidden)

    ours_logits = np.asarray(jax.jit(logits)(params))
    assert len({i["input_ids"].shape for i in inputs}) >= 3  # images of unequal size
    for row, mask, arguments in zip(ours_logits, batch["prompt"].mask, inputs, strict=True):
        with torch.no_grad():
            expected = model(**arguments).logits[0].numpy()
        assert np.max(np.abs(row[mask] - expected)) <= 1e-4


def test_greedy_captions_equal_generate(ours, theirs):
    policy, params, batch, tokenizer = ours
    model, inputs = theirs
    greedy = Sampling(max_tokens=24, temperature=0.0)
    decoding, valid = Decoding(1, tokenizer.stop, greedy), np.ones(4, bool)
    images, key = Batch(batch["images"], batch["prompt"], None, valid), jax.random.key(0)
    write = jax.jit(lambda params: rollout(policy, params, images, decoding=decoding, key=key))
    captions = write(params)
    rows = zip(captions.tokens[:, 0], captions.mask[:, 0], inputs, strict=True)
    for tokens, mask, arguments in rows:
        written = model.generate(**arguments, do_sample=False, max_new_tokens=24)
        expected = written[0, arguments["input_ids"].shape[1] :].tolist()
        assert np.asarray(tokens)[np.asarray(mask)].tolist() == expected
        assert tokenizer.decode(expected).startswith("digits: ")


def test_judge_logits_equal_transformers():
    model = Qwen2ForCausalLM.from_pretrained(JUDGE).eval().float()
    judge = families.build(hf.read_config(JUDGE))
    params = {"params": hf.load_params(JUDGE, judge)["decoder"]}
    tokenizer = Tokenizer.from_pretrained(JUDGE, 512)
    ids = np.asarray([tokenizer.encode("digits: north red three, total one\nWhich digit")])
    decoder = judge.decoder
    x = decoder.apply(params, ids, method=Decoder.embed)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden, _ = decoder.apply(params, x, positions, jnp.ones(ids.shape, bool))
    logits = decoder.apply(params, hidden, method=Decoder.logits)
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    assert np.max(np.abs(np.asarray(logits) - expected)) <= 1e-4
