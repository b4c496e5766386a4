"""Measures captions by a judge's answers to questions, with intervals.

    python -m caprl_jax.evaluate --judge=DIR --data=ROWS --captions=captions.jsonl --out=DIR2
    python -m caprl_jax.evaluate --judge=DIR --data=ROWS --model=DIR --out=DIR2

The first takes what caprl_jax.caption made of the same rows, the second has a model write captions.
--protocol=mcq asks the rows' multiple-choice questions about an image's best or first caption (the
model's: greedy), prism asks one question about each of four captions and scores the answer's text,
captionqa asks CaptionQA's questions. DIR2/results.json holds means, their 95% intervals over the
images, and each row's values; with --against=OTHER/results.json,.. also the differences, row by
row. DIR2/report.html shows them side by side, with the images where they differ most.
evaluate/README.md says more.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from caprl_jax import protocols
from caprl_jax.api import LoadedJudge, load_judge, load_policy
from caprl_jax.api.judge import require_finite
from caprl_jax.caption import job, pictures
from caprl_jax.caption.parts import Place
from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph, set_up_logging
from caprl_jax.data.records import Question
from caprl_jax.decode.sampling import Sampling
from caprl_jax.endpoint import is_url
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import mcq, page, tables
from caprl_jax.evaluate.captionqa_rows import SPLITS
from caprl_jax.evaluate.scorers import SCORERS

# Flags that one protocol alone uses.
_FLAGS_OF = {"orders": "mcq", "max_tokens": "mcq", "scorer": "prism", "split": "captionqa"}
TEMPERATURE = 1.0  # of the probability that "expected" is: the judge's own, as at an endpoint


def asker(judge: LoadedJudge, batch: int) -> mcq.Ask:
    """Returns the judge as mcq.measure asks it, `batch` captions at a time.

    Calls of the result raise UserError if the judge's logits are not finite.
    """

    def ask(
        texts: Sequence[str], questions: Sequence[Sequence[Question]], order: int
    ) -> list[mcq.Answers]:
        found = []
        for start in range(0, len(texts), batch):
            part = slice(start, start + batch)
            own = questions[part]
            verdicts = judge.score_texts(
                list(texts[part]), own, mode="greedy", temperature=TEMPERATURE, seed=order
            )
            require_finite(verdicts, judge.directory)
            for i, asked in enumerate(own):
                at = i, 0, slice(len(asked))
                right, abstained = verdicts.score[at] > 0.5, verdicts.abstained[at]
                found.append(mcq.Answers(right, verdicts.p_truth[at], abstained))
        return found

    return ask


def read(captions: Path, data: str) -> tuple[list[mcq.Captioned], dict[str, int]]:
    """Joins captions with the questions of their images.

    Returns:
      (images with both, counts of images without questions and without a caption, and of captions
      without an image).

    Raises:
      ConfigError: the file holds no captions, or none of these images.
    """
    texts = {name: own[0] for name, own in tables.captions(captions, best=True).items() if own}
    found, counts = [], {"without_questions": 0, "without_caption": 0, "without_image": 0}
    unseen = set(texts)
    for picture in pictures.find(data).each():
        unseen.discard(picture.id)
        questions = picture.questions()
        if not questions:
            counts["without_questions"] += 1
        elif picture.id not in texts:
            counts["without_caption"] += 1
        else:
            text, source = texts[picture.id], picture.source
            found.append(mcq.Captioned(picture.id, text, tuple(questions), source))
    counts["without_image"] = len(unseen)
    if not found:
        raise ConfigError(f"no image of {data} has both questions and a caption: {counts}")
    return found, counts


def _captions(given: Any, out: Path) -> Path:
    """Returns the file of captions: the one given, or one that the model writes."""
    if given.captions:
        return Path(given.captions)
    sampling = Sampling(given.max_tokens, temperature=0.0)
    settings = job.Settings(sampling, batch=given.batch)
    policy = load_policy(given.model)
    job.caption(policy, pictures.find(given.data), settings, Place(out / "captions.jsonl"))
    return out / "captions.jsonl"


def evaluate(given: Any) -> None:
    """Does what the flags ask for.

    Raises:
      ConfigError: flags contradict each other, or a file can't be read or written.
    """
    out, others = protocols.prepare(given)
    at_endpoint = is_url(given.judge) or given.as_released
    ask, model = protocols.asker(given, out) if at_endpoint else (None, "")
    rows, without = read(_captions(given, out), given.data)
    if ask is None:
        judge = load_judge(given.judge)
        ask, model = asker(judge, given.batch), protocols.judge_version(judge)
    logging.info("asking about %d images", len(rows))
    found, about = mcq.measure(rows, ask, given.orders), {}
    if at_endpoint:
        found, about = protocols.drop_failed(ask, found)
    measured = {
        "protocol": "mcq",
        "images": len(found),
        "without": without,
        "judge": str(given.judge),
        "judge_model": model,
        "data": given.data,
        "captions": given.captions or given.model,
        "orders": given.orders,
        "expected_temperature": TEMPERATURE,
        "summary": mcq.summary(found),
        "groups": mcq.groups(found),
        "by_length": mcq.by_length(found),
        "each": found,
    } | about
    page.finish(out, measured, others, lambda ids: pictures.read(pictures.find(given.data), ids))
    if at_endpoint:
        protocols.show_flaws(measured)


def check_flags(given: Any) -> None:
    """Raises ConfigError if a flag is given that the protocol, or the judge, doesn't use."""
    for name, protocol in _FLAGS_OF.items():
        if given[name].present and given.protocol != protocol:
            raise ConfigError(
                f"--{name} is for --protocol={protocol}: leave it out for {given.protocol}"
            )
    if given["judge_model"].present and not is_url(given.judge):
        raise ConfigError(f"--judge_model is for an endpoint, which --judge={given.judge} isn't")


def main(_: list[str]) -> None:
    """Evaluates what the flags name, or prints the error in one paragraph."""
    set_up_logging()
    with in_one_paragraph():
        given = flags.FLAGS
        check_flags(given)
        if given.protocol == "mcq":
            evaluate(given)
        else:
            protocols.evaluate(given)


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string(
        "judge", None, "A judge's directory, gs:// URL, hub id or endpoint.", required=True
    )
    flags.DEFINE_string("data", None, "Rows with questions, or what import_data made of them.")
    flags.mark_flag_as_required("data")
    flags.DEFINE_string("captions", "", "File that caprl_jax.caption made of these rows.")
    flags.DEFINE_string("model", "", "A policy's directory, gs:// URL or hub id, to caption them.")
    flags.DEFINE_string("out", None, "Folder of results.json.", required=True)
    flags.DEFINE_list("against", [], "results.json of others, by commas, to compare with.")
    flags.DEFINE_enum("protocol", "mcq", protocols.PROTOCOLS, "Protocol of the evaluation.")
    flags.DEFINE_bool("as_released", False, "Whether flaws of the released code are reproduced.")
    flags.DEFINE_enum("scorer", "", ("", *SCORERS), "Scorer of Prism's rows that name none.")
    flags.DEFINE_enum("split", "", ("", *SPLITS), "Split of CaptionQA's data; empty is all.")
    flags.DEFINE_string("judge_model", "", "Judge's name at an endpoint that serves several.")
    flags.DEFINE_integer("orders", 4, "Orders of the options that mcq asks.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 512, "Most tokens of captions for mcq.", lower_bound=1)
    flags.DEFINE_integer("batch", 16, "Images in a batch.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
