"""vLLM as a peer, played by a stand-in: other work is refused, its failures are told."""

import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.bench import peers, vllm_peer
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.drawn import Ours
from caprl_jax.bench.lengths import Lengths
from caprl_jax.bench.peers import WorkDiffers
from caprl_jax.bench.vllm_peer import Drawn, Theirs, WorkerFailed

from .peers_test import TEXT, TOWER, ids, random_model, sizes

# Answers as vllm_worker.py does, from a file; draws what it is asked for and one token `more`.
STAND_IN = """
import json, sys
known = json.load(open(sys.argv[0] + ".json"))
setup = json.loads(sys.stdin.readline())
if known["dies"]:
    sys.exit("no module named vllm")
print(json.dumps({"vllm": "0", "pictures": len(setup["pictures"])}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    tokens = [[n + known["more"] for n in row] for row in asked["lengths"]]
    print(json.dumps(known["answer"] | {"seconds": 1.5, "tokens": tokens}), flush=True)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two captions of at most 8 tokens of each of 8 images, which 8 devices share."""
    folder, c = tmp_path_factory.mktemp("models"), config_lib.default()
    c.policy.path, c.judge.path = str(folder / "policy"), str(folder / "judge")
    random_model.make(folder / "policy", ids([*TEXT, *TOWER]), dtype=np.float32)
    judge = random_model.changed(sizes.CONFIGS["peer-50m"], list(TEXT))
    random_model.make(folder / "judge", judge, dtype=np.float32)
    c.data.batch = c.eval.batch = 8
    c.data.max_windows, c.data.max_prompt, c.data.max_question = 1, 32, 38
    c.sampling.max_tokens, c.caprl.group, c.caprl.questions = 8, 2, 2
    return work_lib.make(c, folder)


@pytest.fixture(scope="module")
def ours(work):
    return Ours(work)


@pytest.fixture
def stand_in(work, ours, tmp_path, monkeypatch):
    """Starts vLLM's stand-in, whose answers are right unless changed."""
    right = {
        "ids": np.asarray(ours(8, 0.0).tokens).tolist(),
        "prompts": np.asarray(work.prompt.tokens).tolist(),
        "likeliest": [
            {str(i): float(row[i]) for i in np.argsort(row)[-20:]}
            for row in np.asarray(jax.nn.log_softmax(work_lib.first_logits(work, ours.params)))
        ],
    }
    started, worker = [], tmp_path / "worker.py"
    worker.write_text(STAND_IN)
    monkeypatch.setattr(vllm_peer, "WORKER", worker)

    def start(more=0, dies=False, **changed):
        known = {"answer": right | changed, "more": more, "dies": dies}
        Path(f"{worker}.json").write_text(json.dumps(known))
        started.append(Theirs(work, sys.executable, tmp_path))
        return started[-1]

    yield start
    for theirs in started:
        theirs.close()


def lengths():
    return Lengths(4, 2).draw((8, 2), 8)


def test_the_same_work_passes_at_lengths_of_any_kind(work, ours, stand_in):
    for drawn in (lengths(), np.full((8, 2), 8)):
        checked = vllm_peer.checks(work, ours, stand_in(), drawn)
        assert all(c.same for c in checked) and len(checked) == 6


def test_our_captions_have_the_lengths_that_vllms_have(ours):
    drawn = ours.from_pictures(lengths(), 8)
    np.testing.assert_array_equal(drawn.length, lengths())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"more": 1}, "tokens drawn"),
        ({"ids": np.zeros((8, 2, 8), int).tolist()}, "greedy tokens that agree"),
        ({"prompts": np.zeros((8, 32), int).tolist()}, "prompts whose ids differ"),
        ({"likeliest": [{"3": -1.0}] * 8}, "log-probabilities after the prompt"),
    ],
)
def test_other_work_is_refused(work, ours, stand_in, changed, named):
    with pytest.raises(WorkDiffers, match=named):
        vllm_peer.checks(work, ours, stand_in(**changed), lengths())


def test_the_end_of_vllms_log_is_told_when_it_fails(stand_in):
    with pytest.raises(WorkerFailed, match="no module named vllm"):
        stand_in(dies=True)


def test_vllm_is_stopped_in_our_turns(stand_in):
    theirs = stand_in()

    def becomes(stopped):
        stat = Path(f"/proc/{theirs._process.pid}/stat")
        for _ in range(100):
            if (stat.read_text().split()[2] == "T") == stopped:
                return True
            time.sleep(0.05)
        return False

    with theirs.stopped():
        assert becomes(True)
    assert becomes(False)
    assert theirs(Drawn(lengths()))["tokens"] == lengths().tolist()


def test_pairs_are_timed_in_turns(ours, stand_in):
    found = vllm_peer._in_turns(ours, stand_in(), lengths(), (8, 2))
    assert [len(pair.ratios) for pair in found.values()] == [2] * 5
    assert found["all"].theirs == [1.5, 1.5]
    assert found["all: of it decode"].theirs == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no interpreter")
def test_vllm_itself_does_the_same_work(work, tmp_path):
    found = vllm_peer.compare(work.config, tmp_path, 1, Lengths(4, 2), os.environ["VLLM_PYTHON"])
    assert all(c.same for c in found.checks) and found.facts["vLLM's environment"]
    assert isinstance(found.pairs["all"], peers.Pairs)
