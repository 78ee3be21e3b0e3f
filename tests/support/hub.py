"""A server in a thread that speaks the Hub's API: repositories, revisions, redirects to files, uploads, and faults."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from support.servers import InThread

WEIGHTS = (".safetensors", ".rac", ".bin", ".gguf")


def git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repository:
    """Commits of one model: each is its files by name; `refs` are branches."""

    def __init__(self, name):
        self.name = name
        self.commits, self.refs, self.gated, self.private, self.asked_private = {}, {}, False, False, None

    def commit(self, files, ref="main"):
        sha = hashlib.sha1(b"".join(n.encode() + d for n, d in sorted(files.items())) + ref.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def at(self, revision):
        return self.refs.get(revision, revision)


class Hub(InThread):
    """`token` opens what is gated or private and is needed to write. Faults: `busy` answers of 429, then all is well;
    `drops` large answers end in the middle; `lies` maps names to other bytes than their SHA-256 states; `page` entries
    of a listing come at once; `plain`: small files come whole, whatever range is asked for."""

    def __init__(self, token="hf_secret", page=1000):
        super().__init__(_Handler)
        self.token, self.page, self.repos, self.stored = token, page, {}, {}
        self.busy, self.retry_after, self.drops, self.lies, self.plain = 0, "0", 0, {}, False
        self.requests, self.sent, self.leaked = [], 0, False

    def add(self, repo, files, ref="main"):
        """A commit with these files; returns its hash."""
        return self.repos.setdefault(repo, Repository(repo)).commit(files, ref)

    def asked(self, part):
        """Requests whose path has this part, as (method, path, range)."""
        return [r for r in self.requests if part in r[1]]


@contextmanager
def serving(monkeypatch, folder):
    """A Hub that `huggingface_hub` asks in this process; cache and token are in a folder."""
    from huggingface_hub import constants, utils

    from rac.container import hub as door
    from rac.container import remote

    with Hub() as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_TOKEN_PATH": str(folder / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for module in (remote, door):
            monkeypatch.setattr(module, "BACKOFF", 0.001)
        utils.close_session()
        yield server
        utils.close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_all()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_all(self):
        hub, url = self.server, urlsplit(self.path)
        self.path_, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with hub.lock:
            hub.requests.append((self.command, self.path_, self.headers.get("Range")))
            busy, hub.busy = hub.busy > 0, max(0, hub.busy - 1)
        if busy:
            return self.answer(429, b"slow down", {"Retry-After": hub.retry_after})
        for pattern, action in _ROUTES:
            if match := re.fullmatch(pattern, self.path_):
                return action(self, *match.groups())
        return self.answer(404, b"no such route")

    # --- answers ---

    def answer(self, status, body=b"", headers=None):
        hub = self.server
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with hub.lock:
            drop = len(body) > 4096 and hub.drops > 0
            hub.drops -= drop
            end = len(body) * (hub.drops % 7 + 1) // 9 if drop else len(body)
            hub.sent += end
        self.wfile.write(body[:end])
        if drop:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def json(self, value, status=200, headers=None):
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def refuse(self, status, code, message):
        self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def known(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def repository(self, name, revision=None):
        """(repository, commit), or None where the refusal was sent."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.known):
            return self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
        sha = repo.at(revision or "main")
        if sha not in repo.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha

    # --- reading ---

    def info(self, name, revision=None):
        if found := self.repository(name, revision):
            files = [{"rfilename": n} for n in found[0].commits[found[1]]]
            self.json({"id": name, "sha": found[1], "siblings": files, "private": found[0].private, "tags": []})

    def tree(self, name, revision):
        if not (found := self.repository(name, revision)):
            return None
        rows = []
        for n, data in sorted(found[0].commits[found[1]].items()):
            row = {"type": "file", "path": n, "size": len(data), "oid": git_oid(data)}
            if n.endswith(WEIGHTS):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            rows.append(row)
        start, page = int(self.query.get("cursor", ["0"])[0]), self.server.page
        more = {}
        if start + page < len(rows):
            url = f"{self.server.endpoint}/api/models/{name}/tree/{revision}?recursive=true&cursor={start + page}"
            more["Link"] = f'<{url}>; rel="next"'
        return self.json(rows[start : start + page], headers=more)

    def resolve(self, name, revision, file):
        if not (found := self.repository(name, revision)):
            return None
        repo, sha = found
        if name != repo.name:  # it was renamed
            return self.answer(307, b"", {"Location": f"/{repo.name}/resolve/{revision}/{file}"})
        if repo.gated and not self.known:
            return self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", "Access is restricted")
        files = repo.commits[sha]
        if file not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = files[file]
        stated = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not file.endswith(WEIGHTS):
            if self.server.plain:
                return self.answer(200, data, stated | {"ETag": f'"{git_oid(data)}"'})
            return self.part(data, stated | {"ETag": f'"{git_oid(data)}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.server.stored[oid] = self.server.lies.get(file, data)
        stated |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"'}
        return self.answer(302, b"", stated | {"Location": f"http://localhost:{self.server.server_port}/cdn/{oid}"})

    def cdn(self, oid):
        if "Authorization" in self.headers:
            self.server.leaked = True
        self.part(self.server.stored[oid], {"ETag": f'"{oid}"'})

    def part(self, data, stated):
        asked = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        if not asked:
            return self.answer(200, data, stated)
        first = int(asked[1])
        last = min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self.answer(206, data[first : last + 1], stated | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # --- writing ---

    def create(self):
        if not self.known:
            return self.refuse(401, "", "Invalid username or password.")
        given = json.loads(self.body)
        name = f"{given['organization']}/{given['name']}"
        url = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.repos:
            return self.json({"error": "You already created this model repo"} | url, 409)
        repo = self.server.repos[name] = Repository(name)
        repo.asked_private = given.get("visibility", given.get("private"))
        repo.commit({".gitattributes": b"*.rac filter=lfs\n"})
        return self.json(url)

    def branch(self, name, ref):
        repo = self.server.repos[name]
        if ref in repo.refs:
            return self.json({"error": "Reference already exists"}, 409)
        repo.refs[ref] = repo.refs["main"]
        return self.json({})

    def preupload(self, name, revision):
        if not self.known:
            return self.refuse(401, "", "Invalid username or password.")
        if not (found := self.repository(name, revision)):
            return None
        there = found[0].commits[found[1]]
        rows = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = path.endswith(WEIGHTS)
            old = there.get(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else git_oid(old)
            rows.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return self.json({"files": rows})

    def batch(self, name):
        rows = []
        for found in json.loads(self.body)["objects"]:
            row = {"oid": found["oid"], "size": found["size"]}
            if found["oid"] not in self.server.stored:
                row["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{found['oid']}"}}
            rows.append(row)
        self.json({"transfer": "basic", "objects": rows})

    def store(self, oid):
        good = hashlib.sha256(self.body).hexdigest() == oid
        if good:
            self.server.stored[oid] = self.body
        self.answer(200 if good else 400)

    def commit(self, name, revision):
        if not self.known:
            return self.refuse(401, "", "Invalid username or password.")
        if not (found := self.repository(name, revision)):
            return None
        files = dict(found[0].commits[found[1]])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        sha = found[0].commit(files, revision)
        return self.json({"commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def yaml(self):
        self.json({"errors": [], "warnings": []})


_ID = "([^/]+/[^/]+)"
_ROUTES = [
    (f"/api/models/{_ID}", _Handler.info),
    (f"/api/models/{_ID}/revision/(.+)", _Handler.info),
    (f"/api/models/{_ID}/tree/(.+)", _Handler.tree),
    (f"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    (f"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    (f"/api/models/{_ID}/branch/(.+)", _Handler.branch),
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.yaml),
    (f"/{_ID}\\.git/info/lfs/objects/batch", _Handler.batch),
    ("/lfs/(.+)", _Handler.store),
    ("/cdn/(.+)", _Handler.cdn),
    (f"/{_ID}/resolve/([^/]+|refs/pr/\\d+)/(.+)", _Handler.resolve),
]
