"""Secrets: what counts as one, how they look in text, and that nothing else is touched."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import random
import string
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar.errors import UserError
from cifar.system import redact as module
from cifar.system.redact import find_secrets, forget_secrets, is_secret_name, mask_secrets, redact, reject_secrets

SECRET = "correct-horse-battery"
HARD = "a\"b'c\\d &<é>%2"  # every escape changes it
KEY = "a1b2c3d4e5" * 4
NUMBERED = itertools.repeat("")  # pytest writes the name of a test to the environment: no texts in it


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Three secrets, in a home without keys."""
    for name in [name for name in os.environ if is_secret_name(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DB_PASSWORD", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HARD_TOKEN", HARD)
    forget_secrets()


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "DB_PASSWORD",
        "PGPASSWORD",
        "MYSQL_PWD",
        "SSHPASS",
        "HF_TOKEN",
        "GITHUB_TOKEN",
        "accessToken",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "SENTRY_DSN",
        "SESSION_COOKIE",
        "BASIC_AUTH",
        "OAUTH2",
        "APP_CREDENTIALS",
        "SLACK_WEBHOOK_URL",
        "AZURE_CONNECTION_STRING",
        "db-password",
        "PASSWORD2",
        "API_KEYS",
        "SECRETS",
        "NPM_AUTHTOKEN",
        "MY_PASSPHRASE",
    ],
)
def test_these_variables_are_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "PWD",
        "OLDPWD",
        "PATH",
        "HOME",
        "KEYBOARD",
        "KEYBOARD_LAYOUT",
        "KEYMAP",
        "TOKENIZERS_PARALLELISM",
        "MONKEY",
        "MONKEYPATCH",
        "GIT_AUTHOR_NAME",
        "AUTHOR",
        "SSH_AUTH_SOCK",
        "GIT_CREDENTIAL_HELPER",
        "TOKEN_LIMIT",
        "SECRET_NAME",
        "KEYCLOAK_REALM",
        "PATTERN",
        "DATABASE_URL",
        "CIFAR_STORAGE",
        "WANDB_IDENTITY_TOKEN_FILE",
        "SSH_PUBLIC_KEY",
        "STRIPE_PUBLISHABLE_KEY",
        "COMPASS",
        "DONKEY",
    ],
)
def test_these_are_not(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_KEY", "short7!"),
        ("MAX_TOKENS", "10000000"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
        ("TOKEN_ENDPOINT_AUTH", "https://auth.example.com/token"),
        ("SSH_AUTH", "publickey"),
        ("API_KEY", " \t\n        "),
    ],
)
def test_these_values_are_ordinary(name: str, value: str) -> None:
    assert find_secrets({name: value, "HOME": "/nonexistent"}) == {}


@pytest.mark.parametrize(
    ("name", "value", "secrets"),
    [
        ("DATABASE_URL", "postgresql://me:p%40ssw0rd9@h/d", {"p%40ssw0rd9", "p@ssw0rd9"}),
        ("HTTPS_PROXY", "http://me:hunter2hunter2@proxy:8080", {"hunter2hunter2"}),
        ("ANY", "postgresql://me@h/d?password=hunter2hunter2&x=1", {"hunter2hunter2"}),
        ("REPO", "https://ghx_0123456789abcdefghij@github.com/me/x", {"ghx_0123456789abcdefghij"}),
        ("PG", "host=h user=me password=hunter2hunter2 dbname=x", {"hunter2hunter2"}),
        ("API_KEYS", "first-key-1, second-key-2", {"first-key-1, second-key-2", "first-key-1", "second-key-2"}),
        ("DB_PASSWORD", "12345678", {"12345678"}),
        ("SLACK_WEBHOOK", "https://hooks.example.com/T0/B0/abc", {"https://hooks.example.com/T0/B0/abc"}),
        ("REGISTRY_AUTH", "me:hunter2hunter2", {"me:hunter2hunter2", "hunter2hunter2"}),
        ("API_KEY", "/9j4AAQSkZJRgAB+abc=", {"/9j4AAQSkZJRgAB+abc="}),
    ],
)
def test_secrets_are_found_in_values(name: str, value: str, secrets: set[str]) -> None:
    assert set(find_secrets({name: value, "HOME": "/nonexistent"})) == secrets


def test_keys_are_found_in_files(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    (tmp_path / "other").write_text("machine x login y password another-key-1 machine z login a password tiny")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\napi_key = settings-key-1\n")
    (tmp_path / ".pgpass").write_text("# comment\nhost:5432:*:me:pgpass-word\n")
    found = find_secrets({"HOME": str(tmp_path), "NETRC": str(tmp_path / "other"), "WANDB_DIR": str(tmp_path)})
    assert set(found) == {KEY, "another-key-1", "settings-key-1", "pgpass-word"}


def test_a_pipe_in_the_place_of_netrc_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert find_secrets({"HOME": "/nonexistent", "NETRC": str(tmp_path / "pipe")}) == {}
    assert find_secrets({"HOME": "/nonexistent", "NETRC": "/dev/zero"}) == {}


@pytest.mark.parametrize("secret", [SECRET, HARD, KEY], ids=NUMBERED)
def test_a_secret_is_found_however_it_is_written(secret: str) -> None:
    basic = base64.b64encode(f"api:{secret}".encode()).decode()
    for text in (
        secret,
        repr([secret]),
        repr(repr(secret)),
        json.dumps({"a": secret}),
        json.dumps(json.dumps(secret)),
        quote(secret, safe=""),
        quote_plus(secret),
        quote(secret, safe="").lower() if "%" in quote(secret) and secret.islower() else quote(secret),
        html.escape(secret),
        secret.encode().hex(),
        f"Basic {basic}",
        *(base64.b64encode(b"x" * n + secret.encode() + b"y").decode() for n in range(3)),
        *(base64.urlsafe_b64encode(b"x" * n + secret.encode() + b"y").decode() for n in range(3)),
    ):
        redacted = redact(f"before {text} after")
        assert redacted.startswith("before ") and redacted.endswith(" after") and "***" in redacted, text
        for plain in (secret, json.dumps(secret)[1:-1], quote(secret), base64.b64encode(secret.encode()).decode()[2:-4]):
            assert plain not in redacted


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:hunter22@host/x", "https://me:***@host/x"),
        ("postgresql+psycopg2://me:p@ss@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        ("https://me:a%2Fb@host", "https://me:***@host"),
        ("https://:short@host", "https://:***@host"),
        ("git+https://ghp_0123456789abcdefghij@github.com/x", "git+https://***@github.com/x"),
        ("https://host/x?token=abc&lr=1", "https://host/x?token=***&lr=1"),
        ("https://host/x?lr=1&X-Amz-Signature=abc", "https://host/x?lr=1&X-Amz-Signature=***"),
        ("'https://u:abcd@h' and 'ftp://v:efgh@i'", "'https://u:***@h' and 'ftp://v:***@i'"),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer ***"),
        ("'Authorization': 'Basic bWU6aHVudGVy'", "'Authorization': 'Basic ***'"),
        ("Basic bWU6aHVudGVyMg==", "Basic ***"),
        ("password=hunter2hunter2 dbname=x", "password=*** dbname=x"),
        (f"401 for key {'0f' * 20}", "401 for key ***"),
        (f"local-{'0f' * 20}", "***"),
        ("wandb_v1_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("hf_abcdefghijklmnopqrstuvwxyz", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("a eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_def b", "a *** b"),
        ("x -----BEGIN RSA PRIVATE KEY-----\nMIIabc+/=\nxyz\n-----END RSA PRIVATE KEY----- y", "x *** y"),
    ],
    ids=NUMBERED,
)
def test_what_has_the_form_of_a_secret_is_masked(text: str, redacted: str) -> None:
    assert redact(text) == redacted == redact(redacted)


@pytest.mark.parametrize(
    "text",
    [
        "commit 0123456789abcdef0123456789abcdef01234567",
        "http://localhost:8080/a@b and mail@host",
        "https://host/x?lr=0.1&keyword=a&seed=2",
        "Basic Configuration of the basic configurations",
        "unknown key 'lrr': did you mean 'lr'?",
        "password=os.environ['DB_PASSWORD'], token=make_token(x)",
        "sqlite:////tmp/study.db",
        "the secret is short; key = 3",
        "PATH=/opt/secret:/usr/local/bin password: ~/.netrc",
        "task-abcdefghijklmnopqrstuvwxyz",
        "model=resnet20 lr=0.1 token_mode=cls",
    ],
    ids=NUMBERED,
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_password_that_is_a_word_is_masked_as_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", "postgres")
    assert redact("postgresql://host/postgres") == "postgresql://host/***"


def test_a_variable_set_later_counts_and_one_removed_stays_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact("late-secret-1") == "late-secret-1"
    monkeypatch.setenv("LATE_TOKEN", "late-secret-1")
    assert redact("late-secret-1") == "***"
    monkeypatch.delenv("LATE_TOKEN")
    assert redact("late-secret-1") == "***"


def test_a_record_can_be_read_whatever_a_password_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for n, word in enumerate(("finished", "stand-in", "interrupted", "batch_size")):
        monkeypatch.setenv(f"PASSWORD_{n}", word)
    document = {"state": "finished", "dataset": "stand-in", "batch_size": 64, "epochs": 3}
    assert mask_secrets(document) == document


def test_documents_keep_their_shape() -> None:
    document = {"a": [SECRET, 1, None, 0.5, True], SECRET: {"api_key": "abc", "lr": 0.1}}
    assert mask_secrets(document) == {"a": ["***", 1, None, 0.5, True], "***": {"api_key": "***", "lr": 0.1}}
    assert mask_secrets({"api_key": "abc"}, mask_keys=False) == {"api_key": "abc"}


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=string.ascii_letters + string.digits + "-_.!?äß'\"\\ %&+/=", min_size=8, max_size=30), st.text())
def test_no_secret_is_left_in_any_text(secret: str, around: str) -> None:
    secret = secret.strip()
    if len(secret) < 8:
        return
    redactor = module._Redactor({secret: "X"})
    if secret.isalpha():
        around = f" {around} "  # a word is masked as a word
    for text in (around + secret + around, around + json.dumps([secret]), around + repr([secret])):
        left = redactor.redact(text)
        assert secret not in left.replace("***", "\0") or secret in redactor.redact(around)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"note": f"x{SECRET}y"}, "note holds the value of DB_PASSWORD"),
        ({"--name": KEY}, "--name holds the value of WANDB_API_KEY"),
        ({"a tag": ["fine", KEY.upper().lower()]}, "a tag holds"),
        ({"url": "https://me:pw@host"}, "a URL with a password"),
        ({"deep": {"x": [["hf_abcdefghijklmnopqrstuvwxyz"]]}}, "a Hugging Face token"),
        ({"x": "0f" * 20}, "40 hexadecimal digits"),
        ({"api_key": "anything-long"}, "as its name says"),
        ({"b": quote(HARD, safe="")}, "HARD_TOKEN"),
    ],
    ids=NUMBERED,
)
def test_values_that_hold_a_secret_are_refused(values: dict[str, object], what: str) -> None:
    with pytest.raises(UserError) as error:
        reject_secrets(values)
    assert what in str(error.value) and not any(secret in str(error.value) for secret in (SECRET, KEY, HARD))


def test_ordinary_values_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIN_SECRET", "12345678")
    reject_secrets(
        {"lr": 0.12345678, "model": "resnet20", "token_mode": "classical", "experiment": "/home/me/x.yaml", "n": None}
    )
    with pytest.raises(UserError, match="seed holds the value of PIN_SECRET"):
        reject_secrets({"seed": 12345678})


@pytest.mark.parametrize(
    "text", ["://" * 100_000, "a" * 1_000_000, "?" + "a-" * 200_000, "key " * 100_000, "Basic " * 100_000], ids=NUMBERED
)
def test_long_text_takes_no_long_time(text: str) -> None:
    assert redact(text) == text  # the test's time-out is what it is about


def test_random_keys_in_a_long_log() -> None:
    rng = random.Random(0)
    lines = [f"step {n}: loss {rng.random():.4f}" for n in range(2000)]
    lines[1234] += f" {KEY}"
    redacted = redact("\n".join(lines)).split("\n")
    assert redacted[1234].endswith(" ***") and redacted[:1234] == lines[:1234] and redacted[1235:] == lines[1235:]
