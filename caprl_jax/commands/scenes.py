"""Writes scenes of the embedded world as pictures, with their true captions.

    python -m caprl_jax.scenes --to=DIR [--count=512]

DIR/images/ gets the pictures, and DIR/captions.jsonl a line {"id", "image", "caption"} for each: a
small corpus to caption, or to learn captions from. No run holds these scenes out.
"""

import json
from pathlib import Path

from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.data.digits import DIGITS, GRID
from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole
from caprl_jax.run import workdir as workdir_lib


def write_scenes(to: Path, count: int) -> Path:
    """Writes the first scenes of the training split; returns the file of their captions.

    Raises:
      ConfigError: the folder can't be written to.
    """
    from caprl_jax.data.digits import world  # Pillow is imported where it is used

    images = to / "images"
    try:
        workdir_lib.try_out(to)
        images.mkdir(exist_ok=True)
        lines = []
        for record in world.scenes("train", count, GRID, DIGITS):
            picture = images / f"{record.id}.png"
            picture.write_bytes(record.image)
            line = {"id": picture.name, "image": f"images/{picture.name}"}
            lines.append(line | {"caption": record.captions[0]})
        write_whole(to / "captions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as e:
        raise ConfigError(f"can't write {to}: {e.strerror or e}; give another --to") from e
    return to / "captions.jsonl"


def main(_: list[str]) -> None:
    """Writes what the flags name, or prints the error in one paragraph."""
    set_up_logging()
    given = flags.FLAGS
    with in_one_paragraph():
        print(f"made {write_scenes(Path(given.to), given.count)}")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("to", None, "Folder to write to.", required=True)
    flags.DEFINE_integer("count", 512, "Number of scenes.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
