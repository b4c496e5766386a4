"""Prism and CaptionQA from the command line: captions, a judge and rows in, results.json out.

`python -m caprl_jax.evaluate --protocol=..` comes here for all protocols but mcq. The protocols are
evaluate/prism.py and evaluate/captionqa.py; here their captions and judges are made.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.api import LoadedJudge, load_judge, load_policy
from caprl_jax.caption import job, pictures
from caprl_jax.caption.parts import Place
from caprl_jax.caption.pictures import Picture, Pictures
from caprl_jax.data.questions import JudgePrompt, Presented, own_prompt
from caprl_jax.data.records import LETTERS
from caprl_jax.decode.sampling import Sampling
from caprl_jax.endpoint import Chat, Drawn, Endpoint, Failure, Reply, is_url
from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import captionqa, captionqa_rows, page, prism, released, results, tables
from caprl_jax.evaluate.asking import Speak
from caprl_jax.evaluate.letters import Asker

PROTOCOLS = ("mcq", "prism", "captionqa")
_MOST_OPTIONS = len(LETTERS)  # of a judge on the mesh
_ANSWERS = "answers.jsonl"


def evaluate(given: Any) -> None:
    """Evaluates by the protocol that the flags name.

    Raises:
      ConfigError: flags contradict each other, or a file can't be read or written.
    """
    out, others = prepare(given)
    about = {
        "protocol": given.protocol,
        "as_released": given.as_released,
        "judge": given.judge,
        "data": given.data,
        "captions": given.captions or given.model,
    }
    if given.protocol == "prism":
        (measured, images), paired = _prism(given, out), prism.paired
    else:
        (measured, images), paired = _captionqa(given, out), captionqa.paired
    if not measured["each"]:
        raise ConfigError(
            f"nothing was scored: {measured['without']}, {measured['failed'][:1]}; the same "
            "command asks for the missing answers again"
        )

    if others:
        about["against"] = results.compare(measured, others, paired)
    whole = about | measured
    page.finish(out, whole, others, lambda ids: pictures.read(images, ids))
    show_flaws(whole)


def prepare(given: Any) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Makes the folder --out, and reads the evaluations of --against.

    Returns:
      (the folder, results by file).

    Raises:
      ConfigError: flags contradict each other, or a file can't be read or written.
    """
    if bool(given.captions) == bool(given.model):
        raise ConfigError("give either --captions=FILE or --model=DIR")
    others = {file: results.read(file) for file in given.against}
    out = Path(given.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"can't write {out}: {e.strerror or e}; give another --out") from e
    return out, others


def asker(given: Any, out: Path) -> tuple[Asker, str]:
    """Returns the judge at an endpoint as mcq asks it, and its model's name there.

    Raises:
      ConfigError: it is none, whose text the released code's flaws are about.
    """
    if not is_url(given.judge):
        raise ConfigError(
            "--as_released of mcq is about a judge's text: give an endpoint as --judge"
        )
    judge = make_text_judge(given)
    return Asker(judge.speak, out / _ANSWERS, judge.key, given.as_released, given.batch), judge.name


def drop_failed(asked: Asker, found: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict]:
    """Returns mcq's rows without those that failed, and what results.json says about the judge.

    Raises:
      ConfigError: no row is left.
    """
    lost = {} if asked.as_released else asked.failed
    kept = [row for i, row in enumerate(found) if i not in lost]
    failed = [{"id": found[i]["id"], "reason": reason} for i, reason in asked.failed.items()]
    if not kept:
        raise ConfigError(
            f"nothing was scored: {failed[0]}; the same command asks for the missing answers again"
        )
    flaws = {
        name: dataclasses.asdict(flaw) | {"answers": asked.counts[name]}
        for name, flaw in released.MCQ.items()
    }
    return kept, {
        "as_released": asked.as_released,
        "failed": failed,
        "flaws": flaws,
        "not_reproduced": released.NOT_REPRODUCED,
    }


def _prism(given: Any, out: Path) -> tuple[dict[str, Any], Pictures]:
    """Returns (results, the images)."""
    questions, aside = prism.read(given.data, given.scorer)
    images = images_of(tables.files(given.data))
    sampling = Sampling(prism.MAX_TOKENS, temperature=1.0)
    captions = _captions(
        given, out, images, job.Settings(sampling, group=prism.CAPTIONS, batch=given.batch)
    )
    known = captions.keys()
    if not any(q.id in known or q.image in known for q in questions):
        raise ConfigError(f"--captions={given.captions} has no caption of --data={given.data}")
    judge = make_text_judge(given)
    settings = prism.Settings(out / _ANSWERS, judge.key, given.data, given.as_released)
    measured = prism.measure(questions, captions, judge.speak, settings)
    measured["without"] |= {"set_aside": aside.total()}
    return measured | {
        "set_aside": dict(aside),
        "judge_model": judge.name,
        "scorer": given.scorer,
    }, images


def _captionqa(given: Any, out: Path) -> tuple[dict[str, Any], Pictures]:
    """Returns (results, the images)."""
    data = captionqa_rows.read(given.data, given.split)
    images = images_of(data.files)
    sampling = Sampling(captionqa.MAX_TOKENS, temperature=captionqa.TEMPERATURE)
    captions = _captions(given, out, images, job.Settings(sampling, batch=given.batch))
    if not captions.keys() & data.own:
        raise ConfigError(f"--captions={given.captions} has no caption of --data={given.data}")
    if is_url(given.judge):
        speaks = make_text_judge(given)
        name = speaks.name
        choose = captionqa.Chooser(speaks.speak, out / _ANSWERS, speaks.key, given.as_released)
    else:
        judge = with_prompt(load_judge(given.judge))
        name = judge_version(judge)

        def choose(shown: Sequence[captionqa_rows.Shown], texts: Sequence[str]) -> list[Any]:
            return chosen_by_logits(judge, shown, texts, given.batch)

    measured = captionqa.measure(data, captions, choose, given.as_released)
    return measured | {"judge_model": name, "split": data.split}, images


def images_of(files: Mapping[Path, str]) -> Pictures:
    """Finds the images of rows.

    Args:
      files: the rows' files, as tables.files returns them; the images' ids are those of its rows.

    Raises:
      ConfigError: a file's rows can't be counted.
    """

    def named(found: Pictures, stem: str, name: str) -> Iterator[Picture]:
        for i, picture in enumerate(found.each()):
            place = picture.id == f"{stem}-{i:06d}"
            yield dataclasses.replace(picture, id=f"{name}-{i:06d}") if place else picture

    found = []
    for file, name in files.items():
        own = pictures.find(str(file))
        each = functools.partial(named, own, file.stem, name)
        found.append(dataclasses.replace(own, each=each))
    others = [f.name for f in dataclasses.fields(Pictures) if f.name != "count"]
    return Pictures(
        sum(own.count for own in found),
        **{name: functools.partial(_each_of, [getattr(f, name) for f in found]) for name in others},
    )


def _each_of(generators: Sequence[Callable[[], Iterator]]) -> Iterator:
    for generate in generators:
        yield from generate()


def with_prompt(judge: LoadedJudge) -> LoadedJudge:
    """Returns the judge with captionqa.PROMPT, unless its directory holds its own prompt."""
    if own_prompt(judge.directory):
        return judge
    prompt = JudgePrompt.create(judge.tokenizer, captionqa.PROMPT)
    return dataclasses.replace(judge, prompt=prompt)


@dataclasses.dataclass(frozen=True)
class TextJudge:
    """A judge that answers chats with text.

    Attributes:
      speak: the judge.
      name: its model's name at the endpoint; a directory's has its weights' size and time.
      key: tells it from every other judge; its answers are kept under it.
    """

    speak: Speak
    name: str
    key: str


def judge_version(judge: LoadedJudge) -> str:
    """Returns a judge's directory, with its weights' number of bytes and time of change."""
    weights = [f.stat() for f in sorted(Path(judge.directory).glob("*.safetensors"))]
    bytes_, changed = sum(w.st_size for w in weights), max((w.st_mtime for w in weights), default=0)
    return f"{judge.directory} {bytes_} {changed:.0f}"


def make_text_judge(given: Any) -> TextJudge:
    """Returns the judge of the flags as one that answers chats with text.

    Raises:
      UserError: an endpoint can't be reached to ask for its model's name, or serves several models.
    """
    if is_url(given.judge):
        served = Endpoint(given.judge, given.judge_model)
        return TextJudge(served.ask, served.model, f"{given.judge} {served.model}")
    judge = load_judge(given.judge)

    def write(chats: Iterable[Chat], drawn: Drawn) -> Iterator[Reply | Failure]:
        # A judge on the mesh reads one user's turn: the chat's turns after one another.
        texts = ("\n\n".join(turn["content"] for turn in chat) for chat in chats)
        while part := list(itertools.islice(texts, 8 * given.batch)):
            yield from judge.write(
                part,
                seed=drawn.seed or 0,
                batch=given.batch,
                max_tokens=drawn.max_tokens,
                temperature=drawn.temperature,
            )

    version = judge_version(judge)
    return TextJudge(write, version, version)


def chosen_by_logits(
    judge: LoadedJudge, shown: Sequence[captionqa_rows.Shown], texts: Sequence[str], batch: int
) -> list[int | Failure]:
    """Returns the likeliest letter of each question of CaptionQA, from 0, by a judge on the mesh.

    Args:
      judge: see with_prompt; the options stand in CaptionQA's order.
      shown: questions; those of one image follow one another.
      texts: each question's caption.
      batch: captions that are judged together.
    """
    found: list[int | Failure] = [Failure(f"over {_MOST_OPTIONS} options")] * len(shown)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (s, text) in enumerate(zip(shown, texts, strict=True)):
        if len(s.order) <= _MOST_OPTIONS:
            groups.setdefault((s.question.image, text), []).append(i)
    whole = list(groups.items())
    for start in range(0, len(whole), batch):
        part = whole[start : start + batch]
        presented = [
            [Presented(shown[i].question.text, shown[i].options, _place(shown[i])) for i in at]
            for _, at in part
        ]
        letters = judge.letters([text for (_, text), _ in part], presented)
        for (_, at), own in zip(part, letters, strict=True):
            for i, letter in zip(at, own, strict=True):
                found[i] = letter
    return found


def _place(shown: captionqa_rows.Shown) -> int:
    return shown.order.index(shown.question.answer)


def _captions(given: Any, out: Path, images: Pictures, how: job.Settings) -> Mapping:
    """Returns captions by image: those that are given, or those that the model writes."""
    best = given.protocol == "captionqa"  # asks about one
    if given.captions:
        return tables.captions(Path(given.captions), best)
    policy, place = load_policy(given.model), Place(out / "captions.jsonl")
    logging.info("captioning with at most %d tokens", how.sampling.max_tokens)
    job.caption(policy, images, how, place)
    return tables.captions(place.out, best)


def show_flaws(measured: Mapping[str, Any]) -> None:
    """Prints the flaws that were mended or reproduced, and how many answers each touches."""
    how = "reproduced" if measured["as_released"] else "mended"
    for name, flaw in measured["flaws"].items():
        touched = [f"{n} {kind}" for kind, n in flaw.items() if isinstance(n, int)]
        print(f"{how}: {name} ({flaw['released']}), touching {touched[0]}")
