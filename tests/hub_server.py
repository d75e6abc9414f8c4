"""
A small server that speaks as much of the Hugging Face hub's API as `datasets.load_dataset` and
`huggingface_hub.snapshot_download` ask of it.

It serves a folder of datasets laid out OWNER/NAME/files, and of models laid out models/OWNER/NAME/files, on the
loopback interface; point HF_ENDPOINT at `url`. Weights lie elsewhere, as on the hub: who asks for them is sent to /cdn.
"""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".h5")


def _entry(repo, path):
    "A file or folder of the repository as the hub describes it"
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    data = path.read_bytes()
    entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def _answer(self, status, data=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, what): self._answer(200, json.dumps(what).encode(), Content_Type="application/json")

    def do_GET(self):
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.server.asked.append((self.command, url.path))
        root = self.server.root
        if parts[0] == "cdn":                   # what /resolve/ sent here
            file = root.joinpath("models", *parts[1:])
            return self._file(file.read_bytes()) if file.is_file() else self._answer(404)
        # /datasets/OWNER/NAME/resolve/REVISION/FILE, and without the first word for a model
        kind, address = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        if len(address) > 4 and address[2] == "resolve":
            repo = self._repo(kind, address[:2])
            if not self._is_there(kind, repo, address[3]):
                return
            file = repo.joinpath(*address[4:])
            if not file.is_file():
                return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            data = file.read_bytes()
            if kind == "model" and file.name.endswith(LARGE):
                return self._answer(302, X_Linked_Size=str(len(data)), X_Repo_Commit=COMMIT,
                                    X_Linked_ETag=f'"{hashlib.sha256(data).hexdigest()}"',
                                    Location=f"{self.server.url}/cdn/{'/'.join(map(quote, address[:2] + address[4:]))}")
            return self._file(data)
        # /api/(datasets|models)/OWNER/NAME/(revision|tree)/REVISION/PATH
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in ("datasets", "models"):
            kind = parts[1][:-1]
            repo = self._repo(kind, parts[2:4])
            if not self._is_there(kind, repo, *parts[5:6]):
                return
            what, path = "".join(parts[4:5]), repo.joinpath(*parts[6:])
            if what in ("", "revision"):
                files = [p.relative_to(repo).as_posix() for p in sorted(repo.rglob("*")) if p.is_file()]
                return self._json({"id": "/".join(parts[2:4]), "sha": COMMIT, "private": False, "tags": [],
                                   "downloads": 0, "siblings": [{"rfilename": name} for name in files]})
            if what == "tree":
                if not path.is_dir():
                    return self._answer(404, X_Error_Code="EntryNotFound")
                deep = parse_qs(url.query).get("recursive", ["false"])[0].lower() == "true"
                return self._json([_entry(repo, p) for p in sorted(path.rglob("*") if deep else path.iterdir())])
        self._answer(404)

    def _repo(self, kind, name): return self.server.root.joinpath(*["models"] * (kind == "model"), *name)

    def _is_there(self, kind, repo, revision="main"):
        "Whether there is such a repository, and revision of it; answers if not"
        if not repo.is_dir():
            # of a model it tells nobody whether it is missing or private
            self._answer(404 if kind == "dataset" else 401, X_Error_Code="RepoNotFound")
        elif kind == "model" and revision not in ("main", COMMIT):
            self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        else:
            return True

    def _file(self, data):
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):     # who streams asks so
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            return self._answer(206, data[first:last + 1], ETag=tag, X_Repo_Commit=COMMIT,
                                Content_Range=f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
        self._answer(200, data, ETag=tag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


class HubServer:
    "`with HubServer(folder) as hub:` serves until the block is left; `hub.asked` lists (method, path) of all requests"
    def __init__(self, root):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.root, self._server.asked = Path(root), []
        self.asked, self.url = self._server.asked, f"http://127.0.0.1:{self._server.server_port}"
        self._server.url = self.url

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
