"""The shipped verifier tells true statements about held-out images from false ones."""

import jax
import numpy as np
import pytest

from caprl_jax.data import pipeline
from caprl_jax.data.digits import sft, world
from caprl_jax.models.hf import files as hf
from caprl_jax.rl.types import Batch
from caprl_jax.rl.verify import yes
from caprl_jax.run import frozen, load
from caprl_jax.run.frozen import Trained

from .. import shipped

GRID, SCENES, EACH = (3, 3), 128, 16


def kind(statement, facts):
    """Returns the kind of mistake in a false statement."""
    words, held = statement.split(), {place: (color, digit) for place, color, digit in facts}
    if words[0] == "total" and len(words) == 2:
        return "count"
    if len(words) != 3:
        return "no statement"
    if words[0] not in held:
        return "empty cell"
    return "colour" if words[1] != held[words[0]][0] else "digit"


@pytest.mark.slow
def test_true_statements_are_told_from_false_ones(capsys):
    """Half of 2,048 statements about 128 scenes are true."""
    config = shipped.module("tiny_correctness").get_config("correctness")
    read = load.read_with_tokenizer(config.policy.path, "", np.float32)
    found = frozen.read(config, Trained(*read))
    verifier = found.verifier.replace(params=hf.load_params(found.source, found.verifier.policy))
    inputs = load.image_prompt(config, *read)
    rng, rows, images = np.random.default_rng(0), [], []
    for record in world.scenes("heldout", SCENES, GRID, (2, 5)):
        facts = [tuple(f) for f in record.facts]
        truths = [i % 2 == 0 for i in range(EACH)]
        said = [
            sft.true_statement(facts, rng) if t else sft.false_statement(facts, GRID, rng)
            for t in truths
        ]
        rows.append(
            [(s, "true" if t else kind(s, facts)) for s, t in zip(said, truths, strict=True)]
        )
        images.append(Batch(questions=None, valid=np.True_, **inputs(record)))
    tokens, mask = np.zeros((SCENES, 1, EACH, 8), np.int32), np.zeros((SCENES, 1, EACH, 8), bool)
    for i, j in np.ndindex(SCENES, EACH):
        ids = read[2].encode(f" {rows[i][j][0]},")
        tokens[i, 0, j, : len(ids)], mask[i, 0, j, : len(ids)] = ids, True
    run, p = jax.jit(yes), []
    for part in np.split(np.arange(SCENES), 4):
        batch = pipeline.stack([images[i] for i in part])
        p.append(run(verifier, batch, tokens[part], mask[part])[:, 0])
    p, kinds = np.concatenate(p), np.asarray([[k for _, k in row] for row in rows])
    true = kinds == "true"
    area = np.mean(p[true][:, None] > p[~true][None])
    with capsys.disabled():
        print(f"\naccuracy {np.mean((p > 0.5) == true):.3f}, area under the ROC curve {area:.3f}")
        for name in np.unique(kinds):
            own = p[kinds == name]
            print(f"{name:13} {len(own):5} statements, mean p(yes) {own.mean():.3f}")
    assert np.mean((p > 0.5) == true) > 0.9 and area > 0.96
