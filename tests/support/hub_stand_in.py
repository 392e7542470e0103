"""A Hub on this machine: as much of its HTTP interface as huggingface_hub uses to create, upload and list."""

import base64
import hashlib
import json
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse


class StandIn:
    """`with StandIn() as hub:` serves at `hub.url`; `files`: what it holds, `requests`: what was asked."""

    def __init__(self):
        self.files: dict[str, dict] = {}  # path → entry of the tree listing
        self.blobs: dict[str, bytes] = {}  # SHA-256 → content, as uploaded
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, token
        self.created: list[dict] = []
        self.private = True
        self.forget = ""  # a pattern of files that commits lose
        self.account: dict = {}  # whom the token belongs to; none: it is refused

    def __enter__(self):
        stand_in = self
        handler = type("Handler", (_Handler,), {"hub": stand_in})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, lines: list[bytes]) -> None:
        for line in lines:
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.add({"path": value["path"], "size": len(content), "oid": oid})
            elif item["key"] == "lfsFile":
                size = len(self.blobs[value["oid"]])
                lfs = {"oid": value["oid"], "size": size, "pointerSize": 134}
                self.add({"path": value["path"], "size": size, "oid": "0" * 40, "lfs": lfs})
            elif item["key"] == "deletedFile":
                del self.files[value["path"]]

    def add(self, entry: dict) -> None:
        if not fnmatch(entry["path"], self.forget):
            self.files[entry["path"]] = entry | {"type": "file"}


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn

    def do_POST(self):
        body = self.read()
        if self.path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            self.answer({"url": f"{self.hub.url}/user/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [self.upload_mode(name) for name in names]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"objects": [self.lfs_object(item) for item in json.loads(body)["objects"]]})
        else:
            assert "/commit/" in self.path, self.path
            self.hub.commit(body.splitlines())
            self.answer({"commitOid": "c" * 40, "commitUrl": f"{self.hub.url}/user/model/commit/{'c' * 40}"})

    def do_PUT(self):
        self.hub.blobs[self.path.rsplit("/", 1)[1]] = self.read()
        self.answer({})

    def do_GET(self):
        self.read()
        if "/whoami" in self.path:
            self.answer(self.hub.account, 200 if self.hub.account else 401)
        elif "/tree/" in self.path:
            self.answer(list(self.hub.files.values()))
        else:
            self.answer({"id": "user/model", "sha": "c" * 40, "siblings": [], "tags": [], "private": self.hub.private})

    def upload_mode(self, name: str) -> dict:
        mode = "lfs" if name.endswith(".safetensors") else "regular"
        entry = self.hub.files.get(name, {})
        oid = entry.get("lfs", entry).get("oid")
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def lfs_object(self, item: dict) -> dict:
        known = item["oid"] in self.hub.blobs
        upload = {"upload": {"href": f"{self.hub.url}/store/{item['oid']}"}}
        return item | ({} if known else {"actions": upload})

    def read(self) -> bytes:
        self.hub.requests.append((self.command, urlparse(self.path).path, self.headers.get("authorization")))
        if self.headers.get("Transfer-Encoding") == "chunked":
            return self.read_chunks()
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def read_chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, value, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
