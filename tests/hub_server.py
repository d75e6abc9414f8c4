"""
A small server that speaks as much of the Hugging Face hub's API as `datasets.load_dataset` asks of it.

It serves a folder of datasets laid out OWNER/NAME/files, on the loopback interface; point HF_ENDPOINT at `url`.
"""
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _entry(repo, path):
    "A file or folder of the repository as the hub describes it"
    name = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


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
        # /datasets/OWNER/NAME/resolve/REVISION/FILE
        if parts[0] == "datasets" and len(parts) > 5 and parts[3] == "resolve":
            file = root.joinpath(*parts[1:3], *parts[5:])
            if not file.is_file():
                return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            data = file.read_bytes()
            tag = f'"{hashlib.sha1(data).hexdigest()}"'
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):     # who streams asks so
                first, last = map(int, wanted.groups())
                return self._answer(206, data[first:last + 1], ETag=tag, X_Repo_Commit=COMMIT,
                                    Content_Range=f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
            return self._answer(200, data, ETag=tag, X_Repo_Commit=COMMIT)
        # /api/datasets/OWNER/NAME/(revision|tree)/REVISION/PATH
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            repo = root.joinpath(*parts[2:4])
            if not repo.is_dir():
                return self._answer(404, X_Error_Code="RepoNotFound")
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

    do_HEAD = do_GET


class HubServer:
    "`with HubServer(folder) as hub:` serves until the block is left; `hub.asked` lists (method, path) of all requests"
    def __init__(self, root):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.root, self._server.asked = Path(root), []
        self.asked, self.url = self._server.asked, f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
