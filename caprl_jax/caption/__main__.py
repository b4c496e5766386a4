"""Writes captions of many images: a line of JSON for each.

    python -m caprl_jax.caption --model=DIR --images=PHOTOS/ --out=captions.jsonl [--group=4]

Images are a folder or a pattern of pictures, or files of rows as import_data takes them, with or
without questions. Images that can't be read are listed in OUT.errors. An interrupted job goes on
with the same command. Several processes, each with its own devices and with --processes=N
--process=I, share the work on a shared disk; the last to end writes the file. An image's captions
depend on the model, the settings and the image's id, not on the other images. With --judge=DIR, a
row's questions are answered from each of its captions, and the line says which is best.

--select=consensus or --select=logp takes one of the --group captions of an image, the one most like
the others or the one most probable a token. --enrich=5 asks the model about up to five objects of
the caption, and has it write a final one.
"""

from absl import flags

from caprl_jax.api import load_judge, load_policy
from caprl_jax.api.policy import PROMPT
from caprl_jax.caption import parts, pictures
from caprl_jax.caption.job import Settings, caption
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.decode.sampling import Sampling
from caprl_jax.settings import make


def main(_: list[str]) -> None:
    """Captions what the flags name, or prints the error in one paragraph."""
    set_up_logging()
    given = flags.FLAGS
    with in_one_paragraph():
        place = parts.open_place(given.out, given.process, given.processes)
        sampling = make(
            Sampling, {"max_tokens": given.max_tokens, "temperature": given.temperature}
        )
        settings = Settings(
            sampling,
            given.prompt,
            given.group,
            given.seed,
            given.batch,
            select=given.select,
            enrich=given.enrich,
        )
        images = pictures.find(given.images)
        policy = load_policy(given.model, revision=given.revision)
        judge = load_judge(given.judge) if given.judge else None
        done = caption(policy, images, settings, place, judge)
    print(f"made {place.out}" if done else "done; other processes go on")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("model", None, "A directory, gs:// URL or hub id.", required=True)
    flags.DEFINE_string("revision", "", "Revision of a hub id.")
    flags.DEFINE_string("images", None, "A file, a pattern, or a folder.", required=True)
    flags.DEFINE_string("judge", "", "A judge's directory, gs:// URL or hub id; empty: none.")
    flags.DEFINE_string("out", None, "File of captions to make.", required=True)
    flags.DEFINE_string("prompt", PROMPT, "The user's text after the image.")
    flags.DEFINE_integer("group", 1, "Captions of each image.", lower_bound=1)
    flags.DEFINE_string(
        "select", "", "Takes one of them: consensus, logp, or an import path; empty: all."
    )
    flags.DEFINE_integer(
        "enrich", 0, "Most objects to ask about for a final caption; 0: none.", lower_bound=0
    )
    flags.DEFINE_float("temperature", 1.0, "Temperature; 0 is greedy.", lower_bound=0)
    flags.DEFINE_integer("max_tokens", 512, "Most tokens of a caption.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
    flags.DEFINE_integer("batch", 16, "Images in a batch.", lower_bound=1)
    flags.DEFINE_integer(
        "processes", 1, "Number of processes that share the images.", lower_bound=1
    )
    flags.DEFINE_integer("process", 0, "Number of this process, from 0.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
