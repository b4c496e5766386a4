"""CapRL-3B: Qwen2.5-VL-3B captions, Qwen2.5-3B-Instruct judges, on CapRL-QA-75K.

Arguments:  a recipe, released (default): RLOO, no KL, 8 questions drawn with replacement
                      paper: GRPO, KL to the start, 4 questions with shuffled options
            and what it runs on: v5e_16 (default), v6e_16, v5p_8, v5p_64, h200 (one GPU) or
            h200_8 (a node of them; its mesh takes any number); as in 3b.py:paper,v5p_8
Command:    python -m caprl_jax.main --config=configs/3b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/      (parquet or JSON lines: data/files.py)
            The models are fetched from the hub unless --config.policy.path and
            --config.judge.path name directories.
Measured:   not at full size on an accelerator yet. On 2 CPU cores the same config runs with random
            weights of the real layout and tiny sizes (tests/real_data_test.py).
Hardware:   planned (caprl_jax.plan; seconds are floors, real steps take longer), GiB a chip:
            v5e_16 (v5e:4x4) 11.9 of 16, 20.4 s a step; v6e_16 (v6e:4x4) 14.8 of 32, 10.2 s;
            v5p_8 (v5p:2x2x2) 19.1 of 95, 20.5 s; v5p_64 (v5p:4x4x4) 11.9 of 95, 2.9 s.
            h200 and h200_8 are not planned: the compiler for GPUs needs one. h200 captions its
            batch in pieces, whose draws differ: a run begun on other chips doesn't go on there.
Expected:   Prism average over 11 benchmarks 39.9 -> 48.3 (arXiv 2509.22647, Table 3).
"""

from caprl_jax.recipes import choose, decode_over_tensor, released

# Pieces of 128 images: one image a chip at a time on 16 GB, more where there is room.
PIECES = {"v5e_16": 8, "v6e_16": 4, "v5p_8": 8, "v5p_64": 1, "h200": 64, "h200_8": 8}


def get_config(argument=""):
    recipe, hardware = choose(argument, ("released", "paper"), tuple(PIECES))
    c = released("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct", side=28, windows=80)
    c.caprl.micro_batches = PIECES[hardware]
    if hardware == "h200":  # captions of 32 images at a time: their caches take 11 GB
        c.caprl.rollout_batches = 4
        c.caprl.prefill_batches, c.caprl.score_batches = 32, 32
    if not hardware.startswith("h200"):
        decode_over_tensor(c, 4, heads=False)  # 2 key-value heads
    if recipe == "paper":
        c.caprl.advantage = "grpo"
        c.caprl.kl = 0.01  # the paper uses one; its coefficient is not given
        c.caprl.questions = 4
        c.data.shuffle_options = True
    return c
