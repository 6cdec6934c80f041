"""A Hub on the loopback interface: the requests that `huggingface_hub` makes to push a model and to load one back.

It keeps repositories in memory, speaks LFS (`HF_HUB_DISABLE_XET=1`), and makes trouble when asked: a status with
headers, or "cut", which closes the connection in the middle of a body, either way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

USER, TOKEN = "tester", "hf_aTokenThatNobodyMaySee"
LARGE = (".safetensors", ".pt", ".pth", ".bin", ".png")


@dataclass
class Repository:
    private: bool = False
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    messages: list[str] = field(default_factory=list)
    branches: set[str] = field(default_factory=lambda: {"main"})
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"  # large files lie on another host
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.trouble: list[list] = []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def make_trouble(self, method: str, path: str, times: int, what, **headers: str) -> None:
        self.trouble.append([method, re.compile(path), times, what, headers])

    def handle_error(self, request, client_address):
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.cut else content)
            self.close_connection = self.cut

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        path = unquote(self.path.partition("?")[0])
        with self.server.lock:
            self.server.requests.append((self.command, path))
            fault = next(
                (f for f in self.server.trouble if f[0] == self.command and f[1].search(path) and f[2] > 0), None
            )
            if fault:
                fault[2] -= 1
        self.cut = bool(fault) and fault[3] == "cut"
        if self.cut and self.command != "GET":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self.close_connection = True
            self.connection.close()
            return
        self.content = self.body()
        if fault and not self.cut:  # with the token, as a careless server or proxy may quote it
            self.answer(fault[3], {"error": f"trouble with {self.headers.get('Authorization')}"}, **fault[4])
            return
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("POST", "PUT") and not path.startswith("/storage/") and not authorized:
            self.answer(401, {"error": "Invalid username or password."})
            return
        for method, pattern, function in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                with self.server.lock:
                    function(self, *found.groups())
                return
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return found

    # --- pushing -------------------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.content)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repositories:
            self.answer(409, url | {"error": "You already created this model repo"})
            return
        self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        self.answer(200, url)

    def branch(self, name: str, branch: str) -> None:
        if (repository := self.repository(name)) is not None:
            new = branch not in repository.branches
            repository.branches.add(branch)
            self.answer(200 if new else 409, {} if new else {"error": "Reference already exists"})

    def validate(self) -> None:
        import yaml

        content = json.loads(self.content)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(found[1]) if found else None
        wrong = []
        if not isinstance(metadata, dict):
            wrong.append("no metadata")
        elif metadata.get("license") == "other" and not metadata.get("license_name"):
            wrong.append("license other needs license_name")
        self.answer(400 if wrong else 200, {"errors": [{"message": w} for w in wrong], "warnings": []})

    def preupload(self, name: str, _: str) -> None:
        if self.repository(name) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.content)["files"]
            ]
            self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = json.loads(self.content)["objects"]
        for item in objects:
            if item["oid"] not in self.server.blobs:
                item["actions"] = {
                    "upload": {"href": f"{self.server.storage}/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/{name}.git/info/lfs/verify"},
                }
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != oid:
            self.answer(400, {"error": "not what was announced"})
            return
        self.server.blobs[oid] = self.content
        self.answer(200)

    def verify(self, _: str) -> None:
        asked = json.loads(self.content)
        right = len(self.server.blobs.get(asked["oid"], b"")) == asked["size"]
        self.answer(200 if right else 404)

    def commit(self, name: str, _: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        for line in self.content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repository.messages.append(value["summary"])
            elif item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.blobs[value["oid"]]
                repository.large.add(value["path"])
            elif item["key"] == "deletedFile":
                del repository.files[value["path"]]
        commit = hashlib.sha1(self.content).hexdigest()
        repository.commits.append(commit)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    # --- loading -------------------------------------------------------------------------------------------------

    def information(self, name: str, *_: str) -> None:
        if (repository := self.repository(name)) is not None:
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            content = {"id": name, "modelId": name, "sha": repository.commits[-1], "private": repository.private}
            self.answer(200, content | {"siblings": siblings, "tags": []})

    def tree(self, name: str, _: str, below: str = "") -> None:
        if (repository := self.repository(name)) is not None:
            rows = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(repository.files.items())
                if path.startswith(below or "")
            ]
            self.answer(200, rows)

    def resolve(self, name: str, _: str, path: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        commit = repository.commits[-1]
        if path not in repository.files:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        content = repository.files[path]
        if path not in repository.large:
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
            return
        oid = hashlib.sha256(content).hexdigest()
        self.answer(
            302, Location=f"{self.server.storage}/{oid}", X_Repo_Commit=commit, X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=str(len(content)),
        )  # fmt: skip

    def fetch(self, oid: str) -> None:
        content = self.server.blobs[oid]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start:  # a client that goes on where it was cut off
            place = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[int(start[1]) :], ETag=f'"{oid}"', Content_Range=place)
        else:
            self.answer(200, content, ETag=f'"{oid}"')


NAME = r"([\w.-]+/[\w.-]+?)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{NAME}\.git/info/lfs/verify", Handler.verify),
    ("PUT", "/storage/(.+)", Handler.store),
    ("GET", "/storage/(.+)", Handler.fetch),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", Handler.tree),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.information),
    ("GET", f"/api/models/{NAME}", Handler.information),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
