"""The objects of the Python API give what the functions they stand on give."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

import caprl_jax
from caprl_jax.data import records
from caprl_jax.data.digits import world as digits
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.decode.lengths import bucket
from caprl_jax.errors import ModelDirectoryError, UserError
from caprl_jax.parallel import mesh

SCENES = list(digits.scenes("heldout", 3, (3, 3), (2, 5)))


@pytest.fixture(scope="module")
def policy():
    return caprl_jax.load_policy("asset:tiny/policy")


@pytest.fixture(scope="module")
def judge():
    return caprl_jax.load_judge("asset:tiny/judge")


def pictures():
    """Scenes cut to unequal sizes."""
    boxes = [(0, 0, 84, 84), (0, 0, 84, 56), (0, 28, 56, 84)]
    return [Image.open(io.BytesIO(r.image)).crop(b) for r, b in zip(SCENES, boxes, strict=True)]


def test_captions_are_the_same_alone_and_in_a_padded_batch(policy):
    images = pictures()
    together = policy.caption(images, max_tokens=24)
    alone = [policy.caption([image], max_tokens=24)[0] for image in images]
    assert together == alone and all(c[0].startswith("digits: ") for c in together)


def test_an_image_may_come_in_any_form(policy, tmp_path):
    image = pictures()[1]
    image.save(tmp_path / "x.png")
    forms = [image, np.asarray(image), (tmp_path / "x.png").read_bytes(), tmp_path / "x.png"]
    captions = policy.caption(forms, max_tokens=16)
    assert captions == [captions[0]] * len(forms)
    with pytest.raises(ValueError, match=r"float32 \[84, 84\] is no image"):
        policy.caption([np.zeros((84, 84), np.float32)])
    with pytest.raises(ValueError, match="images is empty"):
        policy.caption([])
    with pytest.raises(UserError, match=r"image file 'none\.png' can't be read: No such file"):
        policy.caption([tmp_path / "none.png"])


def test_a_group_is_sampled_by_its_seed(policy):
    one, again, other = (
        policy.caption(pictures(), group=4, max_tokens=24, temperature=1.0, seed=s)
        for s in (0, 0, 1)
    )
    assert one == again and one != other
    assert [len(g) for g in one] == [4, 4, 4] and len({c for g in one for c in g}) > 4


def test_logits_predict_the_greedy_caption(policy):
    images = pictures()
    captions = [c for (c,) in policy.caption(images, max_tokens=24)]
    logits, tokens, mask = policy.logits(images, captions)
    assert logits.shape == (*tokens.shape, 512)
    np.testing.assert_array_equal(np.argmax(logits, -1)[mask], tokens[mask])
    with pytest.raises(ValueError, match="1 texts for 3 images"):
        policy.logits(images, ["x"])


def test_a_judge_has_the_callers_prompt_or_else_its_directorys_own(judge):
    assert judge.prompt == JudgePrompt.create(judge.tokenizer, digits.JUDGE_PROMPT)
    given = "{caption} {question}"
    found = caprl_jax.load_judge("asset:tiny/judge", prompt=given)
    assert found.prompt == JudgePrompt.create(found.tokenizer, given)


def test_a_judge_answers_from_the_caption_alone(judge):
    asked = [[records.unparse_question(q) for q in r.questions] for r in SCENES]
    facts = [[tuple(f) for f in r.facts] for r in SCENES]
    full = [digits.caption(f, len(f)) for f in facts]
    groups = [[text, "digits: "] for text in full]
    found = judge.score_texts(groups, asked, mode="greedy")
    assert found.score.shape == (3, 2, bucket(max(map(len, asked))))
    np.testing.assert_array_equal(found.valid.sum(-1), [[len(q)] * 2 for q in asked])
    right = found.score.sum(-1) / found.valid.sum(-1)
    assert np.all(right[:, 0] > 0.8) and not np.any(right[:, 1])
    assert np.all(found.abstained[:, 1][found.valid[:, 1]])
    alone = judge.score_texts(full, asked, mode="greedy")
    np.testing.assert_array_equal(alone.score[:, 0], found.score[:, 0])
    with pytest.raises(ValueError, match="questions for 2"):
        judge.score_texts(full, asked[:2])
    for captions, questions in ((["x"], [[]]), ([[], []], asked[:2])):
        with pytest.raises(ValueError, match="nothing to judge"):
            judge.score_texts(captions, questions)


def test_any_mesh_gives_the_same_captions(policy):
    other = caprl_jax.load_policy(
        "asset:tiny/policy", mesh=mesh.make_mesh({"data": 4, "tensor": 2})
    )
    assert policy.rules.mesh.shape["fsdp"] == 8
    kernel = other.params["decoder"]["layers"]["gate"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[-1] * 2 == kernel.shape[-1]
    images = pictures()
    assert other.caption(images, max_tokens=24) == policy.caption(images, max_tokens=24)


def test_what_is_the_other_kind_of_model_is_refused():
    with pytest.raises(ModelDirectoryError, match="without vision: load_judge"):
        caprl_jax.load_policy("asset:tiny/judge")
    with pytest.raises(ModelDirectoryError, match="load_policy reads it"):
        caprl_jax.load_judge("asset:tiny/policy")


def test_parameters_may_be_bfloat16():
    found = caprl_jax.load_policy("asset:tiny/policy", param_dtype=jax.numpy.bfloat16)
    assert all(a.dtype == jax.numpy.bfloat16 for a in jax.tree.leaves(found.params))
    assert found.caption(pictures(), max_tokens=24)[0][0].startswith("digits: ")
