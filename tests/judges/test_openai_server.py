"""The judge that is asked over the network, against servers: one that fails in every way, and `transformers serve`."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import finished
from test_openai import CANDIDATE, PROMPTS, make_parents, preferred, row, settings

from salsa.evaluate import judge, statistics
from salsa.judges import openai
from salsa.judges.language_model import client as judge_client
from salsa.workflow import config, jobs, plan, runs

pytest.importorskip("openai", reason="needs the extra salsa[judge]")
KEY = "sk-very-secret"
TURNED_DOWN = {"error": {"message": f"Incorrect API key: {KEY}\nsee the docs", "code": "invalid_api_key"}}


class Server(ThreadingHTTPServer):
    """Speaks /v1/chat/completions. What it does to its n-th request, and how long it takes, is told by `faults`.

    Args:
        faults: number of a request (from 0) -> what to do instead of answering: an HTTP status (int), (status, headers,
            JSON), a text that is sent with status 200, a function of the good answer's text, or seconds (float).
        delay: seconds that each answer takes.
    """

    daemon_threads = True

    def __init__(self, faults=None, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.delay = faults or {}, delay
        self.bodies, self.authorizations = [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = self.number = len(server.bodies)
            server.bodies.append(body)
            server.authorizations.append(self.headers["Authorization"])
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        fault = server.faults.get(number)
        time.sleep(fault if isinstance(fault, float) else server.delay)
        with server.lock:
            server.under_way -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
            self.answer(fault, body)

    def answer(self, fault, body):
        text = "Hm. " + preferred(body["messages"][0]["content"])
        if self.path != "/v1/chat/completions":
            self.send(404, {}, b"{}")
        elif isinstance(fault, int):
            self.send(fault, {}, b'{"error": {"message": "out of order"}}')
        elif isinstance(fault, tuple):
            status, headers, content = fault
            self.send(status, headers, json.dumps(content).encode())
        elif isinstance(fault, str):
            self.send(200, {}, fault.encode())
        else:
            self.send(200, {}, json.dumps(completion(fault(text) if callable(fault) else text)).encode())

    def send(self, status, headers, content):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def completion(text):
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "served-1",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 50, "completion_tokens": 7, "total_tokens": 57},
    }


@pytest.fixture
def serve():
    """Start servers that end with the test."""
    with contextlib.ExitStack() as stack:

        def start(faults=None, delay=0.0):
            server = stack.enter_context(Server(faults, delay))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def parents(tmp_path):
    texts = ("a good answer", "a bad answer")
    made = make_parents(
        tmp_path,
        [row("policy", i, [texts[i % 2]]) for i in range(PROMPTS)],
        [row("sft0", i, [texts[1 - i % 2]]) for i in range(PROMPTS)],
    )
    for folder in set(made.values()):  # as runs that are finished, so that the command takes them
        finished("stage", folder, lambda output: None)
    return made


def judged(server, parents, output, chosen=None, **execution):
    output.mkdir(exist_ok=True)
    chosen = chosen or settings(base_url=server.url)
    limits = {"judge_retries": 2, "judge_timeout": 5.0} | execution
    summary = judge.judge(chosen, parents, output, config.Execution(**limits))
    return statistics.read_verdicts(output / "verdicts.jsonl"), summary


def failed(*arguments, **options):
    with pytest.raises(runs.UserError) as error:
        judged(*arguments, **options)
    assert "\n" not in str(error.value) and KEY not in str(error.value)
    return str(error.value)


def checked_before_the_first_job(server, folder, **execution):
    values = {"judge": {"kind": "openai", "model": "judge-1", "base_url": server.url}}
    run = plan.Run("judge", "j", "0" * 64, values, {}, {"judge_check": True, "judge_timeout": 5.0} | execution)
    jobs.check_judges(plan.Plan(str(folder), {"judge/j": run, "judge/k": run}), ["judge/j", "judge/k"])


def test_each_judge_is_asked_one_question_before_the_first_job(serve, tmp_path, capsys):
    server = serve({0: lambda text: "[[A>>B]]"})
    checked_before_the_first_job(server, tmp_path)
    assert len(server.bodies) == 1 and "two plus two" in server.bodies[0]["messages"][0]["content"]
    name = f"judge judge-1 at 127.0.0.1:{server.server_port} answered a question in "
    line = capsys.readouterr().err
    assert line.startswith(name) and line.endswith(" s\n")
    for text, words in (("Hm.", "but without a verdict"), ("[[B>A]]", "but says B>A where A is right")):
        checked_before_the_first_job(serve({0: lambda _, text=text: text}), tmp_path)
        assert f"{words}; see whether it can judge: salsa judge check" in capsys.readouterr().err
    checked_before_the_first_job(server, tmp_path, judge_check=False)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("fault", "words", "tries"),
    [
        ((401, {}, TURNED_DOWN), "answers 401: Incorrect API key: (key) see the docs", 1),
        ((404, {}, {"error": {"message": "no such model"}}), "answers 404: no such model", 1),
        ((403, {}, {"error": {"message": "not for you"}}), "answers 403: not for you", 1),
        ((503, {"Retry-After": "0.01"}, {}), "answers 503", 2),
        ('{"choices": [', "answers what is no chat completion", 2),
        (3.0, "can't be reached: Request timed out.", 2),
    ],
)
def test_a_server_that_gives_no_answer_is_one_line_before_the_first_job(serve, tmp_path, fault, words, tries):
    server = serve(dict.fromkeys(range(9), fault))
    with pytest.raises(runs.UserError) as error:
        checked_before_the_first_job(server, tmp_path, judge_timeout=1.0)
    message = str(error.value)
    assert message.startswith(f"judge judge-1 at 127.0.0.1:{server.server_port} {words}") and KEY not in message
    assert "\n" not in message and "execution.judge_check=false" in message and len(server.bodies) == tries


def test_a_question_that_took_too_long_is_cancelled_at_the_server(serve_raw, parents, tmp_path):
    """The connection is closed, by which servers know that nobody waits for what they are writing."""

    def write_until_nobody_waits(handler):
        handler.connection.settimeout(20)
        while handler.connection.recv(1):
            pass
        raise ConnectionResetError

    server = serve_raw({0: write_until_nobody_waits})
    verdicts, _ = judged(server, parents, tmp_path / "out", judge_concurrency=1, judge_timeout=1.0, judge_retries=1)
    assert server.gone.is_set() and all(right(verdicts)) and len(server.bodies) == 13


def right(verdicts):
    return [v["winner"] == ("model_a" if v["prompt_id"] % 2 == 0 else "model_b") for v in verdicts]


def test_what_is_asked_and_what_is_kept(serve, parents, tmp_path):
    server = serve()
    verdicts, summary = judged(server, parents, tmp_path / "out")
    assert all(right(verdicts)) and len(verdicts) == 2 * PROMPTS
    assert summary["models"] == ["served-1"] and summary["prompt_tokens"] == 50 * 12
    body = server.bodies[0]
    assert {name: body[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "judge-1", "temperature": 0.0, "max_tokens": 1024,
    }  # fmt: skip
    assert set(body) == {"model", "temperature", "max_tokens", "messages"}
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    assert all(KEY not in path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file())
    answer = runs.read_jsonl(tmp_path / "out" / "answers.jsonl")[0]
    assert answer == {
        "prompt_id": 0, "benchmark": "b", "model_a": CANDIDATE, "model_b": "sft0", "order": 0, "attempt": 0,
        "text": "Hm. [[A>>B]]", "finish_reason": "stop", "prompt_tokens": 50, "completion_tokens": 7,
        "served_model": "served-1",
    }  # fmt: skip


def test_a_server_of_ones_own_needs_no_key(serve, parents, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve()
    assert all(right(judged(server, parents, tmp_path / "out")[0]))
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert all(right(judged(server, parents, tmp_path / "env", settings(base_url=""))[0]))
    assert set(server.authorizations) == {"Bearer none"}


def test_openais_own_server_is_told_the_limit_by_its_new_name():
    def limit(url):
        chosen = config.Judge(kind="openai", model="m", max_tokens=7, temperature=None, base_url=url)
        return openai.Client(chosen, config.Execution()).parameters

    assert limit("") == {"max_completion_tokens": 7} and limit("http://127.0.0.1:9/v1") == {"max_tokens": 7}


def test_faults_that_pass(serve, parents, tmp_path):
    """Each is tried again, and none of them shows in the verdicts."""
    soon = {"Retry-After": "0.01"}
    good = json.dumps(completion("[[A>B]]"))
    faults = {
        0: (429, soon, {"error": {"message": "slow down"}}),
        1: (500, soon, {}),
        2: 8.0,  # longer than the timeout
        4: good[: len(good) // 2],
        5: '{"error": "upstream"}',
        6: "",
        7: (503, soon, {}),
        8: lambda text: "I can't decide.",
        9: lambda text: "[[A>>B]",
    }
    server = serve(faults)
    verdicts, summary = judged(
        server, parents, tmp_path / "out", judge_concurrency=1, judge_timeout=4.0, judge_retries=4
    )
    assert all(right(verdicts)) and len(verdicts) == 12
    assert summary["malformed"] == 2 and summary["errors"] == 0 and summary["asked"] == 14
    assert len(server.bodies) == 12 + len(faults)


@pytest.mark.parametrize(
    ("fault", "words", "tries"),
    [
        ((401, {}, TURNED_DOWN), "answers 401: Incorrect API key: (key) see the docs", 1),
        ((429, {"Retry-After": "0.01"}, {"error": {"message": "no quota"}}), "answers 429", 3),
        ((503, {"Retry-After": "0.01"}, {}), "answers 503", 4),  # the last is a harmless question
        ('{"choices": [', "answers what is no chat completion", 4),
        (8.0, "can't be reached: Request timed out.", 4),
    ],
)
def test_faults_that_stay_end_the_run_and_cost_no_verdict(serve, parents, tmp_path, fault, words, tries):
    server = serve(dict.fromkeys(range(2, 100), fault))
    message = failed(server, parents, tmp_path / "out", judge_concurrency=1, judge_timeout=2.0)
    assert message.startswith(f"judge llm: judge-1 at 127.0.0.1:{server.server_port} {words}")
    assert message.endswith("; 2 of 12 verdicts are kept") and len(server.bodies) == 2 + tries
    verdicts = statistics.read_verdicts(tmp_path / "out" / "verdicts.jsonl")
    assert len(verdicts) == 2 and all(right(verdicts))
    mended = serve()
    verdicts, _ = judged(server, parents, tmp_path / "out", settings(base_url=mended.url))
    assert len(mended.bodies) == 10 and all(right(verdicts))


def test_no_server(parents, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    message = failed(None, parents, tmp_path / "out", settings(base_url=url), judge_retries=0)
    assert "can't be reached: Connection error." in message and "0 of 12" in message


@pytest.mark.parametrize(
    "error",
    [
        {"message": "This model's maximum context length is 64 tokens", "code": 400},
        {"message": "too long", "code": "context_length_exceeded"},
        {"message": "no", "code": "content_filter"},
    ],
)
def test_a_question_that_is_refused_is_an_error_of_that_order(serve, parents, tmp_path, error):
    server = serve({5: (400, {}, {"error": error})})
    verdicts, summary = judged(server, parents, tmp_path / "out", judge_concurrency=1)
    refused = [v for v in verdicts if v["winner"] == "error"]
    assert [(v["prompt_id"], v["order"]) for v in refused] == [(2, 1)] and "400" in refused[0]["reason"]
    assert summary["errors"] == 1 and summary["asked"] == 11


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_is_asked_at_once_than_allowed(serve, parents, tmp_path, concurrency):
    server = serve(delay=0.2)
    judged(server, parents, tmp_path / "out", judge_concurrency=concurrency)
    assert server.most_under_way <= concurrency
    assert concurrency == 1 or server.most_under_way > 1


class Raw(Handler):
    """Answers the n-th request by what `server.raw` has for it, a function of the handler; well without one."""

    def answer(self, fault, body):
        raw = self.server.raw.get(self.number)
        if raw is None:
            return super().answer(fault, body)
        self.server.begun.set()
        try:
            return raw(self)
        except OSError:  # who asked has gone
            self.server.gone.set()


@pytest.fixture
def serve_raw(serve):
    def start(raw):
        server = serve()
        server.RequestHandlerClass, server.raw = Raw, raw
        server.begun, server.gone = threading.Event(), threading.Event()
        return server

    return start


def drip(handler):
    """A byte every 50 ms, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-A: b\r\n")
        time.sleep(0.05)


def giant(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" " * 2**20)
    handler.wfile.write(json.dumps(completion("[[A>B]]")).encode())


def bomb(handler):
    content = zlib.compress(b" " * (judge_client.LARGEST * 4), wbits=31)
    handler.send(200, {"Content-Encoding": "gzip"}, content)


def packed(handler):
    handler.send(200, {"Content-Encoding": "gzip"}, zlib.compress(json.dumps(completion("[[A>B]]")).encode(), wbits=31))


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.mark.parametrize("slow", [drip, drip_headers])
def test_the_timeout_is_of_the_whole_answer(serve_raw, parents, tmp_path, slow):
    server = serve_raw({0: slow})
    begun = time.monotonic()
    verdicts, _ = judged(server, parents, tmp_path / "out", judge_timeout=1.0, judge_retries=1)
    assert all(right(verdicts)) and len(server.bodies) == 13 and time.monotonic() - begun < 10
    assert server.gone.wait(5)


def test_a_giant_answer_is_an_error_of_its_question_and_never_in_memory(serve_raw, parents, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    server = serve_raw({1: giant, 3: bomb, 5: packed})  # 2 and 4 are the harmless questions
    verdicts, _ = judged(server, parents, tmp_path / "out", judge_concurrency=1)
    errors = [v for v in verdicts if v["winner"] == "error"]
    assert [(e["prompt_id"], e["order"]) for e in errors] == [(0, 1), (1, 0)]
    assert {e["reason"] for e in errors} == {"answers with more than 16 MiB"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024  # KiB
    assert len(server.bodies) == 14


def test_a_reset_connection_is_tried_again_and_a_redirection_is_not_followed(serve_raw, serve, parents, tmp_path):
    verdicts, _ = judged(serve_raw({1: reset}), parents, tmp_path / "reset", judge_concurrency=1)
    assert all(right(verdicts))
    elsewhere = serve()
    moved = {"Location": elsewhere.url + "/chat/completions"}
    server = serve_raw(dict.fromkeys(range(99), lambda handler: handler.send(307, moved, b"")))
    message = failed(server, parents, tmp_path / "moved")
    assert f"it is elsewhere, at 127.0.0.1:{elsewhere.server_port}; mend base_url" in message
    assert elsewhere.bodies == [] and len(server.bodies) == 1


def test_what_is_under_way_is_cut_off_when_nobody_waits_for_it(serve_raw, parents, tmp_path):
    """As on SIGTERM: an exception in whoever reads the verdicts."""
    server = serve_raw(dict.fromkeys(range(2, 99), drip))
    chosen, execution = settings(base_url=server.url), config.Execution(judge_concurrency=3, judge_timeout=60.0)
    (tmp_path / "out").mkdir()
    candidate = judge.responses(parents["candidate"], "policy")
    baselines = {"sft0": judge.responses(parents["baseline/sft0"], "sft0")}
    comparisons = list(judge.compare(CANDIDATE, candidate, baselines, True))
    asked = openai.LanguageModelJudge(chosen, parents, tmp_path / "out", execution, comparisons)
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))

    def stop():
        while len(server.bodies) < 5:  # two answered, three under way
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(SystemExit), contextlib.closing(asked.verdicts(comparisons)) as verdicts:
        while next(verdicts):
            begun = time.monotonic()
    assert time.monotonic() - begun < 5 and server.gone.wait(5)
    stopping.join()
    signal.signal(signal.SIGUSR1, before)
    time.sleep(0.3)
    assert len(server.bodies) == 5  # and nothing more is asked


def test_odd_answers_are_kept_readable_and_judged(serve, parents, tmp_path):
    def odd(**changes):
        return json.dumps(completion("x") | changes)

    def message(content):
        return [{"index": 0, "message": {"content": content}, "finish_reason": 7}]

    parts = [{"type": "thinking", "thinking": "[[A=B]]"}, {"type": "text", "text": "[[A>B]] \ud83d"}]
    faults = {
        0: odd(choices=message(parts), usage=None, model=None),
        1: odd(
            choices=message("[[A>B]] \ud83d"), usage={"prompt_tokens": "5", "completion_tokens": 1e400}, model=["m"]
        ),
        2: odd(choices=message(3), usage=4, created="never"),
    }
    verdicts, summary = judged(serve(faults), parents, tmp_path / "out", judge_concurrency=1)
    assert [v.get("grade") for v in verdicts[:2]] == ["A>B", "B>A"] and all(right(verdicts[2:]))
    assert summary["malformed"] == 1 and summary["models"] == ["served-1"] and summary["prompt_tokens"] == 5 + 50 * 10
    lines = runs.read_jsonl(tmp_path / "out" / "answers.jsonl")
    assert lines[0]["text"] == lines[1]["text"] == "[[A>B]] \ufffd" and lines[0]["prompt_tokens"] is None
    again, _ = judged(serve(), parents, tmp_path / "out")
    assert again == verdicts


@pytest.mark.parametrize("status", [400, 403, 422])
def test_the_first_question_may_be_the_one_that_is_refused(serve, parents, tmp_path, status):
    server = serve({0: (status, {}, {"error": {"message": "flagged"}})})
    verdicts, summary = judged(server, parents, tmp_path / "out")
    assert [v["winner"] for v in verdicts].count("error") == summary["errors"] == 1 and verdicts[0]["winner"] == "error"
    assert len(server.bodies) == 13 and "two plus two" in server.bodies[1]["messages"][0]["content"]
    server = serve()
    assert judged(server, parents, tmp_path / "out")[0] == verdicts and server.bodies == []


@pytest.mark.parametrize(
    ("status", "content", "requests"),
    [
        (400, {"error": {"message": "no such model"}}, 1),
        (401, {"error": {"message": "who?"}}, 1),
        (404, {}, 1),
        (400, {"error": {"message": "bad request"}}, 2),
        (403, {"detail": "forbidden"}, 2),
        (200, {"choices": []}, 2),
    ],
)
def test_a_server_that_refuses_every_question_is_asked_once_and_for_a_harmless_one(
    serve, parents, tmp_path, status, content, requests
):
    server = serve(dict.fromkeys(range(99), (status, {}, content)))
    message = failed(server, parents, tmp_path / "out")
    assert (
        f"judge-1 at 127.0.0.1:{server.server_port} " in message
        and f"answers {status if status > 200 else ''}" in message
    )
    assert "0 of 12 verdicts are kept" in message and len(server.bodies) == requests
    later = serve(dict.fromkeys(range(4, 99), (status, {}, content)))
    message = failed(later, parents, tmp_path / "later", judge_concurrency=1)
    assert "4 of 12 verdicts are kept" in message and len(later.bodies) <= 4 + 2


def test_parameters_are_found_out_once_a_run_and_recorded(serve, parents, tmp_path):
    error = {"message": "Unsupported parameter: 'max_tokens'", "param": "max_tokens"}
    server = serve({0: (400, {}, {"error": error})})
    verdicts, summary = judged(server, parents, tmp_path / "out")
    assert all(right(verdicts)) and len(server.bodies) == 13
    assert [sorted(set(body) & set(judge_client.LIMITS)) for body in server.bodies] == [
        ["max_tokens"], *[["max_completion_tokens"]] * 12
    ]  # fmt: skip
    assert summary["changed_parameters"] == {"max_tokens": "max_completion_tokens"}


def command(server, parents, folder, **execution):
    """The stage's command, by hand, and its output folder."""
    runs.write_json(folder / "settings.json", dataclasses.asdict(settings(base_url=server.url)))
    runs.write_json(folder / "execution.json", execution)
    output = folder / "out"
    words = [sys.executable, "-m", "salsa.evaluate.judge", "--settings", str(folder / "settings.json")]
    words += ["--execution", str(folder / "execution.json"), "--output", str(output)]
    return [*words, *(f"--parent={role}={path}" for role, path in parents.items())], output


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_goes_on_and_asks_nothing_twice(serve, parents, tmp_path, stop):
    server = serve({i: 60.0 for i in range(5, 8)})  # 3 at once: these never end
    words, output = command(server, parents, tmp_path, judge_concurrency=3)
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while server.under_way < 3 or len(server.bodies) < 8:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(stop)
    assert process.wait(20) == (-9 if stop == signal.SIGKILL else 143)  # without waiting for the server
    assert len(runs.read_jsonl(output / "answers.jsonl")) == 5 and not (output / runs.MANIFEST).exists()
    with open(output / "verdicts.jsonl", "a") as file:
        file.write('{"prompt_id": 4, "bench')
    second = serve()
    words, _ = command(second, parents, tmp_path, judge_concurrency=3)
    settled = runs.read_json(tmp_path / "settings.json")
    assert subprocess.run(words, capture_output=True, text=True, timeout=120).returncode == 0
    answered = [body["messages"][0]["content"] for body in server.bodies]
    again = [body["messages"][0]["content"] for body in second.bodies]
    assert len(again) == len(set(again)) == 7 and len(set(answered) & set(again)) == 3  # those under way
    verdicts = statistics.read_verdicts(output / "verdicts.jsonl")
    assert len(verdicts) == 12 and all(right(verdicts)) and settled["judge"]["base_url"] == second.url
    assert runs.verify(output)["summary"]["asked"] == 12


def test_the_command_says_what_is_wrong_in_one_line_and_no_file_holds_the_key(serve, parents, tmp_path):
    server = serve(dict.fromkeys(range(4, 100), (401, {}, TURNED_DOWN)))
    words, output = command(server, parents, tmp_path, judge_concurrency=1)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("python -m salsa.evaluate.judge: judge llm: judge-1 at 127.0.0.1")
    assert "4 of 12 verdicts are kept" in last and KEY not in done.stderr + done.stdout
    server.faults = {}
    assert subprocess.run(words, capture_output=True, timeout=120).returncode == 0
    assert runs.verify(output)["summary"]["kept"] == 4
    assert all(KEY.encode() not in path.read_bytes() for path in output.rglob("*") if path.is_file())


def test_no_key_of_the_environment_is_in_a_file_or_an_exception(serve, parents, tmp_path, monkeypatch, caplog):
    """A server fails in every way and repeats the header it was sent: what is raised, and what that hides, lack it."""
    keys = [KEY, "hf_canary", "wandb-canary"]
    monkeypatch.setenv("HF_TOKEN", keys[1])
    monkeypatch.setenv("WANDB_API_KEY", keys[2])
    said = []
    echo = {"error": {"message": f"Authorization: Bearer {KEY}"}}
    for number, fault in enumerate(
        [(401, {}, echo), (429, {}, echo), (500, {}, echo), (400, {}, echo), f"Bearer {KEY}"]
    ):
        server = serve(dict.fromkeys(range(100), fault))
        try:
            judged(server, parents, tmp_path / f"out{number}", judge_retries=0)
        except runs.UserError as error:
            said += traceback.format_exception(error)
    said.append(caplog.text)
    assert not [key for key in keys if key in "".join(said)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [(path, key) for path in files for key in keys if key.encode() in path.read_bytes()] and files


@pytest.fixture(scope="module")
def transformers_serve(tmp_path_factory, tiny_chat_model):
    """The address of `transformers serve` with a small random Llama, and the model's folder."""
    for name in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, of the extra salsa[serving]")
    folder = shutil.copytree(tiny_chat_model, tmp_path_factory.mktemp("served") / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    words = [*program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = folder.parent / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"NO_PROXY": "*"})
    try:
        deadline = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        process.kill()
        process.wait()


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_a_served_model_is_asked(transformers_serve, tmp_path):
    """A random model gives no verdict: two answers to each question are kept, and each is an error."""
    url, folder = transformers_serve
    few = make_parents(tmp_path, [row("policy", 0, ["a"])], [row("sft0", 0, ["b"])])
    chosen = settings(base_url=url, model=str(folder), max_tokens=5, attempts=2)
    verdicts, summary = judged(None, few, tmp_path / "out", chosen, judge_timeout=120.0, judge_concurrency=2)
    assert [v["winner"] for v in verdicts] == ["error", "error"]
    assert (summary["asked"], summary["malformed"], summary["errors"]) == (4, 4, 2)
    assert summary["completion_tokens"] > 0 and summary["prompt_tokens"] > 4 * 100
    assert all(line["text"] for line in runs.read_jsonl(tmp_path / "out" / "answers.jsonl"))
