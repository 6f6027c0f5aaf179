"""A Hub of the few endpoints that huggingface_hub calls when it reads a model and when it writes: real HTTP, commits in memory.

What it keeps is what a test reads back: ``hub.repos["dataset", "org/name"].files("main")``. Refusals are those of the Hub: 401 for
what is missing or private, 403 for gated files and for tokens without the right, 404 for a revision, 412 for a parent that is not
the newest commit, 429 with Retry-After. With ``echo`` every refusal repeats the Authorization header, as no server should. Every
request is noted in ``hub.requests``.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER, READER = "hf_OwnerOwnerOwnerOwnerOwnerOwner00", "hf_ReaderReaderReaderReaderReader11"
USERS = {OWNER: "owner", READER: "reader"}
LARGE = (".safetensors", ".png")  # what .gitattributes of the Hub keeps outside of git


def blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Commits ``{sha: (parent, {path: bytes})}`` and the refs that point to them."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    claimed: dict = field(default_factory=dict)  # sizes told instead of the true ones
    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)  # pull requests: title, author

    def commit(self, ref, files, parent=None):
        made = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        sha = hashlib.sha1(json.dumps([parent, made, len(self.commits)], sort_keys=True).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = (parent, dict(files)), sha
        return sha

    def sha(self, revision):
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision="main"):
        return self.commits[self.sha(revision)][1]

    def tree(self, revision):
        entries = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": p}
            for p in sorted({f.rpartition("/")[0] for f in self.files(revision)} - {""})
        ]
        for path, data in self.files(revision).items():
            entry = {"type": "file", "oid": blob_id(data), "size": self.claimed.get(path, len(data)), "path": path}
            if path.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (digest.encode(), len(data))
                entry |= {"oid": blob_id(pointer), "lfs": {"oid": digest, "size": entry["size"], "pointerSize": len(pointer)}}
            entries.append(entry)
        return entries


class Hub:
    """The state that requests change; ``limited`` is a pattern of paths that answer 429."""

    def __init__(self):
        self.repos, self.large, self.requests = {}, {}, []
        self.limited, self.echo, self.before_commit, self.endpoint = None, False, None, None

    def add(self, name, files, kind="model", **options):
        repository = self.repos[kind, name] = Repository(kind, name, **options)
        return repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files})


class Refusal(Exception):
    def __init__(self, status, message, code=None, **headers):
        self.status, self.message, self.headers = (
            status,
            message,
            {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers,
        )


@contextmanager
def running():
    """A hub at ``hub.endpoint`` for as long as the block takes."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        hub, parts = self.hub, urlsplit(self.path)
        self.query, self.address = {k: v[0] for k, v in parse_qs(parts.query).items()}, unquote(parts.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorization = self.headers.get("Authorization") or ""
        self.user = USERS.get(authorization.removeprefix("Bearer "))
        hub.requests.append((self.command, self.address))
        try:
            if hub.limited and re.search(hub.limited, self.address):
                raise Refusal(429, "too many requests", **{"Retry-After": "77"})
            if authorization and self.user is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for method, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, self.address)
                if method == self.command and found:
                    return answer(self, **found.groupdict())
            raise Refusal(404, f"no endpoint {self.command} {self.address}")
        except Refusal as refusal:
            said = f"{refusal.message} (you sent {authorization})" if hub.echo else refusal.message
            headers = refusal.headers | {"X-Error-Message": said}
            self._send(refusal.status, json.dumps({"error": said}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, status, data=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, document):
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _repository(self, kind, name, writes=False):
        repository = self.hub.repos.get((kind, name))
        if repository is None or (repository.private and self.user is None):
            raise Refusal(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        if writes and self.user is None:
            raise Refusal(401, "Repository not found", "RepoNotFound")
        return repository

    def _revision(self, repository, revision):
        if repository.sha(revision) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository.sha(revision)

    def info(self, kind, name, revision="main"):
        repository = self._repository(kind, name)
        sha = self._revision(repository, revision)
        names = [{"rfilename": path} for path in repository.files(sha)]
        self._json(
            {"_id": "0", "id": name, "sha": sha, "private": repository.private, "gated": repository.gated, "siblings": names}
        )

    def tree(self, kind, name, revision):
        repository = self._repository(kind, name)
        self._json(repository.tree(self._revision(repository, revision)))

    def resolve(self, kind, name, revision, path):
        repository = self._repository("dataset" if kind else "model", name)
        sha = self._revision(repository, revision)
        if repository.gated and self.user != "owner":
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        if path not in repository.files(sha):
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        data = repository.files(sha)[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else blob_id(data)
        self._send(200, data, {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Length": str(len(data))})

    def create(self):
        asked = json.loads(self.body)
        kind, name = asked.get("type") or "model", f"{asked['organization'] or self.user}/{asked['name']}"
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        if (kind, name) in self.hub.repos:
            return self._send(
                409, json.dumps({"url": f"{self.hub.endpoint}/{kind}s/{name}", "error": "You already created this"}).encode()
            )
        if self.user != "owner":
            raise Refusal(403, "You don't have the rights to create a repository under this namespace")
        self.hub.add(name, {}, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json({"url": f"{self.hub.endpoint}/{kind}s/{name}", "id": "0"})

    def validate(self):
        card = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", json.loads(self.body)["content"], re.DOTALL)
        if card:
            yaml.safe_load(card.group(1))
        self._json({"warnings": [], "errors": []})

    def preupload(self, kind, name, revision):
        repository = self._repository(kind, name, writes=True)
        files = repository.files(self._revision(repository, revision))

        def oid(path):
            data = files.get(path)
            return None if data is None else hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else blob_id(data)

        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
        listed = zip(paths, modes, strict=True)
        self._json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False, "oid": oid(p)} for p, mode in listed]})

    def batch(self, kind, name):
        self._repository("dataset" if kind else "model", name, writes=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}", "header": {}}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.large else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def store(self, digest):
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(422, "the content has another hash")
        self.hub.large[digest] = self.body
        self._send(200)

    def commit(self, kind, name, revision):
        repository = self._repository(kind, name, writes=True)
        if self.hub.before_commit:
            self.hub.before_commit(repository)
        opens = self.query.get("create_pr") == "1"
        if not opens and self.user != "owner" and not revision.startswith("refs/pr/"):
            raise Refusal(403, "You need write access")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        head = self._revision(repository, revision)
        if header.get("parentCommit") not in (None, head):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.files(head))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del files[value["path"]]
        if opens:
            repository.requests.append({"title": header["summary"], "author": self.user})
            revision = f"refs/pr/{len(repository.requests)}"
        sha = repository.commit(revision, files, head)
        at = f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        request = {"pullRequestUrl": f"{at}/discussions/{len(repository.requests)}"} if opens else {}
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{at}/commit/{sha}", **request})

    def discussions(self, kind, name):
        repository = self._repository(kind, name)
        told = {
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": name, "type": kind},
        }
        listed = [
            told | {"title": request["title"], "num": i + 1, "author": {"name": request["author"]}}
            for i, request in enumerate(repository.requests)
        ]
        self._json({"discussions": listed, "count": len(listed), "start": 0})

    def whoami(self):
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        self._json({"name": self.user, "type": "user"})


_API = r"/api/(?P<kind>model|dataset)s/(?P<name>[\w.-]+/[\w.-]+)"
_PAGE = r"/(?P<kind>datasets/)?(?P<name>[\w.-]+/[\w.-]+?)"
_ROUTES = [
    ("GET", _API, _Handler.info),
    ("GET", _API + r"/revision/(?P<revision>.+)", _Handler.info),
    ("GET", _API + r"/tree/(?P<revision>.+)", _Handler.tree),
    ("GET", _API + "/discussions", _Handler.discussions),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("GET", _PAGE + r"/resolve/(?P<revision>[\w.-]+|refs/pr/\d+)/(?P<path>.+)", _Handler.resolve),
    ("HEAD", _PAGE + r"/resolve/(?P<revision>[\w.-]+|refs/pr/\d+)/(?P<path>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", _API + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", _PAGE + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(?P<digest>[0-9a-f]{64})", _Handler.store),
    ("POST", _API + r"/commit/(?P<revision>.+)", _Handler.commit),
]


def isolate(monkeypatch, folder):
    """No token, cache or Xet of this machine. huggingface_hub reads the environment once, so that its constants are replaced."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, place in {"HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens"}.items():
        monkeypatch.setattr(constants, name, str(folder / place))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def point(monkeypatch, endpoint):
    """What HF_ENDPOINT does at import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
