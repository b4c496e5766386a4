"""Fetching model directories from the package, paths, buckets and a loopback hub."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest

from caprl_jax.errors import ModelDirectoryError
from caprl_jax.models.hf import download as sources

JUDGE = sources.fetch("asset:tiny/judge")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("config.json", "tokenizer.json", "model.safetensors")


def test_assets_and_local_directories_are_found(tmp_path):
    assert (JUDGE / "config.json").is_file()
    assert sources.fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("path", ["/no/such/dir", "no/such/dir", "../model"])
def test_error_for_a_missing_directory_says_how_to_fetch_it(path):
    with pytest.raises(ModelDirectoryError, match="hf download ORG/NAME --local-dir DIR"):
        sources.fetch(path)


@pytest.fixture
def bucket():
    memory = fsspec.filesystem("memory")
    for file in (*FILES, "optimizer.pt"):
        memory.pipe(f"/models/tiny/{file}", file.encode())
    yield memory
    memory.rm("/models", recursive=True)


def test_bucket_is_copied_once_without_unneeded_files(bucket, tmp_path, monkeypatch):
    copy = sources.fetch("memory://models/tiny/", cache=tmp_path)
    assert {p.name for p in copy.iterdir()} == set(FILES)
    assert (copy / "config.json").read_text() == "config.json"
    with monkeypatch.context() as m:
        m.setattr(type(bucket), "get_file", lambda *_: pytest.fail("copied again"))
        assert sources.fetch("memory://models/tiny", cache=tmp_path) == copy
    bucket.pipe("/models/tiny/config.json", b"another")
    assert sources.fetch("memory://models/tiny", cache=tmp_path) != copy


def test_interrupted_copy_never_looks_complete(bucket, tmp_path, monkeypatch):
    def fail(*_):
        raise ConnectionError("reset")

    with monkeypatch.context() as m, pytest.raises(ModelDirectoryError, match="can't be copied"):
        m.setattr(type(bucket), "get_file", fail)
        sources.fetch("memory://models/tiny", cache=tmp_path)
    assert all(p.name.endswith(".partial") for p in tmp_path.iterdir())
    assert len(list(sources.fetch("memory://models/tiny", cache=tmp_path).iterdir())) == len(FILES)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://models/none", "can't be listed|is not a model directory"),
        ("gs://bucket/model", r"gs:// needs `pip install gcsfs`|can't be listed"),
        ("nosuch://bucket/model", "nosuch"),
    ],
)
def test_bucket_without_a_model_is_refused(url, message, tmp_path):
    with pytest.raises(ModelDirectoryError, match=message):
        sources.fetch(url, cache=tmp_path)


def fetch_in_process(tmp_path, name, revision="", **environment):
    """Fetches from the hub in a new process, because the hub's library reads settings at import."""
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from caprl_jax.models.hf.download import fetch\n"
        f"print(fetch({name!r}, {revision!r}))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_filled_cache_serves_offline(tmp_path):
    cache = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "v1").write_text(COMMIT)
    cached = fetch_in_process(tmp_path, "org/tiny", "v1", HF_HUB_OFFLINE="1")
    assert Path(cached.stdout.strip()) == snapshot, cached.stderr
    missing = fetch_in_process(tmp_path, "org/tiny", "v2", HF_HUB_OFFLINE="1")
    assert missing.returncode and "hf download org/tiny --revision v2" in missing.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """Server with the part of the hub's protocol that a download of one model needs."""

    def _send(self, body: bytes, **headers):
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/revision/main") or path == "/api/models/org/tiny":
            siblings = [{"rfilename": f} for f in (*FILES, "optimizer.pt")]
            self._send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            file = JUDGE / path.rsplit("/", 1)[1]
            self._send(file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=COMMIT)
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": f, "size": (JUDGE / f).stat().st_size, "oid": f}
                for f in FILES
            ]
            self._send(json.dumps(tree).encode(), Content_Type="application/json")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_download_from_the_hub_announces_its_size(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        done = fetch_in_process(tmp_path, "org/tiny", **online)
        refused = fetch_in_process(tmp_path, "org/other", **online)
    finally:
        server.shutdown()
    directory = Path(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    assert {p.name for p in directory.iterdir()} == set(FILES)
    for file in FILES:
        assert (directory / file).read_bytes() == (JUDGE / file).read_bytes()
    size = sum((JUDGE / f).stat().st_size for f in FILES) / 1e9
    assert f"downloading org/tiny (default branch): {size:.2f} GB in 3 files" in done.stderr
    assert "hf download org/other" in refused.stderr
