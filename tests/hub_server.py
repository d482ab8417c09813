"""A stand-in for the Hugging Face hub: the calls that huggingface_hub makes to push and fetch a data set.

Files are stored as on the hub: small text in commits, all else by its SHA-256, uploaded in parts and downloaded from
another host (`localhost` in place of `127.0.0.1`), which must not see the token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_aRightTokenOfThisStandIn"
LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "cc0-1.0", "other")
TEXT = (".json", ".md", ".gitattributes")
PART_BYTES = 1 << 16
PAGE = 7
"""Entries in a page of a tree; the hub's own have 1,000."""


@dataclass(frozen=True)
class Stored:
    """A file of a commit."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """What git calls it: of a large file, its pointer's."""
        data = self.sha256.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Repo:
    """A data set with its history."""

    private: bool
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, Stored]) -> str:
        """Add a commit to main; return its name."""
        oid = hashlib.sha1(f"{self.titles}{title}{sorted((n, f.oid) for n, f in files.items())}".encode()).hexdigest()
        self.commits[oid], self.refs["main"] = files, oid
        self.titles.append(title)
        return oid

    @property
    def files(self) -> dict[str, Stored]:
        """The files of main."""
        return self.commits[self.refs["main"]]


class Hub(ThreadingHTTPServer):
    """The server and what it holds; tests read and change it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        self.sent: Counter[str] = Counter()
        """Bytes that arrived of each large file, by SHA-256."""
        self.fetched: Counter[str] = Counter()
        """Downloads of each file, by path."""
        self.calls: list[str] = []
        self.writes = 0
        self.on_write: Callable[[int], None] = lambda count: None
        """Called with the number of changes that were asked for, before the next of them is made."""
        self.damage: dict[str, int] = {}
        """For a path, how many downloads get one wrong byte."""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def fill(hub: Hub, name: str, folder: Path, *, private: bool = False) -> str:
    """Put the files of a folder into a data set, without a client; return the commit."""
    repo = hub.repos.setdefault(name, Repo(private))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return repo.commit("filled", {path: Stored(data, not path.endswith(TEXT)) for path, data in files.items()})


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        self.server.calls.append(f"{self.command} {self.path}")
        for method, pattern, call in _ROUTES:
            found = re.fullmatch(pattern, unquote(urlsplit(self.path).path))
            if found and self.command in method.split():
                try:
                    with self.server.lock:
                        answer = call(self, body, *found.groups())
                except _Refusal as refusal:
                    self._refuse(refusal)
                else:
                    if answer is not None:
                        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
                return
        self._refuse(_Refusal(501, message=f"the stand-in has no {self.command} {self.path}"))

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, refusal: _Refusal) -> None:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, "Content-Type": "application/json"}
        body = {"error": refusal.message, "errors": [{"message": refusal.message}]}
        self._send(refusal.status, json.dumps(body).encode(), {name: told for name, told in headers.items() if told})

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _check_token(self) -> None:
        if not self._may_write:
            raise _Refusal(401, message="Invalid credentials in Authorization header")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._may_write):
            raise _Refusal(404 if self._may_write else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit_of(self, name: str, revision: str) -> tuple[str, dict[str, Stored]]:
        repo = self._repo(name)
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    # Reading

    def info(self, _: bytes, name: str, revision: str | None) -> Any:
        oid, _files = self._commit_of(name, revision or "main")
        return {"id": name, "sha": oid, "private": self._repo(name).private, "tags": [], "siblings": []}

    def tree(self, _: bytes, name: str, revision: str) -> None:
        _oid, files = self._commit_of(name, revision)
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries += [_entry(path, one) for path, one in sorted(files.items())]
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + PAGE < len(entries):
            place = urlsplit(self.path).path
            headers["Link"] = f'<{self.server.endpoint}{place}?recursive=true&cursor={start + PAGE}>; rel="next"'
        self._send(200, json.dumps(entries[start : start + PAGE]).encode(), headers)

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        oid, files = self._commit_of(name, revision)
        if path not in files:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        one = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{one.etag}"'}
        if not one.large:
            self._send(200, self._served(path, one.data), headers)
            return
        place = f"http://localhost:{self.server.server_port}/blobs/{one.sha256}/{path}"
        linked = {"X-Linked-Etag": f'"{one.sha256}"', "X-Linked-Size": str(len(one.data)), "Location": place}
        self._send(302, b"", headers | linked)

    def blob(self, _: bytes, sha256: str, path: str) -> None:
        if "Authorization" in self.headers:
            raise _Refusal(400, message="a token was sent to another host")
        files = [file for repo in self.server.repos.values() for one in repo.commits.values() for file in one.values()]
        data = next(file.data for file in files if file.sha256 == sha256)
        self._send(200, self._served(path, data), {"ETag": f'"{sha256}"'})

    def _served(self, path: str, data: bytes) -> bytes:
        if self.command == "HEAD":
            return data
        self.server.fetched[path] += 1
        if self.server.damage.get(path, 0):
            self.server.damage[path] -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    # Writing

    def create(self, body: bytes) -> Any:
        self._check_token()
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}"
        answer = {"url": f"{self.server.endpoint}/datasets/{name}", "name": name}
        if given["type"] != "dataset":
            raise _Refusal(400, message="a datastore is a data set")
        if name in self.server.repos:
            self._send(409, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return None
        repo = self.server.repos[name] = Repo(given.get("visibility") == "private")
        repo.commit("initial commit", {".gitattributes": Stored(b"*.npy filter=lfs\n", large=False)})
        return answer

    def validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        licence = re.search(r"^license: (\S+)$", content.split("---")[1], re.MULTILINE)
        if licence is None or licence[1] not in LICENCES:
            raise _Refusal(400, message=f'"license" must be one of {", ".join(LICENCES)}')
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        self._check_token()
        _oid, files = self._commit_of(name, revision)
        return {
            "files": [
                {
                    "path": one["path"],
                    "uploadMode": "regular" if one["path"].endswith(TEXT) else "lfs",
                    "shouldIgnore": False,
                    "oid": files[one["path"]].etag if one["path"] in files else None,
                }
                for one in json.loads(body)["files"]
            ]
        }

    def batch(self, body: bytes, name: str) -> Any:
        self._check_token()
        self._repo(name)
        return {"transfer": "multipart", "objects": [self._actions(one) for one in json.loads(body)["objects"]]}

    def _actions(self, one: dict[str, Any]) -> dict[str, Any]:
        """What is left to do for a file: nothing if it is there; small ones in one piece, others in parts."""
        sha256, size = one["oid"], one["size"]
        if sha256 in self.server.blobs:
            return one
        upload: dict[str, Any] = {"href": f"{self.server.endpoint}/upload/{sha256}/1", "header": {}}
        if size > PART_BYTES:
            parts = range(1, -(-size // PART_BYTES) + 1)
            places = {f"{part:05}": f"{self.server.endpoint}/upload/{sha256}/{part}" for part in parts}
            upload = {
                "href": f"{self.server.endpoint}/complete/{sha256}",
                "header": {"chunk_size": str(PART_BYTES), **places},
            }
        verify = {"href": f"{self.server.endpoint}/verify/{sha256}", "header": {}}
        return one | {"actions": {"upload": upload, "verify": verify}}

    def part(self, body: bytes, sha256: str, part: str) -> None:
        self._count_write()
        self.server.parts.setdefault(sha256, {})[int(part)] = body
        self.server.sent[sha256] += len(body)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, sha256: str) -> Any:
        known = self.server.parts[sha256]
        told = {one["partNumber"]: one["etag"].strip('"') for one in json.loads(body)["parts"]}
        if told != {part: hashlib.md5(data).hexdigest() for part, data in known.items()}:
            raise _Refusal(400, message="parts are missing")
        return {"success": True}

    def verify(self, _: bytes, sha256: str) -> Any:
        data = b"".join(data for _, data in sorted(self.server.parts.pop(sha256).items()))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise _Refusal(400, message="it has another SHA-256")
        self.server.blobs[sha256] = data
        return {"success": True}

    def _count_write(self) -> None:
        self.server.writes += 1
        self.server.on_write(self.server.writes)

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        self._check_token()
        self._count_write()
        oid, files = self._commit_of(name, revision)
        header, *changes = (json.loads(line) for line in body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent not in (None, oid):
            raise _Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for change in changes:
            _apply(files, change["key"], change["value"], self.server.blobs)
        made = self._repo(name).commit(header["value"]["summary"], files)
        url = f"{self.server.endpoint}/datasets/{name}/commit/{made}"
        return {"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""}


def _entry(path: str, one: Stored) -> dict[str, Any]:
    known = {"type": "file", "path": path, "oid": one.oid, "size": len(one.data)}
    return known | ({"lfs": {"oid": one.sha256, "size": len(one.data), "pointerSize": 130}} if one.large else {})


def _apply(files: dict[str, Stored], kind: str, value: dict[str, Any], blobs: dict[str, bytes]) -> None:
    if kind == "file":
        files[value["path"]] = Stored(base64.b64decode(value["content"]), large=False)
    elif kind == "lfsFile":
        if value["oid"] not in blobs:
            raise _Refusal(400, message=f"{value['path']} was not uploaded")
        files[value["path"]] = Stored(blobs[value["oid"]], large=True)
    elif kind == "deletedFile":
        del files[value["path"]]
    else:
        raise _Refusal(400, message=f"a change of kind {kind}")


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", rf"/api/datasets/{_NAME}(?:/revision/(.+))?", _Handler.info),
    ("GET", rf"/api/datasets/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET HEAD", rf"/datasets/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET HEAD", r"/blobs/([0-9a-f]{64})/(.+)", _Handler.blob),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/datasets/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/datasets/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/([0-9a-f]{64})/(\d+)", _Handler.part),
    ("POST", r"/complete/([0-9a-f]{64})", _Handler.complete),
    ("POST", r"/verify/([0-9a-f]{64})", _Handler.verify),
    ("POST", rf"/api/datasets/{_NAME}/commit/([^/]+)", _Handler.commit),
)
