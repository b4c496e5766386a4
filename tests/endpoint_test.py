"""A model behind an endpoint answers every question once, whatever the server does."""

import signal
import threading
import time

import pytest

from caprl_jax import endpoint
from caprl_jax.endpoint import KEY, Drawn, Endpoint, Failure, Limits, Reply
from caprl_jax.errors import ConfigError, UserError

from .endpoint_server import FAULTS, serving

QUICK = Limits(concurrency=8, timeout=0.75, tries=4)


def echo(request):
    return request["messages"][-1]["content"].upper()


def chats(count):
    return [[{"role": "user", "content": f"question {i}"}] for i in range(count)]


def test_every_fault_is_overcome_and_answers_keep_their_order():
    with serving(echo, FAULTS) as server:
        replies = list(Endpoint(server.url, limits=QUICK).ask(chats(60)))
    assert [r.text for r in replies] == [f"QUESTION {i}" for i in range(60)]
    assert set(server.faults) - {""} == set(FAULTS)
    assert set(server.asked.values()) == {2}


def test_so_many_are_asked_at_a_time():
    def later(request):
        time.sleep(0.05)
        return echo(request)

    with serving(later) as server:
        assert len(list(Endpoint(server.url, limits=Limits(4)).ask(chats(12)))) == 12
    assert 1 < server.most <= 4


@pytest.mark.parametrize("fault", FAULTS)
def test_what_never_works_is_a_failure_with_its_reason(fault):
    with serving(echo, (fault,), most_faults=99) as server:
        limits = Limits(timeout=0.5, tries=2)
        (failure,) = Endpoint(server.url, limits=limits).ask(chats(1))
    assert isinstance(failure, Failure) and failure.reason
    assert set(server.asked.values()) == {2}


def test_first_tokens_log_probabilities():
    with serving(lambda _: ("B", {"B": -0.1, "A": -2.5})) as server:
        asked = Endpoint(server.url, "tiny")
        assert asked.ask_once(chats(1)[0], Drawn(1, letters=True)).first == {"B": -0.1, "A": -2.5}
        assert asked.ask_once(chats(1)[0]) == Reply("B", False, None)


def test_tries_count_all_requests_of_a_question_whatever_they_meet():
    with serving(echo, FAULTS, most_faults=3) as server:
        replies = list(Endpoint(server.url, limits=QUICK).ask(chats(16)))
    assert [r.text for r in replies] == [f"QUESTION {i}" for i in range(16)]
    assert set(server.asked.values()) == {4} == {QUICK.tries}


def test_log_probabilities_are_those_of_the_letter_that_the_text_names():
    words = [{"The": -0.01}, {" answer": -0.01}, {" is": -0.1}, {" B": -0.4, " A": -1.2}]
    with serving(lambda _: ("The answer is B", words)) as server:
        reply = Endpoint(server.url, "tiny").ask_once(chats(1)[0], Drawn(8, letters=True))
    assert reply.first == {" B": -0.4, " A": -1.2}


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a program; pytest's processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_closing_waits_for_no_request():
    with serving(echo, ("slow",), slow=20) as server:
        asked = Endpoint(server.url, "tiny", Limits(4, timeout=60)).ask(chats(9))
        began = time.monotonic()
        main = threading.main_thread().ident
        threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            next(asked)
        assert time.monotonic() - began < 10 and server.now == 4


def test_a_refused_field_is_left_out_for_good():
    def answer(request):
        if "logprobs" in request:
            return 400, "logprobs is not supported by this model"
        if "max_tokens" in request:
            return 400, "Unsupported parameter: use 'max_completion_tokens' instead"
        return "B"

    with serving(answer) as server:
        asked = Endpoint(server.url, "tiny", Limits(1, tries=2))
        replies = list(asked.ask(chats(3), Drawn(4, letters=True)))
    assert [r.text for r in replies] == ["B"] * 3 and sum(server.asked.values()) == 2 + 3


@pytest.mark.parametrize(("status", "permanent"), [(400, True), (413, True), (401, False)])
def test_what_the_server_refuses_is_asked_once(status, permanent, monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    with serving(lambda _: (status, "no: Bearer sk-secret")) as server:
        failure = Endpoint(server.url, "tiny", QUICK).ask_once(chats(1)[0])
    assert failure.permanent == permanent and sum(server.asked.values()) == 1
    assert str(status) in failure.reason and "sk-secret" not in failure.reason


@pytest.mark.parametrize("given", ["2", "Fri, 31 Dec 1999 23:59:59 GMT", "nan", "soon", "-1", ""])
def test_retry_after(given):
    assert endpoint._retry_after({"retry-after": given}) == (2 if given == "2" else 0)
    assert endpoint._retry_after({"retry-after": "1e9"}) == 900


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with serving(echo) as server:
        Endpoint(server.url).ask_once(chats(1)[0])
        assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    "rest",
    ["me:secret@host/v1", ":secret@host", "host/#key=secret", "host/?key=secret", "[secret", ""],
)
def test_a_url_with_a_key_is_refused_without_showing_it(rest):
    with pytest.raises(ConfigError, match=KEY) as caught:
        Endpoint(f"http://{rest}")
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(UserError, match="which models it serves"):
        _ = Endpoint("http://127.0.0.1:9/v1", limits=Limits(timeout=1, tries=1)).model
    asked = Endpoint("http://127.0.0.1:9/v1", "tiny", Limits(timeout=1, tries=1))
    assert isinstance(asked.ask_once(chats(1)[0]), Failure)
