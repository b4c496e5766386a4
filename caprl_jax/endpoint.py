"""Asks a model behind an OpenAI-compatible endpoint, many questions at a time.

A question that fails is asked again, later each time, and as the server's Retry-After says. One
that fails for good comes back as a Failure with its reason; none is lost.
"""

import base64
import concurrent.futures
import dataclasses
import json
import os
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from caprl_jax.errors import ConfigError, UserError

KEY = "OPENAI_API_KEY"  # the environment variable that holds the key; a key is no setting
_SLEEP = 0.5  # seconds before a malformed answer is asked for again; doubled each time
_LETTERS = 20  # most log-probabilities of a token that the protocol allows
Chat = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of what is asked.

    Attributes:
      concurrency: most questions at a time.
      timeout: seconds until a question that has no answer is asked again.
      tries: how often a question is asked before it is given up.
    """

    concurrency: int = 8
    timeout: float = 120.0
    tries: int = 6


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Settings of an answer.

    Attributes:
      max_tokens: most tokens of an answer.
      temperature: 0 is greedy.
      seed: of the draws, for servers that take one; None: the server's own.
      letters: whether to ask for the first token's log-probabilities.
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
      first: log-probability of each likely first token, by its text; None if the server gave none.
    """

    text: str
    truncated: bool
    first: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Failure:
    """A question that was given up; `reason` is the last error."""

    reason: str
    permanent: bool = False


def is_url(path: str) -> bool:
    """Tells whether a model's path names an endpoint."""
    return str(path).startswith(("http://", "https://"))


def image_part(png: bytes) -> dict[str, Any]:
    """Returns the part of a user's turn that holds an image."""
    data = base64.b64encode(png).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


class Endpoint:
    """A model behind an endpoint."""

    def __init__(self, url: str, model: str = "", limits: Limits = Limits()):
        """Prepares to ask; nothing is sent yet.

        Args:
          url: of the API, for example http://host:8000/v1.
          model: its name there; empty takes the only one that is served.
          limits: of what is asked.

        Raises:
          ConfigError: the URL can't be used, or openai isn't installed.
        """
        try:
            import openai  # an extra: most users have no endpoint
        except ImportError as e:
            raise ConfigError(f"{url} needs: pip install 'caprl_jax[endpoint]'") from e
        parts = urllib.parse.urlsplit(url)
        if not is_url(url) or not parts.hostname or parts.username or parts.query:
            raise ConfigError(
                f"{parts.scheme}://{parts.hostname} is no endpoint: give http(s)://HOST[:PORT]/v1, "
                f"without a key: that is read from the environment, {KEY}"
            )
        self.url, self.limits, self._errors = url, limits, openai
        self._client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get(KEY) or "none",
            timeout=limits.timeout,
            max_retries=limits.tries - 1,
        )
        self._model = model

    @property
    def model(self) -> str:
        """The model's name.

        Raises:
          UserError: the server can't be reached, or serves several models.
        """
        if not self._model:
            try:
                served = [m.id for m in self._client.models.list().data]
            except (self._errors.OpenAIError, ValueError, TypeError, AttributeError) as e:
                raise UserError(f"{self.url} doesn't say which models it serves: {e}") from e
            if len(served) != 1:
                raise UserError(f"{self.url} serves {served}: name one of them")
            self._model = served[0]
        return self._model

    def ask(self, chats: Iterable[Chat], drawn: Drawn = Drawn()) -> Iterator[Reply | Failure]:
        """Yields the answers in the order of the chats, `limits.concurrency` asked at a time."""
        pending: list[concurrent.futures.Future] = []
        with concurrent.futures.ThreadPoolExecutor(self.limits.concurrency) as pool:
            try:
                for chat in chats:
                    pending.append(pool.submit(self.ask_once, chat, drawn))
                    if len(pending) >= 2 * self.limits.concurrency:
                        yield pending.pop(0).result()
                for future in pending:
                    yield future.result()
            finally:
                for future in pending:
                    future.cancel()

    def ask_once(self, chat: Chat, drawn: Drawn = Drawn()) -> Reply | Failure:
        """Returns the answer to one chat, asked up to `limits.tries` times."""
        wanted: dict[str, Any] = {
            "max_tokens": drawn.max_tokens,
            "temperature": drawn.temperature,
        }
        if drawn.letters:
            wanted |= {"logprobs": True, "top_logprobs": _LETTERS}
        if drawn.seed is not None:
            wanted["seed"] = drawn.seed
        reason = ""
        for tried in range(self.limits.tries):
            if tried:
                time.sleep(min(_SLEEP * 2 ** (tried - 1), 8))
            try:
                found = self._client.chat.completions.create(
                    model=self.model, messages=list(chat), **wanted
                )
                return _reply(found)
            except self._errors.APIStatusError as e:  # the client has tried again where it helps
                return Failure(_line(e))
            except self._errors.APIConnectionError as e:
                return Failure(_line(e))
            except (self._errors.OpenAIError, ValueError, TypeError, AttributeError) as e:
                reason = f"a malformed answer: {_line(e)}"
        return Failure(reason)


def _reply(found: Any) -> Reply:
    """Checks an answer's form, which the client leaves to its caller."""
    choice = found.choices[0] if found.choices else None
    text = choice.message.content if choice is not None else None
    if not isinstance(text, str):
        raise ValueError("it holds no text")
    given = getattr(choice.logprobs, "content", None) if choice.logprobs else None
    first = {t.token: float(t.logprob) for t in given[0].top_logprobs} if given else None
    return Reply(text, choice.finish_reason == "length", first)


def _line(error: Exception) -> str:
    name = "invalid JSON" if isinstance(error, json.JSONDecodeError) else type(error).__name__
    return " ".join(f"{name}: {error}".split()).rstrip(".")[:200]
