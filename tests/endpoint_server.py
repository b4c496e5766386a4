"""An OpenAI-compatible server in this process, which misbehaves where it is told to."""

import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "429", "slow", "drip", "cut", "malformed", "no_choices", "no_text")


@dataclasses.dataclass
class Served:
    """A running server.

    Attributes:
      url: of its API.
      asked: how often each request's body has come, by its digest.
      faults: how often each fault was shown.
      most: most requests at a time.
      keys: the authorization headers seen.
      model: name of the model that it serves.
    """

    url: str = ""
    model: str = "tiny"
    asked: Counter = dataclasses.field(default_factory=Counter)
    faults: Counter = dataclasses.field(default_factory=Counter)
    most: int = 0
    now: int = 0
    keys: set = dataclasses.field(default_factory=set)
    lock: Any = dataclasses.field(default_factory=threading.Lock)


# (the request's JSON) -> the answer's text, or (text, {first token: log-probability}), or the whole
# answer in the protocol's form.
Answer = Callable[[dict], Any]


@dataclasses.dataclass(frozen=True)
class Script:
    """Behaviour of a server; see serving."""

    answer: Answer
    faults: tuple[str, ...]
    most_faults: int
    slow: float

    def fault(self, digest: str, tried: int) -> str:
        """The fault of a request's try; "" for none."""
        if not self.faults or tried >= self.most_faults:
            return ""
        return self.faults[(int(digest, 16) + tried) % len(self.faults)]


class Handler(BaseHTTPRequestHandler):
    """Answers by the server's `script`, and notes it in its `served`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Lists the one model."""
        model = {"id": self.server.served.model, "object": "model"}
        self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """Answers a chat, or shows a fault."""
        served, body = self.server.served, self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(body).hexdigest()
        with served.lock:
            served.keys.add(self.headers.get("Authorization"))
            fault = self.server.script.fault(digest, served.asked[digest])
            served.faults[fault] += bool(fault)
            served.asked[digest] += 1
            served.now += 1
            served.most = max(served.most, served.now)
        try:
            self._answer(json.loads(body), fault)
        finally:
            with served.lock:
                served.now -= 1

    def _answer(self, request: dict, fault: str) -> None:
        script = self.server.script
        if fault == "500":
            return self._send(500, {"error": {"message": "out of memory"}})
        if fault == "429":
            return self._send(429, {"error": {"message": "busy"}}, {"Retry-After": "0.2"})
        if fault == "slow":
            time.sleep(script.slow)
        reply = script.answer(request)
        if isinstance(reply, tuple) and isinstance(reply[0], int):
            return self._send(reply[0], {"error": {"message": reply[1]}})
        text, logps = reply if isinstance(reply, tuple) else (reply, None)
        logps = logps if request.get("logprobs") else None
        whole = reply if isinstance(reply, dict) else chat(text, logps)
        if fault == "no_choices":
            whole["choices"] = []
        if fault == "no_text":
            whole["choices"][0]["message"] = {"role": "assistant", "content": None}
        return self._send(200, whole, fault=fault)

    def _send(
        self, status: int, content: dict, headers: dict | None = None, fault: str = ""
    ) -> None:
        data = json.dumps(content).encode()
        data = data[: len(data) // 2] if fault == "malformed" else data
        with contextlib.suppress(OSError):  # the client may have gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self._write(data, fault)

    def _write(self, data: bytes, fault: str) -> None:
        if fault == "drip":
            for i in range(20):
                self.wfile.write(data[i : i + 1])
                time.sleep(self.server.script.slow / 10)
            data = data[20:]
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection |= fault == "cut"


@contextlib.contextmanager
def serving(
    answer: Answer, faults: tuple[str, ...] = (), most_faults: int = 1, slow: float = 1.5
) -> Iterator[Served]:
    """Serves `answer`; a request's first `most_faults` tries each meet a fault of its own.

    Args:
      answer: of the model.
      faults: which kinds of FAULTS are shown, or "" for none, in turn by the request's digest.
      most_faults: how often a request is refused.
      slow: seconds that a slow answer takes, and half of those of a dripping one; give the client
        less.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.script = Script(answer, faults, most_faults, slow)
    server.served = Served(url=f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.served
    finally:
        server.shutdown()
        server.server_close()


def chat(text: str, logps: Any) -> dict[str, Any]:
    """An answer in the protocol's form."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    if logps:
        content = []
        for table in logps if isinstance(logps, list) else [logps]:
            tops = [{"token": t, "logprob": p, "bytes": None} for t, p in table.items()]
            content.append(tops[0] | {"top_logprobs": tops})
        choice["logprobs"] = {"content": content, "refusal": None}
    return {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [choice],
    }
