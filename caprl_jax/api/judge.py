"""A judge as an object: captions and questions in, verdicts out."""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from caprl_jax.api import draws, loading
from caprl_jax.api.loading import Loaded
from caprl_jax.data import questions as questions_lib
from caprl_jax.data import records
from caprl_jax.data.questions import JudgePrompt, Presented, own_prompt
from caprl_jax.data.records import LETTERS, Question
from caprl_jax.data.tokens import pad
from caprl_jax.decode.lengths import bucket
from caprl_jax.decode.sampling import Sampling
from caprl_jax.endpoint import Reply
from caprl_jax.errors import ModelDirectoryError, UserError
from caprl_jax.models.vlm import Prompt
from caprl_jax.parallel import axes
from caprl_jax.parallel import mesh as mesh_lib
from caprl_jax.rl import embed
from caprl_jax.rl.judge import Judge, Judging, Mode
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Captions, Decoding, Questions, Verdicts
from caprl_jax.run import compile as compile_lib
from caprl_jax.settings import make


@dataclasses.dataclass(frozen=True)
class LoadedJudge(Loaded):
    """A judge with its parameters on a mesh; made by load_judge.

    Attributes:
      prompt: the text around captions and questions; for the others see Loaded.
    """

    prompt: JudgePrompt

    @functools.cached_property
    def model(self) -> Judge:
        """Returns the judge for rl.judge.judge, with its instruction read once."""
        prompt = jax.device_put(self.prompt.instruction(), mesh_lib.replicated(self.rules))
        decoder, params = self.modules.decoder, self.params["decoder"]
        read = compile_lib.read_instruction(decoder, params, prompt, self.rules)
        return Judge(decoder, params, read)

    def questions(
        self,
        per_image: Sequence[Sequence[Mapping[str, Any] | Question]],
        *,
        seed: int | Sequence[int] = 0,
        draws: int | None = None,
        replacement: bool = True,
        shuffle: bool = True,
    ) -> Questions:
        """Prepares questions as arrays, padded to length buckets so that few programs are compiled.

        Args:
          per_image: [b] lists of {"question", "choices": ["A) ..", ..], "answer": "B"}, or of
            records.Question.
          seed: seed of draws and shuffles, a whole number from 0 or a list of them. An image's
            depend on the seed and on its own questions, not on the other images.
          draws: number of questions to draw for each image; None takes all of them.
          replacement: whether a question may be drawn twice.
          shuffle: whether to shuffle the options; the abstain option always comes last.

        Returns:
          Questions [b, n, q], numpy; n is `draws`, or a bucket of the largest number of questions.

        Raises:
          UserError: there is no question, or fewer than draws without replacement; or a bad seed.
          MalformedRecord: a question is malformed.
        """
        if not any(len(asked) for asked in per_image):
            raise UserError("nothing to judge: give at least one question")
        asked = [
            [q if isinstance(q, Question) else records.parse_question(q) for q in own]
            for own in per_image
        ]
        seeds = np.atleast_1d(seed).tolist()
        if not all(isinstance(s, int) and s >= 0 for s in seeds):
            raise UserError(f"seed={seed!r} is neither a whole number from 0 nor a list of them")
        rngs = [np.random.default_rng([*seeds, zlib.crc32(repr(own).encode())]) for own in asked]
        if draws is not None:
            asked = [
                questions_lib.draw(own, draws, rng, replacement)
                for own, rng in zip(asked, rngs, strict=True)
            ]
        shown = [
            [questions_lib.present(q, rng if shuffle else None) for q in own]
            for own, rng in zip(asked, rngs, strict=True)
        ]
        most = draws or bucket(max(map(len, shown)))
        longest = bucket(max(len(self.prompt.tail(p)) for own in shown for p in own))
        rows = [self.prompt.arrays(own, most, longest) for own in shown]
        return jax.tree.map(lambda *a: np.stack(a), *rows)

    def score_texts(
        self,
        captions: Sequence[Sequence[str]] | Sequence[str],
        questions: Questions | Sequence[Sequence[Mapping[str, Any]]],
        *,
        mode: Mode = "expected",
        temperature: float = 0.6,
        shuffle: bool = True,
        seed: int = 0,
    ) -> Verdicts:
        """Judges captions on questions, each caption on all questions of its image.

        Args:
          captions: [b][g] texts as `caption` gives them, or [b] of one each.
          questions: what `questions` returns, or [b] lists as it takes them.
          mode: "expected" scores p(truth), "greedy" and "sampled" 1 for a right letter.
          temperature: temperature of the letters' softmax.
          shuffle: whether to shuffle the options of lists; the abstain option always comes last.
          seed: seed of shuffling and sampling.

        Returns:
          Verdicts [b, g, n], numpy; `valid` tells which of the n are questions, `reward` is the
          mean of each caption.

        Raises:
          UserError: not as many lists of questions as images, unequal groups, or nothing to judge.
          MalformedRecord: a question is malformed.
        """
        groups = [[c] if isinstance(c, str) else list(c) for c in captions]
        count = len(questions.truth if isinstance(questions, Questions) else questions)
        if count != len(groups) or len({len(g) for g in groups}) != 1:
            raise UserError(
                f"captions for {len(groups)} images in groups of {sorted({len(g) for g in groups})}"
                f", questions for {count}: both must be lists of one entry an image, and "
                "groups equally large"
            )
        if not groups[0]:
            raise UserError("nothing to judge: give at least one caption")
        if not isinstance(questions, Questions):
            questions = self.questions(questions, seed=seed, shuffle=shuffle)
        arrays = loading.put((self.captions(groups), questions), self.rules)
        judging = make(Judging, {"mode": mode, "temperature": temperature})
        found = embed.score(self.rules, judging, self.model, *arrays, jax.random.key(seed))
        return jax.tree.map(lambda a: a[: len(groups)], jax.device_get(found))

    def letters(
        self, captions: Sequence[str], presented: Sequence[Sequence[Presented]]
    ) -> list[list[int]]:
        """Returns the likeliest letter, from 0, of each question as it is presented.

        Args:
          captions: [b] texts.
          presented: [b] lists of questions, whose options are lettered as they stand.

        Raises:
          UserError: there is nothing to judge, a question has more than 9 options, or a logit of
            the judge is not finite.
        """
        if not any(map(len, presented)):
            raise UserError("nothing to judge: give at least one question")
        if max(len(p.options) for own in presented for p in own) > len(LETTERS):
            raise UserError(f"a question has more than {len(LETTERS)} options: a judge has no more")
        most = bucket(max(map(len, presented)))
        longest = bucket(max(len(self.prompt.tail(p)) for own in presented for p in own))
        rows = [self.prompt.arrays(own, most, longest) for own in presented]
        questions = jax.tree.map(lambda *a: np.stack(a), *rows)
        found = self.score_texts(list(captions), questions, mode="greedy")
        require_finite(found, self.directory)
        return [found.letter[i, 0, : len(own)].tolist() for i, own in enumerate(presented)]

    def write(
        self, texts: Sequence[str], *, seed: int = 0, batch: int = 16, **sampling: Any
    ) -> list[Reply]:
        """Answers each text, a user's turn, with text: [b] replies in their order.

        Args:
          texts: what the user says; control tokens in it are plain characters.
          seed: of the draws; an answer depends on the seed, its own text and its length bucket.
          batch: texts that are answered together; all batches have this size.
          **sampling: fields of decode.sampling.Sampling: max_tokens (512; longer answers are cut),
            temperature (here 0, greedy), top_k, top_p.

        Raises:
          ConfigError: a field of sampling is unknown or out of range.
          UserError: the judge's logits are not finite.
        """
        how = make(Sampling, {"temperature": 0.0} | sampling)
        decoding = Decoding(1, self.tokenizer.stop, how)
        before, after = self.tokenizer.around_text()
        ids = [self.tokenizer.encode_around(before, text, after) for text in texts]
        by_length = collections.defaultdict(list)
        for i, own in enumerate(ids):
            by_length[bucket(len(own))].append(i)
        replies: dict[int, Reply] = {}
        for length, at in sorted(by_length.items()):
            for start in range(0, len(at), batch):
                part = at[start : start + batch]
                filled = [part[i % len(part)] for i in range(batch)]
                prompt = _prompt([ids[i] for i in filled], length)
                digests = draws.digests([texts[i] for i in filled])
                prompt, digests = loading.put((prompt, digests), self.rules)
                keys = draws.keys(seed, digests)
                found = _write(self.rules, self.modules, decoding, self.params, prompt, keys)
                arrays = found.tokens, found.mask, found.truncated, found.logp
                tokens, mask, cut, logp = jax.device_get(arrays)
                _require_finite(logp[mask], self.directory)
                for row, i in enumerate(part):
                    text = self.tokenizer.decode(tokens[row, 0][mask[row, 0]])
                    replies[i] = Reply(text, bool(cut[row, 0]))
        return [replies[i] for i in range(len(texts))]

    def captions(self, groups: Sequence[Sequence[str]]) -> Captions:
        """Returns texts as arrays in the judge's ids, padded to a length bucket.

        Args:
          groups: [b][g] texts, groups equally large.

        Returns:
          Captions [b, g, t], numpy.
        """
        ids = [[self.tokenizer.encode_caption(text) for text in group] for group in groups]
        length = bucket(max(len(i) for group in ids for i in group))
        tokens = np.stack([np.stack([pad(i, length) for i in group]) for group in ids])
        lengths = np.asarray([[[len(i)] for i in group] for group in ids])
        return Captions(tokens, np.arange(length) < lengths)


def _prompt(ids: Sequence[Sequence[int]], length: int) -> Prompt:
    """Returns prompts [b, p] of text alone, padded to `length` tokens."""
    lengths = np.asarray([len(i) for i in ids], np.int32)
    shape = len(ids), length
    return Prompt(
        tokens=np.stack([pad(i, length) for i in ids]),
        mask=np.arange(length) < lengths[:, None],
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        feature=np.full(shape, -1, np.int32),
        next_position=lengths,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(rules, modules, decoding, params, prompt, keys):
    batch = Batch(None, prompt, questions=None, valid=jnp.ones(len(keys), bool))
    with axes.using(rules):
        return rollout(modules, params, batch, decoding=decoding, key=keys)


def require_finite(verdicts: Verdicts, judge: str | Path) -> None:
    """Raises UserError, which names the judge, if one of its answers is not finite."""
    _require_finite(verdicts.score[verdicts.valid], judge)


def _require_finite(values: np.ndarray, judge: str | Path) -> None:
    if not np.all(np.isfinite(values)):
        raise UserError(
            f"the judge {judge} gives logits that are not finite: its weights are damaged, or its "
            "numbers overflow; check the directory, or use another judge"
        )


def load_judge(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    revision: str = "",
    param_dtype: Any = None,
    prompt: str = "",
) -> LoadedJudge:
    """Reads a judge: Qwen2, Qwen2.5 or Qwen3. Arguments as load_policy's, and:

    Args:
      prompt: the user's turn, with {caption} and {question}. Empty takes the one that the
        directory carries in judge_prompt.txt, as the tiny judge that ships does, and without such
        a file the project's own.

    Raises:
      ModelDirectoryError: there is no such model, it is not supported, or its prompt lacks its
        fields.
      UserError: prompt lacks its fields.
    """
    loaded = loading.read(path, revision, mesh, dtype, param_dtype)
    if loaded.modules.vision is not None:
        raise ModelDirectoryError(
            f"{path} holds a model with vision: a judge never sees the image. load_policy reads it"
        )
    template = prompt or own_prompt(loaded.directory)
    return LoadedJudge(**vars(loaded), prompt=JudgePrompt.create(loaded.tokenizer, template))
