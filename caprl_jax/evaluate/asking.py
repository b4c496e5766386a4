"""Asks a judge, and keeps its answers in a file, so that an interrupted evaluation goes on."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from caprl_jax.endpoint import Chat, Drawn, Failure, Reply

# (chats, settings) -> answers in their order, as Endpoint.ask yields them.
Speak = Callable[[Iterable[Chat], Drawn], Iterator[Reply | Failure]]


def answers(
    speak: Speak, chats: Sequence[Chat], drawn: Drawn, kept: Path, judge: str
) -> list[Reply | Failure]:
    """Returns the answer to each chat; only those that the file lacks are asked for.

    Equal chats have one answer. Failures are not kept: the next call asks again.

    Args:
      speak: the judge.
      chats: what to ask.
      drawn: settings of the answers.
      kept: file of answers, a line of JSON each; lines of other judges and settings may be there.
      judge: its name.
    """
    from tqdm import tqdm  # imported where used

    known, keys = _read(kept), [_key(chat, drawn, judge) for chat in chats]
    missing = {k: c for k, c in zip(keys, chats, strict=True) if k not in known}
    found: dict[str, Reply | Failure] = dict(known)
    replies = zip(missing, speak(missing.values(), drawn), strict=True)
    with kept.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            file.write(b"\n" if file.read() != b"\n" else b"")  # after a line that a kill has cut
        bar = tqdm(replies, total=len(missing), unit=" answers", disable=not sys.stderr.isatty())
        for key, reply in bar:
            found[key] = reply
            if isinstance(reply, Reply):
                line = json.dumps({"key": key} | dataclasses.asdict(reply), ensure_ascii=False)
                file.write(line.encode("utf-8", "replace") + b"\n")
                file.flush()
    return [found[key] for key in keys]


@dataclasses.dataclass
class Letters:
    """Asks as `answers` does, with log-probabilities unless the server refuses them.

    Attributes:
      refused: whether the server refuses requests for them; None until it is known. It is found
        out once: by a question that is refused for good with them, and answered without.
    """

    refused: bool | None = None

    def __call__(
        self, speak: Speak, chats: Sequence[Chat], drawn: Drawn, kept: Path, judge: str
    ) -> list[Reply | Failure]:
        """Returns the answers with log-probabilities, or without them if the server refuses."""
        wanted = dataclasses.replace(drawn, letters=True)
        plain = dataclasses.replace(drawn, letters=False)
        for chat in chats:
            if self.refused is not None:
                break
            (reply,) = answers(speak, [chat], wanted, kept, judge)
            if isinstance(reply, Reply):
                self.refused = False
            elif not reply.permanent:
                break  # it may pass: nothing is known
            elif isinstance(answers(speak, [chat], plain, kept, judge)[0], Reply):
                self.refused = True
        return answers(speak, chats, plain if self.refused else wanted, kept, judge)


def _key(chat: Chat, drawn: Drawn, judge: str) -> str:
    whole = json.dumps([judge, dataclasses.asdict(drawn), list(chat)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _read(kept: Path) -> dict[str, Reply]:
    found = {}
    for line in kept.read_bytes().splitlines() if kept.exists() else ():
        try:
            entry = json.loads(line)
            found[entry["key"]] = Reply(entry["text"], entry["truncated"], entry["first"])
        except (ValueError, KeyError, TypeError):
            continue  # cut by a kill: it is asked for again
    return found
