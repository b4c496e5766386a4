"""Asks a model behind an OpenAI-compatible endpoint, many questions at a time.

Failed requests are retried with growing delays, or after the server's Retry-After. A question that
fails in every try comes back as a Failure with its reason; none is lost.
"""

import base64
import collections
import concurrent.futures
import dataclasses
import email.utils
import json
import logging
import os
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from caprl_jax import letters
from caprl_jax.errors import ConfigError, UserError

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key; a key is no setting
_DELAY, _LONGEST_DELAY = 0.5, 60.0  # seconds before the second try, doubled each time; the most
_LONGEST_RETRY_AFTER = 900.0  # seconds
_MOST_LOGPROBS = 20  # log-probabilities of a token that the protocol allows
_AGAIN = (408, 409, 429)  # statuses of a server that may answer later, as all from 500 on
_PERMANENT = (400, 413, 422)  # of a request that no try makes better
# Fields that some servers refuse: the request is sent without them from then on.
_OPTIONAL = ("top_logprobs", "logprobs", "seed", "temperature")
Chat = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the requests.

    Attributes:
      concurrency: most requests at a time.
      timeout: seconds until a request without a whole answer is sent again.
      tries: how often a request is sent before it is given up.
    """

    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 8


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Settings of an answer.

    Attributes:
      max_tokens: most tokens of an answer.
      temperature: 0 is greedy.
      seed: of the draws, for servers that take one; None: the server's own.
      letters: whether to ask for log-probabilities of the letter that an answer names.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    letters: bool = False


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
      text: its text.
      truncated: whether it ran into max_tokens.
      first: log-probability of each likely token in the place of the letter that the text names,
        or of the first token if it names none; None if the server gave none.
    """

    text: str
    truncated: bool
    first: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """A question that was given up.

    Attributes:
      reason: the last error.
      permanent: whether the server refused the question itself, as too long, say.
    """

    reason: str
    permanent: bool = False


class _Malformed(ValueError):
    """An answer that isn't in the protocol's form."""


def is_url(path: str) -> bool:
    """Tells whether a model's path names an endpoint."""
    return str(path).startswith(("http://", "https://"))


def image_part(png: bytes) -> dict[str, Any]:
    """Returns the part of a user's turn that holds an image."""
    data = base64.b64encode(png).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _check(url: str) -> None:
    """Refuses a URL that can't be an endpoint's, or that holds a key, without showing it."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, secret = parts.hostname, "@" in parts.netloc or parts.query or parts.fragment
    except ValueError:
        host, secret = None, True
    if not is_url(url) or not host or secret:
        raise ConfigError(
            f"the endpoint's URL ({host or 'no host'}) must be http(s)://HOST[:PORT]/v1, without a "
            f"key: that is read from the environment variable {KEY}"
        )


class Endpoint:
    """A model behind an endpoint."""

    def __init__(self, url: str, model: str = "", limits: Limits = Limits()):
        """Prepares requests; nothing is sent yet.

        Args:
          url: of the API, for example http://host:8000/v1.
          model: its name there; empty takes the only one that is served.
          limits: of the requests.

        Raises:
          ConfigError: the URL can't be used, or openai isn't installed.
        """
        _check(url)
        try:
            import openai  # an extra: most users have no endpoint
        except ImportError as e:
            raise ConfigError(f"{url} needs: pip install 'caprl_jax[endpoint]'") from e
        self.url, self.limits, self._openai = url, limits, openai
        self._key = os.environ.get(KEY) or "none"
        self._client = openai.OpenAI(
            base_url=url, api_key=self._key, timeout=limits.timeout, max_retries=0
        )
        self._model = model
        self._refused: set[str] = set()

    @property
    def model(self) -> str:
        """Returns the model's name.

        Raises:
          UserError: the server can't be reached, or serves several models.
        """
        if not self._model:
            try:
                served = [m.id for m in self._client.with_options(max_retries=2).models.list().data]
            except (self._openai.OpenAIError, ValueError, TypeError, AttributeError) as e:
                raise UserError(
                    f"{self.url} doesn't say which models it serves: {self._line(e)}"
                ) from e
            if len(served) != 1:
                raise UserError(f"{self.url} serves {served}: name one of them")
            self._model = served[0]
        return self._model

    def ask(self, chats: Iterable[Chat], drawn: Drawn = Drawn()) -> Iterator[Reply | Failure]:
        """Yields the answers in the order of the chats, `limits.concurrency` asked at a time.

        Closing the generator, or Ctrl-C, leaves the requests under way to end by themselves.
        """
        todo: queue.SimpleQueue = queue.SimpleQueue()
        stop, threads = threading.Event(), 0
        pending: collections.deque[concurrent.futures.Future] = collections.deque()

        def work() -> None:
            while (task := todo.get()) is not None:
                future, chat = task
                try:
                    future.set_result(self.ask_once(chat, drawn, stop))
                except BaseException as e:
                    future.set_exception(e)

        try:
            for chat in chats:
                pending.append(concurrent.futures.Future())
                todo.put((pending[-1], chat))
                if threads < self.limits.concurrency:
                    threading.Thread(target=work, daemon=True).start()
                    threads += 1
                if len(pending) >= 2 * self.limits.concurrency:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            stop.set()
            for _ in range(threads):
                todo.put(None)

    def ask_once(
        self, chat: Chat, drawn: Drawn = Drawn(), stop: threading.Event | None = None
    ) -> Reply | Failure:
        """Returns the answer to one chat, asked up to `limits.tries` times.

        Args:
          chat: the turns.
          drawn: settings of the answer.
          stop: gives up when it is set.
        """
        stop = stop or threading.Event()
        tried, reason = 0, "stopped"
        while tried < self.limits.tries and not stop.is_set():
            delay = min(_DELAY * 2**tried, _LONGEST_DELAY) * random.uniform(0.75, 1)
            try:
                return self._request(chat, drawn)
            except self._openai.APIStatusError as e:
                reason = self._line(e)
                if self._without_refused(e):
                    continue
                if e.status_code not in _AGAIN and e.status_code < 500:
                    return Failure(reason, e.status_code in _PERMANENT)
                delay = max(delay, _retry_after(e.response.headers))
            except (self._openai.OpenAIError, ValueError, OSError) as e:
                reason = self._line(e)
            tried += 1
            if tried < self.limits.tries:
                stop.wait(delay)
        return Failure(reason)
        return Failure(reason)

    def _request(self, chat: Chat, drawn: Drawn) -> Reply:
        fields: dict[str, Any] = {"temperature": drawn.temperature, "seed": drawn.seed}
        if drawn.letters:
            fields |= {"logprobs": True, "top_logprobs": _MOST_LOGPROBS}
        if fields["seed"] is None:
            del fields["seed"]
        fields = {name: value for name, value in fields.items() if name not in self._refused}
        newer = "max_tokens" in self._refused
        fields["max_completion_tokens" if newer else "max_tokens"] = drawn.max_tokens
        deadline = time.monotonic() + self.limits.timeout
        with self._client.chat.completions.with_streaming_response.create(
            model=self.model, messages=list(chat), **fields
        ) as response:
            body = self._body(response, deadline)
        try:
            return _reply(json.loads(body))
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            raise _Malformed(f"a malformed answer: {e!r}") from e

    def _body(self, response: Any, deadline: float) -> bytes:
        """Reads a whole answer; the client's own timeout is between two of its bytes."""
        parts = []
        try:
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer within {self.limits.timeout:g} s")
        except (OSError, self._openai.OpenAIError):
            raise
        except Exception as e:  # of the HTTP library, which differs between versions of openai
            raise ConnectionError(f"the answer broke off: {e}") from e
        return b"".join(parts)

    def _without_refused(self, error: Any) -> bool:
        """Tells whether the server refuses an optional field, which is then left out for good."""
        if error.status_code not in (400, 422):
            return False
        said = str(error)
        names = [n for n in _OPTIONAL if n in said]
        names += ["max_tokens"] if "max_completion_tokens" in said else []
        if "logprobs" in names:
            names.append("top_logprobs")
        new = set(names) - self._refused
        if new:
            logging.warning("%s refuses %s: asked without", self.url, ", ".join(sorted(new)))
        self._refused |= new
        return bool(new)

    def _line(self, error: Exception) -> str:
        """Formats an error in a line, without the key."""
        said = f"{type(error).__name__}: {error}".replace(self._key, "***")
        return " ".join(said.split()).rstrip(".")[:200]


def _reply(answer: Any) -> Reply:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("it holds no text")
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    return Reply(text, choice.get("finish_reason") == "length", _at_letter(text, tokens))


def _at_letter(text: str, tokens: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Returns the log-probabilities at a text's letter, else at its first token."""
    if not tokens:
        return None
    spoken = "".join(token["token"] for token in tokens)
    place = letters.place(spoken, len(letters.LETTERS)) or 0
    end = 0
    for token in tokens:
        end += len(token["token"])
        if place < end:
            break
    return {t["token"]: float(t["logprob"]) for t in token["top_logprobs"]}


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that a server asks to wait, 0 without such a wish."""
    given = headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER) if seconds == seconds else 0.0
