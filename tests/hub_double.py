"""A double of the Hugging Face Hub for push and pull of models, schedulers and pipelines, over real HTTP on localhost.

Repositories live in memory, one revision ("main") each, with a commit id that changes with every commit. Files arrive
base64-encoded in the commit itself (`uploadMode: regular`). `fail_with`: the status that every write is answered with.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubDouble:
    def __init__(self):
        self.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def clear(self) -> None:
        """As it was in the beginning, but for its address."""
        self.repos: dict[str, dict[str, bytes]] = {}  # repo id -> path in the repo -> content
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path), in order
        self.fail_with: int | None = None

    def __enter__(self) -> "HubDouble":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, hf_home) -> dict[str, str | None]:
        """The environment of a fresh process that talks to this double, with a cache of its own under `hf_home`."""
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
        return dict.fromkeys(names) | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_double",
            "HF_HOME": str(hf_home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def sha(self, repo: str) -> str:
        digest = hashlib.sha1(repo.encode())
        for path, content in sorted(self.repos[repo].items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):  # quiet
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def not_found(self, code: str) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.command in ("POST", "PUT", "DELETE") and self.hub.fail_with:
            self.answer(self.hub.fail_with, {"error": "the double was told to fail"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/[^/]+", path):
            getattr(self, match[2])(match[1], body)
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/[^/]+)?", path.split("/tree/")[0]):
            self.info(match[1], tree="/tree/" in path)
        elif match := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path):
            self.file(match[1], match[2])
        else:
            self.answer(501, {"error": f"the double does not know {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def create(self, wanted: dict) -> None:
        repo = "/".join(part for part in (wanted.get("organization") or "user", wanted["name"]) if part)
        status = 409 if repo in self.hub.repos else 200
        self.hub.repos.setdefault(repo, {})
        self.hub.private.setdefault(repo, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.answer(status, {"url": f"{self.hub.url}/{repo}", "id": repo})

    def preupload(self, repo: str, body: bytes) -> None:
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                self.hub.repos[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "deletedFile":
                self.hub.repos[repo].pop(item["value"]["path"], None)
        sha = self.hub.sha(repo)
        self.answer(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, repo: str, tree: bool) -> None:
        if repo not in self.hub.repos:
            return self.not_found("RepoNotFound")
        files = self.hub.repos[repo]
        if tree:
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.answer(200, entries)
        facts = {"id": repo, "sha": self.hub.sha(repo), "private": self.hub.private[repo], "tags": [], "downloads": 0}
        self.answer(200, facts | {"siblings": [{"rfilename": path} for path in files]})

    def file(self, repo: str, path: str) -> None:
        if repo not in self.hub.repos:
            return self.not_found("RepoNotFound")
        if path not in self.hub.repos[repo]:
            return self.not_found("EntryNotFound")
        content = self.hub.repos[repo][path]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=self.hub.sha(repo), Accept_Ranges="bytes")
