"""A small Hub on the loopback interface for the real clients: repositories in a folder, faults on demand, a log of calls.

with HubServer(folder) as hub:
    hub.users["hf_token"] = ("user", True)
    subprocess.run([...], env=hub.environment(cache, token="hf_token"))
"""

import base64
import json
import os
import re
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import HubStore, Refused

ID = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = []


def route(method, pattern):
    """Register a method of the handler for requests; its groups become arguments, percent-decoded."""

    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *_):
        """Nothing on standard error."""

    @property
    def token(self):
        given = self.headers.get("Authorization", "")
        return given.removeprefix("Bearer ").strip() or None

    def do_any(self):
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        call = {"method": self.command, "path": unquote(parts.path), "query": parts.query, "host": self.headers["Host"],
                "range": self.headers.get("Range"), "authorized": self.token is not None, "status": None}  # fmt: skip
        if "/commit/" in parts.path and length:
            call["header"] = json.loads(self.body.partition(b"\n")[0])["value"]
        self.hub.calls.append(call)
        self.fault = self.hub.fault_for(self.command, unquote(parts.path))
        if self.fault.get("seconds"):
            time.sleep(self.fault["seconds"])
        if self.fault.get("drop"):
            return self.hang_up()
        try:
            if self.fault.get("status"):
                raise Refused(self.fault["status"], "", "a fault on demand")
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(parts.path)
                if match and method in (self.command, "GET" if self.command == "HEAD" else None):
                    return function(
                        self, **{key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    )
            raise Refused(404, "", f"no such endpoint: {self.command} {parts.path}")
        except Refused as refused:
            headers = {
                "X-Error-Code": refused.code,
                "X-Error-Message": refused.message,
                **self.fault.get("headers", {}),
            }
            self.answer({"error": refused.message}, refused.status, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_any

    def hang_up(self):
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, value=None, status=200, headers=None):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, data, status=200, headers=None):
        self.hub.calls_by(self, status)
        if self.fault.get("lost"):
            return self.hang_up()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            keep = self.fault.get("truncate")
            with suppress(OSError):
                self.wfile.write(data if keep is None else data[:keep])
            if keep is not None and keep < len(data):
                self.wfile.flush()
                self.hang_up()

    # ---- users, repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        name, writes = self.hub.user(self.token)
        if name is None:
            raise Refused(401, "", "Invalid username or password.")
        role = "write" if writes else "read"
        self.answer(
            {"type": "user", "name": name, "fullname": name, "orgs": [], "auth": {"accessToken": {"role": role}}}
        )

    @route("POST", "/api/validate-yaml")
    def validate(self):
        self.answer({"errors": [], "warnings": []})

    @route("POST", "/api/repos/create")
    def create(self):
        values = json.loads(self.body)
        name, _ = self.hub.user(self.token)
        owner = values.get("organization") or name
        repo_id = values["name"] if "/" in values["name"] else f"{owner}/{values['name']}"
        private = bool(values.get("private")) or values.get("visibility") == "private"
        try:
            repo, _ = self.hub.create(repo_id, private, self.token)
        except Refused as refused:
            if refused.status != 409:
                raise
            return self.answer({"error": refused.message, "url": f"{self.hub.endpoint}/{repo_id}"}, 409)
        self.answer({"url": f"{self.hub.endpoint}/{repo.id}", "id": repo.id, "name": repo.id})

    @route("DELETE", "/api/repos/delete")
    def delete(self):
        values = json.loads(self.body)
        name, _ = self.hub.user(self.token)
        repo, _ = self.hub.writable(f"{values.get('organization') or name}/{values['name']}", self.token)
        del self.hub.repos[repo.id]
        self.answer({})

    @route("POST", "/api/repos/move")
    def move(self):
        values = json.loads(self.body)
        repo, _ = self.hub.writable(values["fromRepo"], self.token)
        self.hub.repos[values["toRepo"]] = self.hub.repos.pop(repo.id)
        repo.id = values["toRepo"]
        self.answer({})

    @route("PUT", f"/api/models/{ID}/settings")
    def settings(self, repo):
        found, _ = self.hub.writable(repo, self.token)
        values = json.loads(self.body)
        found.private = values.get(
            "private", values.get("visibility") == "private" if "visibility" in values else found.private
        )
        found.gated = values.get("gated", found.gated)
        self.answer(values)

    @route("GET", f"/api/models/{ID}/auth-check(?P<write>/write)?")
    def auth_check(self, repo, write=None):
        (self.hub.writable if write else self.hub.open_files)(repo, self.token)
        self.answer({})

    # ---- reading

    def info_of(self, path, file, expanded=True):
        entry = {"type": "file", "oid": file.git_oid, "size": file.size, "path": path}
        return entry | ({"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {})

    @route("GET", f"/api/models/{ID}(/revision/(?P<revision>[^/]+))?")
    def model_info(self, repo, revision="main"):
        found = self.hub.readable(repo, self.token)
        commit = self.hub.resolve(found, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.git_oid}
                if file.lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        self.answer({"_id": "0" * 24, "id": found.id, "modelId": found.id, "author": found.owner, "sha": commit.id,
                     "private": found.private, "gated": "auto" if found.gated else False, "disabled": False, "tags": [],
                     "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z",
                     "createdAt": "2026-01-01T00:00:00.000Z", "siblings": siblings})  # fmt: skip

    @route("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<below>.*))?")
    def tree(self, repo, revision, below=""):
        found = self.hub.readable(repo, self.token)
        files = self.hub.resolve(found, revision).files
        prefix = f"{below.rstrip('/')}/" if below else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if below and not inside:
            raise Refused(404, "EntryNotFound", "Entry not found")
        folders = {path[: len(prefix) + i] for path in inside for i, c in enumerate(path[len(prefix) :]) if c == "/"}
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        if not recursive:
            inside = {path: file for path, file in inside.items() if "/" not in path[len(prefix) :]}
            folders = {folder for folder in folders if "/" not in folder[len(prefix) :]}
        found_folders = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in sorted(folders)
        ]
        self.answer([*found_folders, *(self.info_of(path, file) for path, file in inside.items())])

    @route("POST", f"/api/models/{ID}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, repo, revision):
        files = self.hub.resolve(self.hub.readable(repo, self.token), revision).files
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        self.answer([self.info_of(path, files[path]) for path in paths if path in files])

    @route("GET", f"/api/models/{ID}/refs")
    def refs(self, repo):
        found = self.hub.readable(repo, self.token)
        named = {"branches": ("refs/heads/", found.branches), "tags": ("refs/tags/", found.tags),
                 "pullRequests": ("refs/pr/", found.pulls)}  # fmt: skip
        values = {key: [{"name": str(name), "ref": f"{prefix}{name}", "targetCommit": commit} for name, commit in refs.items()]
                  for key, (prefix, refs) in named.items()}  # fmt: skip
        self.answer({**values, "converts": []})

    @route("GET", f"/api/models/{ID}/commits/(?P<revision>[^/]+)")
    def commits(self, repo, revision):
        found = self.hub.readable(repo, self.token)
        listed, commit = [], self.hub.resolve(found, revision)
        while commit is not None:
            listed.append({"id": commit.id, "title": commit.title, "message": commit.description,
                           "date": "2026-01-01T00:00:00.000Z", "authors": [{"user": commit.author}]})  # fmt: skip
            commit = found.commits.get(commit.parent)
        self.answer(listed)

    @route("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        found = self.hub.open_files(repo, self.token)
        commit = self.hub.resolve(found, revision)
        if path not in commit.files:
            self.hub.calls_by(self, 404)
            return self.answer(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.id}
            )
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:  # as on the Hub, the content lies on another host
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
            headers["Location"] = f"http://localhost:{self.server.server_port}/content/{file.sha256}"
            return self.send(b"", 302, headers)
        self.send_content(file.sha256, headers)

    @route("GET", "/content/(?P<sha256>[0-9a-f]{64})")
    def content(self, sha256):
        self.send_content(sha256, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def send_content(self, sha256, headers):
        data, status = (self.hub.blobs / sha256).read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        self.send(
            data, status, {**headers, "Content-Length": str(len(data)), "Content-Type": "application/octet-stream"}
        )

    # ---- writing

    @route("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo, revision):
        found = self.hub.readable(repo, self.token)
        if "create_pr" not in self.query:
            self.hub.writable(repo, self.token)
        held = self.hub.resolve(found, revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path, lfs = file["path"], self.hub.is_lfs(file["path"], file["size"])
            oid = held[path].etag if path in held and held[path].lfs == lfs else None
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    @route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        self.hub.readable(repo, self.token)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = {"href": f"{self.hub.endpoint}/upload/{wanted['oid']}", "header": {}}
            verify = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify", "header": {}}
            held = (self.hub.blobs / wanted["oid"]).exists()
            objects.append({**wanted, **({} if held else {"actions": {"upload": href, "verify": verify}})})
        self.answer({"transfer": "basic", "objects": objects})

    @route("PUT", "/upload/(?P<sha256>[0-9a-f]{64})")
    def lfs_upload(self, sha256):
        if self.hub.put_blob(self.body, True).sha256 != sha256:
            raise Refused(400, "", "the content is not what was announced")
        self.answer({})

    @route("POST", rf"/{ID}\.git/info/lfs/objects/verify")
    def lfs_verify(self, repo):
        self.answer({})

    @route("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)")
    def commit(self, repo, revision):
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        pull = self.query.get("create_pr") == "1"
        with self.hub.lock:
            found = self.hub.readable(repo, self.token) if pull else self.hub.writable(repo, self.token)[0]
            head = self.hub.resolve(found, revision)
            if header.get("parentCommit") not in (None, head.id):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                self.apply(files, line["key"], line["value"])
            words = {"title": header["summary"], "description": header["description"]}
            made, number = self.hub.add_commit(
                found, revision, files, author=self.hub.user(self.token)[0], pull=pull, **words
            )
        url = f"{self.hub.endpoint}/{repo}"
        values = {"success": True, "commitOid": made.id, "commitUrl": f"{url}/commit/{made.id}", "hookOutput": ""}
        self.answer(values | ({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}))

    def apply(self, files, key, value):
        if key == "file":
            data = base64.b64decode(value["content"])
            files[value["path"]] = self.hub.put_blob(data, False)
        elif key == "lfsFile":
            blob = self.hub.blobs / value["oid"]
            if not blob.exists():
                raise Refused(400, "", f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = self.hub.put_blob(blob.read_bytes(), True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(400, "EntryNotFound", f"no file {value['path']} to delete")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]
        elif key != "header":
            raise Refused(400, "", f"unknown operation {key}")

    @route("POST", f"/api/models/{ID}/branch/(?P<name>[^/]+)")
    def create_branch(self, repo, name):
        found, _ = self.hub.writable(repo, self.token)
        if name in found.branches:
            raise Refused(409, "", f"Reference already exists: {name}")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint") or "main"
        found.branches[name] = self.hub.resolve(found, start).id
        self.answer({})

    @route("DELETE", f"/api/models/{ID}/branch/(?P<name>[^/]+)")
    def delete_branch(self, repo, name):
        found, _ = self.hub.writable(repo, self.token)
        del found.branches[name]
        self.answer({})

    @route("POST", f"/api/models/{ID}/tag/(?P<revision>[^/]+)")
    def create_tag(self, repo, revision):
        found, _ = self.hub.writable(repo, self.token)
        found.tags[json.loads(self.body)["tag"]] = self.hub.resolve(found, revision).id
        self.answer({})

    @route("POST", f"/api/models/{ID}/discussions")
    def discuss(self, repo):
        found = self.hub.readable(repo, self.token)
        number = len(found.pulls) + 1
        found.pulls[number] = self.hub.resolve(found, "main").id
        self.answer({"num": number})


class HubServer(HubStore):
    """A Hub that listens on a free port while it is entered; see the module.

    `calls` lists every request: method, path, query, host, range, status.  `fail` arranges faults.
    """

    def __init__(self, root):
        super().__init__(root)
        self.root = root
        self.calls, self.faults = [], []

    def __enter__(self):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.hub, self.http.daemon_threads = self, True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def fail(self, method, path, times=1, after=0, **fault):
        """Have matching requests fail.

        Args:
            method, path: of the requests, the path as a regular expression.
            times: how many of them; `after` that many that succeed.
            **fault: `status` and `headers`; `drop` (no answer), `lost` (done, but no answer), `truncate` (after that many
                bytes of the body), `seconds` (of waiting).
        """
        self.faults.append({"method": method, "path": re.compile(path), "times": times, "after": after, **fault})

    def fault_for(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault["method"] == method and fault["path"].search(path):
                    if fault["after"] > 0:
                        fault["after"] -= 1
                    elif fault["times"] > 0:
                        fault["times"] -= 1
                        return fault
        return {}

    def calls_by(self, handler, status):
        """Note the status of the answer that a handler gives."""
        path = unquote(urlsplit(handler.path).path)
        for call in reversed(self.calls):
            if call["path"] == path and call["method"] == handler.command and call["status"] is None:
                call["status"] = status
                break

    def asked(self, method=None):
        """``[(method, path, status)]`` of all calls so far."""
        return [(c["method"], c["path"], c["status"]) for c in self.calls if method in (None, c["method"])]

    def environment(self, cache, token=None, **more):
        """Environment variables of a client process that knows this Hub alone."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        values = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1",
                  "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        return kept | values | ({"HF_TOKEN": token} if token else {}) | {k: str(v) for k, v in more.items()}
