"""CapRL with Qwen2.5-VL-7B as policy and Qwen2.5-7B-Instruct as judge, on CapRL-QA-75K.

Arguments:  what it runs on: v5p_16 (default), v5e_64
Command:    python -m caprl_jax.main --config=configs/7b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/
Measured:   not on an accelerator yet.
Hardware:   planned (caprl_jax.plan; seconds are floors, real steps take longer), GiB a chip:
            v5p_16 (v5p:2x2x4) 24.3 of 95, 18.7 s a step; v5e_64 (v5e:8x8) 12.7 of 16, 14.4 s
Expected:   no figures are published for this size; the untrained 7B stands at 44.9 in the Prism
            average where the trained 3B reaches 48.3 (arXiv 2509.22647, Table 3).
"""

from caprl_jax.config import choose, decode_over_tensor, default

PIECES = {"v5p_16": 4, "v5e_64": 2}  # of 128 images


def get_config(argument=""):
    (hardware,) = choose(argument, tuple(PIECES))
    c = default()
    c.policy.path = "Qwen/Qwen2.5-VL-7B-Instruct"
    c.policy.remat = True
    c.judge.path = "Qwen/Qwen2.5-7B-Instruct"
    c.judge.mode = "sampled"
    c.steps = 1800
    c.sampling.max_tokens = 1024
    c.caprl.group = 8
    c.caprl.advantage = "rloo"
    c.caprl.questions = 8
    c.caprl.micro_batches = PIECES[hardware]
    decode_over_tensor(c, 4, heads=True)  # 4 key-value heads
    c.data.source = "files"
    c.data.batch = 128
    c.data.shuffle_options = False
    # An image of at most 1024 features of 28 x 28 pixels, and the words around it.
    c.data.max_pixels = 1024 * 28 * 28
    c.data.max_prompt = 1088
    c.data.max_windows = 80
    c.data.max_question = 192
    c.eval.every = 200
    c.eval.images = 128
    c.eval.batch = 64
    c.checkpoint.every = 100
    c.export.dtype = "bfloat16"
    return c
