"""A local server that speaks the part of the Hugging Face Hub's protocol that loading and pushing models needs."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants, hf_api


class HubError(Exception):
    """A refusal: the status, the message and the X-Error-Code that the Hub sends."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: "HubServer"

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, "/" + "/".join(parts)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.answer_headers: dict[str, str] = {}
        self.cut = False
        try:
            self.send(*(self.post(parts, body) if self.command == "POST" else self.get(parts)))
        except HubError as error:
            status, message, code = error.args
            self.answer_headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.send(status, {"error": message})

    do_HEAD = do_POST = do_GET

    def send(self, status: int, content: bytes | dict | list) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (self.answer_headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)

    def log_message(self, *args) -> None:
        pass

    # Downloads

    def get(self, parts: list[str]) -> tuple[int, bytes | dict | list]:
        match parts:
            case [user, name, "resolve", revision, *path]:
                return self.get_file(f"{user}/{name}", revision, "/".join(path))
            case ["api", "models", user, name, "tree", revision]:
                files = self.open(f"{user}/{name}", revision)
                return 200, [{"type": "file", "path": p, "size": len(d), "oid": blob_id(d)} for p, d in files.items()]
            case ["datasets", user, name, "resolve", revision, *path]:
                return self.get_file(f"datasets/{user}/{name}", revision, "/".join(path))
            case ["api", "datasets", user, name, "tree", revision, *path]:
                return 200, self.list_folder(f"datasets/{user}/{name}", revision, "/".join(path))
            case ["api", "datasets", user, name, "revision", revision]:
                siblings = [{"rfilename": path} for path in self.open(f"datasets/{user}/{name}", revision)]
                return 200, {"id": f"{user}/{name}", "sha": self.answer_headers["X-Repo-Commit"], "siblings": siblings}
            case ["api", "models", user, name]:
                return self.get([*parts, "revision", "main"])
            case ["api", "models", user, name, "revision", revision]:
                siblings = [{"rfilename": path} for path in self.open(f"{user}/{name}", revision)]
                sha = self.answer_headers["X-Repo-Commit"]
                return 200, {"id": f"{user}/{name}", "sha": sha, "siblings": siblings}
        raise HubError(404, "Not found", None)

    def list_folder(self, repo: str, revision: str, folder: str = "") -> list[dict]:
        """The files and folders in a folder of a repository."""
        prefix, found = f"{folder}/" if folder else "", {}
        for path, data in self.open(repo, revision).items():
            if path.startswith(prefix):
                child, _, deeper = path.removeprefix(prefix).partition("/")
                entry = {"type": "file", "size": len(data), "oid": blob_id(data)}
                found[child] = ({"type": "directory", "oid": ""} if deeper else entry) | {"path": prefix + child}
        if not found:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return list(found.values())

    def open(self, repo: str, revision: str) -> dict[str, bytes]:
        """The files of a repository that the client may know of, at a revision that exists."""
        if not (self.server.root / repo).is_dir() or self.server.private.get(repo, self.token) != self.token:
            raise HubError(404 if self.token else 401, "Repository not found", "RepoNotFound")
        commit, files = self.server.snapshot(repo)
        if revision not in ("main", commit):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.answer_headers["X-Repo-Commit"] = commit
        return files

    def get_file(self, repo: str, revision: str, path: str) -> tuple[int, bytes]:
        data = self.open(repo, revision).get(path)
        if self.server.gated.get(repo, self.token) != self.token:
            raise HubError(403 if self.token else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        self.cut = f"{repo}/{path}" in self.server.cut
        self.answer_headers |= {"ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            return 200, data
        start, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(start) : int(last or len(data)) + 1]
        if not part:
            raise HubError(416, "Range not satisfiable", None)
        self.answer_headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        return 206, part

    # Uploads, all of them as regular files; any token may write

    def post(self, parts: list[str], body: bytes) -> tuple[int, dict]:
        if not self.token:
            raise HubError(401, "Invalid username or password.", None)
        first, *lines = (json.loads(line) for line in body.splitlines())
        match parts:
            case ["api", "validate-yaml"]:
                return 200, {}
            case ["api", "repos", "create"]:
                repo = f"{first['organization'] or 'user'}/{first['name']}"
                exists = (self.server.root / repo).is_dir()
                (self.server.root / repo).mkdir(parents=True, exist_ok=True)
                return 409 if exists else 200, {"url": f"{self.server.endpoint}/{repo}"}
            case ["api", "models", user, name, "preupload", revision]:
                files = {path: blob_id(data) for path, data in self.open(f"{user}/{name}", revision).items()}
                answer = {"uploadMode": "regular", "shouldIgnore": False}
                paths = [file["path"] for file in first["files"]]
                return 200, {"files": [answer | {"path": path, "oid": files.get(path)} for path in paths]}
            case ["api", "models", user, name, "commit", revision]:
                repo = f"{user}/{name}"
                self.open(repo, revision)
                for line in lines:
                    if line["key"] != "file":
                        raise HubError(400, f"{line['key']} is not supported", None)
                    path = self.server.root / repo / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
                commit, _ = self.server.snapshot(repo)
                return 200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}", "commitOid": commit}
        raise HubError(404, "Not found", None)


class HubServer(ThreadingHTTPServer):
    """Serves the folders `root/{user}/{repo}` as model repositories with one branch, `main`, of one commit.

    Those of `root/datasets/{user}/{repo}` are repositories of datasets, which may be read.

    Files may be changed at any time, which changes the commit; commits of the past are not kept.
    """

    request_queue_size = 64  # a client that opens more connections at once than fit waits a second

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.home = root.with_name(f"{root.name}-home")  # of the clients: cache and token
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []  # method and path
        self.cut: set[str] = set()  # "user/repo/file": the connection breaks after half of it
        self.private: dict[str, str] = {}  # "user/repo": the token without which it does not seem to exist
        self.gated: dict[str, str] = {}  # "user/repo": the token without which its files are refused

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()

    def snapshot(self, repo: str) -> tuple[str, dict[str, bytes]]:
        """The commit, which follows from the content, and the files."""
        paths = sorted(path for path in (self.root / repo).rglob("*") if path.is_file())
        files = {path.relative_to(self.root / repo).as_posix(): path.read_bytes() for path in paths}
        return hashlib.sha1(repr([(path, blob_id(data)) for path, data in files.items()]).encode()).hexdigest(), files

    @property
    def downloads(self) -> list[str]:
        """The files whose content was asked for, in order."""
        paths = [path.partition("/resolve/") for method, path in self.requests if method == "GET"]
        return [path.partition("/")[2] for _, found, path in paths if found]


def blob_id(data: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty `HubServer` that this process uses, with an empty cache and no token.

    `monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)` takes the process offline.
    """
    with HubServer(tmp_path / "hub") as server:
        settings = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(server.home / "hub"),
            "HF_TOKEN_PATH": str(server.home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()  # the session keeps the proxies of the environment
        yield server
