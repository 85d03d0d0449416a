"""The MONAI Label app: wires settings, store, tasks, strategies and scoring; the work is done elsewhere.

Built again in every training, scoring and batch process, so nothing here loads weights or starts a thread: that
happens at the first request and in :meth:`MyApp.on_init_complete`, which only the server calls.
"""

import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

import medvl_sam2
from lib.configs.medvl_sam2 import APP_NAME, APP_VERSION, LABELS, TRAINER, AppConfig
from lib.configs.upstream_aliases import INFER_ALIASES, TRAIN_ALIASES, TRAIN_DEFAULTS, UNCERTAINTY_ALIAS
from lib.datastore import GuardedStore, open_local_store
from lib.dicomweb_store import open_dicomweb_store
from lib.infers.batch import BatchTask
from lib.infers.interactive import InteractiveTask
from lib.infers.language import ReportTask, VqaTask
from lib.infers.scribbles import ScribblesTask
from lib.infers.segment import ReferringTask, SemanticTask
from lib.priority import give_way_as_task
from lib.request_parsing import UnknownImageError
from lib.result_writing import http_error
from lib.retrain_schedule import RetrainConfig, RetrainSchedule
from lib.runtime import Runtime
from lib.scoring.dice import DiceScoring
from lib.scoring.score_file import ScoreFile
from lib.scoring.uncertainty import UncertaintyScoring
from lib.sessions import clean_sessions, may_be_image
from lib.strategies.sampling import FirstStrategy, RandomStrategy, UncertaintyStrategy
from lib.trainers.finetune import FinetuneTask

logger = logging.getLogger(__name__)

_MAX_UNREADABLE = 20
"""Series in a row that turn out to be no volume before next sample says so."""


class MyApp(MONAILabelApp):
    """MedVL-SAM2 for MONAI Label."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        give_way_as_task()
        conf = conf or {}
        self.config = AppConfig.from_conf(Path(app_dir), conf)
        self.runtime = Runtime(self.config)
        self.schedule = RetrainSchedule(
            RetrainConfig.from_conf(conf), self.config.store / "retrain.json", self._start_training
        )
        self._last_info: dict[str, Any] | None = None
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=APP_NAME,
            description="Prompt, correct, retrain: one vision-language and segmentation model. Not for clinical use.",
            version=APP_VERSION,
            labels=list(LABELS),
        )

    # --- what is offered --------------------------------------------------------------------------------------------

    def init_datastore(self) -> Datastore:
        remote = self.studies.startswith(("http://", "https://"))
        store = super().init_datastore() if remote else open_local_store(self.studies, self.runtime.geometry)
        if isinstance(store, GuardedStore):
            store.provenance_of = self.runtime.provenance
        return store

    def init_remote_datastore(self) -> Datastore:
        if settings.MONAI_LABEL_DATASTORE or "googleapis.com" in self.studies:
            return super().init_remote_datastore()
        if shutil.which("itkimage2segimage") is None:
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        if shutil.which("itkimage2segimage") is None:
            logger.warning("itkimage2segimage is missing (dcmqi): /infer/ cannot answer with output=dicom_seg")
        return open_dicomweb_store(self.studies, self.runtime.geometry)

    def init_infers(self) -> dict[str, InferTask]:
        tasks: dict[str, InferTask] = {
            "medvl_interactive": InteractiveTask(self.runtime),
            "medvl_semantic": SemanticTask(self.runtime),
            "medvl_referring": ReferringTask(self.runtime),
            "medvl_vqa": VqaTask(self.runtime),
            "medvl_report": ReportTask(self.runtime),
            "medvl_scribbles": ScribblesTask(self.runtime),
        }
        aliases = INFER_ALIASES if self.config.upstream_aliases else {}
        return tasks | {alias: tasks[name] for alias, (name, _) in aliases.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        tasks: dict[str, TrainTask] = {TRAINER: FinetuneTask(self.config, self.schedule)}
        if self.config.upstream_aliases:
            tasks |= dict.fromkeys(TRAIN_ALIASES, FinetuneTask(self.config, self.schedule, TRAIN_DEFAULTS))
        return tasks

    def init_strategies(self) -> dict[str, Strategy]:
        scores = ScoreFile(self.config.store, self.studies, "uncertainty")
        chance = RandomStrategy(scores)
        # Slicer preselects the first.
        uncertain = UncertaintyStrategy(scores, self.runtime.served_version, chance)
        strategies: dict[str, Strategy] = {"uncertainty": uncertain, "random": chance, "first": FirstStrategy()}
        return strategies | ({UNCERTAINTY_ALIAS: uncertain} if self.config.upstream_aliases else {})

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        store, studies = self.config.store, self.studies
        uncertainty = UncertaintyScoring(self.runtime, ScoreFile(store, studies, "uncertainty"))
        methods: dict[str, ScoringMethod] = {
            "dice": DiceScoring(ScoreFile(store, studies, "dice")),
            "uncertainty": uncertainty,
        }
        return methods | ({UNCERTAINTY_ALIAS: uncertainty} if self.config.upstream_aliases else {})

    def init_batch_infer(self) -> BatchTask:
        return BatchTask()

    # --- requests ---------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What clients read first, and MONAI Label before every task: the last good answer when anything fails."""
        try:
            self._last_info = super().info()
        except Exception:
            logger.exception("The app cannot be described; the last description is sent")
            if self._last_info is None:
                raise
        return self._last_info

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        _require("model", request.get("model"), self._infers)
        if self.config.upstream_aliases and request["model"] in INFER_ALIASES:
            request = {**INFER_ALIASES[request["model"]][1], **request}
        image = request.get("image")
        if isinstance(image, str) and image:
            store = datastore or self.datastore()
            if os.path.exists(image):
                known = may_be_image(Path(image), store, self.sessions())
            else:
                known = bool(store.get_image_uri(image))
            if not known:
                unknown = f"image {image!r} is not in the datastore; refresh the list of images or send it again"
                raise http_error(UnknownImageError(unknown))
        return super().infer(request, datastore)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        _require("strategy", request.get("strategy") or "random", self._strategies)
        sample = self._readable_sample(request)
        if sample.get("path"):
            self.runtime.expect(Path(sample["path"]))
        return sample

    def _readable_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """The next image that is one: the store leaves out from then on what it found to be none (415)."""
        for _ in range(_MAX_UNREADABLE):
            try:
                return dict(super().next_sample(request))
            except HTTPException as error:
                if error.status_code != 415:
                    raise
                reason = error
                logger.warning("Skipped as the next sample: %s", error.detail)
        raise reason

    def scoring(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        _require("scoring method", request.get("method"), self._scoring_methods)
        return super().scoring(request, datastore)

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        _require("trainer", request.get("model"), self._trainers)
        return super().train(request)

    def bundle_path(self, model: str | None) -> None:
        """MONAI Label asks this before it starts a process: the place to refuse a model there is none of."""
        if model:
            _require("model", model, {**self._infers, **self._trainers})

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """Count a submitted label, but no draft; what is returned reaches the annotator with the reply.

        On a DICOMweb server ``dicom_seg`` says what became of this label there, also when others saved meanwhile.
        """
        record = getattr(label_id, "record", None)  # of lib.label_versions.SavedLabel
        draft = record is not None and record.draft
        labels = self.schedule.state().labels if draft else self.schedule.label_saved()
        logger.info("Label saved for %s; %d since the last training", image_id, labels)
        note = getattr(self.datastore(), "dicom_note", None)
        shown = {"dicom_seg": note(image_id, record.tag)} if note and record is not None and not draft else {}
        return {"labels_since_training": labels, **shown}

    # --- the server -------------------------------------------------------------------------------------------------

    def on_init_complete(self) -> None:
        """Called in the server only, after start."""
        _share_paths(Path(self.app_dir))
        super().on_init_complete()
        self.info()
        self.schedule.start()

    def cleanup_sessions(self) -> None:
        clean_sessions(self.sessions())

    def _start_training(self) -> bool:
        return bool(self.async_training(TRAINER))


def _require(what: str, name: Any, known: dict[str, Any]) -> None:
    if name not in known:
        raise HTTPException(404, f"{what} {name!r} does not exist; choose from {', '.join(known)}")


def _share_paths(app_dir: Path) -> None:
    """Let training and scoring processes find the app and the package, also when neither is installed.

    MONAI Label reads PYTHONPATH without a default there: unset, its tasks would stay SUBMITTED for ever.
    """
    wanted = [str(app_dir), str(Path(medvl_sam2.__file__).resolve().parents[1])]
    present = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join([*present, *(entry for entry in wanted if entry not in present)])
