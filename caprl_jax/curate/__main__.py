"""Writes questions and rubrics about images, and keeps those that need the image.

    python -m caprl_jax.curate generate --model=DIR --images=PHOTOS/ --out=DIR2
    python -m caprl_jax.curate rubrics --model=DIR --images=PHOTOS/ --out=DIR2
    python -m caprl_jax.curate paraphrase --images=ROWS.jsonl --out=DIR2
    python -m caprl_jax.curate filter --model=DIR --rows=DIR2/rows.jsonl [--of=rubrics] --out=DIR3
    python -m caprl_jax.curate report --dir=DIR3

generate has a vision-language model write questions about each image, and reads them strictly;
rubrics has it write criteria of a caption instead, and rows keep the questions that they have.
paraphrase needs no model. It turns each caption of a row into a rubric: does a new caption say the
same?
filter has a model answer each question several times, its options shuffled, with the image and
without, and keeps those that the image alone answers (CapRL, arXiv 2509.22647). report writes
DIR3/report.html. A model is a directory, a hub id, or an endpoint's URL, http://HOST:PORT/v1. An
interrupted job goes on with the same command; several processes, with --processes=N --process=I,
share the work on a shared disk.
"""

from pathlib import Path

from absl import flags

from caprl_jax import endpoint
from caprl_jax.api import load_policy
from caprl_jax.caption import pictures
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.curate import filter as filter_lib
from caprl_jax.curate import folder
from caprl_jax.curate import generate as generate_lib
from caprl_jax.curate import paraphrase as paraphrase_lib
from caprl_jax.curate import report as report_lib
from caprl_jax.curate.trials import PRESETS, Settings
from caprl_jax.endpoint import Endpoint, Limits
from caprl_jax.errors import ConfigError, did_you_mean
from caprl_jax.settings import make


def _model(given: flags.FlagValues) -> generate_lib.Model:
    if not endpoint.is_url(given.model):
        return load_policy(given.model, revision=given.revision)
    limits = Limits(given.concurrency, given.timeout, given.tries)
    return Endpoint(given.model, given.model_name, limits)


def _settings(kind: type, given: flags.FlagValues, more: dict | None = None) -> object:
    names = kind.__dataclass_fields__
    return make(kind, {n: given[n].value for n in names if n in given} | (more or {}))


def generate(given: flags.FlagValues, kind: generate_lib.Kind = generate_lib.QUESTIONS) -> None:
    """Writes questions, as the flags say."""
    place = folder.open_folder(given.out, generate_lib.ROWS, given.process, given.processes)
    images = pictures.find(given.images, given.root)
    settings = _settings(generate_lib.Settings, given)
    done = generate_lib.generate(_model(given), images, settings, place, kind)
    print(f"made {place.out}" if done else "done; other processes go on")


def rubrics(given: flags.FlagValues) -> None:
    """Writes rubrics, as the flags say."""
    generate(given, generate_lib.RUBRICS)


def paraphrase(given: flags.FlagValues) -> None:
    """Makes rubrics of captions, as the flags say."""
    place = folder.open_folder(given.out, generate_lib.ROWS, given.process, given.processes)
    done = paraphrase_lib.paraphrase(pictures.find(given.images, given.root), place)
    print(f"made {place.out}" if done else "done; other processes go on")


def _images_flags() -> None:
    flags.DEFINE_string("images", None, "A file, a pattern, or a folder.", required=True)


def _generate_flags() -> None:
    flags.DEFINE_integer(
        "count", 5, "Number of questions, or rubrics, to ask for about each image.", lower_bound=1
    )
    flags.DEFINE_integer("max_tokens", 2048, "Most tokens of an answer.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.1, "Temperature; 0 is greedy.", lower_bound=0)


def filter_settings(given: flags.FlagValues) -> Settings:
    """Returns the filter's settings: a preset's, with the flags that are given."""
    preset = PRESETS[given.preset]
    chosen = {n: given[n].value for n in preset if given[n].value is not None}
    return _settings(Settings, given, preset | chosen)


def filter_rows(given: flags.FlagValues) -> None:
    """Filters questions, as the flags say."""
    place = folder.open_folder(given.out, filter_lib.KEPT, given.process, given.processes)
    rows, settings = pictures.find(given.rows, given.root), filter_settings(given)
    done = filter_lib.filter_questions(_model(given), rows, settings, place, given.of)
    print(f"made {place.out}" if done else "done; other processes go on")


def _filter_flags() -> None:
    flags.DEFINE_string("rows", None, "Rows with questions: generate's, or others.", required=True)
    flags.DEFINE_enum("of", "questions", list(filter_lib.JOBS), "What to ask and filter.")
    flags.DEFINE_enum("preset", "paper", list(PRESETS), "Default trials and bounds.")
    flags.DEFINE_integer(
        "trials", None, "Number of option orders to ask each question in.", lower_bound=1
    )
    flags.DEFINE_float(
        "visual",
        None,
        "Keep a question if accuracy with the image is above this; 1 means all right answers.",
    )
    flags.DEFINE_float(
        "text_only",
        None,
        "Keep a question if accuracy without the image is below this; 0 means no right answer.",
    )
    flags.DEFINE_bool("logprobs", True, "Ask an endpoint for log-probabilities.")


def _model_flags() -> None:
    flags.DEFINE_string("model", None, "A directory, gs:// URL, hub id, or URL.", required=True)
    flags.DEFINE_string("revision", "", "Revision of a hub id.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
    flags.DEFINE_integer("batch", 16, "Images in a batch of a local model.", lower_bound=1)
    flags.DEFINE_string("model_name", "", "The model's name at an endpoint that serves several.")
    flags.DEFINE_integer(
        "concurrency", 8, "Largest number of requests to an endpoint at a time.", 1
    )
    flags.DEFINE_float("timeout", 120, "Seconds to wait for an endpoint's answer.", 0)
    flags.DEFINE_integer("tries", 6, "Tries for each request to an endpoint.", 1)


def _place_flags() -> None:
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_string(
        "root", "", "Folder that must hold the rows' image files; empty: the folder of the rows."
    )
    flags.DEFINE_integer("processes", 1, "Number of processes that share the work.", lower_bound=1)
    flags.DEFINE_integer("process", 0, "Number of this process, from 0.")


def report(given: flags.FlagValues) -> None:
    """Writes the page of a folder, as the flags say."""
    print(f"made {report_lib.write(Path(given.dir))}")


def _report_flags() -> None:
    flags.DEFINE_string("dir", None, "Folder that another job has made.", required=True)


_WRITING = (_images_flags, _generate_flags, _model_flags, _place_flags)
JOBS = {
    "generate": (generate, _WRITING),
    "rubrics": (rubrics, _WRITING),
    "paraphrase": (paraphrase, (_images_flags, _place_flags)),
    "filter": (filter_rows, (_filter_flags, _model_flags, _place_flags)),
    "report": (report, (_report_flags,)),
}


def _define_flags(jobs: list[str]) -> None:
    for define in dict.fromkeys(define for job in jobs for define in JOBS[job][1]):
        define()


def parse_flags(argv: list[str]) -> list[str]:
    """Takes the job's name from the arguments, and parses its flags."""
    given = [a for a in argv[1:2] if not a.startswith("-")]
    with in_one_paragraph():
        if given and given[0] not in JOBS:
            raise ConfigError(f"{given[0]!r} is no job of curate: {did_you_mean(given[0], JOBS)}")
        helps = any(a in ("-h", "-help", "--help", "-?") for a in argv)
        if not given and not helps:
            raise ConfigError(f"name what to do: python -m caprl_jax.curate {' | '.join(JOBS)}")
    _define_flags(given or list(JOBS))  # --help alone lists those of all jobs
    return [given[0] if given else "", *cli.parse_flags([argv[0], *argv[1 + len(given) :]])]


def main(argv: list[str]) -> None:
    """Does the job that the arguments name, or prints the error in one paragraph."""
    set_up_logging()
    with in_one_paragraph():
        JOBS[argv[0]][0](flags.FLAGS)


if __name__ == "__main__":
    cli.run(main, parse_flags)
