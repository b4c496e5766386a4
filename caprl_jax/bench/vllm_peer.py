"""Comparison of captions drawn by this project and by vLLM, which has its own environment.

vLLM runs in a process of its own (bench/vllm_worker.py), by the interpreter that --vllm_python
names. Both sides start from pictures, and read them and the prompts anew for each draw. vLLM shares
a prompt's keys and values between captions of an image by its prefix cache.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax.bench import lengths as lengths_lib
from caprl_jax.bench import peers, synthetic
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.drawn import Ours
from caprl_jax.bench.lengths import Lengths
from caprl_jax.bench.peers import Checked, Comparison, Pairs
from caprl_jax.bench.work import Work
from caprl_jax.errors import UserError

WORKER = Path(__file__).with_name("vllm_worker.py")
_CACHE = 1 << 30  # bytes; more than the captions of a comparison fill
_GREEDY = 8  # number of tokens that are compared
_LIKELIEST = 20  # the most that vLLM returns
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


class WorkerFailed(UserError):
    """Error of vLLM's process that ended or answered with something else than JSON."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Captions to be drawn.

    Attributes:
      lengths: int [b, g].
      temperature: of the softmax.
      logprobs: number of likeliest tokens whose log-probabilities are returned beside the drawn
        one's; None for no log-probabilities, 0 for the drawn one's.
      details: whether tokens are returned.
    """

    lengths: np.ndarray
    temperature: float = 1.0
    logprobs: int | None = None
    details: bool = False


class Theirs:
    """vLLM's process."""

    def __init__(self, work: Work, python: str, folder: Path):
        """Starts it, and waits until it is ready.

        Args:
          work: the work of both sides.
          python: the interpreter of an environment with vLLM.
          folder: pictures are written there.

        Raises:
          WorkerFailed: it ended.
        """
        c, paths = work.config, []
        for i, picture in enumerate(work.pictures):
            paths.append(str(folder / f"{i}.png"))
            picture.save(paths[-1])
        side = {"width": work.pictures[0].width, "height": work.pictures[0].height}
        setup = {
            "model": str(work.policy_path.resolve()),
            "pictures": paths,
            "text": work.text,
            "group": c.caprl.group,
            # vLLM starts with a picture of the largest size; without a size that takes minutes.
            "image": {"count": 1, **side},
            "tokens": c.data.max_prompt + c.sampling.max_tokens,
            "memory": _CACHE,
        }
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
        self._log = (folder / "vllm.log").open("w+")
        self._process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=kept | _ENVIRONMENT,
            process_group=0,  # of the same session, whose processes share their time
        )
        try:
            self.facts = self._ask(setup)
        except BaseException:  # also Ctrl-C, which doesn't reach a process group of its own
            self.close()
            raise

    def __call__(self, drawn: Drawn) -> dict[str, Any]:
        """Draws; returns the worker's answer."""
        return self._ask(dataclasses.asdict(drawn) | {"lengths": drawn.lengths.tolist()})

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops its processes meanwhile: vLLM's look for work even when they have none."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (ValueError, OSError) as e:
            self._log.seek(0)
            last = "\n".join(self._log.read().splitlines()[-15:])
            raise WorkerFailed(f"vLLM's process has failed; the end of its log:\n{last}") from e

    def close(self) -> None:
        """Ends the process, by force if it doesn't end by itself."""
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def checks(work: Work, ours: Ours, theirs: Theirs, lengths: np.ndarray) -> list[Checked]:
    """Returns the checks on which both sides must agree before they are timed."""
    b, g = lengths.shape
    answer = theirs(Drawn(np.full((b, g), _GREEDY), 0.0, _LIKELIEST, details=True))
    prompts = [tokens[mask].tolist() for tokens, mask in _rows(work)]
    greedy = np.asarray(ours(_GREEDY, 0.0).tokens)
    same = int((greedy == np.asarray(answer["ids"])).sum())
    logits = work_lib.first_logits(work, ours.params)
    likeliest = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    log_p = [
        (likeliest[i, int(token)], value)
        for i, tokens in enumerate(answer["likeliest"])
        for token, value in tokens.items()
    ]
    drawn = ours.from_pictures(lengths, work.config.sampling.max_tokens)
    wrong = sum(p != other for p, other in zip(prompts, answer["prompts"], strict=True))
    told = [
        Checked("prompts whose ids differ", wrong, 0),
        Checked("prompt tokens with padding", work.prompt.mask.size, sum(map(len, prompts))),
        peers.difference("log-probabilities after the prompt", *zip(*log_p, strict=True), 1e-3),
        Checked(f"greedy tokens that agree, of {greedy.size}", same, greedy.size),
        Checked("captions not as long as asked, ours", int((drawn.length != lengths).sum()), 0),
        Checked("tokens drawn", int(drawn.length.sum()), _drawn_tokens(theirs, lengths)),
    ]
    peers.require_same(told)
    return told


def _rows(work: Work) -> Any:
    return zip(np.asarray(work.prompt.tokens), np.asarray(work.prompt.mask), strict=True)


def _drawn_tokens(theirs: Theirs, lengths: np.ndarray) -> int:
    return int(np.sum(theirs(Drawn(lengths))["tokens"]))


def compare(
    config: ml_collections.ConfigDict,
    folder: Path,
    repeats: int,
    lengths: Lengths | None,
    python: str,
) -> Comparison:
    """Checks, then times in turns.

    Args:
      config: a settled config.
      folder: models that the config names by size alone are made there.
      repeats: number of pairs.
      lengths: distribution of the captions' lengths; None: all have the limit.
      python: the interpreter of an environment with vLLM.

    Raises:
      WorkDiffers: the two sides don't do the same work.
      WorkerFailed: vLLM's process has ended.
    """
    peers.keep_memory()
    work = work_lib.make(config, folder)
    ours, drawn = Ours(work), synthetic.caption_lengths(config, lengths)
    limit = config.sampling.max_tokens
    with tempfile.TemporaryDirectory() as scratch:
        theirs = Theirs(work, python, Path(scratch))
        try:
            checked = checks(work, ours, theirs, drawn)
            pairs = _in_turns(ours, theirs, drawn, (limit, repeats))
        finally:
            theirs.close()
    told = _facts(work, theirs, lengths_lib.tell(lengths, drawn))
    processing = min(peers.seconds(ours.batch) for _ in range(3))
    told["our processing of the pictures, part of our times, s"] = f"{processing:.3f}"
    return Comparison(told, checked, {}, pairs)


def _seconds(ours: Ours, lengths: np.ndarray, limit: int) -> float:
    return peers.seconds(lambda: ours.from_pictures(lengths, limit))


def _in_turns(
    ours: Ours, theirs: Theirs, lengths: np.ndarray, size: tuple[int, int]
) -> dict[str, Pairs]:
    """Returns pairs of times by what is drawn; size is (limit, repeats)."""
    limit, repeats = size
    one = np.ones_like(lengths)
    asked = {  # name -> (lengths, our limit, whether vLLM returns log-probabilities)
        "all": (lengths, limit, None),
        "all, log-probabilities from vLLM too": (lengths, limit, 0),
        "vision and prompt": (one, 1, None),
    }
    found = {name: Pairs() for name in asked}
    for own, most, _ in asked.values():
        _seconds(ours, own, most)
    for swapped in peers.in_turns(repeats):
        for name, (own, most, logprobs) in asked.items():
            for first in (not swapped, swapped):
                for _ in range(2):  # the second counts, as in peers.turn
                    if first:
                        with theirs.stopped():
                            took = _seconds(ours, own, most)
                    else:
                        took = theirs(Drawn(own, logprobs=logprobs))["seconds"]
                (found[name].ours if first else found[name].theirs).append(took)
    rest = found.pop("vision and prompt")
    for name in list(found):
        found[f"{name}: of it decode"] = found[name].minus(rest)
    return found | {"vision and prompt": rest}


def _facts(work: Work, theirs: Theirs, lengths: str) -> dict[str, Any]:
    c, device = work.config, jax.devices()[0]
    return {
        "policy": c.policy.path,
        "batch": f"{c.data.batch} images, {c.caprl.group} captions each",
        "lengths": lengths,
        "load average of the last minutes": peers.load(),
        "JAX": f"{jax.__version__} on {jax.device_count()} x {device.device_kind}, float32",
        "vLLM's environment": ", ".join(f"{name} {value}" for name, value in theirs.facts.items()),
    }
