"""Values of rows, checked and brought into one form: texts, and chat messages {"role", "content"}.

A row with values that can't be learned from is dropped and counted by its reason (`Dropped`): a missing text, half a
surrogate, a tool call, an image. A value of another form than files of that kind have is a UserError that names the key
and the form: the file is not what the setting wants, or was written wrongly.
"""

import unicodedata

from salsa.workflow.messages import UserError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # as OpenAI names them
TOOL_ROLES = ("tool", "function", "ipython", "observation")
TEXT_PARTS = ("text", "input_text", "output_text")
THINKING_PARTS = ("thinking", "reasoning", "redacted_thinking")  # thinking is no part of the answer
MESSAGES = 'a list of {"role": "user", "assistant" or "system", "content": a text}'
INVISIBLE = set("\u034f\u115f\u1160\u2800\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


def user(text):
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text):
    """A message of the assistant."""
    return {"role": "assistant", "content": text}


class Dropped(Exception):
    """A row can't be learned from; the text of this exception is the reason."""


def wrong(key, value, form):
    """The error for a value that has another form than it should."""
    words = repr(value) if isinstance(value, str) else type(value).__name__
    return UserError(f"{key!r} has the wrong form: {words[:60]}; it is {form}")


def missing(value):
    """Whether a value is null, or the NaN that pandas writes in its place."""
    return value is None or value != value


def text(key, value, form="a text"):
    """The value, if it is text. Raises Dropped where it is null or no Unicode text, UserError for anything else."""
    if missing(value):
        raise Dropped("no_text")
    if not isinstance(value, str):
        raise wrong(key, value, form)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Dropped("half_surrogate") from None
    return value


def blank(value):
    """Whether a text looks empty: it holds only white space, zero-width and control characters."""
    return all(unicodedata.category(sign) in ("Cc", "Cf", "Zs", "Zl", "Zp") or sign in INVISIBLE for sign in value)


def seen(value):
    """The text as it looks: without zero-width characters, with one spelling of accents, and stripped."""
    if value.isascii():
        return value.strip()
    signs = unicodedata.normalize("NFC", value)
    return "".join(sign for sign in signs if unicodedata.category(sign) != "Cf" and sign not in INVISIBLE).strip()


def messages(key, value, left_out=None):
    """Chat messages {"role", "content"} from a list of messages, without other keys; parts of content become one text.

    Args:
        key: the value's key, for errors.
        value: the list of messages.
        left_out: a Counter of parts that were left out, by their type.
    """
    if missing(value):
        raise Dropped("no_text")
    if not isinstance(value, list):
        raise wrong(key, value, MESSAGES)
    return [_message(key, message, left_out) for message in value]


def text_or_messages(key, value, left_out=None):
    """`messages` for a list, `text` for anything else."""
    if isinstance(value, list):
        return messages(key, value, left_out)
    return text(key, value, f"a text or {MESSAGES}")


def _message(key, message, left_out):
    if not isinstance(message, dict):
        raise wrong(key, message, MESSAGES)
    role, problem = message.get("role"), None
    if not isinstance(role, str):
        problem = f"a message without 'role' ({', '.join(map(str, message))[:60]})"
    elif role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise Dropped("tool_calls")
    elif role not in ROLES:
        problem = f"the role {role[:30]!r}"
    elif "content" not in message:
        problem = f"a message without 'content' ({', '.join(map(str, message))[:60]})"
    if problem:
        raise UserError(f"{key!r} has the wrong form: {problem}; it is {MESSAGES}")
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_part(key, part, left_out) for part in content)
    return {"role": ROLES[role], "content": text(key, content, MESSAGES)}


def _part(key, part, left_out):
    """The text of a part of a message's content; "" for thinking. A row with any other part is dropped."""
    if isinstance(part, str):
        return text(key, part)
    if not isinstance(part, dict):
        raise wrong(key, part, MESSAGES)
    kind = part.get("type") or "text"
    if kind in THINKING_PARTS:
        if left_out is not None:
            left_out[kind] += 1
        return ""
    if kind not in TEXT_PARTS or "text" not in part:
        raise Dropped("not_only_text")
    return text(key, part["text"])
