"""Tokenizers of bytes, with templates such as hub models have."""

import copy
import functools
from pathlib import Path

from tokenizers import AddedToken

from salsa import base
from salsa.workflow import config


@functools.cache
def _bytes():
    texts = ["How do I cook rice? Wash it, then boil it in water.", "Write a poem about the sea."] * 20
    return base.make_tokenizer(texts, Path("none"), config.Architecture(vocabulary_size=400, max_length=1024))


def byte_tokenizer(*extra, special=True):
    """Byte-level BPE with more tokens; `<eos>` ends texts, as `<|endoftext|>` does for models of ChatML."""
    made = copy.deepcopy(_bytes())
    made.add_tokens([AddedToken(token, special=special) for token in extra])
    return made


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
