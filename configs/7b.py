"""CapRL with Qwen2.5-VL-7B as policy and Qwen2.5-7B-Instruct as judge, on CapRL-QA-75K.

Arguments:  what is trained, whole (default): all weights; or lora: updates of rank 32 of the
            decoder's projections, which fits one H200
            and the hardware, found (default): mesh, slices and rematerialisation are chosen for the
            present devices; or one with fixed values below: v5p_16, v5e_64
Command:    python -m caprl_jax.main --config=configs/7b.py --workdir=DIR \
                --config.data.path=CapRL-QA-75K/
Measured:   not on an accelerator yet.
Hardware:   planned (caprl_jax.plan; seconds by roofline, real steps take longer), GiB a chip:
            found on 8 H100 (h100:8) 52.4 of 60, 30.9 s a step; lora on 1 H200 (h200:1) 70.3 of
            105.3, 128 s a step. With captions of at most 1,024
            tokens and earlier code: v5p_16 (v5p:2x2x4) 24.3 of 95, 18.7 s; v5e_64 (v5e:8x8) 12.7
            of 16, 14.4 s
Expected:   no figures are published for this size; the untrained 7B stands at 44.9 in the Prism
            average, in which the trained 3B reaches 48.3 (arXiv 2509.22647, Table 3).
"""

from caprl_jax.recipes import choose, decode_over_tensor, fix_slices, lora, released

SLICES = {"v5p_16": 4, "v5e_64": 2}  # slices of 128 images


def get_config(argument=""):
    trained, hardware = choose(argument, ("whole", "lora"), ("found", *SLICES))
    c = released("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", side=28, windows=80)
    if hardware in SLICES:
        fix_slices(c, SLICES[hardware])
        decode_over_tensor(c, 4, heads=True)  # 4 key-value heads
    if trained == "lora":
        lora(c)
    return c
