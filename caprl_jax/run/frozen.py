"""Reads the frozen models that reward terms need beside judge and reference."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax.data import sentences, templates
from caprl_jax.data.examples import CaprlExamples
from caprl_jax.data.pipeline import MakeExample
from caprl_jax.data.reference_captions import ReferencePrompt, WithReference
from caprl_jax.data.tokens import PolicyPrompt, Tokenizer
from caprl_jax.endpoint import is_url
from caprl_jax.errors import ConfigError, about
from caprl_jax.models.vlm import Policy
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.rewards import needed_models
from caprl_jax.rl.verify import Verifier
from caprl_jax.run import choices, load
from caprl_jax.run import clip as clip_lib
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.clip import ClipReader


@dataclasses.dataclass(frozen=True)
class Trained:
    """The policy in training, as it is read before its parameters.

    Attributes:
      policy: modules.
      directory: the directory they came from.
      tokenizer: its tokenizer.
    """

    policy: Policy
    directory: Path
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Frozen models that have been read without parameters.

    Attributes:
      verifier: the verifier without parameters; None if no term needs one.
      source: the verifier's directory; None for the initial policy.
      clip: CLIP; None if no term needs it.
      reference: makes the verifier's prompt; None if it reads no reference caption.
    """

    verifier: Verifier | None = None
    source: Path | None = None
    clip: ClipReader | None = None
    reference: ReferencePrompt | None = None

    def examples(self, example: CaprlExamples) -> MakeExample:
        """Returns the maker of examples with the arrays that the models read of a record."""
        if self.clip:
            example = dataclasses.replace(example, arrays=self.clip.arrays)
        return WithReference(example, self.reference) if self.reference else example

    @property
    def through_text(self) -> bool:
        """Tells whether captions must pass to CLIP as text."""
        return self.clip is not None and self.clip.policy is not None

    def load(
        self, config: ml_collections.ConfigDict, rules: ShardRules, reference: Any
    ) -> dict[str, Any]:
        """Returns the models with parameters on the mesh, by name, for rl.step.Run.frozen.

        Args:
          config: the run's config.
          rules: mesh and shard rules.
          reference: the initial policy's parameters on the mesh, where they are needed; None where
            the reference moves with the state.
        """
        out: dict[str, Any] = {}
        if self.verifier is not None:
            params = reference
            if self.source is not None:
                logging.info("loading the verifier, %s", config.verifier.path)
                dtype = compile_lib.compute_dtype(config)
                params = load.load_frozen(self.verifier.policy, self.source, rules, dtype)
            own = self.verifier.replace(params={})
            out["verifier"] = jax.device_put(own, mesh.replicated(rules)).replace(params=params)
        if self.clip is not None:
            out["clip"] = self.clip.load(rules, compile_lib.compute_dtype(config))
        return out


def read(config: ml_collections.ConfigDict, trained: Trained) -> Frozen:
    """Reads the frozen models that the config's reward terms need, and checks that they fit.

    Raises:
      ConfigError, ModelDirectoryError: one can't be used.
    """
    needed = needed_models(choices.terms(config))
    verifier, source = _verifier(config, trained) if "verifier" in needed else (None, None)
    clip = clip_lib.read(config, trained.tokenizer) if "clip" in needed else None
    reference = _reference(config, trained) if choices.reference_tokens(config) else None
    found = Frozen(verifier, source, clip, reference)
    if found.through_text and is_url(config.judge.path):
        raise ConfigError(
            f"config.clip.path={config.clip.path} has another tokenizer than the policy, and "
            f"config.judge.path={config.judge.path} is an endpoint: a step can't be two programs "
            "for both yet; give a judge's directory"
        )
    return found


def _verifier(config: ml_collections.ConfigDict, trained: Trained) -> tuple[Verifier, Path | None]:
    own, policy, source = config.verifier, trained.policy, None
    if own.path:
        policy, source = _other(config, trained)
    tokenizer = trained.tokenizer
    return Verifier(
        policy=policy,
        params={},
        endings=sentences.endings(tokenizer, own.ends),
        question=np.asarray(tokenizer.encode(question(config, tokenizer)), np.int32),
        answers=np.asarray([_token(tokenizer, own, name) for name in ("yes", "no")], np.int32),
        sentences=own.sentences,
        length=own.max_sentence,
    ), source


def _reference(config: ml_collections.ConfigDict, trained: Trained) -> ReferencePrompt:
    own, text, policy = config.verifier, config.policy.prompt, trained.policy
    mrope = policy.decoder.config.mrope_section is not None
    prompt = PolicyPrompt.create(trained.tokenizer, text, policy.vision.config, mrope)
    with about("verifier"):
        return ReferencePrompt.create(
            trained.tokenizer, prompt, text, own.reference, own.max_reference
        )


def question(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> str:
    """Returns the text between a sentence and the verifier's answer."""
    return templates.after_reply(tokenizer.directory, tokenizer.inner, config.verifier.question)


def _token(tokenizer: Tokenizer, settings: Any, name: str) -> int:
    ids = tokenizer.encode(settings[name])
    if len(ids) != 1:
        raise ConfigError(
            f"config.verifier.{name}={settings[name]!r} is {len(ids)} tokens of the policy's "
            "tokenizer: the answer must be one token; name another word"
        )
    return ids[0]


def _other(config: ml_collections.ConfigDict, trained: Trained) -> tuple[Policy, Path]:
    """Returns modules and directory of a verifier that isn't the initial policy."""
    path, dtype = config.verifier.path, compile_lib.compute_dtype(config)
    policy, directory, tokenizer = load.read_with_tokenizer(path, config.verifier.revision, dtype)
    said = f"config.verifier.path={path}"
    if policy.vision is None:
        raise ConfigError(f"{said} holds a model without vision: a verifier sees the image")
    if tokenizer.inner.get_vocab() != trained.tokenizer.inner.get_vocab():
        raise ConfigError(
            f"{said} has another tokenizer than the policy, whose ids the verifier reads: give a "
            "model of the policy's family"
        )
    ours, theirs = trained.policy.vision.config, policy.vision.config
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in _SHARED}
    processors = (
        load.image_processor(d, v) for d, v in ((trained.directory, ours), (directory, theirs))
    )
    a, b = (dataclasses.replace(p, min_pixels=1, max_pixels=1) for p in processors)
    pairs |= {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)}
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different:
        name, (our, its) = next(iter(different.items()))
        raise ConfigError(
            f"{said}: {name} is {its}, the policy's is {our}: the verifier sees the policy's "
            "patches, so both must cut images alike"
        )
    mrope = [p.decoder.config.mrope_section is None for p in (trained.policy, policy)]
    if mrope[0] != mrope[1]:
        raise ConfigError(f"{said}: only one of policy and verifier has positions of three axes")
    return policy, directory


_SHARED = ("patch_dim", "merge", "window")  # sizes of a tower that patches depend on
