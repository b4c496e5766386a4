"""The bench's phases are the step's."""

import jax
import numpy as np
import pytest

from caprl_jax.bench import model_flops, phases
from caprl_jax.bench.lengths import Lengths
from caprl_jax.plan import shapes
from caprl_jax.run import fit

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
        found[pieces] = phases.measure(config, ("prefill", "decode", "score"), 1)
    for name, whole in found[1].items():
        assert found[2][name].roofline.flops == whole.roofline.flops
        assert found[2][name].tokens == whole.tokens
        assert whole.seconds == [1.0]
    spent = {name: timing.seconds for name, timing in found[2].items()}
    assert spent == {"prefill": [2.0], "decode": [2.0], "score": [1.0]}
    assert all(name in phases.tell(found[2]) for name in found[2])


@pytest.mark.slow
def test_captions_in_fewer_rows_have_less_work_and_waste_less(monkeypatch, one_device):
    monkeypatch.setattr(phases, "seconds_of", lambda run, repeats: [1.0])
    found = {}
    for usual in (0, 4):
        config = tiny({"data.batch": 2, "caprl.usual_tokens": usual, "sampling.max_tokens": 16})
        found[usual] = phases.measure(config, ("decode",), 1, Lengths(4, 3))["decode"]
    alone, moved = found[0], found[4]
    assert moved.roofline.flops < 0.9 * alone.roofline.flops
    assert moved.padding < alone.padding - 0.1
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
    timed = phases.measure(config, phases.PHASES, 1)
    found = {name: t.roofline.flops for name, t in timed.items()}
    assert found.pop("step") == pytest.approx(sum(found.values()), rel=1e-3)
    # All are taken to last a second: shares of the peak add up as FLOPs do.
    useful = {name: t.mfu / timed["decode"].mfu * found["decode"] for name, t in timed.items()}
    assert useful.pop("step") == pytest.approx(sum(useful.values()), rel=1e-3)
    needed = model_flops.update(config, shapes.build(config, jax.devices()))
    assert useful.pop("update") == pytest.approx(needed, rel=1e-3)
    assert useful == pytest.approx({name: found[name] for name in useful}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [None, Lengths(8, 5)])
def test_tokens_are_those_of_captions_as_long_as_drawn(lengths, one_device):
    """Each caption of a step counts its own prompt, as others count."""
    config = tiny({"data.batch": 2, "sampling.max_tokens": 32})
    found = phases.measure(config, ("decode", "score", "step"), 1, lengths)
    captions = 2 * config.caprl.group
    written = captions * 32 if lengths is None else lengths.draw((2, captions // 2), 32).sum()
    asked = config.caprl.questions * config.data.max_question
    assert found["decode"].tokens == found["decode"].generated == written
    assert found["score"].tokens == written + captions * asked
    assert found["step"].tokens == written + captions * config.data.max_prompt
    assert all((t.padding > 0.05) == bool(lengths) for t in found.values()), found
    rate = written / found["step"].median
    assert f"{rate:,.0f} generated tokens/s" in phases.tell(found)


@pytest.mark.slow
def test_captions_have_exactly_the_drawn_lengths(one_device):
    """In the decode phase, and in the step's metrics, whatever the weights say."""
    config = tiny({"data.batch": 2, "sampling.max_tokens": 32})
    fit.settle(config, jax.devices())
    built = shapes.build(config, jax.devices())
    drawn = Lengths(8, 5).draw((2, config.caprl.group), 32)
    found = {p.name: p for p in phases.phases(config, built, drawn)}
    captions = jax.jit(found["decode"].function)(*found["decode"].args)
    np.testing.assert_array_equal(captions.length, drawn)
    np.testing.assert_array_equal(captions.mask.sum(-1), drawn)
    _, metrics = jax.jit(found["step"].function)(*found["step"].args)
    total, count = metrics["caption_length"]
    assert total / count == pytest.approx(drawn.mean())
