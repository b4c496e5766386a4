"""The bench's phases are the step's."""

import jax
import pytest

from caprl_jax.bench import model_flops, phases
from caprl_jax.plan import shapes

from .. import shipped


def tiny(changes):
    config = shipped.module("tiny").get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
def test_a_batch_captioned_in_pieces_has_the_same_work(monkeypatch, one_device):
    monkeypatch.setattr(phases, "seconds_of", lambda run, repeats: [1.0])
    found = {}
    for pieces in (1, 2):
        config = tiny(
            {
                "data.batch": 2,
                "caprl.group": 2,
                "sampling.max_tokens": 8,
                "caprl.updates": 1,
                "caprl.rollout_batches": pieces,
            }
        )
        found[pieces] = phases.measure(config, ("prefill", "decode", "score"), 1, False)
    for name, whole in found[1].items():
        assert found[2][name].roofline.flops == whole.roofline.flops
        assert found[2][name].tokens == whole.tokens
        assert whole.seconds == [1.0]
    spent = {name: timing.seconds for name, timing in found[2].items()}
    assert spent == {"prefill": [2.0], "decode": [2.0], "score": [1.0]}
    assert all(name in phases.tell(found[2]) for name in found[2])


@pytest.mark.slow
def test_captions_in_fewer_rows_are_counted_as_usual_and_waste_less(monkeypatch, one_device):
    """The work is of one run of each stage; of natural captions it is told what was wasted."""
    monkeypatch.setattr(phases, "seconds_of", lambda run, repeats: [1.0])
    found = {}
    for usual in (0, 4):
        config = tiny(
            {
                "data.batch": 2,
                "caprl.usual_tokens": usual,
                "sampling.max_tokens": 16,
            }
        )
        found[usual] = phases.measure(config, ("decode",), 1, True)["decode"]
    alone, moved = found[0], found[4]
    assert moved.roofline.flops < 0.6 * alone.roofline.flops
    assert moved.wasted < alone.wasted - 0.1
    assert f"{moved.wasted:.0%} of its tokens are no caption's" in phases.tell({"decode": moved})


@pytest.mark.slow
def test_the_phases_sum_up_to_the_step(monkeypatch, one_device):
    """But for what XLA finds twice in the whole step and does once, which slices keep apart."""
    monkeypatch.setattr(phases, "seconds_of", lambda run, repeats: [1.0])
    config = tiny(
        {
            "data.batch": 2,
            "caprl.group": 2,
            "sampling.max_tokens": 8,
            "caprl.updates": 1,
            "caprl.micro_batches": 2,  # what is in a loop XLA does not merge with what is not
            "caprl.kl": 0.0,
        }
    )
    timed = phases.measure(config, phases.PHASES, 1, 0)
    found = {name: t.roofline.flops for name, t in timed.items()}
    assert found.pop("step") == pytest.approx(sum(found.values()), rel=1e-3)
    # All are taken to last a second: shares of the peak add up as FLOPs do.
    useful = {name: t.mfu / timed["decode"].mfu * found["decode"] for name, t in timed.items()}
    assert useful.pop("step") == pytest.approx(sum(useful.values()), rel=1e-3)
    needed = model_flops.update(config, shapes.build(config, jax.devices()))
    assert useful.pop("update") == pytest.approx(needed, rel=1e-3)
    assert useful == pytest.approx({name: found[name] for name in useful}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("natural", [True, False])
def test_natural_captions_end_about_halfway(natural, one_device):
    config = tiny({"data.batch": 2, "sampling.max_tokens": 32})
    found = phases.measure(config, ("score",), 1, natural)["score"]
    asked = 2 * config.caprl.group * config.caprl.questions * config.data.max_question
    length = (found.tokens - asked) / (2 * config.caprl.group)
    assert (4 < length < 28) if natural else length == 32
