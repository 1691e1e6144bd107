"""Artifacts: collections of versions, their manifests and files, aliases, and which run made and used them.

Modelled on what the client and wandb-core ask, and on W&B's documentation. Two things are not known of the real server and
are chosen here: a version gets its number when it is committed, and content is known again, and not uploaded, in an entity.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from helpers.protocol.world import Run, World, key_of


@dataclass
class Artifact:
    """One version. `manifest` and `files` are what was uploaded; `digest` is what the client said."""

    id: str
    collection: Collection
    digest: str
    client_id: str
    run: str  # that made it
    state: str = "PENDING"
    version: int = -1
    aliases_to_come: list[str] = field(default_factory=list)
    description: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    manifest_md5: str = ""
    used_by: list[str] = field(default_factory=list)  # ids of runs
    created: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        return f"{self.collection.name}:v{self.version}"

    @property
    def type(self) -> str:
        return self.collection.type

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return dict(self.manifest.get("contents", {}))

    @property
    def aliases(self) -> list[str]:
        return [alias for alias, artifact in self.collection.aliases.items() if artifact is self]


@dataclass
class Collection:
    entity: str
    project: str
    name: str
    type: str
    versions: list[Artifact] = field(default_factory=list)  # committed ones
    aliases: dict[str, Artifact] = field(default_factory=dict)

    def find(self, alias: str) -> Artifact | None:
        if re.fullmatch(r"v\d+", alias):
            return next((each for each in self.versions if each.version == int(alias[1:])), None)
        return self.aliases.get(alias)


class Store:
    """All artifacts of a server. Callers hold the world's lock."""

    def __init__(self) -> None:
        self.collections: dict[tuple[str, str, str], Collection] = {}
        self.by_id: dict[str, Artifact] = {}
        self.clients: dict[str, str] = {}  # client id -> artifact id
        self.manifests: dict[str, Artifact] = {}
        self.content: dict[tuple[str, str], bytes] = {}  # (entity, MD5 in base64) -> what was uploaded

    def committed(self, kind: str = "") -> list[Artifact]:
        return [each for one in self.collections.values() for each in one.versions if not kind or each.type == kind]

    def made_by(self, run_id: str, kind: str = "") -> list[Artifact]:
        return [each for each in self.committed(kind) if each.run == run_id]

    def used_by(self, run_id: str) -> list[Artifact]:
        return [each for each in self.committed() if run_id in each.used_by]

    def create(self, where: dict[str, Any], entity: str, project: str, name: str) -> Artifact:
        if not re.fullmatch(r"[\w.-]{1,128}", name, re.ASCII):
            raise ValueError(f"'{name}' is no name of a collection")
        kind = where["artifactTypeName"]
        collection = self.collections.setdefault((entity, project, name), Collection(entity, project, name, kind))
        if collection.type != kind:
            raise ValueError(f"{name} already exists with type {collection.type}; cannot create another with type {kind}")
        aliases = [each["alias"] for each in where.get("aliases") or []]
        if wrong := [alias for alias in aliases if not alias or re.search(r"[/:]", alias) or re.fullmatch(r"v\d+", alias)]:
            raise ValueError(f"'{wrong[0]}' is no alias")
        latest = collection.aliases.get("latest")
        if where.get("enableDigestDeduplication") and latest and latest.digest == where["digest"]:
            self.clients[where["clientID"]] = latest.id
            for alias in aliases:
                collection.aliases[alias] = latest
            return latest
        key = key_of("Artifact", str(1000 + len(self.by_id)))
        made = Artifact(key, collection, where["digest"], where["clientID"], where.get("runName") or "")
        made.aliases_to_come, made.description = aliases, where.get("description")
        made.metadata = json.loads(where.get("metadata") or "{}")
        self.by_id[key] = made
        self.clients[where["clientID"]] = key
        return made

    def commit(self, artifact: Artifact) -> None:
        if artifact.state == "COMMITTED":
            return
        entity = artifact.collection.entity
        stored = self.content.get((entity, artifact.manifest_md5))
        if stored is None:
            raise ValueError(f"the manifest of {artifact.collection.name} was not uploaded")
        artifact.manifest = json.loads(stored)
        for path, entry in artifact.entries.items():
            if "ref" not in entry and (entity, entry["digest"]) not in self.content:
                raise ValueError(f"{path} of {artifact.collection.name} was not uploaded")
        artifact.state, artifact.version = "COMMITTED", len(artifact.collection.versions)
        artifact.collection.versions.append(artifact)
        for alias in artifact.aliases_to_come:
            artifact.collection.aliases[alias] = artifact

    def upload(self, entity: str, md5: str, content: bytes) -> bool:
        """Whether it is what was announced."""
        if base64.b64encode(hashlib.md5(content).digest()).decode() != md5:
            return False
        self.content[entity, md5] = content
        return True

    def read(self, artifact: Artifact, path: str) -> bytes:
        """The content of one of its files."""
        return self.content[artifact.collection.entity, artifact.entries[path]["digest"]]


def date(stamp: float) -> str:
    return datetime.fromtimestamp(stamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def connect(items: Sequence[Any], node: Any, first: int | None = None, after: str | None = None) -> dict[str, Any]:
    start = int(after or 0)
    end = len(items) if first is None else min(len(items), start + first)
    edges = [{"node": node(item), "cursor": str(start + n + 1)} for n, item in enumerate(items[start:end])]
    page = {"endCursor": str(end) if edges else None, "hasNextPage": end < len(items)}
    return {"totalCount": len(items), "edges": edges, "pageInfo": page}


class ArtifactNode:
    def __init__(self, world: World, artifact: Artifact) -> None:
        self._world, self._artifact = world, artifact
        self.id, self.state, self.digest = artifact.id, artifact.state, artifact.digest
        self.versionIndex = artifact.version if artifact.version >= 0 else None
        self.description, self.metadata = artifact.description, json.dumps(artifact.metadata)
        self.ttlDurationSeconds, self.ttlIsInherited, self.tags, self.historyStep = -1, True, [], None
        self.size, self.fileCount = sum(each.get("size", 0) for each in artifact.entries.values()), len(artifact.entries)
        self.digestAlgorithm, self.commitHash = "MANIFEST_MD5", artifact.digest
        self.createdAt = self.updatedAt = date(artifact.created)

    def artifactSequence(self, info: Any) -> CollectionNode:
        return CollectionNode(self._world, self._artifact.collection)

    def artifactType(self, info: Any) -> dict[str, Any]:
        return kind_node(self._artifact.type)

    def aliases(self, info: Any) -> list[dict[str, Any]]:
        return alias_nodes(self._world, self._artifact)

    def currentManifest(self, info: Any) -> Any:
        if not self._artifact.manifest_md5:
            return None
        return {"id": key_of("Manifest", self.id), "file": file_node(info, self._artifact, "", self._artifact.manifest_md5)}

    def createdBy(self, info: Any) -> Any:
        from helpers.protocol.graph import RunNode

        run = self._world.runs.get(self._artifact.run)
        return RunNode(self._world, run) if run else None

    def usedBy(self, info: Any) -> Any:
        from helpers.protocol.graph import RunNode, page

        return page([self._world.runs[i] for i in self._artifact.used_by], lambda run: RunNode(self._world, run))


class CollectionNode:
    __typename = "ArtifactSequence"  # GraphQL reads it, to tell which kind of collection this is

    def __init__(self, world: World, collection: Collection) -> None:
        self._world, self._collection = world, collection
        self.id = key_of("ArtifactCollection", collection.entity, collection.project, collection.name)
        self.name, self.description, self.digestAlgorithm = collection.name, None, "MANIFEST_MD5"
        self.createdAt = self.updatedAt = date(0.0)
        self.tags, self.defaultArtifactType = {"edges": []}, kind_node(collection.type)

    def project(self, info: Any) -> Any:
        from helpers.protocol.graph import ProjectNode

        return ProjectNode(self._world, self._collection.entity, self._collection.project)

    def latestArtifact(self, info: Any) -> ArtifactNode | None:
        latest = self._collection.aliases.get("latest")
        return ArtifactNode(self._world, latest) if latest else None

    def artifacts(self, info: Any, first: int | None = None, after: str | None = None, order: str = "") -> Any:
        return connect(self._collection.versions, lambda each: ArtifactNode(self._world, each), first, after)

    def aliases(self, info: Any, first: int | None = None, after: str | None = None) -> Any:
        named = [alias for each in self._collection.versions for alias in alias_nodes(self._world, each)]
        return connect(named, lambda alias: alias, first, after)

    def artifactMembership(self, info: Any, aliasName: str) -> MembershipNode | None:
        found = self._collection.find(aliasName)
        return MembershipNode(self._world, found) if found else None


class MembershipNode:
    def __init__(self, world: World, artifact: Artifact) -> None:
        self._world, self._artifact = world, artifact
        self.id, self.versionIndex = key_of("Membership", artifact.id), artifact.version
        self.createdAt = date(artifact.created)

    def aliases(self, info: Any) -> list[dict[str, Any]]:
        return alias_nodes(self._world, self._artifact)

    def artifactCollection(self, info: Any) -> CollectionNode:
        return CollectionNode(self._world, self._artifact.collection)

    def artifact(self, info: Any) -> ArtifactNode:
        return ArtifactNode(self._world, self._artifact)

    def files(self, info: Any, names: Any = None, first: int | None = None, after: str | None = None) -> Any:
        wanted = [path for path in self._artifact.entries if not names or path in names]
        entries = self._artifact.entries
        return connect(wanted, lambda p: file_node(info, self._artifact, p, entries[p]["digest"]), first, after)


def kind_node(kind: str) -> dict[str, Any]:
    return {"id": key_of("ArtifactType", kind), "name": kind}


def alias_nodes(world: World, artifact: Artifact) -> list[dict[str, Any]]:
    names = [*artifact.aliases, *([f"v{artifact.version}"] if artifact.version >= 0 else [])]
    where = CollectionNode(world, artifact.collection)
    return [{"id": key_of("Alias", artifact.id, name), "alias": name, "artifactCollection": where} for name in names]


def file_node(info: Any, artifact: Artifact, path: str, md5: str, *, is_new: bool = False) -> dict[str, Any]:
    """`is_new`: it is to be uploaded."""
    hexed = base64.urlsafe_b64encode(md5.encode()).decode()
    url = f"{info.context.url}/artifact_files/{artifact.collection.entity}/{hexed}"
    entry = artifact.entries.get(path, {})
    return {
        "id": key_of("ArtifactFile", artifact.id, path),
        "name": path,
        "displayName": path,
        "url": url,
        "directUrl": url,
        "sizeBytes": entry.get("size", 0),
        "storagePath": f"wandb_artifacts/{md5}",
        "md5": md5,
        "digest": md5,
        "uploadUrl": url if is_new else None,
        "uploadHeaders": [],
        "uploadMultipartUrls": None,
        "artifact": lambda info: {"id": artifact.id},
    }


class RootArtifacts:
    """The queries and mutations of artifacts; a part of graph.Root."""

    _world: Any

    def artifact(self, info: Any, id: str) -> ArtifactNode | None:
        found = self._world.artifacts.by_id.get(id)
        return ArtifactNode(self._world, found) if found else None

    def artifactCollection(self, info: Any, id: str) -> CollectionNode | None:
        nodes = (CollectionNode(self._world, each) for each in self._world.artifacts.collections.values())
        return next((node for node in nodes if node.id == id), None)

    def clientIDMapping(self, info: Any, clientID: str) -> dict[str, Any] | None:
        found = self._world.artifacts.clients.get(clientID)
        return {"serverID": found} if found else None

    def _place(self, input: dict[str, Any]) -> tuple[str, str]:
        # An offline file does not know its entity and says "". W&B takes that for one's own elsewhere; here it is not known.
        place = (input["entityName"] or self._world.entity, input["projectName"])
        if place not in self._world.projects:
            raise ValueError(f"there is no project {'/'.join(place)}")
        return place

    def createArtifact(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        place = self._place(input)
        if input.get("runName") and self._world.run(*place, input["runName"]) is None:
            raise ValueError(f"there is no run {input['runName']}")
        (name,) = input.get("artifactCollectionNames") or [input["artifactCollectionName"]]
        return {"artifact": ArtifactNode(self._world, self._world.artifacts.create(input, *place, name))}

    def createArtifactManifest(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self._world.artifacts.by_id[input["artifactID"]]
        key = key_of("Manifest", artifact.id)
        self._world.artifacts.manifests[key] = artifact
        # the first call says no digest yet, and is there to have an id
        artifact.manifest_md5 = input["digest"]
        file = file_node(info, artifact, "", input["digest"], is_new=True)
        return {"artifactManifest": {"id": key, "file": file}}

    def updateArtifactManifest(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self._world.artifacts.manifests[input["artifactManifestID"]]
        artifact.manifest_md5 = input["digest"]
        file = file_node(info, artifact, "", input["digest"], is_new=True)
        return {"artifactManifest": {"id": input["artifactManifestID"], "file": file}}

    def createArtifactFiles(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        store, nodes = self._world.artifacts, []
        for spec in input["artifactFiles"]:
            artifact = store.by_id[spec["artifactID"]]
            is_new = (artifact.collection.entity, spec["md5"]) not in store.content
            nodes.append(file_node(info, artifact, spec["name"], spec["md5"], is_new=is_new))
        return {"files": connect(nodes, lambda node: node)}

    def commitArtifact(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self._world.artifacts.by_id[input["artifactID"]]
        self._world.artifacts.commit(artifact)
        return {"artifact": ArtifactNode(self._world, artifact)}

    def updateArtifact(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self._world.artifacts.by_id[input["artifactID"]]
        if input.get("metadata") is not None:
            artifact.metadata = json.loads(input["metadata"])
        return {"artifact": ArtifactNode(self._world, artifact)}

    def useArtifact(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        artifact = self._world.artifacts.by_id.get(input["artifactID"])
        if artifact is None or artifact.state != "COMMITTED":
            raise ValueError(f"there is no artifact {input['artifactID']}")
        run = self._world.run(*self._place(input), input["runName"])
        if run is None:
            raise ValueError(f"there is no run {input['runName']}")
        if run.id not in artifact.used_by:
            artifact.used_by.append(run.id)
        return {"artifact": ArtifactNode(self._world, artifact)}

    def addAliases(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        for collection, alias, artifact in self._aliases(input):
            collection.aliases[alias] = artifact
        return {"success": True}

    def deleteAliases(self, info: Any, input: dict[str, Any]) -> dict[str, Any]:
        for collection, alias, artifact in self._aliases(input):
            if collection.aliases.get(alias) is artifact:
                del collection.aliases[alias]
        return {"success": True}

    def _aliases(self, input: dict[str, Any]) -> Iterable[tuple[Collection, str, Artifact]]:
        artifact = self._world.artifacts.by_id[input["artifactID"]]
        for each in input["aliases"]:
            place = (each["entityName"], each["projectName"], each["artifactCollectionName"])
            collection = self._world.artifacts.collections[place]
            assert artifact in collection.versions, f"{artifact.name} is not in {place}"
            yield collection, each["alias"], artifact


class ProjectArtifacts:
    """The artifacts of a project; a part of graph.ProjectNode."""

    _world: Any
    entityName: str
    name: str

    def artifactCollection(self, info: Any, name: str) -> CollectionNode | None:
        found = self._world.artifacts.collections.get((self.entityName, self.name, name))
        return CollectionNode(self._world, found) if found else None

    def artifactType(self, info: Any, name: str) -> dict[str, Any] | None:
        mine = [c for c in self._world.artifacts.collections.values() if (c.entity, c.project) == (self.entityName, self.name)]
        mine = [each for each in mine if each.type == name]
        if not mine:
            return None

        def collection(info: Any, name: str) -> CollectionNode | None:
            return next((CollectionNode(self._world, each) for each in mine if each.name == name), None)

        def collections(info: Any, first: int | None = None, after: str | None = None) -> Any:
            return connect(mine, lambda each: CollectionNode(self._world, each), first, after)

        return {**kind_node(name), "artifactCollection": collection, "artifactCollections": collections}

    def artifactCollectionMembership(self, info: Any, name: str) -> MembershipNode | None:
        collection, _, alias = name.partition(":")
        found = self._world.artifacts.collections.get((self.entityName, self.name, collection))
        artifact = found.find(alias or "latest") if found else None
        return MembershipNode(self._world, artifact) if artifact else None

    def artifact(self, info: Any, name: str) -> ArtifactNode | None:
        found = self.artifactCollectionMembership(info, name)
        return ArtifactNode(self._world, found._artifact) if found else None


class RunArtifacts:
    """The artifacts of a run; a part of graph.RunNode."""

    _world: Any
    _run: Run

    def outputArtifacts(self, info: Any, first: int | None = None, after: str | None = None) -> Any:
        made = self._world.artifacts.made_by(self._run.id)
        return connect(made, lambda each: ArtifactNode(self._world, each), first, after)

    def inputArtifacts(self, info: Any, first: int | None = None, after: str | None = None) -> Any:
        used = self._world.artifacts.used_by(self._run.id)
        return connect(used, lambda each: ArtifactNode(self._world, each), first, after)
