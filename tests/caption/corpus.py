"""Captions many images of the embedded world: whole, killed, by two processes, and by transformers.

    python -m tests.caption.corpus [--images=5000] [--kills=3]

Prints whether the files are the same, and images a second beside those of generate() on the same
images, in batches of 16, each with its start and its reading of the files.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from caprl_jax.data.digits import world as digits
from caprl_jax.data.images import decode_image
from caprl_jax.models.hf import download as sources

from .. import serving

TOKENS, BATCH = 32, 16


def make(folder: Path, count: int) -> None:
    """Writes pictures of two sizes."""
    for i, record in enumerate(digits.scenes("train", count, (3, 3), (2, 5))):
        image = decode_image(record.image)
        (image.crop((0, 0, 84, 56)) if i % 4 == 0 else image).save(folder / f"{i:05d}.png")


def job(images: Path, out: Path, process: int = 0, processes: int = 1) -> subprocess.Popen:
    """Starts the command."""
    out.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "caprl_jax.caption", "--model=asset:tiny/policy"]
    command += [f"--images={images}", f"--out={out}", f"--max_tokens={TOKENS}", f"--batch={BATCH}"]
    command += [f"--process={process}", f"--processes={processes}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def timed(jobs: list[subprocess.Popen], began: float) -> float:
    """Waits for jobs; returns the seconds since `began`."""
    codes = [j.wait() for j in jobs]
    assert not any(codes), codes
    return time.monotonic() - began


def killed(images: Path, out: Path, kills: int, seconds: float) -> int:
    """Kills the job at random moments, then lets it end; returns how often it was killed."""
    rng, count = random.Random(0), 0
    for _ in range(kills):
        running = job(images, out)
        time.sleep(rng.uniform(0.2, 0.6) * seconds)
        count += running.poll() is None
        running.kill()
        running.wait()
    timed([job(images, out)], 0)
    return count


def theirs(images: list[Path]) -> float:
    """Seconds of transformers' generate() for images of one size, a batch at a time."""
    began = time.monotonic()
    directory = sources.fetch("asset:tiny/policy")
    model, _, tokenizer = serving.served(directory, [])
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            part = [Image.open(p).convert("RGB") for p in images[start : start + BATCH]]
            inputs = serving.inputs(directory, part, model, tokenizer)
            joined = {name: torch.cat([i[name] for i in inputs]) for name in inputs[0]}
            found = model.generate(**joined, max_new_tokens=TOKENS, do_sample=True)
            tokenizer.batch_decode(found[:, joined["input_ids"].shape[1] :])
    return time.monotonic() - began


def main() -> None:
    """Runs all four, and prints what it saw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        images.mkdir()
        make(images, given.images)
        seconds = timed([job(images, folder / "whole/c.jsonl")], time.monotonic())
        whole = (folder / "whole/c.jsonl").read_bytes()
        print(f"whole: {given.images} images in {seconds:.0f} s: {given.images / seconds:.1f}/s")
        count = killed(images, folder / "killed/c.jsonl", given.kills, seconds)
        same = (folder / "killed/c.jsonl").read_bytes() == whole
        print(f"killed {count} times: the same file: {same}")
        out, began = folder / "two/c.jsonl", time.monotonic()
        both = timed([job(images, out, i, 2) for i in range(2)], began)
        same = out.read_bytes() == whole
        print(f"two processes, {both:.0f} s: the same file: {same}")
        alike = [p for i, p in enumerate(sorted(images.iterdir())) if i % 4][: given.images // 5]
        other = theirs(alike)
        rate, ours = len(alike) / other, given.images / seconds
        print(f"generate(): {len(alike)} images in {other:.0f} s, {rate:.1f} a second")
        print(f"ours / theirs: {ours / rate:.2f}")


if __name__ == "__main__":
    main()
