"""Records what TRL's and Tunix's own code returns for arrays that are the same for all.

Run it in an environment of theirs: python tests/rl/golden/record_peers.py trl|tunix
It writes peers_NAME.npz beside itself: losses, their gradients and advantages. peers_test.py
compares ours with them.
"""

import collections
import importlib.metadata
import pathlib
import sys
import types

import numpy as np

GROUP, TOKENS, CLIP, CLIP_HIGH, CISPO, SAPO = 4, 7, 0.2, 0.28, 2.0, (1.0, 1.05)
WEIGHTS = (1.0, 0.3)


def arrays():
    """Log-probabilities of 2 groups whose ratios lie on both sides of the clips, and rewards."""
    rng = np.random.default_rng(0)
    old = -rng.exponential(2.0, (2 * GROUP, TOKENS)).astype(np.float32)
    logp = old + rng.normal(0, 0.4, old.shape).astype(np.float32)
    length = rng.integers(1, TOKENS + 1, 2 * GROUP)
    return {
        "logp": np.minimum(logp, 0),
        "old_logp": old,
        "reference_logp": (old + rng.normal(0, 0.3, old.shape)).astype(np.float32),
        "mask": np.arange(TOKENS) < length[:, None],
        "advantages": rng.normal(size=2 * GROUP).astype(np.float32),
        "rewards": rng.random((2 * GROUP, 2)).astype(np.float32),
    }


def trl(given):
    """name -> (loss, gradient by logp), by the trainer's own _compute_loss."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    def run(kind, level="token", beta=0.0, high=CLIP_HIGH):
        logp = torch.tensor(given["logp"], requires_grad=True)
        mask = torch.tensor(given["mask"]).int()
        trainer = types.SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (logp, logp.detach(), None),
            accelerator=types.SimpleNamespace(
                num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
            ),
            model=types.SimpleNamespace(training=True),
            args=types.SimpleNamespace(
                delta=None,
                sapo_temperature_pos=SAPO[0],
                sapo_temperature_neg=SAPO[1],
                steps_per_generation=1,
                use_bias_correction_kl=False,
            ),
            _metrics={"train": collections.defaultdict(list)},
            loss_type=kind,
            importance_sampling_level=level,
            beta=beta,
            epsilon_low=CLIP,
            epsilon_high=high,
            max_completion_length=TOKENS,
            current_gradient_accumulation_steps=1,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=False,
            _entropy_bonus_enabled=False,
        )
        loss = GRPOTrainer._compute_loss(
            trainer,
            None,
            {
                "prompt_ids": mask[:, :1],
                "prompt_mask": mask[:, :1],
                "completion_ids": mask,
                "completion_mask": mask,
                "advantages": torch.tensor(given["advantages"]),
                "old_per_token_logps": torch.tensor(given["old_logp"]),
                "ref_per_token_logps": torch.tensor(given["reference_logp"]),
                "num_items_in_batch": mask.sum(),
            },
        )
        loss.backward()
        return loss.item(), logp.grad.numpy()

    return {
        "clipped": run("grpo"),
        "clipped, k3": run("grpo", beta=0.1),
        "dapo": run("dapo"),
        "dr_grpo": run("dr_grpo"),
        "gspo": run("grpo", "sequence"),
        "cispo": run("cispo", high=CISPO),
        "sapo": run("sapo"),
    }


def tunix(given):
    """name -> (loss, gradient by logp), and name -> advantages, by Tunix's algo_core."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl import algo_core, common

    def run(kind, mean, beta=0.0, estimator="low_var_kl"):
        config = types.SimpleNamespace(
            beta=beta,
            epsilon=CLIP,
            epsilon_high=CLIP_HIGH,
            loss_algo=kind,
            loss_agg_mode=mean,
            temperature=1.0,
            kl_loss_mode=estimator,
            kl_clamp_value=None,
        )
        example = types.SimpleNamespace(
            prompt_ids=None,
            completion_ids=None,
            completion_mask=jnp.asarray(given["mask"]).astype(jnp.float32),
            advantages=jnp.asarray(given["advantages"]),
            old_per_token_logps=jnp.asarray(given["old_logp"]),
            ref_per_token_logps=jnp.asarray(given["reference_logp"]),
        )

        def loss(logp):
            common.compute_per_token_logps = lambda *a, **k: (logp, jnp.zeros((*logp.shape, 2)))
            model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
            return algo_core.grpo_loss_fn(model, example, config, 0, 1)[0]

        return jax.device_get(jax.value_and_grad(loss)(jnp.asarray(given["logp"])))

    rewards = given["rewards"] @ np.asarray(WEIGHTS, np.float32)
    by_name = {"grpo": "grpo", "rloo": "rloo", "dr_grpo": "drgrpo"}
    for ours, theirs in by_name.items():
        found = algo_core.function_registry.get_advantage_estimator(theirs)
        given[f"advantages/{ours}"] = np.asarray(found(rewards, GROUP))
    return {
        "clipped": run("grpo", "sequence-mean-token-mean"),
        "clipped, k3": run("grpo", "sequence-mean-token-mean", 0.1),
        "clipped, k2": run("grpo", "sequence-mean-token-mean", 0.1, "mse_kl"),
        "clipped, k1": run("grpo", "sequence-mean-token-mean", 0.1, "kl"),
        "dapo": run("grpo", "token-mean"),
        "dr_grpo": run("grpo", "sequence-mean-token-scale"),
        "gspo_token": run("gspo-token", "sequence-mean-token-mean"),
    }


if __name__ == "__main__":
    name, given = sys.argv[1], arrays()
    found = {"trl": trl, "tunix": tunix}[name](given)
    version = importlib.metadata.version({"trl": "trl", "tunix": "google-tunix"}[name])
    for key, (loss, gradient) in found.items():
        given[f"loss/{key}"], given[f"gradient/{key}"] = np.float32(loss), np.asarray(gradient)
    np.savez(pathlib.Path(__file__).parent / f"peers_{name}.npz", version=version, **given)
    print(name, version, {key: float(loss) for key, (loss, _) in found.items()})
