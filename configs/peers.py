"""Comparisons with transformers and TRL: Qwen2.5-VL's architecture at sizes for a CPU.

The weights are random, and no published model has these sizes: both sides only need the same ones.
Images fill their bucket (32 x 32 patches, 256 features), and so do prompts and questions.

Argument:  50m (default) or 500m, about the parameters of the policy, and of the judge
Command:   python -m caprl_jax.bench --config=configs/peers.py --peer=transformers
           python -m caprl_jax.bench --config=configs/peers.py:500m --peer=trl
Hardware:  any CPU; 500m with trl needs 20 GB of memory
Measured:  not here: the command prints the ratio for your machine.
"""

from caprl_jax.config import default
from caprl_jax.recipes import choose


def get_config(argument=""):
    [size] = choose(argument, ("50m", "500m"))
    c = default()
    c.policy.path, c.judge.path = f"peer-vl-{size}", f"peer-{size}"
    c.policy.remat = "products"  # quicker here than "none"; TRL is quickest without
    c.caprl.score_batches = 2  # one image's questions fit in the caches: 3% of scoring
    c.dtype = "float32"
    c.sampling.max_tokens = 64
    c.caprl.group = 8
    c.caprl.questions = 4
    c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 0
    c.data.batch = 2
    c.eval.batch = 2
    c.data.max_windows = 16
    c.data.max_prompt = 272
    c.data.max_question = 38
    return c
