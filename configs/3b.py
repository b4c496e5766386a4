"""CapRL-3B: Qwen2.5-VL-3B captions, Qwen2.5-3B-Instruct judges, on CapRL-QA-75K.

Arguments:  3b.py:released (default): RLOO, no KL, 8 questions drawn with replacement
            3b.py:paper: GRPO, KL to the start, 4 questions with shuffled options
Command:    python -m caprl_jax.main --config=configs/3b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/      (parquet or JSON lines: data/files.py)
            The models are fetched from the hub unless --config.policy.path and
            --config.judge.path name directories.
Measured:   not at full size on an accelerator yet. On 2 CPU cores the same config runs with random
            weights of the real layout and tiny sizes (tests/real_data_test.py).
Hardware:   not planned yet. By arithmetic the tower's full attention holds 1.7 GB of scores for
            each largest image, for all images of a device at once: choose data.batch by it.
Expected:   Prism average over 11 benchmarks 39.9 -> 48.3 (arXiv 2509.22647, Table 3).
"""

from caprl_jax.config import default


def get_config(recipe="released"):
    c = default()
    c.policy.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    c.policy.remat = True
    c.judge.path = "Qwen/Qwen2.5-3B-Instruct"
    c.judge.mode = "sampled"
    c.steps = 1800  # where the shipped checkpoint was taken; a pass over the data is about 588
    c.sampling.max_tokens = 1024
    c.caprl.group = 8
    c.caprl.micro_batches = 16
    c.data.source = "files"
    c.data.batch = 128
    # An image of at most 1024 features of 28 x 28 pixels, and the words around it.
    c.data.max_pixels = 1024 * 28 * 28
    c.data.max_prompt = 1088
    c.data.max_windows = 80
    c.data.max_question = 192
    c.eval.every = 200
    c.eval.images = 128
    c.checkpoint.every = 100
    c.export.dtype = "bfloat16"
    if recipe == "released":
        c.caprl.advantage = "rloo"
        c.caprl.questions = 8
        c.data.shuffle_options = False
    elif recipe == "paper":
        c.caprl.advantage = "grpo"
        c.caprl.kl = 0.01  # the paper uses one; its coefficient is not given
        c.caprl.questions = 4
    else:
        raise ValueError(f"3b.py:{recipe} is neither :released nor :paper")
    return c
