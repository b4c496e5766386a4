"""Models as objects, for notebooks and other projects: the same code that trains.

    policy = caprl_jax.load_policy("Qwen/Qwen2.5-VL-3B-Instruct")
    judge = caprl_jax.load_judge("Qwen/Qwen2.5-3B-Instruct")
    captions = policy.caption(images)
    verdicts = judge.score(captions, questions)

An object holds modules, parameters and tokenizer; its methods turn images and text into arrays and
call functions that are pure and jitted. Who has arrays already calls those: caprl_jax.rl.rollout,
caprl_jax.judge, caprl_jax.rl.step.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from caprl_jax.data import questions as questions_lib
from caprl_jax.data import records
from caprl_jax.data.images import ImageProcessor, decode_image, to_rgb
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer, pad
from caprl_jax.decode.sampling import Sampling
from caprl_jax.models.families import ModelDirectoryError
from caprl_jax.models.vision import Images, batch_images, lay_out, windows_of
from caprl_jax.models.vlm import Policy, Prompt
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel import mesh as mesh_lib
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl import judge as judge_lib
from caprl_jax.rl import rollout
from caprl_jax.run import compile as programs
from caprl_jax.run import load as startup

PROMPT = "Describe the image in detail."
Picture = Image.Image | np.ndarray | bytes | str | Path


def _bucket(size: int) -> int:
    """size rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ..: few shapes, so few programs."""
    power = 1 << max(math.ceil(math.log2(max(size, 1))) - 1, 0)
    return next(b for b in (power, power + power // 2, 2 * power) if b >= size)


def _picture(image: Picture) -> Image.Image:
    """RGB, from a Pillow image, uint8 [height, width, 3], encoded bytes or the path of a file."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"an array of {image.dtype} {list(image.shape)} is no image: uint8 "
                "[height, width, 3] is"
            )
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    return decode_image(image if isinstance(image, bytes) else Path(image).read_bytes())


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A policy with its parameters on a mesh; made by load_policy.

    Attributes:
      modules: Flax modules and sizes.
      params: their parameters.
      tokenizer: of its directory.
      processor: of its directory.
      layout: where the parameters lie.
      directory: where they were read.
    """

    modules: Policy
    params: Any
    tokenizer: Tokenizer
    processor: ImageProcessor
    layout: Layout
    directory: Path

    def inputs(self, images: Sequence[Picture], prompt: str = PROMPT) -> tuple[Images, Prompt]:
        """Images and their prompts as arrays, padded to a bucket that holds the largest.

        Args:
          images: Pillow images, uint8 arrays [height, width, 3], encoded bytes or paths.
          prompt: the user's text after the image.

        Returns:
          (Images [b, m, ..], Prompt [b, p]), numpy.

        Raises:
          UnreadableImage, ValueError: an image can't be used.
        """
        vision = self.modules.vision.config
        mrope = self.modules.decoder.config.mrope_section is not None
        filler = PolicyPrompt.create(self.tokenizer, prompt, vision, mrope)
        found = [self.processor(_picture(image)) for image in images]
        windows = _bucket(max(windows_of(grid, vision) for _, grid in found))
        features = max(rows * columns for _, (rows, columns) in found) // vision.merge**2
        length = _bucket(filler.length(features))
        laid = batch_images([lay_out(p, grid, vision, windows) for p, grid in found])
        prompts = [filler.fill(grid, length) for _, grid in found]
        return laid, jax.tree.map(lambda *a: np.stack(a), *prompts)

    def caption(
        self,
        images: Sequence[Picture],
        prompt: str = PROMPT,
        group: int = 1,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[str]]:
        """Captions, `group` for each image: [b][group] texts.

        Args:
          images: as for inputs.
          prompt: the user's text after the image.
          group: captions per image; they share one reading of it.
          max_tokens: longer captions are cut.
          temperature: of the softmax; 0 is greedy.
          top_k: see sampling.Sampling.
          top_p: see sampling.Sampling.
          seed: of the draws.
        """
        sampling = Sampling(max_tokens, temperature, top_k, top_p)
        found = self.sample(*self.inputs(images, prompt), jax.random.key(seed), group, sampling)
        tokens, mask = jax.device_get((found.tokens, found.mask))
        return [
            [self.tokenizer.decode(ids[real]) for ids, real in zip(*image, strict=True)]
            for image in zip(tokens, mask, strict=True)
        ]

    def sample(
        self,
        images: Images,
        prompt: Prompt,
        key: jax.Array,
        group: int,
        sampling: Sampling,
    ) -> rollout.Rollout:
        """rollout.sample on arrays as `inputs` makes them; Rollout [b, group, t], first b rows."""
        count = prompt.tokens.shape[0]
        images, prompt = self._placed((images, prompt))
        found = _sample(
            self.modules, group, self.tokenizer.stop, sampling, self.layout, self.params, images,
            prompt, key,
        )  # fmt: skip
        return jax.tree.map(lambda a: a[:count], found)

    def logits(self, images: Sequence[Picture], texts: Sequence[str], prompt: str = PROMPT):
        """What the policy predicts at each token of a given caption of each image.

        Args:
          images: as for inputs, b of them.
          texts: one caption per image.
          prompt: the user's text after the image.

        Returns:
          (float32 [b, t, vocab]: entry i predicts token i; int32 [b, t] tokens, padded with 0;
           bool [b, t], False for padding). All logits at once: for looking, not for training.
        """
        if len(texts) != len(images):
            raise ValueError(f"{len(texts)} texts for {len(images)} images: one each is needed")
        ids = [self.tokenizer.encode_caption(text) for text in texts]
        length = _bucket(max(map(len, ids)))
        tokens = np.stack([pad(i, length) for i in ids])
        mask = np.arange(length) < np.asarray([[len(i)] for i in ids])
        arrays = self._placed((*self.inputs(images, prompt), tokens[:, None], mask[:, None]))
        found = _logits(self.modules, self.layout, self.params, *arrays)
        return found[: len(texts), 0], tokens, mask

    def _placed(self, arrays: Any) -> Any:
        return _put(arrays, self.layout)


def _put(arrays: Any, layout: Layout) -> Any:
    """Fills the batch axis up to a multiple of the mesh's, with copies, and places it."""
    multiple = mesh_lib.batch_multiple(layout)

    def filled(a):
        return np.resize(a, (-(-len(a) // multiple) * multiple, *a.shape[1:]))

    return mesh_lib.put_batch(jax.tree.map(filled, arrays), layout)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(modules, group, stop, sampling, layout, params, images, prompt, key):
    return rollout.sample(
        modules, params, images, prompt, key, group, stop, sampling, layout=layout
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(modules, layout, params, images, prompt, tokens, mask):
    with logical.using(layout):
        trunk = modules.trunk(params, images, prompt)
        return modules.logits(params, modules.branches(params, trunk, tokens, mask))


@dataclasses.dataclass(frozen=True)
class LoadedJudge:
    """A judge with its parameters on a mesh; made by load_judge.

    Attributes:
      modules: Flax modules and sizes.
      params: their parameters.
      tokenizer: of its directory.
      prompt: around captions and questions.
      layout: where the parameters lie.
      directory: where they were read.
    """

    modules: Policy
    params: Any
    tokenizer: Tokenizer
    prompt: JudgePrompt
    layout: Layout
    directory: Path

    @functools.cached_property
    def instruction(self) -> judge_lib.Instruction:
        """The prompt's fixed part, read once."""
        prompt = jax.device_put(self.prompt.instruction(), mesh_lib.replicated(self.layout))
        return programs.read_instruction(
            self.modules.decoder, self.params["decoder"], prompt, self.layout
        )

    def score(
        self,
        captions: Sequence[Sequence[str]] | Sequence[str],
        questions: Sequence[Sequence[Mapping[str, Any]]],
        mode: judge_lib.Mode = "expected",
        temperature: float = 0.6,
        shuffle: bool = True,
        seed: int = 0,
    ) -> judge_lib.Verdicts:
        """Has captions judged on questions, each caption on all of its image's.

        Args:
          captions: [b][g] texts as `caption` gives them, or [b] of one each.
          questions: [b] lists of {"question", "choices": ["A) ..", ..], "answer": "B"}.
          mode: "expected" scores p(truth), "greedy" and "sampled" 1 for a right letter.
          temperature: of the letters' softmax.
          shuffle: shuffle the options; the abstain option always comes last.
          seed: of shuffling and sampling.

        Returns:
          Verdicts [b, g, n], numpy; n is the largest number of questions, `valid` tells which are.

        Raises:
          ValueError: not as many lists of questions as images, or unequal groups.
          MalformedRecord: a question that is none.
        """
        groups = [[c] if isinstance(c, str) else list(c) for c in captions]
        if len(questions) != len(groups) or len({len(g) for g in groups}) != 1:
            raise ValueError(
                f"captions for {len(groups)} images in groups of {sorted({len(g) for g in groups})}"
                f", questions for {len(questions)}: both must be lists of one entry an image, and "
                "groups equally large"
            )
        tokens, mask = self._tokens(groups)
        asked = self._questions(questions, np.random.default_rng(seed) if shuffle else None)
        arrays = _put((tokens, mask, asked), self.layout)
        found = _score(
            self.modules.decoder, mode, temperature, self.layout, self.params["decoder"],
            self.instruction, *arrays, jax.random.key(seed),
        )  # fmt: skip
        return jax.tree.map(lambda a: a[: len(groups)], jax.device_get(found))

    def _tokens(self, groups: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        ids = [[self.tokenizer.encode_caption(text) for text in group] for group in groups]
        length = _bucket(max(len(i) for group in ids for i in group))
        tokens = np.stack([np.stack([pad(i, length) for i in group]) for group in ids])
        lengths = np.asarray([[[len(i)] for i in group] for group in ids])
        return tokens, np.arange(length) < lengths

    def _questions(self, asked, rng: np.random.Generator | None) -> judge_lib.Questions:
        parsed = [[records.parse_question(q) for q in own] for own in asked]
        shown = [[questions_lib.present(q, rng) for q in own] for own in parsed]
        most = max(map(len, shown))
        longest = _bucket(max(len(self.prompt.tail(p)) for own in shown for p in own))
        rows = [self.prompt.arrays(own, most, longest) for own in shown]
        return jax.tree.map(lambda *a: np.stack(a), *rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _score(decoder, mode, temperature, layout, params, instruction, tokens, mask, questions, key):
    with logical.using(layout):
        return judge_lib.score(
            decoder, params, instruction, tokens, mask, questions, key, mode, temperature
        )


def load_policy(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    revision: str = "",
    param_dtype: Any = None,
) -> LoadedPolicy:
    """Reads a policy: Qwen2.5-VL or Qwen3-VL.

    Args:
      path: a directory in Hugging Face format, a gs:// URL of one, a hub id, or
        "asset:tiny/policy", the one that ships.
      dtype: of the computation; default bfloat16 on accelerators, float32 on CPU.
      mesh: where the parameters go, as caprl_jax.parallel.mesh.make_mesh makes it; default all devices on
        the axis fsdp.
      revision: of a hub id.
      param_dtype: of the parameters; default that of the computation.

    Raises:
      ModelDirectoryError: there is no such model, or it is not supported.
    """
    loaded = _load(path, dtype, mesh, revision, param_dtype)
    modules, directory = loaded[0], loaded[-1]
    if modules.vision is None:
        raise ModelDirectoryError(f"{path} holds a model without vision: load_judge reads it")
    processor = startup.image_processor(directory, modules.vision.config)
    return LoadedPolicy(*loaded[:3], processor, *loaded[3:])


def load_judge(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    revision: str = "",
    param_dtype: Any = None,
    prompt: str = "",
) -> LoadedJudge:
    """Reads a judge: Qwen2, Qwen2.5 or Qwen3. Arguments as load_policy's, and:

    Args:
      prompt: the user's turn, with {caption} and {question}; empty is the project's own. The tiny
        judge that ships, "asset:tiny/judge", wants caprl_jax.data.digits.world.JUDGE_PROMPT.

    Raises:
      ModelDirectoryError: there is no such model, or it is not supported.
      ValueError: prompt lacks its fields.
    """
    loaded = _load(path, dtype, mesh, revision, param_dtype)
    if loaded[0].vision is not None:
        raise ModelDirectoryError(
            f"{path} holds a model with vision: a judge never sees the image. load_policy reads it"
        )
    return LoadedJudge(*loaded[:3], JudgePrompt.create(loaded[2], prompt), *loaded[3:])


def _load(path, dtype, mesh, revision, param_dtype):
    on = mesh_lib.layout(mesh_lib.make_mesh({"fsdp": -1}) if mesh is None else mesh)
    dtype = programs.default_dtype() if dtype is None else dtype
    modules, directory = startup.read_model(str(path), revision, dtype)
    tokenizer = Tokenizer.from_pretrained(directory, modules.decoder.config.vocab)
    params = startup.load_frozen(modules, directory, on, param_dtype or dtype)
    return modules, params, tokenizer, on, directory
