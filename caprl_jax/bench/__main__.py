"""Times a config's step on this device, phase by phase, with random weights.

python -m caprl_jax.bench --config=configs/3b.py:h200 [--phases=prefill,decode,score,update,step]
    [--repeats=5] [--lengths=fixed|natural|MEAN,DEVIATION] [--json=FILE]
python -m caprl_jax.bench --config=FILE --scaling=group,caption,questions,image [--repeats=5]
    [--json=FILE]    (how the cost grows with captions, their tokens, questions, image tokens)
python -m caprl_jax.bench --config=FILE --images [--repeats=5]    (the data pipeline alone)
python -m caprl_jax.bench --config=configs/3b.py --naive    (runs nothing: what the tree saves)
python -m caprl_jax.bench --config=configs/3b.py:h200 --padding --lengths=natural    (runs nothing)
python -m caprl_jax.bench --config=configs/peers.py --peer=transformers|trl [--models=DIR]
    [--repeats=5] [--json=FILE]
python -m caprl_jax.bench --config=configs/peers.py --peer=vllm --vllm_python=VENV/bin/python
    [--lengths=natural] [--models=DIR] [--repeats=5] [--json=FILE]

The last two compare with another library, on the same weights and work (bench/peers.py).
Without --peer and --images it needs JAX, Flax, optax, ml_collections and absl only.
"""

import dataclasses
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags

from caprl_jax.bench import lengths, naive, padding, peers, scaling, synthetic
from caprl_jax.bench.phases import PHASES, measure, tell
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, parse_config_flags
from caprl_jax.config import validate
from caprl_jax.errors import ConfigError
from caprl_jax.plan import shapes
from caprl_jax.run import fit


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_list("phases", ",".join(PHASES), f"Some of {', '.join(PHASES)}.")
    flags.DEFINE_integer("repeats", 5, "Repeats of each phase.", lower_bound=1)
    flags.DEFINE_string(
        "lengths",
        "fixed",
        "Tokens of captions: fixed (the limit), natural (log-normal; mean 500 and deviation 300 of "
        "4096, in proportion for other limits), or MEAN,DEVIATION.",
    )
    flags.DEFINE_list(
        "scaling", [], f"Time at several sizes of these: {', '.join(scaling.SWEEPS)}."
    )
    flags.DEFINE_bool("naive", False, "Compare the step's work with a step that shares nothing.")
    flags.DEFINE_bool("padding", False, "Reckon padding's share of each phase's FLOPs.")
    flags.DEFINE_bool("images", False, "Time the data pipeline alone.")
    flags.DEFINE_enum("peer", None, list(peers.NEEDS), "Compare with this library instead.")
    flags.DEFINE_string("vllm_python", None, "Python of an environment with vLLM's CPU build.")
    flags.DEFINE_string("models", None, "Where a peer's random models lie; default temporary.")
    flags.DEFINE_string("json", None, "Where to write the figures as JSON too.")


def main(_: list[str]) -> None:
    """Measures and prints."""
    config = flags.FLAGS.config
    with in_one_paragraph():
        if flags.FLAGS.naive:
            print(naive.tell(naive.compare(config)))
        elif flags.FLAGS.padding:
            reckon_padding(config)
        elif flags.FLAGS.images:
            from caprl_jax.bench import images  # it reads models and data, which phases don't need

            pace = images.measure(config, flags.FLAGS.repeats)
            print(images.tell(pace))
            write(dataclasses.asdict(pace) | {"images_a_second": pace.images_a_second})
        elif flags.FLAGS.peer:
            compare(config, flags.FLAGS.peer, flags.FLAGS.repeats)
        elif flags.FLAGS.scaling:
            scale(config, tuple(flags.FLAGS.scaling), flags.FLAGS.repeats)
        else:
            time_phases(config, tuple(flags.FLAGS.phases), flags.FLAGS.repeats)


def require_known(flag: str, wanted: Collection[str], known: Collection[str]) -> None:
    """Raises ConfigError if a flag names something unknown."""
    if unknown := set(wanted) - set(known):
        raise ConfigError(f"--{flag}: {', '.join(unknown)} is none of {', '.join(known)}")


def write(found: Any) -> None:
    """Writes the file of --json, if it is given."""
    if flags.FLAGS.json:
        Path(flags.FLAGS.json).write_text(json.dumps(found, indent=2, default=str))


def time_phases(config: ml_collections.ConfigDict, wanted: tuple[str, ...], repeats: int) -> None:
    """Times phases and prints the results."""
    require_known("phases", wanted, PHASES)
    wished = lengths.parse(flags.FLAGS.lengths, config.sampling.max_tokens)
    timings = measure(config, wanted, repeats, wished)
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, JAX {jax.__version__}")
    described = lengths.tell(wished, synthetic.caption_lengths(config, wished))
    print(described)
    print(tell(timings))
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        print(f"peak memory {stats['peak_bytes_in_use'] / 2**30:.2f} GiB")
    also = {"lengths": described}
    write({n: dataclasses.asdict(t) | {"median": t.median} | also for n, t in timings.items()})


def reckon_padding(config: ml_collections.ConfigDict) -> None:
    """Reckons padding's share of FLOPs at the lengths that are asked for, and prints it."""
    validate(config)
    fit.settle(config, jax.devices())
    wished = lengths.parse(flags.FLAGS.lengths, config.sampling.max_tokens)
    drawn = synthetic.caption_lengths(config, wished)
    found = padding.of_config(config, shapes.build(config, jax.devices()), drawn)
    print(f"{lengths.tell(wished, drawn)}\n{padding.tell(found)}")
    write({n: dataclasses.asdict(part) | {"share": part.share} for n, part in found.items()})


def scale(config: ml_collections.ConfigDict, wanted: tuple[str, ...], repeats: int) -> None:
    """Times the step at several sizes and prints; results are written after each size."""
    require_known("scaling", wanted, scaling.SWEEPS)
    found = {}
    for name in wanted:

        def done(sweep, name=name):
            found[name] = sweep
            took = sweep.seconds("step")[-1]
            print(f"{sweep.what} {sweep.sizes[-1]}: a step takes {took:.3g} s", flush=True)
            write(scaling.as_json(found))

        print(scaling.tell(scaling.measure(config, name, repeats, done=done)), flush=True)


def compare(config: ml_collections.ConfigDict, peer: str, repeats: int) -> None:
    """Compares with a peer and prints the results."""
    peers.require_installed(peer)
    peers.require_cpu()
    validate(config)
    fit.settle(config, jax.devices())
    wished = lengths.parse(flags.FLAGS.lengths, config.sampling.max_tokens)
    if wished is not None and peer != "vllm":
        raise ConfigError(f"--peer={peer} draws captions of one length: leave out --lengths")
    if peer == "vllm" and not flags.FLAGS.vllm_python:
        raise ConfigError("--peer=vllm needs --vllm_python=VENV/bin/python (bench/README.md)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.FLAGS.models or temporary)
        if peer == "vllm":  # each reads models and data, which phases don't need
            from caprl_jax.bench import vllm_peer

            found = vllm_peer.compare(config, folder, repeats, wished, flags.FLAGS.vllm_python)
        elif peer == "trl":
            from caprl_jax.bench import trl_peer

            found = trl_peer.compare(config, folder, repeats)
        else:
            from caprl_jax.bench import generate_peer

            found = generate_peer.compare(config, folder, repeats)
    print(peers.tell(found))
    write(found.as_json())


if __name__ == "__main__":
    define_flags()
    cli.run(main, parse_config_flags)
