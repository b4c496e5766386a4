"""A table of captions, and what the files of each dashboard show of a run."""

import io
import json
import struct
import time

from PIL import Image

from caprl_jax.report.html import Answer, Caption
from caprl_jax.run.captions import Row

NAN = float("nan")


def rows(count=2):
    """Rows of pictures in different colours, each with a right and a wrong answer."""
    out = []
    for i in range(count):
        picture = io.BytesIO()
        Image.new("RGB", (40, 20), (100 * i, 50, 0)).save(picture, "PNG")
        answers = [
            Answer("Which color?", ["A) red", "B) blue"], "A", "A", False, 0.75),
            Answer("How many?", ["A) 1", "B) 2"], "B", "A", False, 0.125),
        ]
        caption = Caption(f"caption {i}: “red”\n<b>", 5 + i, 0.5, answers)
        out.append(Row(f"digits/{i} ☃", picture.getvalue(), caption))
    return out


def jsonl(workdir):
    """{(step, name): value} of metrics.jsonl, NaN where a number wasn't finite."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        (line["step"], name): NAN if value is None else value
        for line in lines
        for name, value in line.items()
        if name not in ("step", "time")
    }


def scalars(pairs):
    """{key: value} of (key, value) pairs, none of which may come twice."""
    out = {}
    for key, value in pairs:
        assert key not in out, f"{key} is there twice"
        out[key] = value
    return out


def wandb_records(workdir):
    """The records of all offline files of W&B in a workdir, a start after the other.

    W&B's process writes the end of a file soon after the run has ended: the record "exit".
    """
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.parent.name):
        yield from _ended(path)


def _ended(path):
    """A file's records when nobody writes to it any more; those of a killed run have no end."""
    until = path.stat().st_mtime + 5
    while True:
        records = list(read_log(path))
        ended = records and records[-1].WhichOneof("record_type") == "exit"
        if ended or time.time() > until:
            return records
        time.sleep(0.05)


def read_log(path):
    """The records of a .wandb file: 7 bytes, and a log of LevelDB, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last fragment
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def wandb_history(workdir):
    """The rows of W&B's history, nested keys joined by dots."""
    for record in wandb_records(workdir):
        if record.WhichOneof("record_type") == "history":
            yield {
                i.key or ".".join(i.nested_key): json.loads(i.value_json)
                for i in record.history.item
            }


def wandb_scalars(workdir):
    """{(step, name): value} of the run in W&B's offline files."""
    own = ("_step", "_timestamp", "_runtime", "step")
    return scalars(
        ((row["step"], name), value)
        for row in wandb_history(workdir)
        for name, value in row.items()
        if name not in own and not name.startswith("captions.")
    )


def wandb_tables(workdir):
    """{step: [row as a dict]} of the tables; images as PIL images."""
    files = {}
    for record in wandb_records(workdir):
        if record.WhichOneof("record_type") == "artifact":
            for entry in record.artifact.manifest.contents:
                assert entry.local_path.startswith(str(workdir)), "a table lies outside"
                files[record.artifact.client_id, entry.path] = entry.local_path
    out = {}
    for row in wandb_history(workdir):
        if "captions.artifact_path" in row:
            client = row["captions.artifact_path"].split("//")[1].split("/")[0]
            with open(files[client, "captions.table.json"]) as file:
                table = json.load(file)
            shown = [dict(zip(table["columns"], r, strict=True)) for r in table["data"]]
            for own in shown:
                own["image"] = Image.open(files[client, own["image"]["path"]])
            out[row["step"]] = shown
    return out


def mlflow_run(workdir):
    """(client, run) of the only run in WORKDIR/mlruns."""
    from mlflow import MlflowClient

    client = MlflowClient(str(workdir / "mlruns"))
    (experiment,) = [e for e in client.search_experiments() if e.name == "caprl"]
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def mlflow_scalars(workdir):
    """{(step, name): value} of the run in WORKDIR/mlruns, whose names have dots for slashes."""
    client, run = mlflow_run(workdir)
    names = {name.replace("/", "."): name for _, name in jsonl(workdir)}
    return scalars(
        ((m.step, names[m.key]), m.value)
        for name in run.data.metrics
        for m in client.get_metric_history(run.info.run_id, name)
    )


def mlflow_tables(workdir):
    """{step: [row as a dict]} of the table; images as PIL images."""
    client, run = mlflow_run(workdir)
    root = client.download_artifacts(run.info.run_id, "")
    with open(f"{root}/captions.json") as file:
        table = json.load(file)
    out = {}
    for values in table["data"]:
        row = dict(zip(table["columns"], values, strict=True))
        row["image"] = Image.open(f"{root}/{row['image']['filepath']}")
        out.setdefault(row["step"], []).append(row)
    return out
