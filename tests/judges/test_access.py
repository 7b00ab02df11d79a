"""The address and the key of a judge's server, looked at before anything is asked."""

import socket

import pytest

from salsa.judges.language_model import access as judge_access
from salsa.workflow import compose, config, jobs, plan, runs

SECRET = "hunter2"


def said(function, *arguments):
    with pytest.raises(runs.UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value) and SECRET not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://localhost:8000/v1",
        "https://api.openai.com/v1",
        "https://x.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21",
        "http://[::1]:8000/v1/",
        "HTTPS://Host.example/v1",
        "https://host.example/accounts/me@here/v1",
    ],
)
def test_addresses_that_are_taken(url):
    judge_access.check_base_url(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:8000/v1", "no address with http://"),
        ("localhost:8000/v1", "no address with http://"),
        ("//host/v1", "no address with http://"),
        ("ftp://host/v1", "no address with http://"),
        ("http:///v1", "no address with http://"),
        ("http://", "no address with http://"),
        ("v1", "no address with http://"),
        ("http://host:99999/v1", "no address"),
        ("http://host:0/v1", "no address"),
        ("http://host:eighty/v1", "no address"),
        ("http://[::1/v1", "no address"),
        (f"http://user:{SECRET}@host/v1", "holds a user or password"),
        (f"http://{SECRET}@host/v1", "holds a user or password"),
        (f"user:{SECRET}@host/v1", "no address with http://"),
        (f"http://user:{SECRET}/{SECRET}@host/v1", "no address"),
        (f"http://host/v1?api-key={SECRET}", "its query holds api-key"),
        (f"http://host/v1?x=1&Token={SECRET}", "its query holds Token"),
        ("http://host/v1\nhttp://other", "has a space"),
        (" http://host/v1", "has a space"),
        ("http://höst/v1", "outside ASCII"),
        ("http://host/v1#here", "#fragment"),
        ("http://host/v1/chat/completions", "leave out /chat/completions"),
    ],
)
def test_addresses_that_are_refused(url, words):
    message = said(judge_access.check_base_url, url, "judges.mine.base_url")
    assert message.startswith("judges.mine.base_url") and words in message


def judge(**changes):
    return config.Judge(kind="openai", model="m", key_variable="MY_KEY", **changes)


@pytest.mark.parametrize("key", [f"{SECRET}…", f"{SECRET}\nsecond", f"{SECRET} {SECRET}", "schlüssel", "a\u200bb"])
def test_a_key_that_no_header_can_carry_is_one_line_without_the_key(monkeypatch, key):
    monkeypatch.setenv("MY_KEY", key)
    assert "MY_KEY: its character" in said(judge_access.check_access, judge())
    monkeypatch.setenv("MY_KEY", f"  {SECRET}\n")  # as a file with a line end gives it
    judge_access.check_access(judge())


def test_a_key_in_the_place_of_its_variables_name_is_not_shown():
    message = said(compose.compose, ["judge=[openai]", f"judges.openai.key_variable=sk-{SECRET}"])
    assert message.startswith("judges.openai.key_variable: must be the name of an environment variable")


def test_the_environments_address_is_looked_at_too(monkeypatch):
    monkeypatch.setenv("MY_KEY", "key")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{SECRET}@host/v1")
    assert said(judge_access.check_access, judge()).startswith("OPENAI_BASE_URL=http://…@host/v1: holds a user")


def test_planning_refuses_an_address():
    overrides = ["judge=[openai]", f"judges.openai.base_url=http://u:{SECRET}@h/v1"]
    assert said(compose.compose, overrides).startswith("judges.openai.base_url=http://…@h/v1: holds a user")
    compose.compose(["judge=[openai]", *(f"judges.openai.{key}=null" for key in ("temperature", "max_tokens", "seed"))])


def test_an_address_that_is_not_there_is_named_before_the_first_job(tmp_path, monkeypatch):
    def check(url, **execution):
        values = {"judge": {"kind": "openai", "model": "m", "base_url": url}}
        run = plan.Run("judge", "j", "0" * 64, values, {}, execution)
        jobs.check_judges(plan.Plan(str(tmp_path), {"judge/j": run}), ["judge/j"])

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    message = said(lambda: check(url, judge_check=True))
    assert "can't be reached (Connection refused)" in message and "execution.judge_check=false" in message
    check(url, judge_check=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    monkeypatch.setenv("http_proxy", address)
    monkeypatch.setenv("no_proxy", "")
    message = said(lambda: check(url, judge_check=True, judge_retries=0))  # only the proxy could tell where it is
    assert "Connection error" in message and "(one question, before the first job)" in message

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    monkeypatch.setenv("no_proxy", "*")
    message = said(lambda: check("https://no.such.host/v1", judge_check=True))
    assert "no.such.host:443 can't be reached (Name or service not known)" in message
