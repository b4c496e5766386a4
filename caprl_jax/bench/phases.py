"""Times a config's step, phase by phase, with random weights of the real shapes on this device.

Every phase is compiled alone, and the step whole. Beside each time stands the floor of its work:
its FLOPs and memory traffic, read from the compiled program, at the rates that a large matrix
product and a large copy reach on this device in the same run. What stays in a cache beats that
floor: tiny configs do. HFU is what a phase reaches of the large product's FLOP/s, recomputation
counted; MFU what it reaches without what the update computes twice (bench/model_flops.py), of the
chip's published FLOP/s where they are known. With natural lengths the work is still that of
captions as long as they may be (with caprl.buckets less is done, and HFU and MFU are too high),
and which share of decoding's slots waited is told.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.bench import model_flops, synthetic
from caprl_jax.config import validate
from caprl_jax.decode import scheduling as slots
from caprl_jax.decode.sampling import Sampling
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel import hardware as chips
from caprl_jax.parallel.hardware import Chip
from caprl_jax.plan import roofline as floors
from caprl_jax.plan import shapes as abstract
from caprl_jax.plan.hlo import costs as hlo_costs
from caprl_jax.rl import rollout, step
from caprl_jax.run import compile as programs

PHASES = ("prefill", "decode", "score", "update", "step")


@dataclasses.dataclass
class Timing:
    """One phase.

    Attributes:
      seconds: of each repetition, that a step spends on it.
      compile_seconds: once.
      tokens: that it reads or writes.
      floor: its work, and the seconds that the measured ceilings allow it.
      temporaries: bytes that it holds beside arguments and results.
      mfu: FLOPs without what is computed twice, a second of the median, over the chip's peak.
      wasted: of decoding natural lengths, the share of slots that waited for longer captions.
    """

    seconds: list[float]
    compile_seconds: float
    tokens: float
    floor: floors.Floor
    temporaries: int
    mfu: float
    wasted: float | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def seconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
    """Times of run() until its results are there, after one that isn't counted."""
    jax.block_until_ready(run())
    out = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - began)
    return out


def ceilings(dtype: Any, repeats: int = 5) -> Chip:
    """What this device reaches: a large matrix product, and a copy of a large array."""
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    n, m = (2048, 2**26) if cpu else (8192, 2**30)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = min(seconds_of(functools.partial(jax.jit(jnp.matmul), a, a), repeats))
    # Into the same memory: a CPU's system would clear new memory first, which takes longer.
    held, move = [jnp.zeros(m // 4, jnp.float32)], jax.jit(lambda v: v + 1, donate_argnums=0)

    def moved():
        held[0] = move(held[0])
        return held[0]

    copy = min(seconds_of(moved, repeats))
    known = chips.chip(device)
    link = known.link_bytes if known else float("inf")
    return Chip(device.device_kind, 2 * n**3 / product, 0.0, 2 * m / copy, link)


def phases(
    config: ml_collections.ConfigDict, built: abstract.AbstractStep, stop: tuple[int, ...]
) -> Iterator[tuple[str, Callable, tuple, float, int]]:
    """(name, function to jit, arguments, tokens, runs a step) of each phase, fed by those before.

    A batch that is captioned in pieces is prefilled and decoded in such pieces here too; one is
    timed, and stands for the others.
    """
    p, constants = built.parts, programs.settings(config)
    on, sampling = p.layout, Sampling(**config.sampling)
    batch = synthetic.batch(config, built)
    state = synthetic.state(built)
    frozen = synthetic.frozen(built, state.params)
    key = jax.random.key(0)
    b, g, t = config.data.batch, config.caprl.group, config.sampling.max_tokens
    asked = config.caprl.questions * config.data.max_question
    pieces = constants.rollout_batches
    first = batch
    if pieces > 1:
        first = jax.jit(lambda whole: jax.tree.map(lambda a: a[0], logical.split(whole, pieces)))(
            batch
        )

    def prefill(params, batch):
        of = p.policy, params, batch.images, batch.prompt
        with logical.using(on), jax.named_scope("prefill"):
            if constants.reuse == "none":
                return rollout.prefill(*of, constants.prefills), None
            reading = rollout.read(*of)
            return reading.trunk, reading

    def decode(params, trunk, key):
        valid = jnp.ones(b // pieces, bool)
        keep = constants.reuse == "rollout"
        return rollout.sample_after(
            p.policy, params, trunk, key, g, stop, sampling, on, valid, keep, constants.slots
        )

    def score(frozen, captions, questions, key):
        return step.judged(
            p.judge, constants, frozen, captions.tokens, captions.mask, questions, key, on
        )

    def update(state, frozen, batch, captions, verdicts, reading):
        return step.learn(
            p.policy, p.optimizer, constants, state, frozen, batch, captions, verdicts, on, reading
        )

    yield "prefill", prefill, (state.params, first), b * config.data.max_prompt, pieces
    trunk, reading = jax.jit(prefill)(state.params, first)
    yield "decode", decode, (state.params, trunk, key), b * g * t, pieces
    captions, known = jax.jit(decode)(state.params, trunk, key)
    reading = reading and reading.replace(known=known)
    del trunk, first, known
    if pieces > 1:
        captions = jax.tree.map(lambda a: jnp.concatenate([a] * pieces), captions)
    written = float(jnp.sum(captions.length))
    yield "score", score, (frozen, captions, batch.questions, key), written + b * g * asked, 1
    verdicts = jax.jit(score)(frozen, captions, batch.questions, key)
    learned = b * config.data.max_prompt + written
    yield "update", update, (state, frozen, batch, captions, verdicts, reading), learned, 1
    del reading
    whole = b * g * config.data.max_prompt + written  # as EasyR1 counts: each with its prompt
    yield "step", _step(config, built, stop), (state, frozen, batch, key), whole, 1


def _step(config, built: abstract.AbstractStep, stop) -> Callable:
    p = built.parts
    return functools.partial(
        step.caprl_step, p.policy, p.judge, p.optimizer, programs.settings(config),
        Sampling(**config.sampling), stop, layout=p.layout,
    )  # fmt: skip


def measure(
    config: ml_collections.ConfigDict, wanted: tuple[str, ...], repeats: int, natural: bool
) -> dict[str, Timing]:
    """Times the wanted phases.

    The state is not donated, so that a phase can be repeated: a run needs less memory.

    Raises:
      ConfigError: the config can't be.
    """
    validate(config)
    built = abstract.build(config, jax.devices())
    vocab = built.parts.policy.decoder.config.vocab
    # Random weights end a caption with any token alike: as many stop tokens as make its mean
    # length half of the bucket.
    count = max(1, round(2 * vocab / config.sampling.max_tokens)) if natural else 0
    stop = tuple(range(count)) if natural else (vocab,)
    top = ceilings(programs.compute_dtype(config))
    out = {}
    c = config.caprl
    turns = slots.most_turns(c.group, c.slots, config.sampling.max_tokens)
    needed = model_flops.update(config, built) / built.parts.layout.mesh.size
    known = chips.chip(jax.devices()[0])
    peak = known.flops if known else top.flops
    for name, function, args, tokens, runs in phases(config, built, stop):
        if name not in wanted:
            continue
        began = time.perf_counter()
        compiled = jax.jit(function).lower(*args).compile()
        took = time.perf_counter() - began
        text, vision = hlo_costs.hlo_text(compiled), built.parts.policy.vision.config
        found = floors.phases(text, top, turns, vision)
        seconds = seconds_of(functools.partial(compiled, *args), repeats)
        work = floors.together([*found.values()] * runs)
        useful = work.flops
        if updating := found["update"].flops:
            useful += needed - updating
        out[name] = Timing(
            [runs * s for s in seconds], took, tokens, work,
            compiled.memory_analysis().temp_size_in_bytes,
            useful / peak / (runs * statistics.median(seconds)),
        )  # fmt: skip
        if natural and name == "decode":
            out[name].wasted = _wasted(compiled(*args)[0].length, c.slots)
    return out


def _wasted(length: jax.Array, count: int) -> float:
    """Of captions drawn at once, in so many slots an image."""
    waited, whole = slots.wasted(length, jnp.ones(len(length), bool), 1, count)
    return float(waited / whole)


def tell(timings: dict[str, Timing]) -> str:
    """The timings as a table."""
    lines = [
        f"{'phase':9}{'ms':>10}{'spread':>8}{'tokens/s':>11}{'TFLOP/s':>9}{'GB/s':>8}"
        f"{'HFU':>6}{'MFU':>6}{'floor ms':>10}{'reached':>9}  {'bound by':9}{'compile s':>10}"
        f"{'temp GiB':>9}"
    ]
    for name, t in timings.items():
        spread = (max(t.seconds) - min(t.seconds)) / t.median
        lines.append(
            f"{name:9}{1e3 * t.median:10.1f}{spread:8.0%}{t.tokens / t.median:11,.0f}"
            f"{t.floor.flops / t.median / 1e12:9.2f}{t.floor.hbm_bytes / t.median / 1e9:8.1f}"
            f"{t.floor.seconds['compute'] / t.median:6.0%}{t.mfu:6.0%}"
            f"{1e3 * t.floor.floor:10.1f}{t.floor.floor / t.median:9.0%}  {t.floor.bound:9}"
            f"{t.compile_seconds:10.1f}{t.temporaries / 2**30:9.2f}"
        )
        if t.wasted is not None:
            lines.append(f"  {t.wasted:.0%} of its slots waited for longer captions")
        if t.floor.uncounted:
            lines.append(f"  without the work of {', '.join(sorted(set(t.floor.uncounted)))}")
    return "\n".join(lines)
