"""The sink of Weights & Biases."""

import contextlib
import dataclasses
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.run.sinks.dashboard import Dashboard, facts
from caprl_jax.settings import setting

_FLUSH = 0.5  # seconds after which W&B's process writes what it was sent; by default it's 15
_STAGING = "WANDB_DATA_DIR"
_COLUMNS = ("image", "name", "caption", "tokens", "reward", "verdicts")


@dataclasses.dataclass(frozen=True)
class Wandb:
    """Options of the sink."""

    project: str = setting("caprl", "project of the run")
    entity: str = setting("", "user or team; empty: W&B's default")
    name: str = setting("", "name of the run; empty: the workdir's")
    mode: str = setting(
        "",
        "offline: the run stays in WORKDIR/wandb until `wandb sync`; empty: as WANDB_MODE says",
        choices=("", "online", "offline"),
    )


class _Wandb(Dashboard):
    """A run of W&B with the axis "step". Its own count, `_step`, goes up with every write."""

    service = "wandb"

    def __init__(self, workdir: Path, resume_step: int | None, options: Wandb):
        self._options = options
        super().__init__(workdir, resume_step)

    def open(self, run: str | None) -> str:
        import wandb  # imported where used: an extra

        given = self._options
        self._client, self._table, self._image = None, wandb.Table, wandb.Image
        self._client = wandb.init(
            project=given.project,
            entity=given.entity or None,
            name=given.name or self.workdir.resolve().name,
            id=run or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8],
            resume="allow",
            mode=given.mode or None,
            dir=str(self.workdir),
            config=facts(self.workdir),
            allow_val_change=True,  # a resumed run may change some keys
            reinit="create_new",
            settings=wandb.Settings(console="off", x_transaction_log_flush_interval=_FLUSH),
        )
        self._client.define_metric("*", step_metric="step")
        return self._client.id

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self._log({"step": step, **values})

    def send_table(self, step: int, rows: Sequence[Any]) -> None:
        table = self._table(columns=list(_COLUMNS))
        for row in rows:
            image, caption = row.thumbnail(), row.caption
            shown = None if image is None else self._image(image)
            table.add_data(
                *(shown, row.name, caption.text, caption.length, caption.accuracy, row.verdicts())
            )
        with _staged_in(self.workdir / "wandb"):
            self._log({"step": step, "captions": table})

    def _log(self, values: Mapping[str, Any]) -> None:
        # A count that goes on in resumed runs: offline, W&B doesn't know the earlier starts.
        self._client.log(values, step=self.sent, commit=True)

    def finish(self, failed: bool) -> None:
        self._client.finish(exit_code=int(failed))


@contextlib.contextmanager
def _staged_in(directory: Path) -> Iterator[None]:
    """Keeps tables in a directory until they are uploaded, unless the user has chosen another.

    By default W&B keeps them in the home directory, where a container's end loses them.
    """
    if _STAGING in os.environ:
        yield
        return
    os.environ[_STAGING] = str(directory.resolve())
    try:
        yield
    finally:
        del os.environ[_STAGING]


def wandb_sink(workdir: Path, resume_step: int | None, options: Wandb) -> _Wandb:
    """Opens a run of Weights & Biases, whose files lie in WORKDIR/wandb."""
    return _Wandb(workdir, resume_step, options)


wandb_sink.extra = "wandb"
