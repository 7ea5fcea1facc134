"""Heads of the hub, through its own client: a server on this machine takes the hub's place."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
import yaml

from beagle.drafters import hub
from beagle.drafters.checkpoint import save_head
from beagle.drafters.load import resolve_draft
from beagle.errors import BeagleError
from conftest import tiny_head, tiny_target

TOKEN = "hf_secret"


class Hub:
    """Repositories: by name, revisions; of each, files.

    Attributes:
        asked: method and path of every request.
        locked: repositories that only the owner of the token sees.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.locked: set[str] = set()
        self.url = ""

    def add(self, name, files, revision="main"):
        self.repositories.setdefault(name, {})[revision] = files

    def find(self, name, revision):
        """Files and commit of a revision."""
        for tag, files in self.repositories[name].items():
            commit = hashlib.sha1(json.dumps([tag, *map(repr, files.items())]).encode()).hexdigest()
            if revision in (tag, commit):
                return files, commit
        return None, None


@contextmanager
def hub_server():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.resolve(send=False)

        def do_GET(self):
            self.resolve(send=True)

        def resolve(self, send):
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path))
            repository, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.rpartition("/")
            if repository not in hub.repositories or (repository in hub.locked and not self.known()):
                return self.fail(401 if not self.known() else 404, "RepoNotFound")
            files, commit = hub.find(repository, revision)
            if files is None:
                return self.fail(404, "RevisionNotFound")
            if name not in files:
                return self.fail(404, "EntryNotFound")
            content = files[name]
            tag = hashlib.sha256(content).hexdigest()
            self.send(content if send else b"", length=len(content), etag=f'"{tag}"', **{"x-repo-commit": commit})

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(("POST", path))
            body = self.rfile.read(int(self.headers["content-length"] or 0))
            if not self.known():
                return self.fail(401, None)
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                hub.repositories.setdefault(name, {"main": {}})
                return self.json({"url": f"{hub.url}/{name}", "name": name})
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            if "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "shouldIgnore": False, "uploadMode":
                          "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files]  # fmt: skip
                return self.json({"files": modes})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [{"oid": o["oid"], "size": o["size"], "authenticated": True,
                            "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}}
                           for o in json.loads(body)["objects"]]  # fmt: skip
                return self.json({"transfer": "basic", "objects": objects})
            if "/commit/" in path:
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                new = dict(hub.repositories[name]["main"])
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        new[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        new[value["path"]] = hub.large[value["oid"]]
                hub.repositories[name]["main"] = new
                commit = hub.find(name, "main")[1]
                return self.json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})
            self.fail(404, None)

        def do_PUT(self):
            hub.asked.append(("PUT", self.path))
            content = self.rfile.read(int(self.headers["content-length"]))
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.send(b"")

        def known(self):
            return self.headers.get("authorization") == f"Bearer {TOKEN}"

        def fail(self, status, code):
            self.send(b"", status, **({"x-error-code": code} if code else {}))

        def json(self, content):
            self.send(json.dumps(content).encode(), **{"content-type": "application/json"})

        def send(self, content, status=200, length=None, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def remote(monkeypatch, tmp_path):
    with hub_server() as running:
        use(monkeypatch, running.url, tmp_path)
        yield running


def use(monkeypatch, url, tmp_path):
    """What HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET set before the client is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for client in (huggingface_hub.hf_api.api,):
        monkeypatch.setattr(client, "endpoint", url)
    hub.download_head.cache_clear()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


GENERATE = ["generate", "w3 w4", "--dtype", "float32", "-n", 16, "-q", "--target"]


@pytest.mark.parametrize("draft", ["org/head", "org/head@main", "org/head+lookup", "org/head@v1+lookup"])
def test_a_head_of_the_hub_drafts(remote, folders, beagle, draft):
    remote.add("org/head", files_of(folders.head))
    remote.add("org/head", files_of(folders.head), "v1")
    drafted = beagle(*GENERATE, folders.target, "--draft", draft)
    assert drafted.code == 0, drafted.err
    assert drafted.out == beagle(*GENERATE, folders.target, "--draft", "none").out
    assert {method for method, _ in remote.asked} == {"HEAD", "GET"}
    assert [path for method, path in remote.asked if method == "GET" and path.endswith("model.safetensors")] != []
    assert len([path for method, path in remote.asked if method == "HEAD" and path.endswith("config.json")]) == 1


def test_a_training_starts_from_a_head_of_the_hub(remote, train, folders, tmp_path):
    remote.add("org/head", files_of(folders.head))
    ended = train(tmp_path / "hub", "--init", "org/head")
    assert ended.code == 0, ended.err
    assert train(tmp_path / "folder", "--init", folders.head).code == 0
    one, other = ((tmp_path / name / "head" / "model.safetensors").read_bytes() for name in ("hub", "folder"))
    assert one == other
    train(tmp_path / "none", "--init", "org/none").refusal("org/none", "no such head")


def test_a_revision_is_the_one_asked_for(remote, folders, tmp_path):
    other = tmp_path / "older"
    save_head(tiny_head(tiny_target(), seed=3), other, target="tiny", dtype=torch.float32, meta={})
    remote.add("org/head", files_of(folders.head))
    remote.add("org/head", files_of(other), "refs/pr/1")
    one, two = (hub.download_head(name, lambda *_: None) for name in ("org/head", "org/head@refs/pr/1"))
    assert (one / "model.safetensors").read_bytes() == (folders.head / "model.safetensors").read_bytes()
    assert (two / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    commit = remote.find("org/head", "refs/pr/1")[1]
    assert hub.download_head(f"org/head@{commit}", lambda *_: None) == two


def test_a_downloaded_head_is_used_where_there_is_no_network(remote, folders, monkeypatch, tmp_path):
    remote.add("org/head", files_of(folders.head))
    online = hub.download_head("org/head", lambda *_: None)
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert hub.download_head("org/head", lambda *_: None) == online


def test_what_the_hub_lacks_is_refused_by_name(remote, folders, beagle, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    remote.add("org/head", files_of(folders.head))
    remote.add("org/empty", {"README.md": b"hello"})
    remote.add("org/pickled", {**files_of(folders.head), "pytorch_model.bin": b"never read"})
    del remote.repositories["org/pickled"]["main"]["model.safetensors"]
    remote.add("org/model", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"large"})

    def refused(draft, *names):
        beagle(*GENERATE, folders.target, "--draft", draft).refusal(f"draft '{draft}'", *names)

    refused("org/nothing", "no such folder", "no such head at http://127", "hf auth login")
    refused("org/head@v9", "has no revision 'v9'")
    refused("org/empty", "no config.json and model.safetensors")
    refused("org/pickled", "no config.json and model.safetensors")
    refused("org/model", "no Beagle head", "model:org/model")
    assert not [path for _, path in remote.asked if path.endswith(("org/model/resolve/main/model.safetensors", ".bin"))]
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else the client tries for long
    refused("org/never-seen", "no such folder", "http://127.0.0.1:9 can't be asked")


def test_a_folder_comes_first(remote, folders, monkeypatch, tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "head").symlink_to(folders.head)
    monkeypatch.chdir(tmp_path)
    assert str(resolve_draft("org/head", "tiny")) == "org/head"
    assert remote.asked == []


@pytest.mark.parametrize("name", ["runs/mine/head", "/org/head", "./head", "../head", "org", "org/head@", "org/", ""])
def test_what_is_no_name_of_the_hub(remote, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert not hub.is_hub_name(name)
    with pytest.raises(BeagleError, match="no such folder"):
        resolve_draft(name, "tiny")
    assert remote.asked == []


def test_a_head_is_uploaded_with_a_card_and_drafts_from_there(remote, train, folders, beagle, tmp_path, monkeypatch):
    assert train(tmp_path / "run").code == 0
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ended = beagle("push", tmp_path / "run", "org/tiny-head", "--license", "apache-2.0")
    assert ended.code == 0, ended.err
    assert f"{remote.url}/org/tiny-head" in ended.err
    files = remote.repositories["org/tiny-head"]["main"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "result.json"}
    assert files["model.safetensors"] == (tmp_path / "run" / "head" / "model.safetensors").read_bytes()
    assert str(tmp_path) not in "".join(files[name].decode() for name in ("README.md", "config.json", "result.json"))
    drafted = beagle(*GENERATE, folders.target, "--draft", "org/tiny-head")
    assert drafted.code == 0, drafted.err
    assert drafted.out == beagle(*GENERATE, folders.target, "--draft", "none").out

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    card = files["README.md"].decode()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "apache-2.0"
    assert "speculative-decoding" in yaml.safe_load(head)["tags"]
    assert "--draft org/tiny-head" in body
    assert result["command"] in body
    assert f"{result['stored_tokens']:,} tokens" in body
    assert "the target's answers to 12 prompts" in body
    assert " ".join(f"{alpha:.3f}" for alpha in result["validation_step_alpha"]) in body
    assert "| seed | 0 of the training, 0 of the answers |" in body
    assert "| licence | apache-2.0 |" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"] == result["recipe"]["train"]


def test_a_card_can_be_read_before_it_is_uploaded(remote, train, beagle, tmp_path):
    assert train(tmp_path / "run").code == 0
    shown = beagle("push", tmp_path / "run", "org/tiny-head", "--card", "-")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("---\n")
    assert "| licence | not stated |" in shown.out
    assert remote.asked == []


def test_uploads_that_cannot_be_are_refused(remote, train, folders, beagle, tmp_path, monkeypatch):
    run = tmp_path / "run"
    beagle("push", run, "org/head").refusal(run, "no result.json")
    assert train(run).code == 0
    beagle("push", run, "head").refusal("repository 'head'", "ORG/NAME")
    beagle("push", run, "org/head").refusal("org/head", "hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    beagle("push", run, "org/head").refusal("org/head", "401", "hf auth login")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    beagle("push", run, "org/head").refusal("org/head", "http://127.0.0.1:9 can be reached")
    (run / "head" / "config.json").unlink()
    beagle("push", run, "org/head").refusal("head", "no config.json")
    assert "org/head" not in remote.repositories
