"""The server of a judge: sends one question as a chat completion of OpenAI's form, and reads what comes back.

Whatever a server does ends in one of four ways: an answer, `Refused` (it won't take this question), `Failed` (no try of
this question came to an answer) or `Interrupted` (nothing more can be asked for now). Faults are tried again. All
questions together wait for a rate limit to pass. A parameter that the server refuses is left out for the rest of the
run. A request ends after `execution.judge_timeout`, however slowly its answer drips.

OpenAI's own client is not used for this: it has each request wait for a rate limit by itself, and bounds neither the
time nor the size of a whole answer. Left out: what is asked, and what an answer means (salsa/judges/openai.py).
"""

import asyncio
import contextlib
import datetime
import email.utils
import json
import math
import os
import re
import sys
import time
import unicodedata
import zlib
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from salsa.judges import Interrupted
from salsa.judges.language_model.access import access_key, base_url, check_access
from salsa.workflow.messages import UserError

LARGEST = 2**24  # bytes of an answer
LONGEST_WAIT = 8.0  # seconds between two tries after a fault
# Seconds to wait after a rate limit where the server doesn't say how long: most limits are of one minute.
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
PATIENCE = 900.0  # the longest pause, in seconds, that a server may ask for
SHORTEST_KEY = 8
OVERSIZED = -1  # in the place of a status: an answer larger than LARGEST
AGAIN = (408, 409, 425)  # statuses of faults that may pass, as are all from 500 on
EVERY = (401, 402, 404, 405, 407, 410, 426)  # statuses that every other question would get, too
LIMITS = ("max_tokens", "max_completion_tokens")  # two names of one parameter
TOO_LONG = re.compile(
    r"context[ _-]*(?:length|size|window)|context_length_exceeded|too (?:long|large)|exceeds? the (?:model|maximum)|"
    r"maximum (?:input|prompt|sequence)|must be at least 1, got -",
    re.IGNORECASE,
)
ABOUT_ALL = re.compile(  # words of a refusal that every other question would get, too
    r"\b(?:no such|unknown|invalid|unsupported|unrecognized)\s+(?:model|deployment)\b|api[ _-]?key|credential|billing|"
    r"\bmodel\b[^.]{0,80}\b(?:not found|does(?: not|n't) exist|not available|not supported|decommissioned)\b|"
    r"model_not_found|quota|insufficient (?:credit|balance)",
    re.IGNORECASE,
)
UNPAID = re.compile(  # not "billing" alone: messages on limits of one minute, too, name a page where to pay for more
    r"insufficient_quota|exceeded your current quota|insufficient (?:credit|balance)|billing_(?:hard_limit|not_active)|"
    r"billing (?:hard limit|details)"
)
SPAN = r"[0-9.]+\s*(?:milli|ms|s|m|h|d)[a-z]*"  # "20ms", "7m12s" (in two), "26 seconds"
SECONDS = {"milli": 1e-3, "ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
AGAIN_IN = re.compile(rf"\b(?:again|retry)\s+(?:in|after)\s+((?:{SPAN}\s*)+)", re.IGNORECASE)
AFTER = ("retry-after-ms", "retry-after")  # headers that say how long to wait, for whatever reason
RESET = re.compile(r"(?:x-|anthropic-)?rate-?limit-(?:[\w-]+-)?reset(?:-[\w-]+)?")  # headers that say when a limit ends
ECHOES = ("input", "messages", "prompt", "body", "ctx")  # fields of an error that repeat what was asked


class Refused(Exception):
    """Why the server will not answer one question. `server` names the server."""

    def __init__(self, reason, server=""):
        super().__init__(reason)
        self.server = server


class Failed(Refused):
    """What went wrong with every try of one question, because of the question or because the server is down."""


@dataclass
class Reply:
    """What a request came back with.

    Attributes:
        status: the HTTP status; 0 where no answer came.
        headers: by name in lower case.
        content: the JSON of the body, or None where the body is none.
        words: the server's message to people, or what went wrong.
    """

    status: int
    headers: dict = field(default_factory=dict)
    content: object = None
    words: str = ""


class Client:
    """The server of a judge; see the module. An asynchronous context, which closes its connections.

    Raises UserError where the settings name no server that can be asked, or the environment allows no connections.
    """

    def __init__(self, judge, execution):
        check_access(judge)
        self.judge, self.retries, self.timeout = judge, execution.judge_retries, execution.judge_timeout
        self.secret = access_key(judge)
        address = urlsplit(base_url(judge))
        self.url = address._replace(path=address.path.rstrip("/") + "/chat/completions").geturl()
        self.name = f"{judge.model} at {address.netloc}"
        # The newer models of OpenAI and Azure refuse the old name of this limit; not every other server knows the new.
        is_openai = f".{address.hostname}".endswith((".api.openai.com", ".openai.azure.com"))
        parameters = {LIMITS[is_openai]: judge.max_tokens, "temperature": judge.temperature}
        self.parameters = {name: value for name, value in parameters.items() if value is not None}
        self.changed = {}  # parameter that the server refuses -> the name that it takes instead, or None
        self.taken = False  # whether the server took a question of this run
        self._headers = headers = {"Authorization": f"Bearer {self.secret or 'none'}", "Accept-Encoding": "identity"}
        if address.hostname.endswith(".azure.com") and self.secret:
            headers["api-key"] = self.secret
        for name, variable in (("OpenAI-Organization", "OPENAI_ORG_ID"), ("OpenAI-Project", "OPENAI_PROJECT_ID")):
            if os.environ.get(variable, "").isascii() and os.environ.get(variable):
                headers[name] = os.environ[variable].strip()
        self._stopping, self._alone = asyncio.Event(), asyncio.Lock()
        self._pauses, self._resume = 0, 0.0  # pauses since the server last took a request; when the last of them ends
        self._announced = False  # whether the user was told of pauses
        self._http = None

    async def __aenter__(self):
        import openai  # whose HTTP client this is

        try:  # a redirection is not followed: it would carry the key to another host
            self._http = openai.DefaultAsyncHttpxClient(timeout=None, follow_redirects=False, headers=self._headers)
        except Exception as error:
            raise UserError(
                f"judge.kind=openai: no connections can be made ({self._shown(str(error))}); mend the environment's "
                "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or SSL_CERT_FILE"
            ) from None
        return self

    async def __aexit__(self, *_):
        await self._http.aclose()

    def stop(self):
        """Begin no more requests: questions that wait for another try give up, those under way are still answered."""
        self._stopping.set()

    async def answer(self, prompt, seed=None, retries=None):
        """One answer: {"text", "finish_reason", "prompt_tokens", "completion_tokens", "served_model"}.

        Where the server refused parameters, `changed_parameters` maps each to the name that it takes instead, or None.

        Args:
            retries: how often to try again after a fault; None: as often as the settings say.

        Raises Refused where the server says that it can't take this prompt, Failed where every try ends in a fault,
        Interrupted where nothing more can be asked.
        """
        retries = self.retries if retries is None else retries
        parameters, changed = self.parameters | ({} if seed is None else {"seed": seed}), dict(self.changed)
        while True:
            sent = {changed.get(name, name): value for name, value in parameters.items()}
            sent.pop(None, None)
            message = {"role": "user", "content": readable(prompt)}
            reply = await self._settled({"model": self.judge.model, **sent, "messages": [message]}, retries)
            if reply.status < 300:
                return self._taken(reply.content["choices"][0], reply.content, changed, parameters)
            refused = [name for name in parameters if changed.get(name, name) in _parameters_named(reply, sent)]
            if not refused:
                reason = self._shown(reply.words)
                if not self.taken and ABOUT_ALL.search(reply.words):
                    raise Interrupted(f"{self.name} {reason}")
                raise Refused(reason, self.name)
            for name in refused:  # the limit's other name is tried before the limit is left out
                others = [other for other in LIMITS if name in LIMITS and other != name and name not in changed]
                changed[name] = others[0] if others else None

    def _taken(self, choice, content, changed, parameters):
        """The answer that a completion's choice holds. Parameters that had to be changed for it stay changed."""
        self.taken = True
        self.changed |= changed
        message, usage = choice["message"], content.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        refusal, reason = message.get("refusal"), choice.get("finish_reason")
        text = self._keyless(text_of(message.get("content")))
        if reason == "content_filter" or (isinstance(refusal, str) and refusal and not text):
            reason = f"answers {reason or 'refusal'}: {refusal or 'the answer was filtered'}"
            raise Refused(self._shown(reason), self.name)
        served = content.get("model")
        line = {
            "text": text,
            "finish_reason": readable(reason)[:100] if isinstance(reason, str) else None,
            "prompt_tokens": _count(usage.get("prompt_tokens")),
            "completion_tokens": _count(usage.get("completion_tokens")),
            "served_model": self._keyless(readable(served))[:200] if isinstance(served, str) else None,
        }
        changes = {name: changed[name] for name in parameters if name in changed}
        return line | ({"changed_parameters": changes} if changes else {})

    async def _settled(self, body, retries):
        """A reply that is an answer (status 200) or a refusal (400); Failed or Interrupted where there is none."""
        reply = None
        for attempt in range(retries + 1):
            if reply:
                wait = requested_wait({name: reply.headers[name] for name in AFTER if name in reply.headers})
                await self._wait(min(wait, LONGEST_PAUSE) if wait else min(0.5 * 2 ** (attempt - 1), LONGEST_WAIT))
            reply = await self._admitted(body)
            if reply.status in (200, 400):
                return reply
            if reply.status in EVERY or 300 <= reply.status < 400:
                raise Interrupted(self._shown(f"{self.name} {reply.words}"))
        raise Failed(self._shown(reply.words), self.name)

    async def _admitted(self, body):
        """A reply that does not speak of a rate limit.

        After a rate limit all requests wait for the same moment, and then go one by one until one is taken.
        """
        while True:
            limited = self._pauses > 0
            async with self._alone if limited else contextlib.nullcontext():
                if limited and not self._pauses:  # taken again while this one waited for its turn
                    continue
                await self._wait(self._resume - asyncio.get_running_loop().time())
                before = self._pauses
                reply = judged(await self._exchange(body))
                if reply.status != 429:
                    self._pauses = 0 if reply.status else self._pauses
                    return reply
                if before == self._pauses:  # the first such reply to the requests that were under way together
                    self._pause(reply)

    def _pause(self, reply):
        """Let all requests wait. Interrupted after too many pauses, or where the server asks for too long a pause."""
        wait, reason = requested_wait(reply.headers, reply.words), self._shown(f"{self.name} {reply.words}")
        if self._pauses >= self.retries:
            raise Interrupted(reason)
        if wait and wait > PATIENCE:
            raise Interrupted(f"{reason}; it asks to wait {wait:.0f} seconds: start again then")
        pause = min(FIRST_PAUSE * 2**self._pauses, LONGEST_PAUSE)
        if wait:  # the server's first word is believed; one that asks for too little again and again is not
            pause = wait if not self._pauses else max(wait, pause)
        self._pauses += 1
        self._resume = asyncio.get_running_loop().time() + pause
        if not self._announced and pause >= 1:
            self._announced = True
            print(f"{reason}: waiting, now and whenever it says so", file=sys.stderr, flush=True)

    async def _wait(self, seconds):
        """Wait for some seconds. Interrupted, at once, when the client is stopped."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise Interrupted(f"{self.name} was not asked again")

    async def _exchange(self, body):
        """Send one request, and turn whatever happens into a Reply."""
        try:
            async with asyncio.timeout(self.timeout), self._http.stream("POST", self.url, json=body) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                content = await _content(response, headers)
            if len(content) > LARGEST:
                return Reply(OVERSIZED, words=f"answers with more than {LARGEST >> 20} MiB")
            return Reply(response.status_code, headers, *_parsed(content))
        except TimeoutError:
            return Reply(0, words="can't be reached: Request timed out.")
        except Exception as error:  # the network's: the HTTP client is httpx before openai 3, and httpx2 since
            name = type(error).__name__
            return Reply(0, words=f"can't be reached: Connection error. {name}{': ' if str(error) else ''}{error}")

    def _shown(self, text):
        """One line of at most 300 characters, without control characters and without the key."""
        text = "".join(" " if unicodedata.category(sign) in ("Cc", "Cf", "Cs") else sign for sign in text[:5000])
        text = " ".join(text.split())
        return self._keyless(text)[:300]

    def _keyless(self, text):
        """The text with a mark in the place of the key. A text shorter than SHORTEST_KEY is no key to protect."""
        return text.replace(self.secret, "(key)") if len(self.secret) >= SHORTEST_KEY else text


async def _content(response, headers):
    """The bytes of a body; no more than a little over `LARGEST`, so that a larger one is never in memory."""
    content = bytearray()
    async for part in response.aiter_raw():
        content += part
        if len(content) > LARGEST:
            return content
    # Some servers compress although the request asks them not to.
    if headers.get("content-encoding", "identity").strip().lower() in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(47).decompress(content, LARGEST + 1)
    return content


def _parsed(content):
    """(JSON or None, message to people) of a body."""
    text = content.decode("utf-8-sig", errors="replace")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        page = text.lstrip().startswith("<")
        return None, (re.sub(r"<[^>]*>", " ", text[:5000]).strip() if page else text)[:1000]
    error = parsed[0] if isinstance(parsed, list) and parsed else parsed  # Google's is a list of one
    error = error.get("error", error) if isinstance(error, dict) else error
    message = error.get("message") if isinstance(error, dict) else error
    return parsed, message if isinstance(message, str) else text[:1000]


def judged(reply):
    """The reply with its status reduced to one of these, and words that cite the server.

    200: an answer, whose first choice has a message | 400: a refusal of this question, or of one of its parameters |
    429: a rate limit | those of `EVERY` and 3xx: no question would be answered | 0: a fault that may pass.
    """
    status, content = reply.status, reply.content
    if status in (0, OVERSIZED):  # other questions may still be answered
        return Reply(400 if status else 0, {}, None, reply.words)
    if 200 <= status < 300:
        return _judged_content(reply)
    words = f"answers {status}: {reply.words}".strip(": ")
    if 300 <= status < 400:
        place = urlsplit(reply.headers.get("location", "")).netloc
        elsewhere = f"it is elsewhere{f', at {place}' if place else ''}; mend base_url"
        return Reply(status, {}, content, f"answers {status}: {elsewhere}")
    if status == 404:
        words += "; see that base_url (which often ends in /v1) and model are right"
    elif status == 429 and UNPAID.search(str(content).lower()) and not requested_wait({}, reply.words):
        status = 402
    elif status == 429 and "request too large" in reply.words.lower():
        status = 400
    elif status in AGAIN or status >= 500:
        status = 400 if TOO_LONG.search(reply.words) else 0
    elif status != 429 and status not in EVERY:
        status = 400
    return Reply(status, reply.headers, content, words)


def _judged_content(reply):
    """`judged` for a reply with status 200."""
    content = reply.content
    choices = content.get("choices") if isinstance(content, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    for place in (choice, content):  # gateways pass another server's error on as if it were an answer
        error = place.get("error") if isinstance(place, dict) else None
        code = _count(error.get("code")) if isinstance(error, dict) else None
        if code and 400 <= code < 600:
            return judged(Reply(code, reply.headers, {"error": error}, text_of(error.get("message")) or "error"))
    if isinstance(choice, dict) and isinstance(choice.get("message"), dict):
        return Reply(200, reply.headers, content, "")
    if isinstance(content, dict) and "choices" in content and (not choices or isinstance(choice, dict)):
        reason = choice.get("finish_reason") if choice else None
        return Reply(400, reply.headers, None, f"answers without a message{f' ({text_of(reason)})' if reason else ''}")
    if content is None and reply.words.lstrip().startswith(("data:", "event:", ":")):
        return Reply(400, reply.headers, None, "answers with a stream of events, which is not read; turn it off there")
    return Reply(0, reply.headers, content, f"answers what is no chat completion: {reply.words}".strip(": "))


def _parameters_named(reply, sent):
    """Which of the parameters that were `sent` a refusal names."""
    if not isinstance(reply.content, dict | list) or TOO_LONG.search(reply.words):
        return set()
    error = reply.content.get("error", reply.content) if isinstance(reply.content, dict) else reply.content
    parameter = error.get("param") if isinstance(error, dict) else None
    if isinstance(parameter, str) and parameter:
        return set(re.findall(r"\w+", parameter)) & set(sent)
    text = " ".join(_strings(reply.content))
    return {name for name in sent if re.search(rf"(?<![\w-]){name}(?![\w-])", text)}


def _strings(value, depth=0):
    """The texts in an error, without the fields that only repeat the question."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth < 8:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            if name not in ECHOES:
                yield from _strings(item, depth + 1)


def text_of(content):
    """The text of a message's content (text, or a list of parts) without thinking; "" where there is none."""
    if isinstance(content, str):
        return readable(content)
    if isinstance(content, list):
        return "".join(map(text_of, content))
    if isinstance(content, dict) and content.get("type", "text") in ("text", "output_text"):
        text = content.get("text")
        return text_of(text.get("value") if isinstance(text, dict) else text)
    return ""


def readable(text):
    """The text with a mark in the place of each half of a surrogate pair, which no UTF-8 file can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _count(value):
    """A number of tokens, or None where the value is no such number."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}", value):
        value = int(value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15
    return int(value) if number and value == int(value) else None


def requested_wait(headers, words="", now=None):
    """Seconds that a server asks to wait, by whichever header it sends, or else by its words ("try again in 7m12s").

    None where the server does not say, or says nonsense.
    """
    now = time.time() if now is None else now
    if "retry-after-ms" in headers:
        waits = [_number(headers["retry-after-ms"]) / 1000]
    elif "retry-after" in headers:
        waits = [_until(headers["retry-after"], now)]
    else:
        limits = [name for name in headers if RESET.fullmatch(name)]
        spent = [name for name in limits if headers.get(name.replace("reset", "remaining"), "0").strip() in ("0", "")]
        waits = [_until(headers[name], now) for name in spent]
        match = AGAIN_IN.search(words)
        if match and not any(wait > 0 for wait in waits):
            waits = [_spans(match[1])]
    return max((wait for wait in waits if wait > 0), default=None)


def _until(text, now):
    """Seconds: a number ("20"), a span ("6m0s", "20ms"), a time since 1970 in seconds or milliseconds, or a date.

    nan where the text is none of these.
    """
    number = _number(text)
    if not math.isnan(number):
        return number if number < 1e9 else number / (1000 if number > 1e11 else 1) - now
    if re.fullmatch(rf"\s*(?:{SPAN}\s*)+", text, re.IGNORECASE):
        return _spans(text)
    for read in (email.utils.parsedate_to_datetime, datetime.datetime.fromisoformat):
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            date = read(text.strip())
            return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp() - now
    return math.nan


def _spans(text):
    """The sum of all spans in a text, in seconds."""
    spans = re.findall(r"([0-9.]+)\s*(milli|ms|s|m|h|d)", text.lower())
    numbers = [_number(value.rstrip(".")) * SECONDS[unit] for value, unit in spans]
    return sum(number for number in numbers if not math.isnan(number))


def _number(text):
    """The finite number that a text is, or nan."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan
