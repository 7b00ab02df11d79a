"""What can be checked of a judge's server before it is asked: its address, its key, and whether it can be reached.

This module needs the standard library alone, so that planning can use it.
"""

import importlib.util
import os
import re
import socket
import urllib.request
from urllib.parse import parse_qsl, urlsplit

from salsa.workflow.messages import UserError

OPENAI = "https://api.openai.com/v1"
SECRET_QUERY = re.compile(r"key|token|secret|sig|password|credential|auth", re.IGNORECASE)
CONNECTING = 5.0  # seconds that a server has, before the first job, to take a connection


def check_base_url(url, setting="judge.base_url"):
    """UserError, in one line and without secrets, for an address at which no server can be asked; "" is the default.

    An address with a password, or with a key in its query, is refused: settings stand in reports, manifests and logs.
    """

    problem = _problem(url) if url else None
    if problem:
        raise UserError(f"{setting}={_without_secrets(url)}: {problem}")


def _problem(url):
    """Why no server can be asked at an address, and what to do; None where one can."""
    if re.search(r"[^\x21-\x7e]", url):
        return "has a space or a character outside ASCII; write the address as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "no address; write one such as http://localhost:8000/v1"
    if parts.scheme not in ("http", "https") or not host or port == 0:
        return "no address with http:// or https://; write one such as http://localhost:8000/v1"
    secrets = [f"its query holds {name}" for name, _ in parse_qsl(parts.query) if SECRET_QUERY.search(name)]
    if "@" in parts.netloc:
        secrets.insert(0, "holds a user or password")
    if secrets:
        remedy = "leave it out, and export the key in the variable that key_variable names"
        return f"{secrets[0]}, which reports and manifests would show; {remedy}"
    if parts.fragment:
        return "has a #fragment, which no server sees; leave it out"
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return "leave out /chat/completions, which is added to it"
    return None


def _without_secrets(url):
    """The address on one line, without what may be a password or a key."""
    url = re.sub(r"[^\x21-\x7e]", "?", url)
    url = re.sub(r"^([a-zA-Z][\w+.-]*://)?.*@", r"\1…@", url)
    return re.sub(r"([?#]).*", r"\1…", url)[:200]


def base_url(judge):
    """The address of the server that the settings, or else the environment, name; checked."""
    check_base_url(judge.base_url)
    environment = os.environ.get("OPENAI_BASE_URL", "").strip()
    check_base_url(environment, "OPENAI_BASE_URL")
    return judge.base_url or environment or OPENAI


def access_key(judge):
    """The key in the environment variable that the settings name, or "" where it is not set."""
    return os.environ.get(judge.key_variable, "").strip()


def check_access(judge):
    """UserError for a missing package, an invalid address, and a key that is missing or can't be sent."""
    if importlib.util.find_spec("openai") is None:
        raise UserError("judge.kind=openai: needs openai, of the extra salsa[judge]; pip install -e '.[judge]'")
    base_url(judge)

    key = access_key(judge)
    odd = re.search(r"[^\x21-\x7e]", key)
    if odd:
        raise UserError(
            f"{judge.key_variable}: its character {odd.start() + 1} is a space, a line break or outside ASCII, "
            "which no key has; copy the key again and export it"
        )
    if not key and not judge.base_url and not os.environ.get("OPENAI_BASE_URL"):
        raise UserError(
            f"judge.kind=openai: {judge.key_variable} is not set; export the key in it, or name another server in "
            "judge.base_url"
        )


def check_reachable(judge):
    """UserError where the server's name is unknown or it takes no connection. The server is asked nothing.

    Nothing is checked where requests go through a proxy, which alone can tell.
    """
    parts = urlsplit(base_url(judge))
    proxies = urllib.request.getproxies()
    through_proxy = parts.scheme in proxies or "all" in proxies
    if through_proxy and not urllib.request.proxy_bypass(parts.hostname):
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((parts.hostname, port), CONNECTING).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"judge {judge.model}: {parts.hostname}:{port} can't be reached ({reason}); start the server or mend "
            "judges.*.base_url, or set execution.judge_check=false where only the judge's job will reach it"
        ) from None
