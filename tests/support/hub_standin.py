"""A Hub on loopback: the part of its HTTP interface that the ordinary clients use.

Made from what the clients send and read: repositories of models and datasets with
commits and branches, file trees, downloads with ranges, large files that redirect to
another host, access by token. A test can make it fail in the ways a real one does.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")  # kept apart from git, on another host
TOKEN = "hf_standin"  # one that may read everything
STRANGER = "hf_stranger"  # a valid one without access to what is gated


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repository:
    """A repository: its commits, each with all of its files, and what its branches mean."""

    kind: str  # model or dataset
    name: str
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Add a commit with exactly these files, and let the branch mean it."""
        listing = json.dumps({path: sha256(data) for path, data in sorted(files.items())})
        sha = hashlib.sha1(f"{len(self.commits)}{self.name}{listing}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def entry(self, sha: str, path: str) -> dict:
        """A file as the tree lists it."""
        data = self.commits[sha][path]
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        fields = {"type": "file", "path": path, "oid": blob, "size": len(data)}
        if path.endswith(LARGE):
            fields["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return fields

    def tree(self, sha: str, folder: str, *, recursive: bool) -> list[dict]:
        """Files and folders below a folder, all or those directly in it."""
        prefix, entries = f"{folder}/" if folder else "", {}
        for path in sorted(p for p in self.commits[sha] if p.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
            entries[path] = self.entry(sha, path)
        if recursive:
            return list(entries.values())
        return [e for name, e in entries.items() if "/" not in name.removeprefix(prefix)]


@dataclass
class Fault:
    """The next `times` requests whose path matches are answered by `act` instead."""

    pattern: str
    times: int
    act: Callable[["Handler"], None]


class Hub:
    """The server; a context manager. `requests` holds what was asked of it."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lent: dict[str, bytes] = {}  # what the other host holds, by hash
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.port = self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def other_host(self) -> str:
        """The same machine by another name: clients must not take their token there."""
        return f"http://localhost:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes], **options) -> Repository:
        repository = Repository(kind, name, **options)
        repository.commit(files)
        self.repositories[kind, name] = repository
        return repository

    def answer(self, status: int, *, times: int, to: str = "") -> None:
        """Answer requests with an error of the server's own."""
        self.faults.append(Fault(to, times, lambda handler: handler.error(status)))

    def break_off(self, to: str, *, times: int) -> None:
        """Close the connection in the middle of a file's content."""
        self.faults.append(Fault(to, times, lambda handler: handler.whole(broken=True)))

    def spoil(self, to: str, spoiled: Callable[[bytes], bytes], *, times: int) -> None:
        """Send other content than the tree announces."""
        self.faults.append(Fault(to, times, lambda handler: handler.whole(change=spoiled)))

    def calm(self) -> None:
        """Be sound again, and forget what was asked."""
        self.faults.clear()
        self.requests.clear()


API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(/.*)?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """One request; HTTP/1.1, since the clients keep their connections."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        self.address = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {unquote(self.address.path)}")
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, self.hub.requests[-1]):
                fault.times -= 1
                return fault.act(self)
        self.whole()

    def whole(self, *, broken: bool = False, change: Callable[[bytes], bytes] | None = None):
        """The answer to the request, or what a fault makes of its content."""
        self.broken, self.change = broken, change
        path = self.address.path
        if path.startswith("/large/"):
            return self._large(path.removeprefix("/large/"))
        if match := API.fullmatch(path):
            kind, name, what, rest = match.groups()
            return self._api(kind, unquote(name), what, unquote((rest or "/")[1:]))
        if match := FILE.fullmatch(path):
            kind = "dataset" if match[1] else "model"
            return self._file(kind, unquote(match[2]), unquote(match[3]), unquote(match[4]))
        return self.error(404)

    def _large(self, digest: str) -> None:
        assert "authorization" not in self.headers, "the token was carried to another host"
        self.content(self.hub.lent[digest], {"ETag": f'"{digest}"'})

    def _repository(self, kind: str, name: str) -> Repository | None:
        """The repository if the request may read it; else the refusal was sent."""
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if (repository := self.hub.repositories.get((kind, name))) is None:
            self.error(404 if token else 401, "RepoNotFound")
            return None
        if repository.gated and token != TOKEN:
            self.error(403 if token else 401, "GatedRepo")
            return None
        return repository

    def _api(self, kind: str, name: str, what: str | None, rest: str) -> None:
        if (repository := self._repository(kind, name)) is None:
            return None
        if what == "refs":
            return self.json(_refs(repository))
        revision, _, folder = rest.partition("/")
        if what == "revision":
            revision, folder = rest, ""
        sha = repository.refs.get(revision or "main", revision)
        if sha not in repository.commits:
            return self.error(404, "RevisionNotFound")
        if what == "tree":
            query = parse_qs(self.address.query)
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = repository.tree(sha, folder, recursive=recursive)
            return self.json(entries) if entries else self.error(404, "EntryNotFound")
        if what == "paths-info":
            paths = json.loads(self.body)["paths"]
            every = repository.tree(sha, "", recursive=True)
            return self.json([entry for entry in every if entry["path"] in paths])
        return self.json(_info(repository, sha))

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(kind, name)) is None:
            return None
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            return self.error(404, "RevisionNotFound")
        if path not in repository.commits[sha]:
            return self.error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        entry, data = repository.entry(sha, path), repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            return self.content(data, headers)
        digest = entry["lfs"]["oid"]
        self.hub.lent[digest] = data
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        headers |= {"Location": f"{self.hub.other_host}/large/{digest}"}
        return self.send(302, b"", headers)

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        """A file's content, or the range of it that was asked for."""
        data = self.change(data) if self.change else data
        status, headers = 200, headers | {"Accept-Ranges": "bytes"}
        if byte_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(byte_range[1]), int(byte_range[2] or len(data) - 1)
            if first >= len(data):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            last = min(last, len(data) - 1)
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            status, data = 206, data[first : last + 1]
        self.send(status, data, headers)

    def error(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        """A refusal as the Hub sends it: the reason is in a header."""
        error_headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self.send(status, json.dumps({"error": code}).encode(), error_headers | (headers or {}))

    def json(self, data) -> None:
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.broken else data)
        if self.broken:
            self.close_connection = True

    broken, change = False, None


def _info(repository: Repository, sha: str) -> dict:
    siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
    about = {"id": repository.name, "sha": sha, "siblings": siblings, "tags": []}
    return about | {"private": False, "gated": repository.gated, "downloads": 0, "likes": 0}


def _refs(repository: Repository) -> dict:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
        for name, sha in repository.refs.items()
    ]
    return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}
