"""CapRL-3B: Qwen2.5-VL-3B captions, Qwen2.5-3B-Instruct judges, on CapRL-QA-75K.

Arguments:  a recipe, released (default): RLOO, no KL, 8 questions drawn with replacement
                      paper: GRPO, KL to the start, 4 questions with shuffled options
            what is trained, whole (default): all weights; or lora: updates of rank 32 of the
                      decoder's projections, which fits one H100
            and the hardware, found (default): mesh, slices and rematerialisation are chosen for
            the present devices; or one with fixed values below: v5e_16, v6e_16, v5p_8, v5p_64,
            h200 (one GPU), h200_8 (a node of them; its mesh takes any number). An example is
            3b.py:paper,v5p_8
Command:    python -m caprl_jax.main --config=configs/3b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/      (parquet or JSON lines: data/sources/files.py)
            The models are fetched from the hub unless --config.policy.path and
            --config.judge.path name directories.
Measured:   not at full size on an accelerator yet. On 2 CPU cores the same config runs with random
            weights of the real layout and tiny sizes (tests/real_data_test.py).
Hardware:   chosen for the present devices, as reckoned from shapes (run/reckon.py, without a
            compiler; python -m caprl_jax.fit --config=configs/3b.py --devices=h100:8 prints it):

            | devices        | remat    | slices | GiB a device  |
            |----------------|----------|--------|---------------|
            | 1 H100, 80 GB  | refused  |        | 93.1 of 59.7  |
            | 2 H100         | full     | 32     | 55.6 of 59.7  |
            | 8 H100         | products | 16     | 43.3 of 59.7  |
            | 1 H100, lora   | products | 128    | 44.1 of 59.7  | captions in 4 slices
            | 1 H200, 141 GB | full     | 64     | 98.0 of 105.3 | captions in 2 slices
            | 8 H200         | products | 8      | 73.1 of 105.3 |
            | v5e:4x4        | full     | 8      | 12.6 of 15.8  |
            | v6e:4x4        | full     | 2      | 26.6 of 31.2  |
            | v5p:2x2x2      | products | 8      | 72.2 of 95.0  |

            (JAX takes 75% of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION sets another
            share.)
            Compiled ahead of time (caprl_jax.plan; seconds by roofline, real steps take longer),
            GiB a device: as chosen on 8 H100 38.0 of 59.7, 14.6 s a step; h200 94.6 of 105.3,
            60.8 s; lora on 1 H100 40.1 of 59.7, 86.8 s; h200_8 23.7 of 105.3, 11.8 s; v5e_16
            (v5e:4x4) 12.4 of 15.8, 23.1 s. With captions of at most 1,024 tokens and
            earlier code: v6e_16 (v6e:4x4) 14.8 of 32, 10.2 s; v5p_8 (v5p:2x2x2) 19.1 of 95, 20.5 s;
            v5p_64 (v5p:4x4x4) 11.9 of 95, 2.9 s.
            h200 captions its batch in slices, whose draws differ: a run begun on other devices
            can't continue with that argument. With `found` it can, in the slices that it began
            with; but TPUs draw otherwise than GPUs and CPUs (decode/sampling.py).
Expected:   Prism average over 11 benchmarks 39.9 -> 48.3 (arXiv 2509.22647, Table 3).
"""

from caprl_jax.recipes import choose, decode_over_tensor, fix_slices, lora, released

# Slices of 128 images: one image a chip at a time on 16 GB, more where there is room.
SLICES = {"v5e_16": 8, "v6e_16": 4, "v5p_8": 8, "v5p_64": 1, "h200": 64, "h200_8": 8}


def get_config(argument=""):
    recipe, trained, hardware = choose(
        argument, ("released", "paper"), ("whole", "lora"), ("found", *SLICES)
    )
    c = released("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct", side=28, windows=80)
    if hardware in SLICES:
        fix_slices(c, SLICES[hardware])
    if hardware == "h200":  # captions of 64 images at a time: their caches take 27 GB
        c.caprl.rollout_batches = 2
        c.caprl.prefill_batches, c.caprl.score_batches = 32, 32
    if hardware in SLICES and not hardware.startswith("h200"):
        decode_over_tensor(c, 4, heads=False)  # 2 key-value heads
    if trained == "lora":
        lora(c)
    if recipe == "paper":
        c.caprl.advantage = "grpo"
        c.caprl.kl = 0.01  # the paper uses one; its coefficient is not given
        c.caprl.questions = 4
        c.data.shuffle_options = True
    return c
