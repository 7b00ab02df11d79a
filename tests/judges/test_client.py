"""What a judge's client makes of replies, rate limits and refused parameters; on a clock of the test's own."""

import asyncio
import json
import selectors

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salsa.judges import Interrupted
from salsa.judges.language_model import client as judge_client
from salsa.judges.language_model.client import Client, Failed, Refused, Reply, requested_wait
from salsa.workflow import config, runs

pytest.importorskip("openai", reason="needs the extra salsa[judge]")
GOOD = {
    "model": "served",
    "choices": [{"message": {"content": "[[A>B]]"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 7},
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Skipping(selectors.DefaultSelector):
    """Waits for nothing: where an event loop would sleep, its clock is put forward."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout or 0.0
        return super().select(0)


def run(coroutine_of, server, retries=6, **judge):
    """(What `coroutine_of(client)` gives, the client, seconds on its clock); requests are answered by `server`.

    Args:
        server: a function of (seconds, body) -> Reply.
    """
    chosen = config.Judge(kind="openai", model="m", base_url="http://127.0.0.1:9/v1", **judge)
    client, clock = Client(chosen, config.Execution(judge_retries=retries)), Skipping()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now

    async def exchange(body):
        reply = server(clock.now, body)
        await asyncio.sleep(0.5)
        return reply

    client._exchange = exchange
    try:
        return loop.run_until_complete(coroutine_of(client)), client, clock.now
    finally:
        loop.close()


def answer(content=GOOD):
    return Reply(200, {}, content, "")


def refusal(status, message, **error):
    content = {"error": {"message": message, **error}}
    return Reply(status, {"server": "s"}, content, message)


async def several(client, questions, at_once=8):
    """Ask questions as the judge's threads do."""
    left = list(range(questions))

    async def worker():
        while left:
            await client.answer(f"question {left.pop()}")

    await asyncio.gather(*(worker() for _ in range(at_once)))


class Limited:
    """Takes so many requests in each window of seconds."""

    def __init__(self, most=10, window=60.0, headers=None):
        self.most, self.window, self.headers = most, window, headers or (lambda left: {})
        self.begun, self.count, self.requests, self.taken = -1e9, 0, 0, 0

    def __call__(self, now, body):
        if now - self.begun > self.window:
            self.begun, self.count = now, 0
        self.count += 1
        self.requests += 1
        if self.count > self.most:
            headers = self.headers(self.begun + self.window - now)
            return Reply(429, headers, {"error": {"message": "slow down"}}, "slow down")
        self.taken += 1
        return answer()


@pytest.mark.parametrize(
    "headers",
    [
        lambda left: {},
        lambda left: {"retry-after": str(int(left) + 1)},
        lambda left: {"retry-after-ms": str(int(left * 1000) + 10)},
        lambda left: {"x-ratelimit-reset-requests": f"{int(left) + 1}s", "x-ratelimit-remaining-requests": "0"},
        lambda left: {"retry-after": "1"},  # which is not true
    ],
)
def test_limits_of_a_minute_are_waited_for_by_all_together(headers, capsys):
    """24 questions at ten a minute take the beginnings of three windows, and few requests that are not taken."""
    server = Limited(headers=headers)
    _, _, seconds = run(lambda client: several(client, 24), server)
    assert server.taken == 24 and 120 < seconds < 180
    assert server.requests < 24 + 2 * (8 + 6)
    assert capsys.readouterr().err.count("answers 429: slow down: waiting") == 1


def test_a_limit_that_stays_ends_the_run_in_bounded_time():
    def closed(now, body):
        return Reply(429, {}, {}, "slow down")

    async def asked(client):
        with pytest.raises(Interrupted, match=r"^m at 127.0.0.1:9 answers 429: slow down$"):
            await client.answer("x")

    assert run(asked, closed)[2] == 6 * 0.5 + 2 + 4 + 8 + 16 + 32 + 60 + 0.5
    assert run(asked, closed, retries=0)[2] == 0.5


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(429, {"retry-after": "86400"}, {}, "daily limit"), "it asks to wait 86400 seconds"),
        (refusal(429, "You exceeded your current quota", code="insufficient_quota"), "exceeded your current quota"),
        (
            refusal(429, "You exceeded your current quota, please check your plan and billing details.", code=None),
            "answers 429: You exceeded your current quota",
        ),
        (refusal(429, "Your account is not active", code="billing_not_active"), "answers 429: Your account"),
        (refusal(401, "no key"), "answers 401: no key"),
        (refusal(402, "pay"), "answers 402: pay"),
        (refusal(404, "no model"), "answers 404: no model; see that base_url"),
        (Reply(307, {"location": "https://elsewhere.example/v1"}, None, ""), "it is elsewhere, at elsewhere.example"),
        (refusal(400, "The model `m` does not exist"), "does not exist"),
        (refusal(403, "Invalid API key"), "Invalid API key"),
    ],
)
def test_what_concerns_every_question_stops_after_one_request(reply, words):
    requests = []

    def server(now, body):
        requests.append(body)
        return reply

    async def asked(client):
        with pytest.raises(Interrupted, match=words) as error:
            await client.answer("x")
        assert "\n" not in str(error.value)

    run(asked, server)
    assert len(requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        refusal(400, "prompt of 900 tokens, context of 512", code=400),
        refusal(400, "flagged", param="prompt"),
        refusal(403, "flagged"),
        refusal(413, "too much"),
        refusal(422, "inputs must have less than 512 tokens"),
        refusal(451, "unlawful"),
        refusal(500, "the request exceeds the available context size"),
        refusal(429, "Request too large for gpt on tokens per min"),
        Reply(400, {"server": "s"}, None, "<html>Bad request</html>"),
        answer({"choices": []}),
        answer({"choices": None, "usage": None}),
        answer({"choices": [{"message": None, "finish_reason": "content_filter"}]}),
        answer({"choices": [{"finish_reason": "stop"}]}),
        answer({"choices": [{"message": {"content": "[[A>B]]"}, "finish_reason": "content_filter"}]}),
        answer({"choices": [{"message": {"content": None, "refusal": "I won't."}, "finish_reason": "stop"}]}),
        answer({"error": {"code": 403, "message": "flagged"}}),
        answer({"choices": [{"error": {"code": 400, "message": "flagged"}, "message": {"content": ""}}]}),
        Reply(200, {}, None, 'data: {"choices": [{"delta": {"content": "[[A"}}]}\n\ndata: [DONE]'),
        refusal(400, "This model only support stream mode, please enable the stream parameter"),
        refusal(400, "max_tokens must be at least 1, got -186."),
        Reply(judge_client.OVERSIZED, words="answers with more than 16 MiB"),
    ],
)
def test_one_question_that_is_not_taken_is_refused_at_once(reply):
    async def asked(client):
        assert (await client.answer("fine"))["text"] == "[[A>B]]"
        with pytest.raises(Refused, match=r"^answers ") as refused:
            await client.answer("blocked")
        assert refused.value.server == "m at 127.0.0.1:9" and "\n" not in str(refused.value)

    _, _, seconds = run(asked, lambda now, body: reply if body["messages"][0]["content"] == "blocked" else answer())
    assert seconds == 1.0  # two requests


@pytest.mark.parametrize(
    "reply",
    [
        refusal(500, "oops"),
        refusal(529, "overloaded"),
        refusal(408, "slow"),
        Reply(0, words="can't be reached: Connection error."),
        Reply(200, {}, None, "<html>"),
        answer({"error": "upstream"}),
        answer({"error": {"code": 502, "message": "upstream"}}),
        answer({"error": {"code": "503", "message": "upstream"}}),
        answer({"choices": 3}),
        Reply(503, {"x-ratelimit-reset-requests": "60s"}, None, "busy"),
        answer({"choices": ["x"]}),
        answer([]),
        Reply(200, {}, 7, "7"),
    ],
)
def test_faults_that_may_pass_are_tried_again(reply):
    replies = [reply, reply, answer()]

    async def asked(client):
        return await client.answer("x")

    found, _, seconds = run(asked, lambda now, body: replies.pop(0), retries=2)
    assert found["text"] == "[[A>B]]" and seconds == 3 * 0.5 + 0.5 + 1.0
    replies = [reply] * 3
    with pytest.raises(Failed):
        run(asked, lambda now, body: replies.pop(0), retries=2)


NAMED = {
    "param": lambda name: refusal(400, "Unsupported parameter", param=name, code="unsupported_parameter"),
    "path": lambda name: refusal(400, "Unsupported parameter", param=f"body.{name}"),
    "prose": lambda name: refusal(400, f"Unsupported value: '{name}' does not support 0.0 with this model."),
    "argument": lambda name: refusal(400, f"Unrecognized request argument supplied: {name}"),
    "pydantic": lambda name: Reply(
        422, {"s": "s"}, {"detail": [{"loc": ["body", name], "msg": "Extra inputs are not permitted"}]}, "…"
    ),
    "mistral": lambda name: Reply(
        422,
        {"s": "s"},
        {"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "input": 1}]}},
        "…",
    ),
    "gateway": lambda name: refusal(
        400, "Provider returned error", metadata={"raw": f'{{"error": "{name} is not supported"}}'}
    ),
}


@pytest.mark.parametrize("way", NAMED)
@pytest.mark.parametrize(
    ("refused", "settled", "changed"),
    [
        (["max_tokens"], {}, {"max_tokens": "max_completion_tokens"}),
        (["max_tokens", "max_completion_tokens"], {}, {"max_tokens": None}),
        (["temperature"], {}, {"temperature": None}),
        (["seed"], {"temperature": 0.7}, {"seed": None}),
        (["seed", "temperature", "max_tokens"], {"temperature": 0.7}, None),
    ],
)
def test_a_parameter_that_the_server_names_is_left_out_for_the_run(way, refused, settled, changed):
    bodies = []

    def server(now, body):
        bodies.append(body)
        return next((NAMED[way](name) for name in refused if name in body), answer())

    async def asked(client):
        return [await client.answer("x", 7 if settled else None) for _ in range(3)]

    answers, client, _ = run(asked, server, **settled)
    if changed is None:
        changed = {"seed": None, "temperature": None, "max_tokens": "max_completion_tokens"}
    assert client.changed == changed and len(bodies) == 3 + (len(refused) if refused[1:] else 1)
    assert all(one["changed_parameters"] == changed for one in answers)
    assert bodies[-1] == bodies[-2] and not set(refused) & set(bodies[-1])


def test_a_question_whose_refusal_names_a_parameter_changes_nothing():
    """As where vLLM finds max_tokens too large for what one prompt leaves, or the error repeats the whole request."""
    for reply in (
        refusal(400, "'max_tokens' is too large: 1024. This model's maximum context length is 512 tokens"),
        Reply(422, {"s": "s"}, {"detail": [{"msg": "bad", "input": {"temperature": 0, "max_tokens": 9}}]}, "bad"),
        refusal(400, "flagged: seed of a plant", code="x"),
    ):
        bodies = []

        async def asked(client):
            await client.answer("fine", 3)
            with pytest.raises(Refused):
                await client.answer("blocked", 3)
            await client.answer("fine", 3)

        def server(now, body, reply=reply, bodies=bodies):
            bodies.append(body)
            return reply if body["messages"][0]["content"] == "blocked" else answer()

        _, client, _ = run(asked, server)
        assert client.changed == {} and bodies[0] == bodies[-1]


def test_null_leaves_a_parameter_out():
    async def asked(client):
        await client.answer("x")

    bodies = []
    run(asked, lambda now, body: bodies.append(body) or answer(), temperature=None, max_tokens=None)
    assert set(bodies[0]) == {"model", "messages"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        (5, ""),
        (True, ""),
        ("half \ud83d", "half \ufffd"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "so"}], "so"),
        ([{"type": "text", "text": {"value": "so"}}, " it is", 3, None], "so it is"),
        ({"text": "so"}, "so"),
        ({"type": "reasoning", "text": "so"}, ""),
        ([[["deep"]]], "deep"),
    ],
)
def test_the_text_of_any_content(content, text):
    assert judge_client.text_of(content) == text


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "type", "value", "code"]), inner)
    ),
    max_leaves=5,
)


@given(ODD, ODD, ODD, ODD, ODD)
def test_an_odd_reply_is_an_answer_that_can_be_kept_or_none(content, usage, model, reason, tokens):
    choice = {"message": {"content": content, "refusal": model}, "finish_reason": reason}
    usage = usage if usage is None else {"prompt_tokens": usage, "completion_tokens": tokens}
    client = Client(config.Judge(kind="openai", model="m", base_url="http://h/v1"), config.Execution())  # opens nothing
    reply = judge_client.judged(answer({"choices": [choice], "usage": usage, "model": model, "created": usage}))
    assert reply.status == 200
    try:
        kept = client._taken(choice, reply.content, {}, {})
    except Refused:
        return
    json.dumps(kept, ensure_ascii=False, allow_nan=False).encode()
    assert isinstance(kept["text"], str)
    for name in ("prompt_tokens", "completion_tokens"):
        assert kept[name] is None or (type(kept[name]) is int and kept[name] >= 0)
    for place in ({"choices": content}, {"choices": [content]}, {"error": content}, content):
        assert judge_client.judged(answer(place)).status in {0, 200, 400, 429, *judge_client.EVERY}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:17:20 GMT"}, 40),  # at 1,000 seconds
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "1e999"}, None),
        ({"x-ratelimit-reset-requests": "6m0s"}, 360),
        ({"x-ratelimit-reset-tokens": "20ms", "x-ratelimit-reset-requests": "1s"}, 1),
        ({"x-ratelimit-reset-tokens": "50s", "x-ratelimit-remaining-tokens": "900"}, None),
        ({"ratelimit-reset": "12"}, 12),
        ({"x-ratelimit-reset": "1700000000000"}, 1700000000 - 1000),
        ({"anthropic-ratelimit-requests-reset": "1970-01-01T00:17:20Z"}, 40),
        ({"x-ratelimit-limit-requests": "60"}, None),
        ({"retry-after": "26 seconds"}, 26),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert requested_wait(headers, now=1000.0) == (None if seconds is None else pytest.approx(seconds))


SPENT = "You exceeded your current quota, please check your plan and billing details. "


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        (  # OpenAI, without a payment method
            "Rate limit reached for gpt on requests per min. Limit: 3 / min. Please try again in 20s. Please add a "
            "payment method to increase your rate limit. Visit https://platform.openai.com/account/billing to add one.",
            20,
        ),
        ("Rate limit reached. Please try again in 7m12s. Need more? https://console.groq.com/settings/billing", 432),
        (
            SPENT + "* Quota exceeded for metric: requests, limit: 10\nPlease retry in 17.30897372s.",
            17.30897372,
        ),  # Google
        ("exceeded call rate limit of your current pricing tier. Please retry after 26 seconds.", 26),  # Azure
        ("No deployments available for selected model, Try again in 60 seconds. Passed model=m", 60),  # LiteLLM
        ("Please try again in 6ms.", 0.006),
        ("Visit https://platform.openai.com/account/billing to add a payment method.", None),
    ],
)
def test_a_rate_limit_is_one_also_where_it_speaks_of_billing(message, seconds):
    reply = judge_client.judged(refusal(429, message))
    assert reply.status == 429
    assert requested_wait(reply.headers, reply.words) == (None if seconds is None else pytest.approx(seconds))


def test_what_an_error_says_for_people():
    said = "You exceeded"
    assert judge_client._parsed(json.dumps([{"error": {"code": 429, "message": said}}]).encode())[1] == said  # Google
    page = b"<html><head><title>502 Bad Gateway</title></head>\r\n<body><hr>nginx</body></html>"
    reply = judge_client.judged(Reply(502, {}, *judge_client._parsed(page)))
    assert reply.status == 0 and " ".join(reply.words.split()) == "answers 502: 502 Bad Gateway nginx"


def test_what_the_server_says_is_shown_on_one_line_without_the_key_or_control_signs():
    client = Client(config.Judge(kind="openai", model="m", base_url="http://h/v1"), config.Execution())
    assert client._shown("a\n b\x1b[31m\u202e sk-very-secret " + "x" * 999).startswith("a b [31m (key) xx")
    assert len(client._shown("x" * 999)) == 300


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h:8000/v1", "http://h:8000/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        (
            "https://x.azure.com/openai/d/gpt?api-version=1",
            "https://x.azure.com/openai/d/gpt/chat/completions?api-version=1",
        ),
    ],
)
def test_where_is_asked(url, asked):
    assert Client(config.Judge(kind="openai", model="m", base_url=url), config.Execution()).url == asked


def test_an_environment_that_allows_no_connections_is_one_line(monkeypatch):
    client = Client(config.Judge(kind="openai", model="m", base_url="http://127.0.0.1:9/v1"), config.Execution())
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("ALL_PROXY", "gopher://nowhere")
    with pytest.raises(runs.UserError, match="mend the environment's") as error:
        asyncio.run(client.__aenter__())
    assert "\n" not in str(error.value)
