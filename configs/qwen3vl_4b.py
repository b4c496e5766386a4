"""CapRL with Qwen3-VL-4B as policy and Qwen3-4B as judge, on CapRL-QA-75K.

Arguments:  what it runs on: v5e_16 (default)
Command:    python -m caprl_jax.main --config=configs/qwen3vl_4b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/
Measured:   not on an accelerator yet.
Hardware:   planned (caprl_jax.plan; seconds are floors, real steps take longer), GiB a chip:
            v5e_16 (v5e:4x4) 13.6 of 16, 45.7 s a step, bound by the traffic of its caches
Expected:   no figures of this pair on the Prism benchmarks are known here; CapRL++ trains this
            size with a judge of this family.
"""

from caprl_jax.config import choose, decode_over_tensor, default

PIECES = {"v5e_16": 8}  # of 128 images


def get_config(argument=""):
    (hardware,) = choose(argument, tuple(PIECES))
    c = default()
    c.policy.path = "Qwen/Qwen3-VL-4B-Instruct"
    c.policy.remat = True
    c.judge.path = "Qwen/Qwen3-4B"
    c.judge.mode = "sampled"
    c.steps = 1800
    c.sampling.max_tokens = 1024
    c.caprl.group = 8
    c.caprl.advantage = "rloo"
    c.caprl.questions = 8
    c.caprl.micro_batches = PIECES[hardware]
    c.caprl.rollout_batches = 2  # 8 key-value heads: caches for 1024 captions take 9 GiB a chip
    decode_over_tensor(c, 4, heads=True)  # 8 key-value heads
    c.optimizer.learning_rate = 1e-5  # CapRL++'s, as its constant schedule
    c.optimizer.schedule = "constant"
    c.data.source = "files"
    c.data.batch = 128
    c.data.shuffle_options = False
    # An image of at most 1024 features of 32 x 32 pixels, and the words around it.
    c.data.max_pixels = 1024 * 32 * 32
    c.data.max_prompt = 1088
    c.data.max_windows = 1024  # features
    c.data.max_question = 192
    c.eval.every = 200
    c.eval.images = 128
    c.eval.batch = 64
    c.checkpoint.every = 100
    c.export.dtype = "bfloat16"
    return c
