"""Judges: an endpoint on this machine that behaves in every way an endpoint may, and the arithmetic of win rates."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from resdpo_trl.errors import UserError
from resdpo_trl.study import judges
from resdpo_trl.study.judges import (
    UNCLEAR,
    EndpointJudge,
    Question,
    Verdict,
    both_orders,
    check_url,
    read_verdict,
    win_rate,
)

SECRET = "planted-key-81734"


def reply(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def longer(question):
    """A judge that prefers the longer answer; it reads them from the request as the model would."""
    said = question["messages"][-1]["content"]
    first = said.split("<answer_A>\n")[1].split("\n</answer_A>")[0]
    second = said.split("<answer_B>\n")[1].split("\n</answer_B>")[0]
    return "[[C]]" if len(first) == len(second) else "[[A]]" if len(first) > len(second) else "[[B]]"


@contextlib.contextmanager
def endpoint(behave):
    """A server whose POST runs `behave(number of the request, its content) -> (status, headers, body)`."""
    seen = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {}, "{}")

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append({"path": self.path, "headers": dict(self.headers), "content": content})
                number = len(seen)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.answer(*behave(number, content))

        def answer(self, status, headers, body):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for part in [body] if isinstance(body, str) else body:
                self.wfile.write(part.encode())
                self.wfile.flush()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(judges, "PAUSES", (0.01, 30.0))


def judge(url, **changes):
    options = {"model": "m", "timeout_seconds": 5.0, "workers": 2}
    return EndpointJudge(url, **options | changes)


QUESTIONS = [
    Question("p", "a long answer", "short"),
    Question("p", "short", "a long answer"),
    Question("p", "ab", "cd"),
]


def test_an_endpoint_is_asked_as_openai_expects_and_its_verdicts_are_read():
    with endpoint(lambda number, content: (200, {}, reply(longer(content)))) as (url, seen):
        made = judge(url + "/", key=SECRET, options={"temperature": 0})
        made.check()
        found = dict(made.verdicts(QUESTIONS))
    assert [found[place].choice for place in range(3)] == ["first", "second", "tie"]
    assert len(seen) == 3
    for request in seen:
        assert request["path"] == "/v1/chat/completions"
        assert request["headers"]["Authorization"] == f"Bearer {SECRET}"
        assert request["content"]["model"] == "m" and request["content"]["temperature"] == 0


def test_without_a_key_none_is_sent(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with endpoint(lambda *_: (200, {}, reply("[[A]]"))) as (url, seen):
        list(judge(url).verdicts(QUESTIONS[:1]))
    assert "Authorization" not in seen[0]["headers"]


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, ""),
        (503, {}, "<html>"),
        (200, {}, "<html>not JSON</html>"),
        (200, {}, reply("I would rather not say.")),
        (200, {}, json.dumps({"choices": []})),
        (200, {}, reply(None)),
    ],
)
def test_a_failed_attempt_is_repeated(status, headers, body):
    def behave(number, content):
        return (status, headers, body) if number <= 2 else (200, {}, reply("[[B]]"))

    with endpoint(behave) as (url, seen):
        ((_, verdict),) = judge(url).verdicts(QUESTIONS[:1])
    assert verdict == Verdict("second")
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("status", "body", "attempts", "reason"),
    [
        (429, SECRET, 4, "HTTP 429"),
        (500, SECRET, 4, "HTTP 500"),
        (401, SECRET, 1, "HTTP 401"),
        (302, "", 1, "HTTP 302"),
        (200, reply("[[D]]"), 4, UNCLEAR),
    ],
)
def test_an_endpoint_that_never_answers_gives_no_verdict(status, body, attempts, reason):
    elsewhere = {"Location": "http://127.0.0.1:9/elsewhere"} if status == 302 else {}
    with endpoint(lambda *_: (status, elsewhere, body)) as (url, seen):
        ((_, verdict),) = judge(url, key=SECRET).verdicts(QUESTIONS[:1])
    assert verdict == Verdict(None, reason)
    assert len(seen) == attempts
    assert verdict.final == (reason == UNCLEAR)


def test_retry_after_is_waited_for_and_bounded(monkeypatch):
    monkeypatch.setattr(judges, "PAUSES", (0.01, 0.4))

    def behave(number, content):
        return (429, {"Retry-After": "3600"}, "") if number == 1 else (200, {}, reply("A"))

    with endpoint(behave) as (url, _):
        started = time.monotonic()
        ((_, verdict),) = judge(url).verdicts(QUESTIONS[:1])
    assert verdict.choice == "first"
    assert 0.4 <= time.monotonic() - started < 4


def test_a_reply_that_never_comes_is_bounded(monkeypatch):
    monkeypatch.setattr(judges, "ATTEMPTS", 2)
    with endpoint(lambda *_: time.sleep(1) or (200, {}, reply("[[A]]"))) as (url, _):
        started = time.monotonic()
        ((_, verdict),) = judge(url, timeout_seconds=0.2).verdicts(QUESTIONS[:1])
    assert verdict == Verdict(None, "timed out")
    assert time.monotonic() - started < 3


def test_an_address_where_nothing_listens_is_refused():
    with endpoint(lambda *_: (200, {}, "")) as (url, _):
        pass
    with pytest.raises(UserError, match=r"unreachable .*Connection refused"):
        judge(url).check()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "file:///etc/passwd",
        "http://",
        "http://[::1/v1",
        "http://h:99999/v1",
        f"http://u:{SECRET}@h/v1",
        f"https://h/v1?api_key={SECRET}",
    ],
)
def test_an_address_with_a_secret_or_without_a_scheme_is_refused_unseen(url):
    with pytest.raises(UserError, match="--judge_url") as refused:
        check_url(url)
    assert SECRET not in str(refused.value)
    with pytest.raises(UserError, match="JUDGE_API_KEY") as refused:
        judge("http://h/v1", key=f"{SECRET}\x00")
    assert SECRET not in str(refused.value)
    assert SECRET not in repr(judge("http://h/v1", key=SECRET))


def test_replies():
    assert read_verdict(reply("Both are fine. [[A]]\nNo: [[B]]").encode()).choice == "second"
    assert read_verdict(reply(" C. ").encode()).choice == "tie"
    assert read_verdict(reply("A is better").encode()) == Verdict(None, UNCLEAR)
    assert read_verdict(b"\xff\xfe") == Verdict(None, UNCLEAR)
    assert read_verdict(b"[]") == Verdict(None, UNCLEAR)
    assert read_verdict(b"[" * 400_000) == Verdict(None, UNCLEAR)


def test_a_judge_that_sees_only_the_order_wins_nothing():
    """Whatever it prefers, the first or the second place: all ties. A consistent one keeps its verdict."""
    outcomes = {
        (one, other): both_orders(one, other)
        for one in ("first", "second", "tie", None)
        for other in ("first", "second", "tie", None)
    }
    assert outcomes["first", "first"] == outcomes["second", "second"] == outcomes["tie", "tie"] == 0.5
    assert outcomes["first", "second"] == 1.0 and outcomes["second", "first"] == 0.0
    assert outcomes["first", "tie"] == outcomes["tie", "second"] == 0.5
    assert all(found is None for pair, found in outcomes.items() if None in pair)


def test_win_rates():
    found = win_rate([1.0, 1.0, 0.5, 0.0, None])
    assert found["win_rate"] == 2.5 / 4 and found["n"] == 4
    assert (found["wins"], found["ties"], found["losses"], found["no_verdict"]) == (2, 1, 1, 1)
    nothing = win_rate([None, None])
    assert nothing["win_rate"] is None and nothing["interval_95"] is None and nothing["no_verdict"] == 2
