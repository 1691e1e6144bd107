"""Where W&B runs go: online, offline or nowhere. Decided without importing wandb, without the network, without a prompt."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cifar.errors import UserError, choices

Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", "online", "offline", "disabled")
# wandb 0.31's default server, and the name it had before: a login made for either is used for both.
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


def mode_from_environment(option: str = "auto") -> Mode:
    """`--wandb OPTION` -> "online", "offline" or "disabled".

    auto follows WANDB_MODE and `wandb offline`; otherwise it is online where a key is configured, and offline elsewhere.
    Raises UserError for an unknown option, and for `online` without a key.
    """
    if option not in MODES:
        raise UserError(f"--wandb {option}: {choices(option, MODES)}")
    if option == "disabled":
        return "disabled"
    if option == "offline":
        return "offline"
    if option == "online" and not credentials():
        raise UserError("--wandb online needs a W&B key: run `wandb login` or set WANDB_API_KEY, or use --wandb offline")
    asked = (os.environ.get("WANDB_MODE") or _settings().get("mode", "")).lower() if option == "auto" else "online"
    if asked == "disabled":
        return "disabled"
    return "offline" if asked in ("offline", "dryrun") or not credentials() else "online"


def credentials() -> str:
    """What holds the key for the configured server (a variable's name or a file's path), or "". The key itself stays there."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return name
    settings = _settings()
    host = urlsplit(_configured(settings)).netloc
    home = Path("~").expanduser()
    files = [Path(os.environ["NETRC"]).expanduser()] if os.environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in filter(Path.exists, files):
        with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
            known = netrc.netrc(file)
            for name in HOSTS if not host or host in HOSTS else (host,):
                if (found := known.authenticators(name)) and found[2]:
                    return str(file)
        break  # wandb reads the first file that exists
    return "the W&B settings file" if settings.get("api_key") else ""


def server() -> str:
    """The URL of the configured server."""
    return _configured(_settings()) or f"https://{HOSTS[0]}"


def _configured(settings: Mapping[str, str]) -> str:
    return os.environ.get("WANDB_BASE_URL") or settings.get("base_url", "")


def _settings() -> dict[str, str]:
    """What `wandb login`, `wandb offline` and `wandb init` wrote; the folder's file wins over the user's."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    local = Path(os.environ.get("WANDB_DIR") or ".")
    values: dict[str, str] = {}
    for path in (folder / "settings", local / "wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(path)
            values.update(parser["default"] if parser.has_section("default") else {})
    return values
