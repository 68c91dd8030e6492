"""A stand-in for the Hugging Face hub: the endpoints that an upload asks, on this machine; it keeps what arrives."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN, USER = "hf_secretsecretsecret", "somebody"
LARGE = 100_000  # bytes from which a file goes by LFS


class Hub:
    """`files`: name in the repository -> content, after a commit. `denied`: paths answered with 403."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[str] = []
        self.stored: dict[str, bytes] = {}  # by LFS, under their SHA-256
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.lfs: set[str] = set()
        self.denied: tuple[str, ...] = ()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if any(part in path for part in self.denied):
            return 403, {"error": "You don't have the rights"}
        if path == "/api/whoami-v2":
            return 200, {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or USER}/{wanted['name']}"
            return 200, {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]}
        if method == "PUT" and path.startswith("/lfs/"):
            self.stored[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            return self._commit([json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"{method} {path}: not in the stub"}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "authenticated": True, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.files[value["path"]] = content
                self.lfs.add(value["path"])
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/{USER}/x/commit/1", "commitOid": "1" * 40, "success": True}


@contextmanager
def serving() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self._body()
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/")
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            asked = (401, {"error": "Invalid token"}) if not authorized else hub.answer(self.command, path, body)
            status, values = asked
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one  # noqa: N815  the library's names

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(hub_url: str, patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> None:
    """Let the hub's library ask there, without its xet protocol, which no stub speaks; nobody's own login is touched."""
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub_url)
    patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    patch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
