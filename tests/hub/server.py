"""A Hub in memory: the endpoints that huggingface_hub calls to create, fill and read models, data sets and Spaces.

A test double, checked against huggingface_hub's own client in `test_server.py`. Tokens are `hf_NAME`, each allowed to
write to the organisation of that name and to read its private repositories.
"""

import base64
import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from time import sleep

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

LFS_THRESHOLD = 100_000  # bytes; larger files, and weights and tables of any size, are uploaded by LFS
DATE = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """An error that the client understands by its status and `X-Error-Code`."""

    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.code, self.message = status, code, message

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return JSONResponse({"error": self.message}, self.status, headers)


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, bytes]
    parents: list[str]


@dataclass
class Repo:
    name: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # a Space's

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parents = [self.branches[branch]] if branch in self.branches else []
        text = json.dumps([parents, title, len(self.commits), {k: git_oid(v) for k, v in sorted(files.items())}])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), title, files, parents)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return self.commits[sha]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_THRESHOLD or path.endswith((".safetensors", ".parquet"))


class Hub:
    """Repositories, uploaded objects, and a record of what was asked for.

    Attributes:
        requests: `(method, path)` of every request, in order.
        downloads: Bytes served for each `org/name/file`.
        uploads: Bytes received, in commits and by LFS.
        broken_uploads: How many of the next LFS uploads fail, as in a broken connection.
        before_commit: Functions that the next commits call first, one each: what another client does meanwhile.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.downloads: dict[str, int] = {}
        self.uploads = 0
        self.broken_uploads = 0
        self.before_commit: list[Callable[[], object]] = []

    def forget_traffic(self) -> None:
        self.requests, self.downloads, self.uploads = [], {}, 0

    def add_folder(self, name: str, folder: Path) -> None:
        """A public repository with the files of a folder. The name of a data set begins with `datasets/`."""
        self.repos[name] = Repo(name, private=False)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.repos[name].commit("main", "files of a folder", files)

    def user(self, request: Request) -> str | None:
        header = request.headers.get("authorization", "")
        return header.removeprefix("Bearer hf_") if header.startswith("Bearer hf_") else None

    def repo(self, request: Request, write: bool = False) -> Repo:
        kind = request.url.path.removeprefix("/api").split("/")[1]
        start = f"{kind}/" if kind in ("datasets", "spaces") else ""
        name = f"{start}{request.path_params['org']}/{request.path_params['name']}"
        user, repo = self.user(request), self.repos.get(name)
        if write:
            self.require_writer(request, request.path_params["org"])
        if repo is None or (repo.private and user != request.path_params["org"]):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def require_writer(self, request: Request, org: str) -> None:
        user = self.user(request)
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if user != org:
            raise Refusal(403, None, f"{user} may not write to {org}")

    async def whoami(self, request: Request) -> Response:
        user = self.user(request)
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        return JSONResponse({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    async def create(self, request: Request) -> Response:
        body = await request.json()
        org = body.get("organization") or self.user(request) or ""
        self.require_writer(request, org)
        kind = body.get("type") or "model"
        name = ("" if kind == "model" else f"{kind}s/") + f"{org}/{body['name']}"
        url = f"{request.base_url}{name}"
        if name in self.repos:
            return JSONResponse({"error": f"You already created this {kind} repo", "url": url}, 409)
        repo = self.repos[name] = Repo(name, bool(body.get("private")) or body.get("visibility") == "private")
        repo.commit(
            "main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        return JSONResponse({"url": url, "name": name, "id": name})

    async def variable(self, request: Request) -> Response:
        repo = self.repo(request, write=request.method != "GET")
        if request.method == "POST":
            body = await request.json()
            repo.variables[body["key"]] = body["value"]
        elif request.method == "DELETE":
            del repo.variables[(await request.json())["key"]]
        return JSONResponse({key: {"key": key, "value": value} for key, value in repo.variables.items()})

    async def delete(self, request: Request) -> Response:
        body = await request.json()
        self.require_writer(request, body["organization"])
        del self.repos[f"{body['organization']}/{body['name']}"]
        return JSONResponse({})

    async def preupload(self, request: Request) -> Response:
        files = self.repo(request, write=True).at(request.path_params["revision"]).files
        answer = []
        for item in (await request.json())["files"]:
            path = item["path"]
            entry = {"path": path, "uploadMode": "lfs" if is_lfs(path, item["size"]) else "regular"}
            if path in files:
                lfs = entry["uploadMode"] == "lfs"
                entry["oid"] = hashlib.sha256(files[path]).hexdigest() if lfs else git_oid(files[path])
            answer.append(entry | {"shouldIgnore": False})
        return JSONResponse({"files": answer})

    async def lfs_batch(self, request: Request) -> Response:
        self.repo(request, write=True)
        objects = []
        for item in (await request.json())["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                base = f"{request.base_url}lfs/"
                entry["actions"] = {
                    "upload": {"href": base + item["oid"]},
                    "verify": {"href": base + "verify", "header": {"authorization": request.headers["authorization"]}},
                }
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request: Request) -> Response:
        if self.broken_uploads:
            self.broken_uploads -= 1
            raise Refusal(400, None, "the connection broke")
        data = await request.body()
        oid = request.path_params["oid"]
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, None, "the content does not match its name")
        self.objects[oid] = data
        self.uploads += len(data)
        return Response()

    async def lfs_verify(self, request: Request) -> Response:
        item = await request.json()
        if len(self.objects.get(item["oid"], b"")) != item["size"]:
            raise Refusal(404, None, "the object is incomplete")
        return Response()

    async def commit(self, request: Request) -> Response:
        repo = self.repo(request, write=True)
        branch = request.path_params["revision"]
        if self.before_commit:
            self.before_commit.pop(0)()
        files = dict(repo.at(branch).files)
        title = ""
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repo.at(branch).sha):
                    raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.uploads += len(files[value["path"]])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, None, f"{value['path']} was never uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refusal(400, None, f"unknown commit operation {item['key']}")
        done = repo.commit(branch, title, files)
        return JSONResponse({"commitUrl": f"{request.base_url}{repo.name}/commit/{done.sha}", "commitOid": done.sha})

    async def branch(self, request: Request) -> Response:
        repo, name = self.repo(request, write=True), request.path_params["revision"]
        if name in repo.branches:
            return JSONResponse({"error": "the branch exists"}, 409)
        start = (await request.json() if await request.body() else {}).get("startingPoint", "main")
        repo.branches[name] = repo.at(start).sha
        return JSONResponse({})

    async def tag(self, request: Request) -> Response:
        repo = self.repo(request, write=True)
        repo.tags[(await request.json())["tag"]] = repo.at(request.path_params["revision"]).sha
        return JSONResponse({})

    async def info(self, request: Request) -> Response:
        repo = self.repo(request)
        commit = repo.at(request.path_params.get("revision", "main"))
        return JSONResponse(
            {
                "id": repo.name,
                "modelId": repo.name,
                "sha": commit.sha,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": DATE,
                "siblings": [
                    {"rfilename": path, **({"size": len(data)} if "blobs" in request.query_params else {})}
                    for path, data in sorted(commit.files.items())
                ],
            }
        )

    async def refs(self, request: Request) -> Response:
        repo = self.repo(request)
        return JSONResponse(
            {
                kind: [{"name": n, "ref": f"refs/{path}/{n}", "targetCommit": sha} for n, sha in refs.items()]
                for kind, path, refs in (
                    ("branches", "heads", repo.branches),
                    ("tags", "tags", repo.tags),
                    ("converts", "convert", {}),
                )
            }
        )

    async def commits(self, request: Request) -> Response:
        repo, found = self.repo(request), []
        sha: str | None = repo.at(request.path_params["revision"]).sha
        while sha:
            commit = repo.commits[sha]
            found.append({"id": sha, "authors": [], "date": DATE, "title": commit.title, "message": ""})
            sha = commit.parents[0] if commit.parents else None
        return JSONResponse(found)

    def entry(self, path: str, data: bytes) -> dict:
        entry: dict = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if is_lfs(path, len(data)):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    async def tree(self, request: Request) -> Response:
        files = self.repo(request).at(request.path_params["revision"]).files
        folder = request.path_params.get("path", "")
        prefix = f"{folder}/" if folder else ""
        below = {path: data for path, data in files.items() if path.startswith(prefix)}
        if folder and not below:
            raise Refusal(404, "EntryNotFound", f"no folder {folder}")
        deep = request.query_params.get("recursive", "").lower() == "true"
        found, folders = [], set()
        for path, data in sorted(below.items()):
            parts = path[len(prefix) :].split("/")
            folders |= {prefix + "/".join(parts[:n]) for n in range(1, len(parts) if deep else min(len(parts), 2))}
            if deep or len(parts) == 1:
                found.append(self.entry(path, data))
        return JSONResponse(found + [{"type": "directory", "path": p, "size": 0, "oid": "0"} for p in sorted(folders)])

    async def paths_info(self, request: Request) -> Response:
        files = self.repo(request).at(request.path_params["revision"]).files
        content_type = request.headers.get("content-type", "")
        if "json" in content_type:
            paths = (await request.json())["paths"]
        else:
            from urllib.parse import parse_qs

            paths = parse_qs((await request.body()).decode())["paths"]
        found = [self.entry(p, files[p]) for p in paths if p in files]
        folders = [p for p in paths if any(f.startswith(p + "/") for f in files)]
        return JSONResponse(found + [{"type": "directory", "path": p, "size": 0, "oid": "0"} for p in folders])

    async def resolve(self, request: Request) -> Response:
        repo = self.repo(request)
        user = self.user(request)
        if repo.gated and user != request.path_params["org"]:
            raise Refusal(401 if user is None else 403, "GatedRepo", f"Access to model {repo.name} is restricted.")
        commit = repo.at(request.path_params["revision"])
        path = request.path_params["path"]
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            refusal = Refusal(404, "EntryNotFound", f"no file {path}").response()
            refusal.headers["X-Repo-Commit"] = commit.sha
            return refusal
        data = commit.files[path]
        etag = hashlib.sha256(data).hexdigest() if is_lfs(path, len(data)) else git_oid(data)
        headers |= {"ETag": f'"{etag}"', "X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        headers["Accept-Ranges"] = "bytes"
        if request.method == "HEAD":
            return Response(headers=headers | {"Content-Length": str(len(data))})
        status = 200
        if span := request.headers.get("range"):
            first, _, last = span.removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(data)
            headers["Content-Range"] = f"bytes {first}-{min(end, len(data)) - 1}/{len(data)}"
            data, status = data[int(first) : end], 206
        name = f"{repo.name}/{path}"
        self.downloads[name] = self.downloads.get(name, 0) + len(data)
        return Response(data, status, headers, media_type="application/octet-stream")

    async def validate_yaml(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    def application(self) -> Starlette:
        repo = "{org}/{name}"
        routes = [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/repos/delete", self.delete, methods=["DELETE"]),
            *(
                Route(f"/api/{kind}/{repo}{path}", endpoint, methods=[method])
                for kind in ("models", "datasets", "spaces")
                for path, endpoint, method in (
                    ("", self.info, "GET"),
                    ("/revision/{revision}", self.info, "GET"),
                    ("/refs", self.refs, "GET"),
                    ("/commits/{revision}", self.commits, "GET"),
                    ("/tree/{revision}", self.tree, "GET"),
                    ("/tree/{revision}/{path:path}", self.tree, "GET"),
                    ("/paths-info/{revision}", self.paths_info, "POST"),
                    ("/preupload/{revision}", self.preupload, "POST"),
                    ("/commit/{revision}", self.commit, "POST"),
                    ("/branch/{revision}", self.branch, "POST"),
                    ("/tag/{revision}", self.tag, "POST"),
                )
            ),
            Route(f"/api/spaces/{repo}/variables", self.variable, methods=["GET", "POST", "DELETE"]),
            *(
                route
                for start in ("/datasets", "/spaces", "")
                for route in (
                    Route(f"{start}/{{org}}/{{name}}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
                    Route(f"{start}/{repo}/resolve/{{revision}}/{{path:path}}", self.resolve),
                )
            ),
            Route("/lfs/verify", self.lfs_verify, methods=["POST"]),
            Route("/lfs/{oid}", self.lfs_put, methods=["PUT"]),
        ]
        wrapped = Starlette(routes=routes, exception_handlers={Refusal: lambda _, refusal: refusal.response()})  # type: ignore[dict-item, union-attr]

        async def recorded(scope, receive, send):
            if scope["type"] == "http":
                self.requests.append((scope["method"], scope["path"]))
            await wrapped(scope, receive, send)

        return recorded  # type: ignore[return-value]


_ports: list[int] = []  # where no server runs: processes with the same address share imported libraries


def nowhere() -> str:
    """An address where nothing answers until the next server, which has it, runs."""
    if not _ports:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            _ports.append(free.getsockname()[1])
    return f"http://127.0.0.1:{_ports[-1]}"


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Runs the hub on a free port of the loopback; yields its address, for `HF_ENDPOINT`."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", _ports.pop() if _ports else 0))
        except OSError:  # another process has taken it
            listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(hub.application(), log_level="error"))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the test's Hub server did not start")
            sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=5)
    _ports.append(port)
