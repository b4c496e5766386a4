"""Timings of a config's step by phase, with random weights of real shapes on this device.

Every phase is compiled alone, and the whole step too. Beside each time stands the roofline of its
work: its FLOPs and memory traffic, read from the compiled program, at the rates that a large matrix
product and a large copy reach on this device in the same run. Work that stays in a cache, as in
tiny configs, beats that roofline. HFU is a phase's share of the large product's FLOP/s, with
recomputation counted. MFU doesn't count work that the update computes twice (bench/model_flops.py);
it is a share of the chip's published FLOP/s where they are known.

Captions are as long as drawn lengths say (bench/lengths.py), whatever the random weights would say.
Where they are shorter than the limit, the compiled program's work is scaled by the share of its
FLOPs that such captions take, reckoned from shapes (bench/padding.py), which gives padding's share
too. A plan counts each stage of the decode loop once, and captions as long as the limit.
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
import numpy as np

from caprl_jax.bench import decoding, model_flops, padding, synthetic
from caprl_jax.bench import lengths as lengths_lib
from caprl_jax.bench.lengths import Lengths
from caprl_jax.config import validate
from caprl_jax.decode import loop
from caprl_jax.parallel import hardware
from caprl_jax.parallel.hardware import Chip
from caprl_jax.parallel.jit import bind
from caprl_jax.parallel.slices import split
from caprl_jax.plan import roofline, shapes
from caprl_jax.plan.hlo import costs
from caprl_jax.plan.shapes import AbstractStep
from caprl_jax.rl import rollout
from caprl_jax.rl import update as update_lib
from caprl_jax.rl.advantages import advantage
from caprl_jax.rl.judge import judge
from caprl_jax.rl.rewards import reward
from caprl_jax.rl.step import caprl_step
from caprl_jax.rl.types import Batch, Rollout, Scored
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import fit

PHASES = ("prefill", "decode", "score", "update", "step")


@dataclasses.dataclass
class Timing:
    """The timing of one phase.

    Attributes:
      seconds: seconds that a step spends on it, for each repetition.
      compile_seconds: seconds of the compilation.
      tokens: number of tokens that it reads or writes, without padding. In a step each caption
        counts its own prompt, as others count (EasyR1).
      generated: number of tokens of captions.
      roofline: its work, and the seconds that the measured ceilings allow it.
      temporaries: bytes that it holds besides arguments and results.
      mfu: FLOPs without recomputation, per second of the median, over the chip's peak.
      padding: padding's share of its FLOPs.
      wasted: share of the decode loop's tokens that are no caption's.
    """

    seconds: list[float]
    compile_seconds: float
    tokens: float
    generated: float
    roofline: roofline.Roofline
    temporaries: int
    mfu: float
    padding: float
    wasted: float | None = None

    @property
    def median(self) -> float:
        """Returns the median of the seconds."""
        return statistics.median(self.seconds)


def seconds_of(run: Callable[[], Any], repeats: int) -> list[float]:
    """Times run() until its results are ready, after one run that isn't counted."""
    jax.block_until_ready(run())
    out = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - began)
    return out


def ceilings(dtype: Any, repeats: int = 5) -> Chip:
    """Measures the device's ceilings: a large matrix product, and a copy of a large array."""
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    n, m = (2048, 2**26) if cpu else (8192, 2**30)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = min(seconds_of(functools.partial(jax.jit(jnp.matmul), a, a), repeats))
    # Copies into the same memory: the system of a CPU clears new memory first, which takes longer.
    held, move = [jnp.zeros(m // 4, jnp.float32)], jax.jit(lambda v: v + 1, donate_argnums=0)

    def moved():
        held[0] = move(held[0])
        return held[0]

    copy = min(seconds_of(moved, repeats))
    known = hardware.chip(device)
    link = known.link_bytes if known else float("inf")
    return Chip(device.device_kind, 2 * n**3 / product, 0.0, 2 * m / copy, link)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase to be timed.

    Attributes:
      name: one of PHASES.
      function: the function to be jitted.
      args: the function's arguments.
      tokens: number of tokens that it reads or writes.
      runs: number of times that a step runs it.
    """

    name: str
    function: Callable
    args: tuple
    tokens: float
    runs: int


def phases(
    config: ml_collections.ConfigDict, built: AbstractStep, drawn: np.ndarray
) -> Iterator[Phase]:
    """Yields the phases of a step, each with arguments from the phases before.

    A batch that is captioned in slices is prefilled and decoded in such slices here too; one slice
    is timed, and stands for the others.

    Args:
      config: a settled config.
      built: its step.
      drawn: int32 [b, g], lengths of the captions.
    """
    cuts, count = compile_lib.slices(config), compile_lib.slices(config).rollout
    run, state, batch = synthetic.step(config, built, drawn)
    policy, key = run.learner.policy, jax.random.key(0)
    b, g = drawn.shape
    written = float(drawn.sum())
    p, asked = config.data.max_prompt, config.caprl.questions * config.data.max_question
    first = batch
    if count > 1:
        cut = jax.jit(lambda whole: jax.tree.map(lambda a: a[0], split(whole, count)))
        first = cut(batch)

    def bound(function):
        return bind(function, built.rules, cuts)

    def prefill(params, batch):
        with jax.named_scope("prefill"):
            return rollout.prefill(policy, params, batch.images, batch.prompt)

    def decode(params, trunk, limits, key):
        return loop.decode(policy, params, trunk, decoding=run.decoding, valid=limits, key=key)

    def score(model, captions, questions, key):
        return judge(model, captions, questions, judging=run.judging, key=key)

    def update(run, state, batch, captions, verdicts):
        scored = Scored(batch, captions, verdicts, run.models)
        rewards = reward(run.rewards, scored)
        advantages = advantage(run.advantage, rewards, batch.valid)
        return update_lib.update(
            run.learner, state, batch, captions=captions, advantages=advantages
        )

    prefill, decode, score, update = map(bound, (prefill, decode, score, update))
    yield Phase("prefill", prefill, (state.params, first), b * p, count)
    trunk = jax.jit(prefill)(state.params, first)
    args = state.params, trunk, first.extras[lengths_lib.LIMITS], key
    yield Phase("decode", decode, args, written, count)
    captions = _of_lengths(jax.jit(decode)(*args), batch)
    del trunk, first, args
    args = run.judge, captions, batch.questions, key
    yield Phase("score", score, args, written + b * g * asked, 1)
    verdicts = jax.jit(score)(*args)
    args = run, state, batch, captions, verdicts
    yield Phase("update", update, args, b * p + written, 1)
    yield Phase("step", bound(caprl_step), (run, state, batch, key), b * g * p + written, 1)


def _of_lengths(part: Rollout, batch: Batch) -> Rollout:
    """Repeats one slice's captions for the whole batch, with the batch's own lengths."""
    limits = batch.extras[lengths_lib.LIMITS]
    count = len(limits) // len(part.tokens)
    whole = jax.tree.map(lambda a: jnp.concatenate([a] * count), part)
    place = jnp.arange(part.tokens.shape[-1])[None, None]
    return whole.replace(mask=place < limits[..., None], length=limits)


def measure(
    config: ml_collections.ConfigDict,
    wanted: tuple[str, ...],
    repeats: int,
    lengths: Lengths | None = None,
) -> dict[str, Timing]:
    """Times the wanted phases.

    The state is not donated, so that a phase can be repeated: a run needs less memory.

    Args:
      config: the run's. Keys that it leaves open are chosen for the devices, in place.
      wanted: some of PHASES.
      repeats: repeats of each.
      lengths: distribution of the captions' lengths; None: all have the limit.

    Raises:
      ConfigError: the config is invalid.
    """
    validate(config)
    fit.settle(config, jax.devices())
    built = shapes.build(config, jax.devices())
    drawn = synthetic.caption_lengths(config, lengths)
    top = ceilings(compile_lib.compute_dtype(config))
    needed = model_flops.update(config, built) / built.rules.mesh.size
    known = hardware.chip(jax.devices()[0])
    peak = known.flops if known else top.flops
    parts = padding.of_config(config, built, drawn)
    planned = padding.of_config(config, built, drawn, planned=True)
    out = {}
    for phase in phases(config, built, drawn):
        if phase.name not in wanted:
            continue
        began = time.perf_counter()
        compiled = jax.jit(phase.function).lower(*phase.args).compile()
        took = time.perf_counter() - began
        found = roofline.phases(
            costs.hlo_text(compiled), top, config.sampling.max_tokens, built.policy.vision.config
        )
        seconds = seconds_of(functools.partial(compiled, *phase.args), repeats)
        done = parts[phase.name].computed / planned[phase.name].computed
        work = roofline.together([*found.values()] * phase.runs).scaled(done)
        useful = work.flops
        if updating := found["update"].flops:
            useful += done * (needed - updating)
        out[phase.name] = Timing(
            seconds=[phase.runs * s for s in seconds],
            compile_seconds=took,
            tokens=phase.tokens,
            generated=float(drawn.sum()),
            roofline=work,
            temporaries=compiled.memory_analysis().temp_size_in_bytes,
            mfu=useful / peak / (phase.runs * statistics.median(seconds)),
            padding=parts[phase.name].share,
            wasted=_wasted(config, built, drawn) if phase.name == "decode" else None,
        )
    return out


def _wasted(config: ml_collections.ConfigDict, built: AbstractStep, drawn: np.ndarray) -> float:
    """Returns the share of the decode loop's tokens that are no caption's."""
    cuts, devices = compile_lib.slices(config), built.rules.size("images")
    turns = decoding.of_slices(drawn, config.sampling.max_tokens, cuts, devices)
    return float(1 - drawn.sum() / turns.tokens)


def tell(timings: dict[str, Timing]) -> str:
    """Formats the timings as a table."""
    lines = [
        f"{'phase':9}{'ms':>10}{'spread':>8}{'tokens/s':>11}{'TFLOP/s':>9}{'GB/s':>8}"
        f"{'HFU':>6}{'MFU':>6}{'padding':>8}{'roofline ms':>12}{'reached':>9}  {'bound by':9}"
        f"{'compile s':>10}{'temp GiB':>9}"
    ]
    for name, t in timings.items():
        spread = (max(t.seconds) - min(t.seconds)) / t.median
        lines.append(
            f"{name:9}{1e3 * t.median:10.1f}{spread:8.0%}{t.tokens / t.median:11,.0f}"
            f"{t.roofline.flops / t.median / 1e12:9.2f}{t.roofline.hbm_bytes / t.median / 1e9:8.1f}"
            f"{t.roofline.seconds['compute'] / t.median:6.0%}{t.mfu:6.0%}{t.padding:8.1%}"
            f"{1e3 * t.roofline.time:12.1f}{t.roofline.time / t.median:9.0%}  {t.roofline.bound:9}"
            f"{t.compile_seconds:10.1f}{t.temporaries / 2**30:9.2f}"
        )
        if t.wasted:
            lines.append(f"  {t.wasted:.0%} of its tokens are no caption's")
        if t.roofline.uncounted:
            lines.append(f"  without the work of {', '.join(sorted(set(t.roofline.uncounted)))}")
    if "step" in timings:
        t = timings["step"]
        lines.append(
            f"a step: {t.tokens / t.median:,.0f} tokens/s as others count, each caption with its "
            f"prompt; {t.generated / t.median:,.0f} generated tokens/s"
        )
    return "\n".join(lines)
