"""bfloat16 against float32 logits of one model directory: ours, and transformers' own.

    python -m tests.precision_at_size --model=DIR        (3B: about 10 minutes and 18 GB on CPU)

Each of the four runs is a process of its own, so that one model is in memory at a time.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

GRID, TEXT, LAST = (16, 24), 64, 32  # patches; text tokens; positions whose logits are compared


def inputs(config: dict) -> tuple[np.ndarray, np.ndarray]:
    """(patches, ids with the image's placeholders), the same in every process."""
    rng = np.random.default_rng(0)
    v = config["vision_config"]
    patch_dim = 3 * v["temporal_patch_size"] * v["patch_size"] ** 2
    patches = rng.normal(size=(GRID[0] * GRID[1], patch_dim)).astype(np.float32)
    image = [config["image_token_id"]] * (GRID[0] * GRID[1] // v["spatial_merge_size"] ** 2)
    words = rng.integers(0, 480, TEXT)
    return patches, np.concatenate([words[:4], image, words[4:]])


def ours(directory: Path, dtype: str) -> np.ndarray:
    """float32 [LAST, vocab]."""
    import jax

    import caprl_jax
    from caprl_jax.models.hf import files as hf
    from caprl_jax.models.vision import batch_images, feature_order, pad_to_windows, window_count
    from caprl_jax.models.vlm import Prompt, mrope_positions

    config = hf.read_config(directory)
    patches, ids = inputs(config)
    policy = caprl_jax.load_policy(directory, dtype=dtype, param_dtype=dtype)
    vision = policy.modules.vision.config
    images = batch_images([pad_to_windows(patches, GRID, vision, window_count(GRID, vision))])
    positions, following = mrope_positions(ids, config["image_token_id"], GRID, vision.merge)
    feature = np.full(len(ids), -1)
    feature[ids == config["image_token_id"]] = feature_order(GRID, vision)
    rows = ids, np.ones(len(ids), bool), positions, feature, np.asarray(following)
    prompt = Prompt(*(a[None] for a in rows))

    def logits(params):
        hidden = policy.modules.trunk(params, images, prompt).hidden[0, -LAST:]
        return policy.modules.logits(params, hidden)

    return np.asarray(jax.jit(logits)(policy.params))


def theirs(directory: Path, dtype: str) -> np.ndarray:
    """float32 [LAST, vocab]."""
    import torch
    from transformers import AutoModelForImageTextToText

    from caprl_jax.models.hf import files as hf

    patches, ids = inputs(hf.read_config(directory))
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=getattr(torch, dtype))
    ids = torch.tensor(ids)[None]
    with torch.no_grad():
        found = model.eval()(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_to_keep=LAST,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=torch.tensor(patches),
            image_grid_thw=torch.tensor([[1, *GRID]]),
        )
    return found.logits[0].float().numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Root-mean-square difference over b's root mean square, about its mean."""
    return float(np.sqrt(np.mean((a - b) ** 2) / np.var(b)))


def measure(directory: Path) -> dict[str, float]:
    """Relative errors of bfloat16 logits, ours and theirs, and between the float32 ones."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for who in ("ours", "theirs"):
            for dtype in ("float32", "bfloat16"):
                path = Path(folder) / "logits.npy"
                command = [sys.executable, "-m", "tests.precision_at_size", f"--model={directory}"]
                command += [f"--who={who}", f"--dtype={dtype}", f"--out={path}"]
                subprocess.run(command, check=True)
                found[who, dtype] = np.load(path)
    # Both against the same float32 logits, so that their errors compare.
    exact = found["theirs", "float32"]
    return {
        "ours, float32 against theirs": relative(found["ours", "float32"], exact),
        "ours, bfloat16 against float32": relative(
            found["ours", "bfloat16"], found["ours", "float32"]
        ),
        "theirs, bfloat16 against float32": relative(found["theirs", "bfloat16"], exact),
    }


def main() -> None:
    """One run, or all four and their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--who", choices=("ours", "theirs"))
    parser.add_argument("--dtype")
    parser.add_argument("--out")
    flags = parser.parse_args()
    if flags.who:
        np.save(flags.out, {"ours": ours, "theirs": theirs}[flags.who](flags.model, flags.dtype))
        return
    for what, error in measure(flags.model).items():
        print(f"{what:<36}{error:.2e}")


if __name__ == "__main__":
    main()
