"""Modules and shapes of a config's models, without weights: from config.json or published sizes."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from caprl_jax.endpoint import is_url
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models import trained as trained_lib
from caprl_jax.models.clip import Clip
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.hf import sizes
from caprl_jax.models.vlm import Policy
from caprl_jax.rl.rewards import needed_models
from caprl_jax.rl.update import initial
from caprl_jax.run import choices
from caprl_jax.run import compile as compile_lib


@dataclasses.dataclass(frozen=True)
class Models:
    """Modules of a config's models, with boxed shapes of all arrays on the mesh.

    Attributes:
      policy: modules.
      params: the policy's parameters.
      opt_state: the optimizer's state.
      judge: the judge's decoder; None behind an endpoint.
      judge_params: its parameters.
      reference: bytes of each parameter of the reference policy; 0 if there is none.
      platform: the devices' platform: cpu, gpu or tpu.
      verifier: modules of the verifier; None if no term needs one.
      frozen: parameters of further frozen models by name.
    """

    policy: Policy
    params: Any
    opt_state: Any
    judge: Decoder | None
    judge_params: Any
    reference: int
    platform: str
    verifier: Policy | None = None
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def model_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """Returns config.json of a directory, a shipped model, or a hub id of published size.

    Args:
      path: directory, asset:NAME, hub id or URL.
      revision: revision of a hub id. With None a model of no published size is not fetched.

    Raises:
      ConfigError: it is not a directory, and no published size has its name.
    """
    name = Path(path).name.lower().removesuffix("-instruct")
    local = path.startswith("asset:") or Path(path).is_dir()
    if local or (revision is not None and name not in sizes.CONFIGS):
        from caprl_jax.models.hf import download as sources
        from caprl_jax.models.hf import files as hf  # these need more packages than a plan

        return hf.read_config(sources.fetch(path, revision or ""))
    if name not in sizes.CONFIGS:
        raise ConfigError(
            f"{path} is no directory here, and no published size: {', '.join(sizes.CONFIGS)}"
        )
    return sizes.CONFIGS[name]


def models(config: ml_collections.ConfigDict, platform: str, fetch: bool = False) -> Models:
    """Returns shapes of a config's models, for devices of a platform, without arrays.

    Args:
      config: the run's config.
      platform: cpu, gpu or tpu.
      fetch: whether to fetch models whose size isn't known from their name.

    Raises:
      ConfigError: a size is unknown, or the policy has no vision tower.
      ModelDirectoryError: a model can't be read or isn't supported.
    """
    dtype = compile_lib.compute_dtype(config, platform)

    def build(section: Any, **options) -> Policy:
        shape = model_config(section.path, section.revision if fetch else None)
        return families.build(shape, dtype, where=section.path, **options)

    policy = build(config.policy, **compile_lib.policy_options(config))
    judge = None if is_url(config.judge.path) else build(config.judge).decoder
    if policy.vision is None:
        raise ConfigError(f"config.policy.path={config.policy.path} is a model without vision")
    trained_lib.check(policy)
    optimizer, key = compile_lib.optimizer(config), jax.random.key(0)
    needed = needed_models(choices.terms(config))
    verifier, frozen = (policy if "verifier" in needed else None), {}
    if verifier and config.verifier.path:
        verifier = build(config.verifier)
        frozen["verifier"] = jax.eval_shape(verifier.init, key)
    if "clip" in needed:
        frozen["clip"] = jax.eval_shape(_clip(config, dtype, fetch).init_params, key)
    state = jax.eval_shape(lambda key: initial(policy, optimizer, policy.init(key)), key)
    return Models(
        policy=policy,
        params=state.params,
        opt_state=state.opt_state,
        judge=judge,
        judge_params=jax.eval_shape(functools.partial(init_decoder, judge), key) if judge else {},
        reference=_reference_bytes(config, dtype),
        platform=platform,
        verifier=verifier,
        frozen=frozen,
    )


def _reference_bytes(config: ml_collections.ConfigDict, dtype: Any) -> int:
    if not compile_lib.needs_reference(config):
        return 0
    return 4 if compile_lib.moves_reference(config) else jnp.dtype(dtype).itemsize


def _clip(config: ml_collections.ConfigDict, dtype: Any, fetch: bool) -> Clip:
    path = config.clip.path
    if not path or not (fetch or Path(path).is_dir()):
        raise ConfigError(
            f"config.clip.path={path!r}: a reward term needs CLIP, and its size is read from a "
            "directory: name one"
        )
    from caprl_jax.models.hf import clip as hf  # these need more packages than a plan
    from caprl_jax.models.hf import download as sources

    return hf.read(sources.fetch(path, config.clip.revision), dtype)


def init_decoder(decoder: Decoder, key: jax.Array) -> Any:
    """Returns random boxed parameters of a decoder."""
    return decoder.init(key, jnp.zeros(1, jnp.int32), method=Decoder.everything)["params"]
