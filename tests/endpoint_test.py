"""A model behind an endpoint answers every question once, whatever the server does."""

import pytest

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
    assert 1 < server.most <= 8


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


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    with serving(echo) as server:
        Endpoint(server.url).ask_once(chats(1)[0])
        assert server.keys == {"Bearer secret"}
    with pytest.raises(ConfigError, match=KEY) as caught:
        Endpoint("http://me:secret@host/v1")
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(UserError, match="which models it serves"):
        _ = Endpoint("http://127.0.0.1:9/v1", limits=Limits(timeout=1, tries=1)).model
    asked = Endpoint("http://127.0.0.1:9/v1", "tiny", Limits(timeout=1, tries=1))
    assert isinstance(asked.ask_once(chats(1)[0]), Failure)
