"""Secrets taken out of what is written, logged and shown: tokens by their shape, passwords by their place."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


MASK = "[removed]"
# As their issuers shape them: Hugging Face, GitHub (two), GitLab, OpenAI and Anthropic, Slack, AWS, Google, Weights &
# Biases, npm, PyPI, and JSON Web Tokens.
_TOKENS = re.compile(
    r"hf_(?:oauth_)?[A-Za-z0-9]{16,}"
    r"|gh[opsur]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}"
    r"|\bglpat-[\w-]{16,}"
    r"|\bsk-[\w-]{20,}"
    r"|\bxox[abeoprs]-[\w-]{10,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bAIza[\w-]{35}"
    r"|\bwandb_v\d+_\w{20,}"
    r"|\bnpm_[A-Za-z0-9]{36}"
    r"|\bpypi-[\w-]{16,}"
    r"|\beyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]*"
)
# scheme://user:password@host, and user:password@host.domain without a scheme; the user's name stays.
_PASSWORDS = re.compile(
    r"(://[^\s/?#:@]*:)[^\s/]+@|(?<![\w.:-])((?!mailto:)[\w.%+-]+:)[^\s/:@]+@(?=[\w-]+\.\w|localhost\b)"
)
_SECRET_NAME = r"[\w-]*(?:token|secret|password|passwd|api_?key|access_?key(?:_?id)?|credential|signature)"
# ?token=…, &X-Amz-Signature=…, &sig=…, and WANDB_API_KEY=…
_PARAMETERS = re.compile(
    rf"([?&;#](?:{_SECRET_NAME}|sig|key)=)[^\s&;#\"']+|(\b{_SECRET_NAME}=)[^\s&;\"',)]{{8,}}", re.IGNORECASE
)
_SECRET_NAMES = re.compile(_SECRET_NAME, re.IGNORECASE)
_KEY_NAMES = re.compile(r"[\w-]*key", re.IGNORECASE)
_HEX_KEY = re.compile(r"[0-9a-f]{40}", re.IGNORECASE)  # of Weights & Biases; elsewhere such a number is a commit


def mask(text: str, *secrets: str) -> str:
    """A text without secrets: those given, what looks like a token, and passwords and keys in addresses.

    Args:
        text (str): anything that is to be written or shown.
        *secrets (str): known ones, of whatever shape.
    Returns:
        str: with "[removed]" in their place.
    """
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _TOKENS.sub(MASK, text)
    text = _PASSWORDS.sub(lambda found: f"{found[1] or found[2]}{MASK}@", text)
    return _PARAMETERS.sub(lambda found: f"{found[1] or found[2]}{MASK}", text)


def masked(value: Any, *secrets: str) -> Any:
    """Arguments, settings or results without secrets: `mask` for every text in them, and by the names of entries.

    An entry whose name ends in token, secret, password, api_key and the like is a secret whatever it looks like; one
    that ends in key is if it has 40 hexadecimal digits.

    Args:
        value (Any): texts, paths, and mappings, lists and tuples of them; anything else stays.
        *secrets (str): as in `mask`.
    Returns:
        Any: a copy, with lists in the place of tuples. A path with a secret in it becomes a text.
    """
    if isinstance(value, Mapping):
        copy = {}
        for name, item in value.items():
            is_secret = isinstance(item, str) and item != "" and _is_secret(str(name), item)
            copy[masked(name, *secrets)] = MASK if is_secret else masked(item, *secrets)
        return copy
    if isinstance(value, (list, tuple)):
        return [masked(item, *secrets) for item in value]
    if isinstance(value, (str, Path)):
        text = mask(str(value), *secrets)
        return value if text == str(value) else text
    return value


def _is_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAMES.fullmatch(name) or (_KEY_NAMES.fullmatch(name) and _HEX_KEY.fullmatch(value)))
