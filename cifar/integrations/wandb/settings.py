"""Decides whether runs go to W&B online, offline or not at all, without importing wandb, without network or prompt."""

from __future__ import annotations

import configparser
import contextlib
import netrc
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cifar.errors import UserError, did_you_mean
from cifar.system.files import UnreadableFileError, is_regular_file, read_text
from cifar.system.variables import read_path, read_variable

Mode = Literal["online", "offline", "disabled"]
MODES = ("auto", "online", "offline", "disabled")
# The default server of wandb 0.31 and its former name. A login for one of them is used for both.
DEFAULT_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")


def mode_from_environment(option: str = "auto") -> Mode:
    """`--wandb OPTION` -> "online", "offline" or "disabled".

    `auto` follows WANDB_MODE and `wandb offline`. Without these it is online if a key is configured, else offline.
    Raises UserError for an unknown option, and for `online` without a key.
    """
    if option not in MODES:
        raise UserError(f"--wandb {option}: {did_you_mean(option, MODES)}")
    if option == "disabled":
        return "disabled"
    if option == "offline":
        return "offline"
    if option == "online" and not find_credentials():
        raise UserError("--wandb online needs a W&B key: run `wandb login` or set WANDB_API_KEY, or use --wandb offline")
    asked = (read_variable("WANDB_MODE") or _read_settings().get("mode", "")).lower() if option == "auto" else "online"
    if asked == "disabled":
        return "disabled"
    return "offline" if asked in ("offline", "dryrun") or not find_credentials() else "online"


def find_credentials() -> str:
    """Where the key for the configured server is (a variable's name or a file's path), or "". Never the key itself."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if read_variable(name):
            return name
    settings = _read_settings()
    host = urlsplit(_configured_url(settings)).netloc
    home = Path("~").expanduser()
    files = [read_path("NETRC", "")] if read_variable("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in filter(is_regular_file, files):
        with contextlib.suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError):
            known = netrc.netrc(file)
            for name in DEFAULT_HOSTS if not host or host in DEFAULT_HOSTS else (host,):
                if (found := known.authenticators(name)) and found[2]:
                    return str(file)
        break  # wandb reads the first file that exists
    return "the W&B settings file" if settings.get("api_key") else ""


def server_url() -> str:
    """The URL of the configured server."""
    return _configured_url(_read_settings()) or f"https://{DEFAULT_HOSTS[0]}"


def _configured_url(settings: Mapping[str, str]) -> str:
    return read_variable("WANDB_BASE_URL") or settings.get("base_url", "")


def _read_settings() -> dict[str, str]:
    """The settings that `wandb login`, `wandb offline` and `wandb init` wrote. This folder's file wins over the user's."""
    folder = read_path("WANDB_CONFIG_DIR", "~/.config/wandb")
    local = read_path("WANDB_DIR", ".")
    values: dict[str, str] = {}
    for path in (folder / "settings", local / "wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(configparser.Error, UnreadableFileError):
            parser.read_string(read_text(path))
            values.update(parser["default"] if parser.has_section("default") else {})
    return values
