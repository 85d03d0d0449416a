"""What every infer task does around its own work: parse, hold a session, time, report errors."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType

from lib.request_parsing import InferRequest, parse_request
from lib.result_writing import http_errors, write_label_map
from lib.runtime import Held, Runtime
from medvl_sam2.types import Geometry


@dataclass(frozen=True)
class Reply:
    """A task's result before it is written: a mask, or the path of a file already written, or neither."""

    params: dict[str, Any]
    mask: np.ndarray | None = None
    geometry: Geometry | None = None
    file: str | None = None


class MedVLTask(InferTask):
    """Base of the app's infer tasks. Subclasses answer in :meth:`run` and raise :class:`MedVLError` to refuse."""

    def __init__(
        self,
        runtime: Runtime,
        kind: InferType,
        labels: Mapping[str, int] | Sequence[str],
        description: str,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            type=kind,
            labels=dict(labels) if isinstance(labels, Mapping) else list(labels),
            dimension=3,
            description=description,
            config=dict(options or {}),
        )
        self.runtime = runtime

    def is_valid(self) -> bool:
        return True

    @abstractmethod
    def check(self, request: Mapping[str, Any]) -> None:
        """Raise for what is wrong with the request itself, before an image is read or weights are loaded."""

    def corrected(self, request: Mapping[str, Any]) -> str | None:
        """Name of the object that a request only corrects, which is quick where it stands; None for other work."""
        return None

    @abstractmethod
    def run(self, request: Mapping[str, Any], parsed: InferRequest, held: Held) -> Reply:
        """Answer one request."""

    def __call__(self, request: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Serve one request; errors leave as HTTP errors with their reason."""
        started = time.perf_counter()
        what = str(request.get("model") or type(self).__name__)
        with http_errors(what):
            parsed = parse_request(request)
            self.check(request)
            corrected = self.corrected(request)
            with self.runtime.use(parsed.image, parsed.client_id, parsed.reset, True, what, corrected) as held:
                opened = time.perf_counter()
                reply = self.run(request, parsed, held)
                version = held.predictor.meta.version
                notes = {"session": dict(held.notes)} if held.notes else {}
            inferred = time.perf_counter()
            file = reply.file
            if reply.mask is not None and reply.geometry is not None:
                file = write_label_map(reply.mask, reply.geometry, parsed.extension, parsed.compress)
            written = time.perf_counter()
        latencies = {
            "pre": round(opened - started, 3),
            "infer": round(inferred - opened, 3),
            "invert": 0,
            "post": 0,
            "write": round(written - inferred, 3),
            "total": round(written - started, 3),
            "transform": {},
        }
        return file, {**reply.params, **notes, "model_version": version, "latencies": latencies}
