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
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": served.model, "object": "model"}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            digest = hashlib.sha256(body).hexdigest()
            with served.lock:
                served.keys.add(self.headers.get("Authorization"))
                tried = served.asked[digest]
                served.asked[digest] += 1
                served.now += 1
                served.most = max(served.most, served.now)
            try:
                fault = faults[(int(digest, 16) + tried) % len(faults)] if faults else ""
                if tried >= most_faults:
                    fault = ""
                with served.lock:
                    served.faults[fault] += bool(fault)
                self._answer(json.loads(body), fault)
            finally:
                with served.lock:
                    served.now -= 1

        def _answer(self, request: dict, fault: str) -> None:
            if fault == "500":
                return self._send(500, {"error": {"message": "out of memory"}})
            if fault == "429":
                return self._send(429, {"error": {"message": "busy"}}, {"Retry-After": "0.2"})
            if fault == "slow":
                time.sleep(slow)
            reply = answer(request)
            if isinstance(reply, tuple) and isinstance(reply[0], int):
                return self._send(reply[0], {"error": {"message": reply[1]}})
            text, first = reply if isinstance(reply, tuple) else (reply, None)
            asked = first if request.get("logprobs") else None
            found = reply if isinstance(reply, dict) else chat(text, asked)
            if fault == "no_choices":
                found["choices"] = []
            if fault == "no_text":
                found["choices"][0]["message"] = {"role": "assistant", "content": None}
            return self._send(200, found, **{fault: True})

        def _send(
            self, status: int, content: dict, headers: dict | None = None, **how: bool
        ) -> None:
            data = json.dumps(content).encode()
            data = data[: len(data) // 2] if how.get("malformed") else data
            with contextlib.suppress(OSError):  # the client may have gone
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                if how.get("drip"):
                    for i in range(20):
                        self.wfile.write(data[i : i + 1])
                        time.sleep(slow / 10)
                    data = data[20:]
                self.wfile.write(data[: len(data) // 2] if how.get("cut") else data)
                if how.get("cut"):
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
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
