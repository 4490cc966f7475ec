"""What is a secret, what is not, and that nothing else of a text changes."""

from pathlib import Path

import pytest

from diffusers_mp.masking import MASK, mask, masked


LETTERS = "Ab3dEf6hIj9lMn2pQr5tUv8x"


@pytest.mark.parametrize(
    "token",
    [
        f"hf_{LETTERS}",
        f"hf_oauth_{LETTERS}",
        *(f"gh{kind}_{LETTERS}" for kind in "opsur"),
        f"github_pat_{LETTERS}_{LETTERS}",
        f"glpat-{LETTERS}",
        f"sk-{LETTERS}",
        f"sk-proj-{LETTERS}-{LETTERS}_{LETTERS}",
        f"sk-ant-api03-{LETTERS}",
        *(f"xox{kind}-1234567890-{LETTERS}" for kind in "bp"),
        "AKIAIOSFODNN7EXAMPLE",
        f"AIza{LETTERS}{LETTERS[:11]}",
        f"wandb_v1_{LETTERS}",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.dBjftJeZ4CVPmB92K27uhbUJU1p1rwW1gFWFOEjXk",
    ],
)
@pytest.mark.parametrize("text", ["{}", "/data/{}/images", "a={}&b", '"{}"', "the key {}, as it was"])
def test_tokens_by_shape(token, text):
    assert mask(text.format(token)) == text.format(MASK)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://me:open@host/a", "https://me:[removed]@host/a"),
        ("see https://me:o:p@en@host.org:80/a@b now", "see https://me:[removed]@host.org:80/a@b now"),
        ("git+ssh://me:open@[::1]/a", "git+ssh://me:[removed]@[::1]/a"),
        ("redis://:open@localhost:6379/0", "redis://:[removed]@localhost:6379/0"),
        ("me:open@example.org/data", "me:[removed]@example.org/data"),
        ("/data/me:open@example.org/images", "/data/me:[removed]@example.org/images"),
        ("--proxy=me:open@localhost:8080", "--proxy=me:[removed]@localhost:8080"),
        ("https://host/a?token=abc&b=1", "https://host/a?token=[removed]&b=1"),
        ("https://host/a?b=1&access_token=abc#c", "https://host/a?b=1&access_token=[removed]#c"),
        (
            "https://s3/a?X-Amz-Credential=AK%2F2026&X-Amz-Date=1&X-Amz-Signature=0f9c&X-Amz-Security-Token=Fwo",
            "https://s3/a?X-Amz-Credential=[removed]&X-Amz-Date=1&X-Amz-Signature=[removed]"
            "&X-Amz-Security-Token=[removed]",
        ),
        ("https://blob/a?sv=2024&sig=ab%3D", "https://blob/a?sv=2024&sig=[removed]"),
        ("https://g/a?key=ab", "https://g/a?key=[removed]"),
        (f"WANDB_API_KEY={'0123456789' * 4} python", "WANDB_API_KEY=[removed] python"),
    ],
)
def test_addresses_keep_all_but_their_secrets(address, expected):
    assert mask(address) == expected
    assert mask(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf_transfer, hf_hub_download and github_pat_ are names",
        "0123456789abcdef0123456789abcdef01234567",  # a commit
        "https://host:8080/data@main and s3://bucket/key@2",
        "ssh://git@host/a, me@example.org, mailto:me@example.org",
        "task-classification-of-many-things-at-once, risk-averse",
        "token=None, key=3, `hub_token` must be given; a token: see docs",
        "--hub_token: expected one argument",
        "the secret=no",
        "monkey=banana, 12:30, a:b@c",
    ],
)
def test_what_is_no_secret_stays(text):
    assert mask(text) == text


def test_entries_are_secrets_by_their_names_too():
    key = "0123456789" * 4
    settings = {
        "wandb_api_key": "short",
        "WANDB_KEY": key,
        "hub_token": "own",
        "password": "open",
        "client-secret": "x",
        "sort_key": "name",
        "commit": key,
        "key": 3,
        "pad_token": None,
        "num_tokens": "12",
        "token": "",
        "nested": [{"api_key": "abc"}, ("own", Path("a/own"), Path("b"))],
        f"hf_{LETTERS}": 1.5,
    }
    assert masked(settings, "own") == {
        **dict.fromkeys(("wandb_api_key", "WANDB_KEY", "hub_token", "password", "client-secret"), MASK),
        **{"sort_key": "name", "commit": key, "key": 3, "pad_token": None, "num_tokens": "12", "token": ""},
        "nested": [{"api_key": MASK}, [MASK, f"a/{MASK}", Path("b")]],
        MASK: 1.5,
    }
    assert settings["hub_token"] == "own"
