"""Secrets: which values are secret on this machine, and text without them.

    redact("401 at https://me:hunter22@host/x")   # "401 at https://me:***@host/x"

Secret are the values of variables whose names say so (DB_PASSWORD, WANDB_API_KEY), passwords in the URLs of any variable, the
keys in netrc and in W&B's settings, and text that has the form of a key. A value counts from eight characters on: a shorter one
would stand in ordinary words. What is secret is found once a process, and again only when the environment has changed.
"""

from __future__ import annotations

import binascii
import contextlib
import functools
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from cifar.errors import UserError
from cifar.states import RUN_STATES

MASK = "***"
MIN_SECRET_LENGTH = 8
MAX_FILE_BYTES = 2**20  # of netrc and its like; a larger one is none
MIN_BASE64_LENGTH = 9  # of the part of a secret's base64 that does not depend on what stands beside it

# -- names of variables ------------------------------------------------------------------------------------------------

_SECRET_WORDS = frozenset((
    "AUTH", "AUTHORIZATION", "BEARER", "CONNSTR", "COOKIE", "COOKIES", "CRED", "CREDENTIAL", "CREDENTIALS", "CREDS", "DSN",
    "JWT", "KEY", "KEYS", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD", "PASSWORDS", "PAT", "PSK", "PW", "PWD", "SAS",
    "SECRET", "SECRETS", "TOKEN", "TOKENS", "WEBHOOK", "WEBHOOKS",
))  # fmt: skip
_SECRET_ENDS = (
    "COOKIE", "CREDENTIAL", "CREDENTIALS", "DSN", "KEY", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD", "PWD", "SECRET", "TOKEN",
)  # fmt: skip
_SECRET_STARTS = ("APIKEY", "AUTHTOKEN", "CREDENTIAL", "OAUTH", "PASSWORD", "SECRET")
_ORDINARY_WORDS = frozenset((
    "BYPASS", "COMPASS", "DONKEY", "HOCKEY", "HOTKEY", "JOCKEY", "LESSKEY", "MONKEY", "PUBKEY", "TURKEY", "WHISKEY",
))  # fmt: skip
_PUBLIC_WORDS = frozenset(("PUBLIC", "PUBLISHABLE"))
_PLURALS = frozenset(("COOKIES", "KEYS", "PASSWORDS", "SECRETS", "TOKENS", "WEBHOOKS"))  # several values side by side
# Plain numbers are secret under these names only.
_PASSWORD_WORDS = ("PASS", "PASSPHRASE", "PASSWD", "PASSWORD", "PSK", "PW", "PWD", "SECRET")
# The last word of a name that is about a secret and does not hold it: GIT_CREDENTIAL_HELPER, TOKEN_LIMIT.
_ABOUT_WORDS = frozenset((
    "ADDR", "ADDRESS", "ALGO", "ALGORITHM", "AUDIENCE", "BACKEND", "COUNT", "DIR", "DIRECTORY", "DOMAIN", "ENABLED",
    "ENDPOINT", "EXPIRY", "FILE", "FOLDER", "FORMAT", "HELPER", "HOST", "HOSTS", "ISSUER", "LAYOUT", "LENGTH", "LEVEL",
    "LIMIT", "METHOD", "MODE", "NAME", "PARALLELISM", "PATH", "POLICY", "PORT", "PREFIX", "PROTO", "PROVIDER", "REALM",
    "REGION", "SCOPE", "SECONDS", "SERVER", "SERVICE", "SIZE", "SOCK", "SOCKET", "TCP", "TIMEOUT", "TTL", "TYPE", "UDP",
    "URI", "URL", "USER", "USERNAME", "VERSION",
))  # fmt: skip
# Words that no mask protects, and that records are made of: with a state masked, a run could not be read.
_ORDINARY_VALUES = frozenset((
    *RUN_STATES, "anonymous", "credential", "credentials", "disabled", "kerberos", "maximize", "minimize", "negotiate",
    "optional", "password", "plaintext", "publickey", "required", "stand-in",
))  # fmt: skip


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret: DB_PASSWORD, HF_TOKEN; not KEYBOARD, PWD, TOKENIZERS_PARALLELISM."""
    words = _split_name(name)
    if name in ("PWD", "OLDPWD") or not words or _PUBLIC_WORDS & set(words):
        return False
    if words[-1] in _ABOUT_WORDS and not any(word.startswith("WEBHOOK") for word in words):
        return False
    return "CONNECTIONSTRING" in "".join(words) or any(map(_is_secret_word, words))


def _is_secret_word(word: str) -> bool:
    is_named = word in _SECRET_WORDS or word.endswith(_SECRET_ENDS) or word.startswith(_SECRET_STARTS)
    return is_named and word not in _ORDINARY_WORDS


def _split_name(name: str) -> list[str]:
    """dbPassword, DB_PASSWORD2, db-password -> DB, PASSWORD."""
    return [word.upper() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _is_ordinary_value(name: str, value: str) -> bool:
    """Whether a value is no secret, whatever its variable is called: a path, a number, a URL without a password."""
    if len(value) < MIN_SECRET_LENGTH or value.lower() in _ORDINARY_VALUES or _is_path(value):
        return True
    words = _split_name(name)
    if re.fullmatch(r"[-+]?[\d_]*\.?\d+(?:[eE][-+]?\d+)?", value):
        return not any(word.endswith(_PASSWORD_WORDS) for word in words)
    return bool(re.match(r"[A-Za-z][\w+.-]*://", value)) and not any(word.startswith("WEBHOOK") for word in words)


def _is_path(value: str) -> bool:
    if not value.startswith(("/", "~/", "./", "../")):
        return False
    path = os.path.expanduser(value)
    folder, name = os.path.split(path)
    with contextlib.suppress(OSError, ValueError):
        return (
            os.path.lexists(path) or (folder not in ("", "/") and os.path.isdir(folder)) or bool(re.search(r"\.\w{1,5}$", name))
        )
    return False


# -- forms of keys in text ---------------------------------------------------------------------------------------------

_SECRET_PARAMETER = (
    r"(?:[\w.-]{0,40}?(?:passw(?:or)?d|passphrase|pwd|token|secret|api[_-]?key|access[_-]?key|accountkey|signature|credential)"
    r"[\w.-]{0,40}|key|sig|auth|pass)"
)


def _mask_basic(match: re.Match[str]) -> str:
    """`Basic` and base64 of USER:PASSWORD; not the word before another word."""
    with contextlib.suppress(ValueError):
        if b":" in binascii.a2b_base64(match[2] + "=" * (-len(match[2]) % 4)):
            return match[1] + MASK
    return match[0]


@dataclass(frozen=True)
class _Form:
    """How a key looks in text. `pattern` is compiled when `markers` were first seen; `after` is what replaces the match."""

    what: str
    markers: tuple[str, ...]  # in lower case: text without any of them cannot match
    pattern: str
    after: str | Callable[[re.Match[str]], str] = MASK
    is_refused: bool = True  # in a configuration


_FORMS = (
    _Form(
        "a URL with a password",
        ("://",),
        # up to the last @ before a slash, else up to the first @; a port is no password
        r"(://[^\s/@:\"'<>]{0,256}+:)(?!\d{1,5}(?:[/?#]|$))(?:[^\s/\"'<>]{1,512}|[^\s@\"'<>]{1,128}+)@",
        rf"\1{MASK}@",
    ),
    _Form("a URL with a token", ("://",), r"(://)[^\s/@:\"'<>]{20,512}+@", rf"\1{MASK}@"),
    _Form("a URL with a secret", ("=",), rf"(?i)([?&;]{_SECRET_PARAMETER}=)(?!\*\*\*)[^&\s\"'<>;#]+", rf"\1{MASK}"),
    _Form(
        "a password",
        ("password", "passwd", "pwd", "secret", "token", "key"),
        r"(?i)(\b(?:[\w-]{0,40}[_-])?(?:password|passwd|pwd|secret|api_?key|access_?key|accountkey|auth_?token|access_?token)"
        r"[\"']?\s{0,3}[=:]\s{0,3}[\"']?)(?!\*\*\*|[~.]?/)[^\s\"'&,;()\[\]{}<>]{8,}(?=[\s\"'&,;]|$)",
        rf"\1{MASK}",
        is_refused=False,
    ),
    _Form(
        "an authorization header",
        ("authorization",),
        r"(?i)(\bauthorization[\"']?\s{0,3}[=:]\s{0,3}[\"']?(?:(?:basic|bearer|token|digest)\s+)?)(?!\*\*\*)[^\s\"',;]{8,}",
        rf"\1{MASK}",
    ),
    _Form("an authorization header", ("bearer",), r"(?i)(\bbearer\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{16,}", rf"\1{MASK}"),
    _Form("an authorization header", ("basic",), r"(?i)(\bbasic\s+)([A-Za-z0-9+/]{8,}={0,2})", _mask_basic),
    _Form("a W&B key", ("wandb_v",), r"\bwandb_v\d+_[\w-]{20,}"),
    _Form("a W&B key", ("local-",), r"\blocal-[0-9a-f]{40}\b"),
    _Form(
        "a W&B key",
        ("key", "token", "secret", "password", "login", "api"),
        r"(?i)((?:key|token|secret|password|login|api)\w{0,10}\W{1,4})[0-9a-f]{40}\b",  # alone it may be a commit
        rf"\1{MASK}",
    ),
    _Form("a GitHub token", ("gh", "github_pat_"), r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    _Form("a GitLab token", ("glpat-",), r"\bglpat-[\w-]{16,}"),
    _Form("a Hugging Face token", ("hf_",), r"\bhf_[A-Za-z0-9]{20,}"),
    _Form("an API key", ("sk-",), r"\bsk-[\w-]{20,}"),
    _Form("an AWS key", ("akia", "asia"), r"\bA[KS]IA[0-9A-Z]{16}\b"),
    _Form("a Slack token", ("xox",), r"\bxox[a-z]-[\w-]{10,}"),
    _Form("a Slack webhook", ("hooks.slack.com/",), r"(hooks\.slack\.com/\w+/)[\w/-]{10,}", rf"\1{MASK}"),
    _Form("a Google key", ("aiza",), r"\bAIza[\w-]{35}"),
    _Form("a package index's token", ("npm_", "pypi-"), r"\b(?:npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,})"),
    _Form("a JSON web token", ("eyj",), r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    _Form(
        "a private key",
        ("private key",),
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\w+/=\s\\]{0,16384}(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?",
    ),
)
_ANY_MARKER = "|".join(re.escape(marker) for marker in sorted({marker for form in _FORMS for marker in form.markers}))


@functools.cache
def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.DOTALL)


# -- what is secret here -----------------------------------------------------------------------------------------------


def find_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Secret value -> where it comes from: the name of a variable, or a file."""
    found: dict[str, str] = {}
    for name, value in environment.items():
        for password in _find_in_text(value):
            found.setdefault(password, name)
        if is_secret_name(name):
            for piece in _split_value(name, value.strip()):
                if not _is_ordinary_value(name, piece):
                    found.setdefault(piece, name)
    for file, pattern in _key_files(environment):
        text = _read_small_file(file)
        for match in re.finditer(pattern, text, re.MULTILINE) if text else ():
            key = match[1].strip("\"'")
            if len(key) >= MIN_SECRET_LENGTH:
                found.setdefault(key, str(file))
    return found


def _find_in_text(value: str) -> Iterator[str]:
    """Passwords of the URLs and connection strings in a variable's value, as they stand there and decoded."""
    patterns = (
        r"://[^\s/@:]{0,256}+:(?!\d{1,5}(?:[/?#]|$))([^\s/]{1,512}|[^\s@]{1,128}+)@",
        r"://([^\s/@:]{20,512}+)@",
        rf"(?i)[?&;]{_SECRET_PARAMETER}=([^&\s;#]+)",
        r"(?i)\b(?:password|passwd|pwd|accountkey|sharedaccesskey)\s?=\s?'?([^\s;'&]+)",
    )
    has_url, lowered = "://" in value and "@" in value, value.lower()
    has_query = "=" in value and any(mark in value for mark in "?&;")
    has_pairs = "=" in value and any(word in lowered for word in ("password", "passwd", "pwd", "accesskey", "accountkey"))
    for pattern in itertools.compress(patterns, (has_url, has_url, has_query, has_pairs)):
        for match in _compile(pattern).finditer(value):
            for password in {match[1], unquote(match[1])}:
                if len(password) >= MIN_SECRET_LENGTH:
                    yield password


def _split_value(name: str, value: str) -> Iterator[str]:
    """A variable's secret value, and the secrets in it: lines, USER:PASSWORD, lists, cookies, JSON."""
    yield value
    words = set(_split_name(name))
    if "\n" in value:
        yield from (line.strip() for line in value.splitlines() if not line.startswith("-----"))
    if words & {"AUTH", "CREDENTIAL", "CREDENTIALS", "CREDS"} and re.fullmatch(r"[^\s:/]+:[^\s/]\S*", value):
        yield value.partition(":")[2]
    if words & _PLURALS:
        yield from re.split(r"[,;\s]+", value)
    if words & {"COOKIE", "COOKIES"}:
        yield from re.findall(r"=([^;\s]+)", value)
    if value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            yield from _list_secret_leaves(json.loads(value))


def _list_secret_leaves(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _list_secret_leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _list_secret_leaves(inner, name)
    elif isinstance(value, str) and is_secret_name(name):
        yield from (part for part in (value, *value.splitlines()) if not part.startswith("-----"))


def _key_files(environment: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Files that hold keys, and how a key stands in them."""
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    netrc = r"(?:password|account)\s+(\"[^\"]*\"|\S+)"
    yield from ((file, netrc) for file in (home / ".netrc", home / "_netrc"))
    if environment.get("NETRC"):
        yield Path(os.path.expanduser(environment["NETRC"])), netrc
    settings = r"^\s*(?:api_key|identity_token)\s*[=:]\s*(\S+)"
    yield Path(os.path.expanduser(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")) / "settings", settings
    yield Path(environment.get("WANDB_DIR") or ".") / "wandb" / "settings", settings
    yield Path(environment.get("PGPASSFILE") or home / ".pgpass"), r"^[^#\n].*:((?:\\:|[^:\n])+)$"


def _read_small_file(file: Path) -> str:
    """Its text; "" where it is missing, large, or no regular file (a pipe would never end)."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        about = file.stat()
        if stat.S_ISREG(about.st_mode) and about.st_size <= MAX_FILE_BYTES:
            return file.read_text(encoding="utf-8", errors="replace")
    return ""


def _list_spellings(secret: str) -> set[str]:
    """How a secret may stand in text: as it is, as repr, JSON, URLs and HTML escape it, in hexadecimal digits, in base64."""
    found = {secret}
    for _ in range(2):  # an error in an error is escaped twice
        found |= {text for each in found for text in (repr(each)[1:-1], json.dumps(each)[1:-1], _dump_unicode(each))}
    content = secret.encode("utf-8", "surrogateescape")
    percent = {quote(content, safe=""), quote(content), quote_plus(content)}
    found |= percent | {re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), text) for text in percent}
    found.add(
        secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;").replace("'", "&#x27;")
    )
    found |= {content.hex(), content.hex().upper()}
    for offset in range(3):
        encoded = binascii.b2a_base64(bytes(offset) + content, newline=False).decode().rstrip("=")
        # what depends on the neighbours is left out: the first characters, and the last one
        inner = encoded[(0, 2, 3)[offset] : (offset + len(content)) * 8 // 6]
        if len(inner) >= MIN_BASE64_LENGTH:
            found |= {inner, inner.replace("+", "-").replace("/", "_")}
    return found


def _dump_unicode(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


class _Redactor:
    """What is secret in one environment, made ready for many texts."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        self.secrets = dict(secrets)
        spellings = {text: secret for secret in secrets for text in _list_spellings(secret)}
        # The longest first: one secret may be a part of another. Plain `in` is many times faster than one large pattern.
        self._spellings = sorted(spellings.items(), key=lambda item: -len(item[0]))
        self._shortest = min(map(len, spellings), default=0)
        self._redact_short = functools.lru_cache(maxsize=4096)(self._redact)  # the same names and values again and again

    def redact(self, text: str) -> str:
        return self._redact_short(text) if len(text) < 256 else self._redact(text)

    def _redact(self, text: str) -> str:
        if self._shortest and len(text) >= self._shortest:
            for spelling, _ in self._spellings:
                if spelling in text:
                    text = _replace_spelling(spelling, text)
        lowered = text.lower()
        if _compile(_ANY_MARKER).search(lowered) is None:  # as in most texts
            return text
        for form in _FORMS:
            if any(marker in lowered for marker in form.markers):
                text = _compile(form.pattern).sub(form.after, text)
        return text

    def find(self, text: str) -> str:
        """What is secret in a text, in words; "" where nothing is."""
        for spelling, secret in self._spellings:
            if spelling in text and _replace_spelling(spelling, text) != text:
                return self.describe(secret)
        lowered = text.lower()
        for form in _FORMS:
            if form.is_refused and any(marker in lowered for marker in form.markers):
                changed = _compile(form.pattern).sub(form.after, text)
                if changed != text:
                    return form.what
        return ""

    def describe(self, secret: str) -> str:
        """Where a secret comes from, in words."""
        origin = self.secrets[secret]
        return f"a key of {origin}" if os.sep in origin else f"the value of {origin}"


def _replace_spelling(spelling: str, text: str) -> str:
    """A password that is a plain word is masked as a word: `postgres` not in `postgresql`."""
    if spelling.isascii() and spelling.isalpha() and len(spelling) < 20:
        return _compile(rf"(?<![A-Za-z0-9]){spelling}(?![A-Za-z0-9])").sub(MASK, text)
    return text.replace(spelling, MASK)


_known: tuple[dict[Any, Any], _Redactor] | None = None  # an environment, and what is secret in it and was before


def _current() -> _Redactor:
    """What is secret now. A variable that a plug-in has set since counts; one that it has removed stays secret."""
    global _known
    # Its own dictionary of bytes: to decode it for every text would take longer than all the rest.
    environment: dict[Any, Any] = getattr(os.environ, "_data", None) or dict(os.environ)
    if _known is None or _known[0] != environment:
        environment = dict(environment)
        before = _known[1].secrets if _known else {}
        secrets = find_secrets(os.environ)
        is_same = _known is not None and secrets.items() <= before.items()
        _known = environment, _known[1] if _known and is_same else _Redactor({**before, **secrets})
    return _known[1]


def forget_secrets() -> None:
    """Find out anew what is secret. For tests, which change the environment back."""
    global _known
    _known = None


# -- text without secrets ----------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """The text with *** in the place of secrets: values of secret variables, passwords in URLs, keys."""
    return _current().redact(text)


def secret_spellings() -> list[str]:
    """How the secrets of this process may stand in text, the longest first."""
    return [spelling for spelling, _ in _current()._spellings]


def mask_secrets(value: Any, *, mask_keys: bool = True) -> Any:
    """A copy for JSON without secrets: what `redact` finds, and with `mask_keys` text under names that look like secrets."""
    return _mask(_current(), value, mask_keys)


def _mask(redactor: _Redactor, value: Any, mask_keys: bool) -> Any:
    if isinstance(value, str):
        return redactor.redact(value)
    if type(value) is not list and isinstance(value, Mapping):
        secret = {
            key for key, inner in value.items() if mask_keys and isinstance(inner, str) and inner and is_secret_name(str(key))
        }
        return {
            _mask_key(redactor, str(key)): MASK
            if key in secret
            else inner
            if type(inner) in _HARMLESS
            else redactor.redact(inner)
            if type(inner) is str
            else _mask(redactor, inner, mask_keys)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [inner if type(inner) in _HARMLESS else _mask(redactor, inner, mask_keys) for inner in value]
    return value


def _mask_key(redactor: _Redactor, key: str) -> str:
    """A name in a document. Names of ours stay, or nothing could be read back."""
    return key if _is_own_name(key) else redactor.redact(key)


@functools.lru_cache(maxsize=4096)  # the same names in each of many documents
def _is_own_name(key: str) -> bool:
    return re.fullmatch("[a-z_]{1,30}", key) is not None


_HARMLESS = {int, float, bool, type(None)}


# -- secrets where they are not taken ----------------------------------------------------------------------------------


def reject_secrets(values: Mapping[str, Any]) -> None:
    """Refuse values that hold a secret, because they would be written down and sent. Raises UserError, which names the value.

    values: what it is (a key, "the name", "a tag") -> the value.
    """
    redactor = _current()
    for name, value in values.items():
        for leaf in _list_leaves(value):
            if what := _describe_secret(redactor, name, leaf):
                raise UserError(
                    f"{redactor.redact(name)} holds {what}: it would be written to files and sent to W&B; "
                    "leave it out, and let code that needs it read it from the environment"
                )


def _describe_secret(redactor: _Redactor, name: str, leaf: Any) -> str:
    text = str(leaf)
    if not isinstance(leaf, str):  # 0.12345678 holds no password 12345678
        return redactor.describe(text) if text in redactor.secrets else ""
    if what := redactor.find(text):
        return what
    if re.fullmatch(r"[0-9a-f]{40}", text.strip()):
        return "40 hexadecimal digits, as a W&B key has (of a commit, give fewer)"
    return "a secret, as its name says" if _is_password_key(name) and not _is_ordinary_value(name, text) else ""


def _is_password_key(name: str) -> bool:
    """Whether a configuration key of this name holds a password. `token_mode` and `key_size` do not."""
    return is_secret_name(name) and bool(
        re.search(r"passw|secret|api_?key|access_?key|(auth|access)_?token|credential", name, re.I)
    )


def _list_leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in (*_list_leaves(key), *_list_leaves(inner))]
    if isinstance(value, list | tuple):
        return [leaf for inner in value for leaf in _list_leaves(inner)]
    return [] if value is None or isinstance(value, bool) else [value]
