"""CapRL with Qwen3-VL-4B as policy and Qwen3-4B as judge, on CapRL-QA-75K.

Arguments:  the hardware, found (default): mesh, slices and rematerialisation are chosen for the
            present devices; or one with fixed values below: v5e_16
Command:    python -m caprl_jax.main --config=configs/qwen3vl_4b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/
Measured:   not on an accelerator yet.
Hardware:   planned (caprl_jax.plan; seconds by roofline, real steps take longer), GiB a chip:
            found on 8 H100 (h100:8) 45.8 of 60, 24.4 s a step. With captions of at most 1,024
            tokens and earlier code: v5e_16 (v5e:4x4) 13.6 of 16, 45.6 s, bound by the traffic of
            its caches
Expected:   no figures of this pair on the Prism benchmarks are known here; CapRL++ trains this
            size with a judge of this family.
"""

from caprl_jax.recipes import choose, decode_over_tensor, fix_slices, released

SLICES = {"v5e_16": 8}  # slices of 128 images


def get_config(argument=""):
    (hardware,) = choose(argument, ("found", *SLICES))
    # Windows of Qwen3-VL are single features.
    c = released("Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-4B", side=32, windows=1024)
    if hardware in SLICES:
        fix_slices(c, SLICES[hardware])
        c.caprl.rollout_batches = 2  # 8 key-value heads: large caches
        decode_over_tensor(c, 4, heads=True)
    c.optimizer.learning_rate = 1e-5  # CapRL++'s value, like its constant schedule
    c.optimizer.schedule = "constant"
    return c
