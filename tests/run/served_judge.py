"""The shipped judge as an endpoint would serve it: by its chat template, in text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.data.questions import JudgePrompt, own_prompt
from caprl_jax.data.records import LETTERS
from caprl_jax.data.tokens import pad
from caprl_jax.models.hf import download as sources
from caprl_jax.parallel import mesh as mesh_lib
from caprl_jax.rl.judge import Judge, letter_logits
from caprl_jax.rl.types import Captions, Questions
from caprl_jax.run import load

JUDGE = sources.fetch("asset:tiny/judge")
TEMPLATE = own_prompt(JUDGE)
_CAPTION, _QUESTION = 80, 64  # tokens


@functools.cache
def _judge():
    rules = mesh_lib.shard_rules(mesh_lib.make_mesh({"fsdp": -1}, jax.devices()[:1]))
    model, directory, tokenizer = load.read_with_tokenizer(str(JUDGE), "", jnp.float32)
    params = load.load_frozen(model, directory, rules, jnp.float32)["decoder"]
    prompt = JudgePrompt.create(tokenizer, TEMPLATE)
    return prompt, jax.jit(letter_logits), Judge(model.decoder, params, prompt.instruction())


def logits(turn: str) -> dict[str, float]:
    """Log-probability of each letter after a user's turn."""
    prompt, run, judge = _judge()
    assert turn.startswith(prompt.before)
    caption, question = turn.removeprefix(prompt.before).rsplit(prompt.between, 1)
    ids = prompt.tokenizer.encode_caption(caption)
    tail = prompt.tokenizer.encode_around("", prompt.between + question, prompt.foot)
    captions = Captions(pad(ids, _CAPTION)[None, None], np.arange(_CAPTION)[None, None] < len(ids))
    one = np.ones((1, 1), np.int32)
    asked = Questions(
        pad(tail, _QUESTION)[None, None],
        np.arange(_QUESTION)[None, None] < len(tail),
        one,
        one,
        one,
    )
    found = jax.nn.log_softmax(run(judge, captions, asked)[0, 0, 0])
    return {f" {letter}": float(p) for letter, p in zip(LETTERS, found, strict=True)}


def answer(request: dict) -> tuple[str, dict[str, float]]:
    """The judge's answer to a request, with log-probabilities."""
    (turn,) = request["messages"]
    assert turn["role"] == "user" and request["max_tokens"] < 10
    found = logits(turn["content"])
    return max(found, key=found.get).strip(), found
