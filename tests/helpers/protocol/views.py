"""Reports and saved workspaces. W&B calls both views; their `type` is "runs" or "project-view"."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from helpers.protocol.world import key_of


@dataclass
class View:
    id: str
    entity: str
    project_name: str
    type: str = ""
    name: str = ""
    displayName: str = ""
    description: str = ""
    spec: str = "{}"
    createdAt: str = "2026-11-22T00:00:00Z"
    updatedAt: str = "2026-11-22T00:00:00Z"

    def project(self, info: Any) -> Any:
        return info.context.project(info, self.project_name, self.entity)


class RootViews:
    """The queries and mutations of views; a part of graph.Root."""

    _world: Any

    def view(self, info: Any, id: str) -> View | None:
        return self._world.views.get(id.rstrip("="))

    def upsertView(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        views = self._world.views
        place = (input.get("entityName") or self._world.entity, input["projectName"])
        if place not in self._world.projects:
            raise ValueError(f"there is no project {'/'.join(place)}")
        if (key := input.get("id")) and key not in views:
            raise ValueError(f"there is no view {key}")
        inserted = not key
        key = key or key_of("View", f"{len(views) + 1:08d}").rstrip("=")
        view = views.setdefault(key, View(key, *place))
        json.loads(input["spec"])
        for name in ("type", "name", "displayName", "description", "spec"):
            setattr(view, name, input.get(name) or getattr(view, name))
        return {"view": view, "inserted": inserted}


class ProjectViews:
    """The views of a project; a part of graph.ProjectNode."""

    _world: Any
    entityName: str
    name: str

    def allViews(self, info: Any, viewType: str = "", viewName: str = "", userName: str = "") -> dict[str, Any]:
        mine = [v for v in self._world.views.values() if (v.entity, v.project_name) == (self.entityName, self.name)]
        return {"edges": [{"node": v} for v in mine if v.type == viewType and (not viewName or v.name == viewName)]}

    def user(self, info: Any) -> Any:
        return info.context.viewer(info)
