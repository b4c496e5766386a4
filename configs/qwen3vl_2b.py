"""CapRL with Qwen3-VL-2B as policy and Qwen3-4B as judge, on CapRL-QA-75K.

Arguments:  the hardware, found (default): mesh, slices and rematerialisation are chosen for the
            present devices; or one with fixed values below: v5e_16
Command:    python -m caprl_jax.main --config=configs/qwen3vl_2b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/
Measured:   not on an accelerator yet.
Hardware:   not planned yet; the larger qwen3vl_4b.py is planned (see there).
Expected:   no figures of this pair on the Prism benchmarks are known here; CapRL 2.0 trains this
            size.
"""

from caprl_jax.recipes import choose, decode_over_tensor, fix_slices, released

SLICES = {"v5e_16": 8}  # slices of 128 images


def get_config(argument=""):
    (hardware,) = choose(argument, ("found", *SLICES))
    # Windows of Qwen3-VL are single features.
    c = released("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-4B", side=32, windows=1024)
    if hardware in SLICES:
        fix_slices(c, SLICES[hardware])
        c.caprl.rollout_batches = 2  # 8 key-value heads: large caches
        decode_over_tensor(c, 4, heads=True)
    c.optimizer.learning_rate = 1e-5  # CapRL++'s value, like its constant schedule
    c.optimizer.schedule = "constant"
    return c
