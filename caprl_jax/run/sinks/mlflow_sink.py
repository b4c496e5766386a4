"""The sink of MLflow."""

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.run.sinks.dashboard import Dashboard, facts, flat
from caprl_jax.settings import setting

_BATCH = 100  # most metrics, parameters or tags of one request; MLflow takes 100 parameters
_LONGEST = 500  # most characters of a parameter or tag
# Without these a server that is gone would hold the run up for minutes at each write.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
_TABLE = "captions.json"
_COLUMNS = ("step", "image", "name", "caption", "tokens", "reward", "verdicts")


@dataclasses.dataclass(frozen=True)
class Mlflow:
    """Options of the sink."""

    tracking_uri: str = setting(
        "", "server or store; empty: MLFLOW_TRACKING_URI, or else the files of WORKDIR/mlruns"
    )
    experiment: str = setting("caprl", "experiment of the run")
    name: str = setting("", "name of the run; empty: the workdir's")


class _Mlflow(Dashboard):
    """A run of MLflow: the config as parameters, the environment as tags, a table of captions."""

    service = "mlflow"

    def __init__(self, workdir: Path, resume_step: int | None, options: Mlflow):
        self._options, self._unsure = options, False
        super().__init__(workdir, resume_step)

    def open(self, run: str | None) -> str:
        from mlflow import MlflowClient, entities  # imported where used: an extra

        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        uri = self._options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = str((self.workdir / "mlruns").resolve())
        self._client, self._entities = MlflowClient(uri), entities
        self._images: set[str] = set()  # that this start has uploaded
        known = facts(self.workdir)
        if run is None:
            run = self._create()
            params = [entities.Param(_name(k), _short(v)) for k, v in flat(known["config"]).items()]
            for i in range(0, len(params), _BATCH):
                self._client.log_batch(run, params=params[i : i + _BATCH])
        self._client.update_run(run, status="RUNNING")
        tags = flat(known["environment"])
        if known["environment"].get("git"):
            tags["mlflow.source.git.commit"] = known["environment"]["git"]["revision"]
        named = [entities.RunTag(_name(name), _short(value)) for name, value in tags.items()]
        for i in range(0, len(named), _BATCH):
            self._client.log_batch(run, tags=named[i : i + _BATCH])
        for name, content in known.items():  # whole, beside the parameters and tags
            self._client.log_dict(run, content, f"{name}.json")
        return run

    def _create(self) -> str:
        given = self._options
        experiment = self._client.get_experiment_by_name(given.experiment)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(given.experiment)
        )
        name = given.name or self.workdir.resolve().name
        return self._client.create_run(number, run_name=name).info.run_id

    def send(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        # In MLflow's files "reward/accuracy" would need a folder of the name of the file "reward".
        named = {_name(k).replace("/", "."): v for k, v in values.items()}
        if self._unsure:  # the last try failed, perhaps after some had arrived
            named = {k: v for k, v in named.items() if not self._has(step, k)}
        self._unsure = True
        metrics = [self._entities.Metric(k, v, now, step) for k, v in named.items()]
        for i in range(0, len(metrics), _BATCH):
            self._client.log_batch(self.run, metrics=metrics[i : i + _BATCH])
        self._unsure = False

    def _has(self, step: int, name: str) -> bool:
        return any(m.step == step for m in self._client.get_metric_history(self.run, name))

    def send_table(self, step: int, rows: Sequence[Any]) -> None:
        for row in rows:
            path = _image_path(row.name)
            image = None if path in self._images else row.thumbnail()
            if image is not None:
                self._client.log_image(self.run, image, artifact_file=path)
            self._images.add(path)
        # One table of all steps, sent whole each time, as MLflow's own log_table does, which needs
        # pandas.
        lines = (self.workdir / "captions.jsonl").read_text().splitlines()
        data = [_row(json.loads(line)) for line in lines]
        self._client.log_dict(self.run, {"columns": list(_COLUMNS), "data": data}, _TABLE)
        tag = json.dumps([{"path": _TABLE, "type": "table"}])
        self._client.set_tag(self.run, "mlflow.loggedArtifacts", tag)

    def finish(self, failed: bool) -> None:
        self._client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


def _row(line: Mapping[str, Any]) -> list[Any]:
    path = _image_path(line["image"])
    image = {"type": "image", "filepath": path, "compressed_filepath": path}
    own = (line["caption"], line["tokens"], line["reward"], json.dumps(line["verdicts"]))
    return [line["step"], image, line["image"], *own]


def _image_path(name: str) -> str:
    return f"images/{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:16]}.png"


def _name(key: str) -> str:
    """Returns a name that MLflow takes."""
    return re.sub(r"[^\w\-./ ]", "_", key)


def _short(value: Any) -> str:
    return str(value)[:_LONGEST]


def mlflow_sink(workdir: Path, resume_step: int | None, options: Mlflow) -> _Mlflow:
    """Opens a run of MLflow, by default in the files of WORKDIR/mlruns."""
    return _Mlflow(workdir, resume_step, options)


mlflow_sink.extra = "mlflow"
