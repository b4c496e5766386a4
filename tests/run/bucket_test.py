"""Workdirs in a bucket, which always holds what a killed run leaves on a disk."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from caprl_jax.run import bucket, manifest
from caprl_jax.run.bucket import Bucket
from caprl_jax.run.workdir import WorkdirError

from ..killed import CAPRL, SETTINGS
from ..xla_flags import ONE_DEVICE

ROOT = Path(__file__).parents[2]
URL = "memory://runs/one"
STEPS = 40
CONFIG = {"config.json": "{}"}  # what makes a directory a run's


@pytest.fixture
def files(monkeypatch, tmp_path):
    """An empty bucket in memory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return store


def write(directory: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def checkpoint(workdir: Path, step: int) -> None:
    """Writes a whole checkpoint."""
    write(
        workdir / "checkpoints" / str(step), {"state/a": f"weights {step}", "config/metadata": "{}"}
    )
    manifest.write(workdir / "checkpoints" / str(step))


def held_by(files) -> dict[str, str]:
    """The content of the bucket's directory by name."""
    return {
        path.removeprefix("/runs/one/"): files.cat(path).decode()
        for path in files.find("/runs/one")
    }


def test_a_path_is_itself(tmp_path):
    with bucket.opened(str(tmp_path / "run")) as workdir:
        assert workdir == tmp_path / "run"


def test_a_file_below_the_url_lies_in_the_copy(tmp_path):
    kept = tmp_path / "skipped" / "2.npz"
    assert bucket.locate(f"{URL}/skipped/2.npz", f"{URL}/", tmp_path) == kept
    assert bucket.locate(str(kept), URL, tmp_path) == kept


def test_a_run_goes_on_from_the_bucket_alone(files):
    with bucket.opened(URL) as first:
        write(first, CONFIG | {"metrics.jsonl": "1\n", "export/1/model": "big", "lock": "here"})
        checkpoint(first, 1)
    assert not first.exists()
    assert "lock" not in held_by(files)
    with bucket.opened(f"{URL}/") as second:
        assert (second / "metrics.jsonl").read_text() == "1\n"
        assert not (second / "export").exists()  # a run that goes on reads none
        assert manifest.fault(second / "checkpoints" / "1") is None
        checkpoint(second, 2)
        bucket.shutil.rmtree(second / "checkpoints" / "1")
    names = set(held_by(files))
    assert {"export/1/model", "checkpoints/2/manifest.json"} <= names
    assert not [name for name in names if name.startswith("checkpoints/1/")]


def test_a_manifest_is_sent_last_and_the_metrics_first(files, tmp_path, monkeypatch):
    there, sent = Bucket(URL, tmp_path / "run"), []
    there.fetch()
    half = {"checkpoints/5.orbax-checkpoint-tmp/state/a": "half"}
    write(there.local, CONFIG | {"captions.jsonl": "", "metrics.jsonl": "1\n"} | half)
    checkpoint(there.local, 3)
    put = type(files).put_file
    monkeypatch.setattr(
        type(files), "put_file", lambda self, a, b: (sent.append(b), put(self, a, b))
    )
    there.send()
    first, _, metrics, *others = (name.removeprefix("/runs/one/") for name in sent)
    assert first == "config.json" and metrics == "metrics.jsonl"
    assert len(others) == 3 and others[-1] == "checkpoints/3/manifest.json"
    sent.clear()
    there.send()
    assert not sent  # nothing has changed


def test_a_half_sent_checkpoint_is_not_fetched_and_goes(files, tmp_path):
    files.pipe_file("/runs/one/config.json", b"{}")
    files.pipe_file("/runs/one/checkpoints/7/state/a", b"half")
    there = Bucket(URL, tmp_path / "run")
    there.fetch()
    assert not (there.local / "checkpoints").exists() and list(held_by(files)) == ["config.json"]


def test_what_is_no_runs_is_neither_fetched_nor_deleted(files, tmp_path):
    """Somebody's models under checkpoints/; and a bucket that holds other things."""
    model = "/runs/one/checkpoints/llama/model.safetensors"
    files.pipe_file(model, b"theirs")
    with pytest.raises(WorkdirError, match=r"holds no run, but checkpoints/llama/model"):
        Bucket(URL, tmp_path / "run").fetch()
    with pytest.raises(WorkdirError, match="holds no run"):
        Bucket("memory://runs", tmp_path / "run").fetch()
    files.pipe_file("/runs/one/config.json", b"{}")
    with bucket.opened(URL) as workdir:
        assert not (workdir / "checkpoints").exists()
        write(workdir, CONFIG)
    assert files.cat(model) == b"theirs"


def test_a_run_that_was_refused_leaves_nothing_in_the_bucket(files):
    with bucket.opened(URL) as workdir:
        write(workdir, {"environment.json": "{}"})
    assert not held_by(files) and not workdir.exists()


def test_a_failure_in_between_is_a_warning_and_the_next_look_sends(files, monkeypatch, caplog):
    monkeypatch.setattr(bucket, "_PAUSE", 0.01)
    put, refused = type(files).put_file, []

    def refuse_twice(self, a, b):
        if len(refused) < 2:
            refused.append(b)
            raise OSError("no network")
        put(self, a, b)

    monkeypatch.setattr(type(files), "put_file", refuse_twice)
    with bucket.opened(URL) as workdir:
        write(workdir, CONFIG)
        until = time.time() + 20
        while not held_by(files) and time.time() < until:
            time.sleep(0.01)
        assert held_by(files) == CONFIG
    assert len([m for m in caplog.messages if "no network" in m]) == 1


def refuse(self, a, b):
    raise OSError("no network")


def test_what_can_not_be_sent_at_the_end_is_where_the_next_start_goes_on(files, monkeypatch):
    with bucket.opened(URL) as workdir:
        write(workdir, CONFIG)
        checkpoint(workdir, 1)
    kept = pytest.raises(WorkdirError, match=r"no network.* is in .*run: the same command goes on")
    with monkeypatch.context() as m, kept as refused, bucket.opened(URL) as workdir:
        m.setattr(type(files), "put_file", refuse)
        write(workdir, {"metrics.jsonl": "1\n"})
        bucket.shutil.rmtree(workdir / "checkpoints" / "1")
        checkpoint(workdir, 2)
    assert str(workdir) in str(refused.value)
    with bucket.opened(URL) as again:
        assert again == workdir and (again / "metrics.jsonl").read_text() == "1\n"
        assert manifest.fault(again / "checkpoints" / "2") is None
    found = held_by(files)
    assert found["metrics.jsonl"] == "1\n" and "checkpoints/2/manifest.json" in found
    assert not [name for name in found if name.startswith("checkpoints/1/")]


def test_a_copy_that_another_machine_has_overtaken_is_put_aside(files, monkeypatch, caplog):
    with pytest.raises(WorkdirError), monkeypatch.context() as m, bucket.opened(URL) as workdir:
        m.setattr(type(files), "put_file", refuse)
        write(workdir, CONFIG | {"metrics.jsonl": "unsent"})
        checkpoint(workdir, 2)
    elsewhere = Bucket(URL, workdir.parents[1] / "elsewhere" / "run")
    elsewhere.fetch()
    write(elsewhere.local, CONFIG | {"metrics.jsonl": "3"})
    checkpoint(elsewhere.local, 3)
    elsewhere.send()
    with bucket.opened(URL) as again:
        assert (again / "metrics.jsonl").read_text() == "3"
    [aside] = again.parent.glob("left-*")
    assert (aside / "metrics.jsonl").read_text() == "unsent" and str(aside) in caplog.text


def test_a_runs_own_error_is_told_before_the_buckets(files, monkeypatch, caplog):
    with pytest.raises(KeyError, match="own"), bucket.opened(URL) as workdir:
        write(workdir, CONFIG)
        monkeypatch.setattr(type(files), "put_file", refuse)
        raise KeyError("own")
    assert "no network" in caplog.text and str(workdir) in caplog.text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x/run", "can't be opened: ValueError: Protocol not known: nowhere"),
        ("s3://no-such-bucket/run", "can't be read and written"),
    ],
)
def test_a_bucket_that_is_not_there_is_refused_by_name(url, message, server, monkeypatch):
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("file").clear_instance_cache()
    with pytest.raises(WorkdirError, match=message), bucket.opened(url):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The environment of an S3 server that holds the bucket `runs`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        wait_for(port)
        store(environment).mkdir("runs")
        yield environment
    finally:
        process.terminate()
        process.wait()


def wait_for(port: int) -> None:
    until = time.time() + 120
    while time.time() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError("the S3 server doesn't start")


def store(environment):
    import s3fs

    return s3fs.S3FileSystem(
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        key="any",
        secret="any",
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def train(environment, tmp_path, *, wait=True):
    """Starts a short run whose workdir is in the bucket, on a machine that knows nothing."""
    directory = tmp_path / str(time.time_ns())
    directory.mkdir()
    config = {**SETTINGS, **CAPRL, "steps": STEPS, "export.when": "end", "checkpoint.every": 2}
    config |= {"eval.every": 0, "data.data_dir": tmp_path}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.run.bucket_run", "--config=configs/tiny.py"),
            "--workdir=s3://runs/tiny",
            *(f"--config.{name}={value}" for name, value in config.items()),
        ],
        cwd=ROOT,
        env=os.environ
        | environment
        | {"TMPDIR": str(directory), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if wait:
        told = process.communicate()
        assert process.returncode == 0, told[1]
    return process


@pytest.mark.slow
def test_a_run_in_a_bucket_is_killed_and_goes_on_elsewhere(server, tmp_path):
    there = store(server)
    process = train(server, tmp_path, wait=False)
    until = time.time() + 600
    while not there.glob("runs/tiny/checkpoints/*/manifest.json"):
        assert process.poll() is None and time.time() < until, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {name.split("/")[3] for name in there.find("runs/tiny/checkpoints")}
    assert kept and str(STEPS) not in kept
    train(server, tmp_path)
    lines = [json.loads(line) for line in there.cat("runs/tiny/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = {name.removeprefix("runs/tiny/") for name in there.find("runs/tiny")}
    wanted = {"report.html", "summary.json", "samples.json", "config.json"}
    assert wanted <= names and f"checkpoints/{STEPS}/manifest.json" in names
    assert [n for n in names if n.startswith(f"export/{STEPS}/")]
    assert [n for n in names if n.startswith("tensorboard/")]
