"""Comparison of captions drawn by this project's rollout and by transformers' generate()."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np
import torch
from transformers import CompileConfig

from caprl_jax.bench import peers, torch_models
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.drawn import Ours, parameters
from caprl_jax.bench.machine import facts
from caprl_jax.bench.peers import Checked, Comparison, Pairs
from caprl_jax.bench.work import Work

_GREEDY = 8  # number of tokens that are compared


class Theirs:
    """generate() of transformers, in each of its ways to draw many captions per image."""

    def __init__(self, work: Work):
        """Reads the weights."""
        self.model, self.inputs = torch_models.policy(work), torch_models.inputs(work)
        self._group = work.config.caprl.group
        compiled = CompileConfig(fullgraph=False, dynamic=False)
        compiled._compile_all_devices = True  # transformers excludes CPUs by default
        plain = functools.partial(self._plain, use_cache=True)
        static = functools.partial(plain, cache_implementation="static")
        self.ways = {
            "num_return_sequences": plain,
            "num_return_sequences, static": functools.partial(static, disable_compile=True),
            "num_return_sequences, static, torch.compile": functools.partial(
                static, compile_config=compiled
            ),
            "prompt read once": self._from_one_prompt,
        }

    def _drawn(self, tokens: int, sample: bool, **options) -> np.ndarray:
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        # Without an end-of-sequence id, no token is compared with one: this is the quickest way to
        # draw exactly this many.
        out = self.model.generate(
            **options,
            **(how if sample else {"do_sample": False}),
            max_new_tokens=tokens,
            min_new_tokens=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, self.inputs["input_ids"].shape[1] :].numpy()

    def _plain(self, tokens: int, sample: bool = True, **options) -> np.ndarray:
        if not sample:  # greedy captions of an image are all the same; only beams repeat them
            return self._drawn(tokens, sample, **self.inputs, **options)
        return self._drawn(
            tokens, sample, **self.inputs, num_return_sequences=self._group, **options
        )

    def _from_one_prompt(self, tokens: int, sample: bool = True) -> np.ndarray:
        """Reads all but the prompt's last token once per image; generate() continues from there."""
        ids, g = self.inputs["input_ids"], self._group
        texts = ("input_ids", "attention_mask", "mm_token_type_ids")
        before = {k: a[:, :-1] if k in texts else a for k, a in self.inputs.items()}
        with torch.inference_mode():
            cache = self.model(**before, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(g)
            inner = self.model.model
            inner.rope_deltas = inner.rope_deltas.repeat_interleave(g, dim=0)
            ids = ids.repeat_interleave(g, dim=0)
            return self._drawn(
                tokens, sample, input_ids=ids, attention_mask=torch.ones_like(ids), cache=cache
            )

    def greedy(self, tokens: int) -> np.ndarray:
        """Draws greedy captions: int [b, tokens]."""
        return self._plain(tokens, sample=False)


def checks(work: Work, ours: Ours, theirs: Theirs) -> list[Checked]:
    """Returns the checks on which both sides must agree before they are timed."""
    config, prompt = work.config, work.prompt
    ids = theirs.inputs["input_ids"].numpy()
    features = ids == work.filler.image_token
    found = [
        Checked("parameters", parameters(ours.params), torch_models.weights(theirs.model)),
        Checked("prompt tokens", int(prompt.mask.sum()), ids.size),
        Checked("prompt tokens with padding", prompt.mask.size, ids.size),
        Checked("image features", int((prompt.feature >= 0).sum()), int(features.sum())),
        Checked("patches", int(work.images.mask.sum()), len(theirs.inputs["pixel_values"])),
        Checked("patches with padding", work.images.mask.size, len(theirs.inputs["pixel_values"])),
    ]
    if all(c.same for c in found):
        found += [Checked("prompt ids that differ", int((prompt.tokens != ids).sum()), 0)]
    peers.require_same(found)
    logits = (
        work_lib.first_logits(work, ours.params),
        torch_models.first_logits(theirs.model, theirs.inputs),
    )
    greedy = np.asarray(ours(_GREEDY, 0.0).tokens)[:, 0]
    agree = int((greedy == theirs.greedy(_GREEDY)).sum())
    t = config.sampling.max_tokens
    drawn = ours(t)
    found += [
        peers.relative_difference("logits after the prompt", *logits, 1e-3),
        Checked(f"greedy tokens that agree, of {greedy.size}", agree, greedy.size),
        Checked("captions", int(np.prod(drawn.length.shape)), work.captions),
        Checked("tokens drawn", int(drawn.length.sum()), work.captions * t),
    ]
    peers.require_same(found)
    return found


@dataclasses.dataclass
class Took:
    """Seconds of one of their ways: the first time, when warm, and for one token."""

    first: float
    whole: float
    one: float

    def __str__(self) -> str:
        """Formats the seconds for the table."""
        return f"{self.whole:.2f} s, decode {self.whole - self.one:.2f}; first {self.first:.1f}"


def try_ways(theirs: Theirs, work: Work) -> dict[str, Took | str]:
    """Times each of their ways to draw the batch's captions, or reports its failure.

    Raises:
      WorkDiffers: a way draws another number of tokens than asked.
    """
    t, found = work.config.sampling.max_tokens, {}
    for name, way in theirs.ways.items():
        drawn = []

        def run(tokens, way=way, drawn=drawn):
            return peers.seconds(lambda: drawn.append(way(tokens).shape))

        try:
            first, whole, _, one = run(t), run(t), run(1), run(1)
        except Exception as e:  # for example, there is no compiler
            found[name] = f"fails here: {type(e).__name__}: {str(e).splitlines()[0][:80]}"
            continue
        peers.require_same([Checked(f"{name}: tokens", (work.captions, t), drawn[1])])
        found[name] = Took(first, whole, one)
    return found


def compare(config: ml_collections.ConfigDict, folder: Path, repeats: int) -> Comparison:
    """Checks, then times in turns: their plainest way, their quickest, and the best at decoding.

    Models that the config names by size alone are made in folder.

    Raises:
      WorkDiffers: the two sides don't do the same work.
    """
    peers.keep_memory()
    work = work_lib.make(config, folder)
    ours, theirs = Ours(work), Theirs(work)
    checked, tried = checks(work, ours, theirs), try_ways(theirs, work)
    fine = {name: took for name, took in tried.items() if isinstance(took, Took)}
    chosen = (
        next(iter(theirs.ways)),
        min(fine, key=lambda n: fine[n].whole),
        min(fine, key=lambda n: fine[n].whole - fine[n].one),
    )
    pairs = {}
    for name in dict.fromkeys(chosen):
        whole, one = _in_turns(ours, theirs.ways[name], work.config.sampling.max_tokens, repeats)
        pairs |= {
            f"{name}: all": whole,
            f"{name}: of it decode": whole.minus(one),
            f"{name}: vision and prefill": one,
        }
    told = {name: str(took) for name, took in tried.items()}
    return Comparison(facts(work), checked, told, pairs)


def _in_turns(ours: Ours, theirs: Callable, tokens: int, repeats: int) -> tuple[Pairs, Pairs]:
    """Returns (pairs with this many tokens, pairs with one)."""
    found = {tokens: Pairs(), 1: Pairs()}
    for t in found:
        jax.block_until_ready(ours(t))
    for swapped in peers.in_turns(repeats):
        for t, pair in found.items():
            sides = [(pair.ours, ours), (pair.theirs, theirs)]
            for times, side in sides[::-1] if swapped else sides:
                times.append(peers.turn(lambda side=side, t=t: side(t)))
    return found[tokens], found[1]
