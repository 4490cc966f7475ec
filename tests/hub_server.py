"""A Hub for tests on 127.0.0.1: the endpoints that huggingface_hub uploads to and downloads from, over real HTTP.

Two ports, as the Hub has two hosts: one for the API and small files, which knows tokens, and one for large files,
which is reached by signed URLs and must never be sent a token. Commits, branches, LFS (basic and multipart, verified),
private repositories and their error codes behave as documented for the Hub; Xet is not spoken.
"""

import base64
import hashlib
import json
import secrets
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import yaml


CHUNK_SIZE = 40_000
LARGE_SUFFIXES = (".safetensors", ".png", ".bin", ".pkl")


@dataclass
class Repository:
    private: bool
    # Branch or commit to the commit's files, {path: content}; the order of `commits` is theirs.
    commits: dict[str, dict] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision):
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    def commit(self, branch, files, message):
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(f"{parent}{message}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision="main"):
        return self.commits[self.resolve(revision)]


@dataclass
class Fault:
    """Break the connection `times` times, at requests whose method and path hold these, after so many bytes."""

    method: str
    path: str
    times: int = 1
    after_bytes: int = 0


def is_large(path):
    return path.endswith(LARGE_SUFFIXES)


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class HubServer:
    """`with HubServer({"hf_token": ("user", "write")}) as server:` serves at `server.endpoint`."""

    def __init__(self, tokens):
        self.reset(tokens)

    def reset(self, tokens):
        """As at the start, at the same address."""
        self.tokens, self.repositories, self.large_files = dict(tokens), {}, {}
        self.parts, self.signatures, self.faults = {}, set(), []
        # (host, method, path, status); status None for a connection that broke.
        self.requests, self.problems, self.echo_token = [], [], False
        self.lock = threading.RLock()

    def __enter__(self):
        self.servers = {}
        for host in ("hub", "storage"):
            handler = type(f"{host}Handler", (_Handler,), {"state": self, "host": host})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            self.servers[host] = server
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def url(self, host):
        return f"http://127.0.0.1:{self.servers[host].server_port}"

    @property
    def endpoint(self):
        return self.url("hub")

    def signed(self, path):
        with self.lock:
            signature = secrets.token_hex(8)
            self.signatures.add(signature)
        return f"{self.url('storage')}{path}?signature={signature}"

    def create(self, repo_id, private=False):
        repository = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.repositories[repo_id] = repository
        return repository

    def count(self, method, path):
        return sum(m == method and path in p and status == 200 for _, m, p, status in self.requests)


class _Broken(Exception):
    pass


class _Answer(Exception):
    def __init__(self, status, body=None, **headers):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubServer
    host: str

    def log_message(self, *_):
        pass

    def do(self):
        self.path, _, query = self.path.partition("?")
        self.parts = [unquote(part) for part in self.path.strip("/").split("/")]
        self.query, self.read = parse_qs(query), False
        status, self.fault = None, None
        with self.state.lock:
            for fault in self.state.faults:
                if fault.times and fault.method == self.command and fault.path in self.path:
                    fault.times -= 1
                    self.fault = fault
                    break
        try:
            try:
                answer = getattr(self, self.host)()
            except _Answer as error:
                answer = error
            except (_Broken, ConnectionError):
                raise
            except Exception as error:
                self.state.problems.append(f"{self.command} {self.path}: {error!r}")
                answer = _Answer(500, {"error": repr(error)})
            if not self.read:
                self.body()
            self.send(answer)
            status = answer.status
        except (_Broken, ConnectionError):
            self.close_connection = True
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        finally:
            with self.state.lock:
                self.state.requests.append((self.host, self.command, self.path, status))

    do_GET = do_HEAD = do_POST = do_PUT = do

    def send(self, answer):
        self.send_response(answer.status)
        # HEAD says how long the answer to GET would be.
        self.send_header("Content-Length", answer.headers.pop("Content-Length", str(len(answer.body))))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None:
            self.wfile.write(answer.body[: self.fault.after_bytes])
            self.wfile.flush()
            raise _Broken
        self.wfile.write(answer.body)

    def body(self):
        """The request's body; a fault in an upload breaks off within it."""
        self.read, chunks, size = True, [], 0
        limit = self.fault.after_bytes if self.fault is not None and self.command == "PUT" else None

        def read(amount):
            nonlocal size
            while amount:
                if limit is not None and size >= limit:
                    raise _Broken
                chunk = self.rfile.read(min(amount, 4096))
                if not chunk:
                    raise _Broken
                chunks.append(chunk)
                size, amount = size + len(chunk), amount - len(chunk)

        if self.headers.get("Transfer-Encoding") == "chunked":
            while amount := int(self.rfile.readline(), 16):
                read(amount)
                self.rfile.readline()
            self.rfile.readline()
        else:
            read(int(self.headers.get("Content-Length", 0)))
        return b"".join(chunks)

    def json(self):
        return json.loads(self.body())

    # The storage host: signed URLs, no tokens

    def storage(self):
        if "Authorization" in self.headers:
            self.state.problems.append(f"token sent to the storage: {self.command} {self.path}")
            return _Answer(400, {"error": "only one authentication mechanism is allowed"})
        if self.query.get("signature", [""])[0] not in self.state.signatures:
            return _Answer(403, {"error": "signature"})
        kind, oid, *part = self.parts
        if self.command == "PUT":
            content = self.body()
            if kind == "part":
                self.state.parts[oid, int(part[0])] = content
                return _Answer(200, b"", ETag=f'"{blob_id(content)}"')
            if sha256(content) != oid:
                return _Answer(400, {"error": "checksum"})
            self.state.large_files[oid] = content
            return _Answer(200, b"")
        if self.command == "POST":
            request = self.json()
            parts = [self.state.parts[oid, entry["partNumber"]] for entry in request["parts"]]
            if [f'"{blob_id(part)}"' for part in parts] != [entry["etag"] for entry in request["parts"]]:
                return _Answer(400, {"error": "etag"})
            if sha256(b"".join(parts)) != oid:
                return _Answer(400, {"error": "checksum"})
            self.state.large_files[oid] = b"".join(parts)
            return _Answer(200)
        content, status, headers = self.state.large_files[oid], 200, {}
        if wanted := self.headers.get("Range"):
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            end = int(end) if end else len(content) - 1
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[int(start) : end + 1], 206
        return _Answer(status, content, **headers)

    # The Hub itself

    def user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.state.tokens:
            echo = token if self.state.echo_token else ""
            error = f"Invalid credentials in Authorization header{echo and f': {echo}'}"
            raise _Answer(401, {"error": error}, X_Error_Message=error)
        return self.state.tokens.get(token, (None, None))

    def repository(self, repo_id, write=False):
        name, role = self.user()
        repository = self.state.repositories.get(repo_id)
        mine = name is not None and repo_id.split("/")[0] == name
        if repository is None or (repository.private and not mine):
            status = 404 if name else 401
            message = "Repository not found" if name else "Invalid username or password."
            raise _Answer(status, {"error": message}, X_Error_Code="RepoNotFound", X_Error_Message=message)
        if write and not (mine and role == "write"):
            raise _Answer(403, {"error": "write"}, X_Error_Message="you must use a write token of the repository")
        return repository

    def resolve(self, repository, revision):
        oid = repository.resolve(revision)
        if oid is None:
            raise _Answer(404, {"error": "revision"}, X_Error_Code="RevisionNotFound")
        return oid

    def hub(self):
        parts = self.parts
        if self.path == "/api/whoami-v2":
            name, role = self.user()
            if name is None:
                return _Answer(401, {"error": "Invalid username or password."})
            return _Answer(200, {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})
        if self.path == "/api/validate-yaml":
            return self.validate_yaml()
        if self.path == "/api/repos/create":
            return self.create_repository()
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs_batch("/".join(parts[:2]).removesuffix(".git"))
        if self.path.endswith(".git/info/lfs/verify"):
            request = self.json()
            known = len(self.state.large_files.get(request["oid"], b"")) == request["size"]
            return _Answer(200 if known else 404)
        if parts[:2] == ["api", "models"]:
            repo_id, action, arguments = "/".join(parts[2:4]), parts[4:5], parts[5:]
            if not action or action == ["revision"]:
                return self.info(repo_id, arguments[0] if arguments else "main")
            return getattr(self, action[0].replace("-", "_"))(repo_id, *arguments)
        if parts[2:3] == ["resolve"]:
            return self.resolve_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return _Answer(404, {"error": f"unknown to this Hub: {self.command} {self.path}"})

    def validate_yaml(self):
        content = self.json()["content"]
        errors, warnings, metadata = [], [], {}
        if content.startswith("---\n") and "\n---\n" in content[4:]:
            metadata = yaml.safe_load(content[4:].split("\n---\n")[0])
        else:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        if metadata.get("license", "mit") not in ("mit", "apache-2.0", "cc-by-4.0", "other"):
            errors.append({"message": f'"license" must be one of mit, …, not {metadata["license"]}'})
        return _Answer(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def create_repository(self):
        request, (name, role) = self.json(), self.user()
        repo_id = f"{request.get('organization') or name}/{request['name']}"
        url = f"{self.state.endpoint}/{repo_id}"
        if name is None or role != "write" or repo_id.split("/")[0] != name:
            message = "You don't have the rights to create a model under this namespace"
            return _Answer(403, {"error": message}, X_Error_Message=message)
        if repo_id in self.state.repositories:
            return _Answer(409, {"error": "You already created this model repo", "url": url})
        self.state.create(repo_id, private=request.get("visibility") == "private")
        return _Answer(200, {"url": url})

    def auth_check(self, repo_id, *write):
        self.repository(repo_id, write=bool(write))
        return _Answer(200)

    def branch(self, repo_id, name):
        repository, request = self.repository(repo_id, write=True), self.json()
        if name in repository.branches:
            return _Answer(409, {"error": "Reference already exists"})
        repository.branches[name] = self.resolve(repository, request.get("startingPoint", "main"))
        return _Answer(200)

    def info(self, repo_id, revision):
        repository = self.repository(repo_id)
        oid = self.resolve(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        return _Answer(
            200, {"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}
        )

    def tree(self, repo_id, revision):
        repository = self.repository(repo_id)
        entries = []
        for path, content in sorted(repository.files(self.resolve(repository, revision)).items()):
            entries.append({"type": "file", "path": path, "size": len(content), "oid": blob_id(content)})
            if is_large(path):
                entries[-1]["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return _Answer(200, entries)

    def preupload(self, repo_id, revision):
        repository = self.repository(repo_id, write=True)
        files, answer = repository.files(self.resolve(repository, revision)), []
        for file in self.json()["files"]:
            large = is_large(file["path"])
            answer.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if file["path"] in files:
                answer[-1]["oid"] = (sha256 if large else blob_id)(files[file["path"]])
        return _Answer(200, {"files": answer})

    def lfs_batch(self, repo_id):
        self.repository(repo_id, write=True)
        objects = []
        for entry in self.json()["objects"]:
            oid, size = entry["oid"], entry["size"]
            objects.append({"oid": oid, "size": size})
            if oid in self.state.large_files:
                continue
            upload = {"href": self.state.signed(f"/object/{oid}")}
            if size > CHUNK_SIZE:
                numbers = range(1, -(-size // CHUNK_SIZE) + 1)
                upload["header"] = {str(number): self.state.signed(f"/part/{oid}/{number}") for number in numbers}
                upload["header"]["chunk_size"] = str(CHUNK_SIZE)
            verify = {"href": f"{self.state.endpoint}/{repo_id}.git/info/lfs/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return _Answer(200, {"objects": objects})

    def commit(self, repo_id, branch):
        repository = self.repository(repo_id, write=True)
        if self.fault is not None and self.fault.after_bytes == 0:
            raise _Broken
        lines = [json.loads(line) for line in self.body().splitlines()]
        files, message = dict(repository.files(self.resolve(repository, branch))), lines[0]["value"]["summary"]
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if len(self.state.large_files.get(value["oid"], b"")) != value["size"]:
                    return _Answer(400, {"error": f"LFS pointer to a file that is not there: {value['path']}"})
                files[value["path"]] = self.state.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        with self.state.lock:
            oid = repository.commit(branch, files, message)
        if self.fault is not None:
            # The commit is made, its answer is lost.
            raise _Broken
        url = f"{self.state.endpoint}/{repo_id}/commit/{oid}"
        return _Answer(200, {"commitUrl": url, "commitOid": oid, "success": True})

    def resolve_file(self, repo_id, revision, path):
        repository = self.repository(repo_id)
        oid = self.resolve(repository, revision)
        content = repository.commits[oid].get(path)
        if content is None:
            return _Answer(404, {"error": "entry"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        if is_large(path):
            digest = sha256(content)
            return _Answer(
                302,
                b"",
                Location=self.state.signed(f"/object/{digest}"),
                X_Repo_Commit=oid,
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(content)),
            )
        return _Answer(200, content, X_Repo_Commit=oid, ETag=f'"{blob_id(content)}"')
