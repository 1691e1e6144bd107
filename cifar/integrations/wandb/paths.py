"""Names of things on W&B: what a user types (ENTITY/PROJECT/ID) or copies from the browser -> entity, project, id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from cifar.errors import UserError
from cifar.system.names import escape_controls

_NAME = re.compile(r"(?!\.{1,2}$)[\w.][\w. -]*")  # not the names . and .., which are folders
_PAGE_NAMES = ("workspace", "table", "overview", "sweeps", "runs", "reports", "groups", "artifacts")  # after ENTITY/PROJECT


@dataclass(frozen=True)
class WandbPath:
    """A project on W&B, or one sweep or run of it (`item_id`; `kind` is "" if the name does not say which of the two)."""

    entity: str
    project: str
    item_id: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.entity, self.project, self.item_id)))


def parse_wandb_path(name: str) -> WandbPath | None:
    """Parse `entity/project`, `entity/project/sweep`, or the URL of a page. None if it is no such name."""
    is_url = "://" in name
    if not is_url and (name.startswith(("/", "~", ".")) or name.endswith("/")):
        return None  # a folder
    parts = [part for part in _split_name(name.strip()) if part]
    if is_url and len(parts) > 2 and parts[0] == "wandb" and parts[2] not in _PAGE_NAMES:
        parts = parts[1:]  # https://forge.coreweave.com/wandb/ENTITY/PROJECT/...
    kind = parts[2].removesuffix("s") if len(parts) > 2 and parts[2] in ("sweeps", "runs") else ""
    if len(parts) > 2 and parts[2] in _PAGE_NAMES:
        parts = parts[:2] + (parts[3:4] if kind else [])
    if len(parts) not in (2, 3) or not all(_NAME.fullmatch(part) for part in parts):
        return None
    return WandbPath(parts[0], parts[1], parts[2], kind) if len(parts) == 3 else WandbPath(parts[0], parts[1])


def parse_sweep_path(name: str) -> tuple[str, str, str]:
    """Parse `id`, `project/id`, `entity/project/id` or the URL of a sweep's page -> (entity, project, id).

    A part that the name does not say is "". Raises UserError if it names no sweep.
    """
    parts = _split_name(name)
    if "://" in name:
        if "sweeps" not in parts[2:-1]:
            raise UserError(f"{name} is not a sweep's page; it looks like https://HOST/ENTITY/PROJECT/sweeps/ID")
        sweeps_index = parts.index("sweeps", 2)
        parts = [*parts[sweeps_index - 2 : sweeps_index], parts[sweeps_index + 1]]
    if len(parts) > 3 or not all(parts) or any(part in (".", "..") or escape_controls(part) != part for part in parts):
        raise UserError(f"'{name}' names no sweep; write ID, PROJECT/ID, ENTITY/PROJECT/ID or the URL of its page")
    entity, project, sweep_id = ["", "", *parts][-3:]
    return entity, project, sweep_id


def _split_name(name: str) -> list[str]:
    """The parts between slashes, decoded (%20 is a space). Those of a URL are its path's."""
    path = urlsplit(name).path if "://" in name else name
    return [unquote(part) for part in path.strip("/").split("/")]
