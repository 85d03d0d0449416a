"""The figures of a training over its steps: a JSONL file and, where asked for, TensorBoard and MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Appends figures and keeps them as ``history``; going on from a step forgets what was written after it."""

    def __init__(
        self, path: Path | None, phase: str, step: int, tensorboard: bool = False, mlflow: MlflowRun | None = None
    ) -> None:
        """``path``: the JSONL file, which several phases may share; ``step``: where this phase goes on from."""
        self.phase, self.history, self._path = phase, list[dict[str, float]](), path
        self._board: SummaryWriter | None = None
        self._mlflow = mlflow
        if path is not None:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # seconds to import

                # The figures of ``step`` itself are kept: it is done and not written again.
                self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step + 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._go_on(path, step)

    def _go_on(self, path: Path, step: int) -> None:
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run may be cut off
            mine = record.pop("phase", None) == self.phase
            if mine and record["step"] <= step:
                self.history.append(record)
            if not mine or record["step"] <= step:
                kept.append(line + "\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the figures of ``step``."""
        record = {"step": float(step), **figures}
        self.history.append(record)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": self.phase, **record}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{self.phase}/{name}", value, step)
        if self._mlflow is not None:
            self._mlflow.write(step, {f"{self.phase}.{name}": value for name, value in figures.items()})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._mlflow is not None:
            self._mlflow.close(failed=kind is not None)


class MlflowRun:
    """One MLflow run, begun or gone on with; nothing of MLflow's process-wide state is touched."""

    def __init__(self, uri: str, name: str, settings: Mapping[str, Any], run: str = "") -> None:
        """``uri`` such as ``sqlite:///mlflow.db``; ``run``: id of the run to go on with."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._last: dict[str, int] = {}
        if run:
            self.id = run
            for key in self._client.get_run(run).data.metrics:
                self._last[key] = max(point.step for point in self._client.get_metric_history(run, key))
            self._client.update_run(run, status="RUNNING")
            return
        known = self._client.get_experiment_by_name("medvl_sam2")
        experiment = known.experiment_id if known is not None else self._client.create_experiment("medvl_sam2")
        self.id = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_batch(self.id, params=[Param(key, str(value)) for key, value in settings.items()])

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of ``step``; those a killed run logged after its last state stand there already."""
        for name, value in figures.items():
            key = name.replace(" ", "_")
            if step > self._last.get(key, -1):
                self._client.log_metric(self.id, key, value, step=step)

    def close(self, failed: bool) -> None:
        """Mark the run as finished, or as failed (also when it was stopped: the next one goes on with it)."""
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")
