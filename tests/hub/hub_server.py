"""A server on loopback that speaks the Hub's upload protocol: repositories, preupload, LFS batches, blobs by hash, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    """token: the one that may write. drop_after: blobs or parts taken before connections are cut (None: never). part_size: larger files are
    uploaded in parts of so many bytes, as the Hub asks for those over 5 GB."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads = 0
        self.part_size = 1 << 62
        self.parts: dict[str, dict[int, bytes]] = {}
        self.drop_after: int | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, value: Any = None, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _any(self) -> None:
        hub, body, path = self.server, self._body(), unquote(urlparse(self.path).path)
        if m := re.fullmatch(r"/blob/(\w+)(?:/(\d+|all))?", path):
            return self._blob(m[1], body, m[2])
        if self.headers.get("Authorization") not in (f"Bearer {hub.token}",):
            return self._answer({"error": "no"}, 401)
        if path == "/api/whoami-v2":
            return self._answer({"name": "org", "type": "user", "orgs": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'org'}/{asked['name']}"
            known = name in hub.repositories
            hub.repositories.setdefault(name, {})
            return self._answer({"url": f"{hub.address}/{name}", "id": name, "name": name}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
            files = [f["path"] for f in json.loads(body)["files"]]
            return self._answer(
                {
                    "files": [
                        {"path": f, "uploadMode": "lfs" if f.endswith(".safetensors") else "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
            for o in objects:
                if o["oid"] not in hub.blobs:
                    where = f"{hub.address}/blob/{o['oid']}"
                    o["actions"] = {"upload": {"href": where, "header": {}}}
                    if o["size"] > hub.part_size:
                        urls = {f"{i + 1:05d}": f"{where}/{i + 1}" for i in range(-(-o["size"] // hub.part_size))}
                        o["actions"]["upload"] = {"href": f"{where}/all", "header": {"chunk_size": str(hub.part_size), **urls}}
            return self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.+", path):
            return self._commit(m[1], body)
        if (m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+|/tree/.+|/paths-info/.+)?", path)) and m[1] in hub.repositories:
            files = list(hub.repositories[m[1]])
            if "/tree/" in path or "/paths-info/" in path:
                return self._answer([])
            return self._answer(
                {"id": m[1], "modelId": m[1], "sha": "a" * 40, "private": False, "tags": [], "siblings": [{"rfilename": f} for f in files]}
            )
        return self._answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def _blob(self, oid: str, body: bytes, part: str | None) -> None:
        hub = self.server
        if part == "all":
            numbers = [p["partNumber"] for p in json.loads(body)["parts"]]
            body = b"".join(hub.parts[oid][n] for n in sorted(numbers))
            return self._keep(oid, body)
        with hub.lock:
            if hub.drop_after is not None and hub.uploads >= hub.drop_after:
                self.close_connection = True
                self.connection.close()
                return
            hub.uploads += 1
        if part is not None:
            hub.parts.setdefault(oid, {})[int(part)] = body
            return self._answer(ETag=f'"{part}"')
        return self._keep(oid, body)

    def _keep(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer({"error": "another content"}, 422)
        self.server.blobs[oid] = body
        return self._answer()

    def _commit(self, name: str, body: bytes) -> None:
        hub, new = self.server, {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                new[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                new[entry["value"]["path"]] = hub.blobs[entry["value"]["oid"]]
        hub.repositories[name].update(new)
        return self._answer(
            {"success": True, "commitUrl": f"{hub.address}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40, "hookOutput": ""}
        )

    do_GET = do_POST = do_PUT = do_HEAD = _any
