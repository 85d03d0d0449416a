"""The one object the app, the scripts and the evaluation talk to.

Concurrency: one :class:`Predictor` serves all sessions, from any thread. Every public method that uses the model holds
``_lock`` from its first look at the session to its result, because one model on one device gains nothing from
interleaving, and because sessions, their timelines and what sessions on one volume share are not thread-safe by
themselves. :meth:`prepare` holds it for one step at a time. A session's recorder is called under the lock, so that a
journal has the changes in the order in which they were made. Objects of one session and sessions of one volume share
only what is never changed once it is made. The cache of encoded slices has a lock of its own, taken for one slice.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, CheckpointMeta, load_checkpoint, load_into, shipped_checkpoint
from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import CheckpointError, PromptError
from medvl_sam2.modeling.compute import Precision, compute_device
from medvl_sam2.modeling.prompts import segment_prompt, segment_reply
from medvl_sam2.modeling.scene_measured import MeasuredScene
from medvl_sam2.modeling.scene_text import SceneTextModel
from medvl_sam2.modeling.siglip import ImageTextModel
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import GlobalLook, Grounding, UnifiedModel, language_view
from medvl_sam2.partial_weights import load_image_text_beside
from medvl_sam2.predictor.embeddings import Embeddings
from medvl_sam2.predictor.evidence import NOT_FOUND, EvidenceMap, ground_answer, ground_report
from medvl_sam2.predictor.feature_cache import CacheConfig, FeatureCache
from medvl_sam2.predictor.first_prompts import InteractiveConfig
from medvl_sam2.predictor.interactive import InteractiveEngine
from medvl_sam2.predictor.named import Located, NamedConfig, NamedEngine
from medvl_sam2.predictor.object_editor import ObjectEditor
from medvl_sam2.predictor.phrases import (
    REPORT_REQUEST,
    asks_for_several,
    checked,
    organs_within,
    short_name,
    spoken_request,
    trained_question,
    vocabulary_matches,
)
from medvl_sam2.predictor.placed_segmenter import PlacedSegmenter
from medvl_sam2.predictor.session import Session, SessionConfig
from medvl_sam2.predictor.shared_volume import SharedVolume
from medvl_sam2.types import Answer, Prompt, Segmentation, Sentence, Volume
from medvl_sam2.vocabulary import spoken

MULTIPLE = ("lesion",)
"""Classes that may have several separate components; organs keep their largest."""
_LEAST_SHARE = {True: 0.02, False: 0.1}
"""Components smaller than this share of the largest are dropped; lesions (True) differ in size more than the parts of
an organ that the field of view cuts or the map breaks up."""

Progress = Callable[[float, str], None]


class Predictor:
    """Prompts and questions in, masks on the stored grid and text out."""

    def __init__(
        self,
        model: UnifiedModel,
        meta: CheckpointMeta,
        interactive: InteractiveConfig | None = None,
        named: NamedConfig | None = None,
        image_text: ImageTextModel | SceneTextModel | None = None,
        sessions: SessionConfig | None = None,
        cache: CacheConfig | None = None,
        precision: Precision = "auto",
    ) -> None:
        """Serve ``model`` where it is; ``precision`` of the slices is that of :class:`PlacedSegmenter`."""
        self.sessions = sessions or SessionConfig()
        self.cache = FeatureCache(cache)
        self._shared: weakref.WeakValueDictionary[int, SharedVolume] = weakref.WeakValueDictionary()
        self.model = model.eval()
        self._embeddings = Embeddings(image_text, self._device)
        self.meta = meta
        segmenter = PlacedSegmenter(model.segmenter, precision)
        self.interactive = InteractiveEngine(segmenter, interactive, self.cache)
        self.named = NamedEngine(segmenter, named, self.cache)
        history = int(self.sessions.history_megabytes * 1e6)
        self._editor = ObjectEditor(self.interactive, self._look, self.segment_text, history)
        self._lock = threading.RLock()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def device(self) -> str:
        """Where the model computes, as torch names it."""
        return str(self._device)

    @property
    def precision(self) -> Precision:
        """Number format the slices are computed in: ``bfloat16`` or ``float32``."""
        return self.interactive.segmenter.precision

    @classmethod
    def load(cls, path: Path | None = None, device: str = "auto", precision: Precision = "auto") -> Predictor:
        """Load a checkpoint directory; None takes the demo weights shipped with the package.

        An image-text model in its folder ``alignment`` is loaded, too. ``device``: see :func:`compute_device`, by
        default a CUDA GPU where there is one.

        Raises:
            CheckpointError: the checkpoint is damaged, or not one.
            ConfigError: this machine has no such device.
        """
        place = compute_device(device)
        path = path or shipped_checkpoint()
        checkpoint = load_checkpoint(path)
        model = UnifiedModel(checkpoint.config, Tokenizer.load(checkpoint.tokenizer_path))
        load_into(model, checkpoint.state)
        beside = path / ALIGNMENT_FOLDER
        image_text = load_image_text_beside(beside, model.language) if beside.is_dir() else None
        return cls(model.to(place), checkpoint.meta, image_text=image_text, precision=precision)

    @property
    def config(self) -> ModelConfig:
        """Configuration of the loaded model."""
        return self.model.config

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names :meth:`segment_classes` takes, in label order."""
        return self.model.config.classes

    def open(self, volume: Volume) -> Session:
        """Start a session. Costs nothing until the first request; sessions on one volume share what is made of it."""
        shared = self._shared.get(id(volume))
        if shared is None:
            shared = self._shared[id(volume)] = SharedVolume(volume)
        return Session(shared)

    def prepare(self, session: Session) -> Iterator[None]:
        """Do ahead what the first request on a volume would wait for, a part at each step of the iterator.

        Between the steps other requests may use the predictor and the session; the results are the same.
        """
        with self._lock:
            _ = session.image, session.intensity
        yield
        with self._lock, torch.inference_mode():
            self._look(session)
        yield

    def close(self) -> None:
        """Drop the encoded slices and remove their files; the predictor stays usable."""
        self.cache.close()

    # --- interactive ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def segment_prompt(self, session: Session, prompt: Prompt, name: str = "object") -> Segmentation:
        """Segment one object from all its prompts so far (cumulative).

        A prompt that stands already or was just undone costs nothing: the object moves to it on its timeline. Of
        another one, edits (clicks, scribbles, lassos) that were already applied are recognised and one that is said
        twice counts once; only new ones cost time, and they change nothing beyond their region
        (:mod:`medvl_sam2.predictor.locality`) unless propagation is asked for. When edits were taken back, the object
        goes back to its state before the first of them, bit by bit, and those after it are applied again. When the
        first prompt was taken back or the box changed, the object is built again.
        What a text found stands under ``name`` for further prompts to correct; nothing found is an empty mask.

        Raises:
            PromptError: a prompt lies outside the volume, or nothing says where the object is.
        """
        prompt = prompt.validated(session.volume.geometry.shape)
        with self._lock:
            return self._editor.place(session, prompt, name)

    @torch.inference_mode()
    def undo(self, session: Session, name: str = "object", count: int = 1) -> Segmentation:
        """The object without its last ``count`` prompts, bit for bit as it was; an empty mask before the first one.

        Raises:
            PromptError: no such object, or no such count.
        """
        with self._lock:
            return self._editor.undo(session, name, count)

    @torch.inference_mode()
    def redo(self, session: Session, name: str = "object", count: int = 1) -> Segmentation:
        """The object with ``count`` prompts that were undone, bit for bit as it was.

        Raises:
            PromptError: fewer were undone, or no such object or count.
        """
        with self._lock:
            return self._editor.redo(session, name, count)

    # --- text -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def segment_classes(
        self, session: Session, classes: Sequence[str] = (), progress: Progress | None = None
    ) -> Segmentation:
        """Segment vocabulary classes; mask value ``n`` is ``classes[n - 1]`` (empty: the whole vocabulary).

        Raises:
            PromptError: a class is not in the vocabulary.
        """
        names = tuple(classes) or self.classes
        unknown = [n for n in names if n not in self.classes]
        if unknown:
            raise PromptError(f"class {unknown[0]!r} is not in the vocabulary; choose from {', '.join(self.classes)}")
        if len(set(names)) != len(names):
            raise PromptError(f"classes {list(names)} name one class twice; list each once")
        with self._lock:
            grounding = self._class_grounding(session, names)
            mask, scores = self._segment_grounded(session, names, grounding, progress)
        return Segmentation(mask, session.volume.geometry, names, scores)

    @torch.inference_mode()
    def segment_text(self, session: Session, text: str) -> Segmentation:
        """Segment what a sentence refers to; ``names`` holds one short name, ``text`` the model's reply.

        Several plain class names ("the liver and the spleen") give one name and mask value each. An empty mask with the
        model's reply is a valid answer: the object is not there.

        Raises:
            PromptError: the text is empty or too long.
        """
        with self._lock:
            named = vocabulary_matches(text)
            if len(named) > 1:
                mask, scores = self._segment_grounded(session, named, self._class_grounding(session, named), None)
                found = [bool((mask == value).any()) for value in range(1, len(named) + 1)]
                reply = segment_reply([spoken(n) for n in named], found)
                return Segmentation(mask, session.volume.geometry, named, scores, reply.replace(" [SEG]", ""))
            request = spoken_request(text)
            look = self._look(session)
            reply = self.model.answer(look.tokens, [request], max_new_tokens=48)[0]
            name = named[0] if named else short_name(text)
            if named and "[SEG]" not in reply:
                reply = segment_reply([spoken(name)], [True])  # a plain class is searched for whatever was said
            if "[SEG]" not in reply:
                empty = np.zeros(session.volume.geometry.shape, dtype=np.uint8)
                return Segmentation(empty, session.volume.geometry, (name,), {name: 0.0}, reply)
            several = name in MULTIPLE or asks_for_several(text)
            grounding = self.model.ground(look, [request], [reply], named, organs_within(text), not several)
            least = _LEAST_SHARE[several] if several or named else 1.0
            mask, scores = self._segment_grounded(session, (name,), grounding, None, least)
        return Segmentation(mask, session.volume.geometry, (name,), scores, reply.replace("[SEG]", "").strip())

    @torch.inference_mode()
    def answer(self, session: Session, question: str) -> Answer:
        """Answer a question about the volume, with the structures that question and answer name.

        Raises:
            PromptError: the question is empty or too long.
        """
        question = checked(question, "question")
        with self._lock:
            answer = self._said(session, question)
            shown = self._evidence_map(session)
            grounded = ground_answer(answer, shown, partial(self._point, session)) if shown else ()
        return replace(answer, sentences=grounded)

    @torch.inference_mode()
    def report(self, session: Session) -> Answer:
        """Draft a report, each sentence with the structures it names."""
        with self._lock:
            answer = self._said(session, REPORT_REQUEST)
            return replace(answer, sentences=self.ground_report(session, answer.text))

    @torch.inference_mode()
    def ground_report(self, session: Session, text: str) -> tuple[Sentence, ...]:
        """The sentences of any report, also one that a person wrote, each with the structures it names.

        Empty where the model has no map of the volume.
        """
        with self._lock:
            shown = self._evidence_map(session)
            return ground_report(text, shown, partial(self._point, session)) if shown else ()

    @torch.inference_mode()
    def evidence_mask(self, session: Session, name: str) -> np.ndarray:
        """Mask (I, J, K) bool on the stored grid of what an :class:`Evidence` names.

        Raises:
            PromptError: the model's map does not show it, or the model has no map.
        """
        with self._lock:
            shown = self._evidence_map(session)
            mask = None if shown is None else shown.mask(name)
        if mask is None:
            raise PromptError(f"{name!r} is {NOT_FOUND}; ask for a name that an answer on this image gave as evidence")
        return mask

    def _said(self, session: Session, question: str) -> Answer:
        text = self.model.answer(self._look(session).tokens, [trained_question(question)])[0]
        return Answer(question, text.replace("[SEG]", "").strip(), self.meta.notice)

    def _evidence_map(self, session: Session) -> EvidenceMap | None:
        elements, shape = self._look(session).elements, session.image.shape
        if elements is None:
            return None
        return EvidenceMap(elements, self.config.scene_organs, session.transform, (shape[0], shape[1], shape[2]))

    def _point(self, session: Session, words: str) -> torch.Tensor:
        """Scores (E,) of the elements of the scene for words that mean one of them."""
        scores = self.model.point(self._look(session), [segment_prompt([words])], [segment_reply([words], [True])])
        return scores[0].cpu()

    @torch.inference_mode()
    def uncertainty(self, session: Session) -> float:
        """How unsure the model is about this volume: mean boundary entropy over the classes it finds, in [0, 1].

        Every class counts once and entropy is taken near its own boundary, so neither organ size nor the field of
        view drives the ranking. 1.0 when nothing is found at all.
        """
        with self._lock:
            names = tuple(n for n in self.classes if n not in MULTIPLE)
            grounding = self._class_grounding(session, names)
            located = self._locate(session, grounding)
            values = []
            for request in range(len(names)):
                found = self.named.delineate(located, session.spacing, request, _LEAST_SHARE[False])
                if found.score > 0:
                    values.append(found.entropy)
        return float(np.mean(values)) if values else 1.0

    # --- embeddings -------------------------------------------------------------------------------------------------

    @property
    def embeds(self) -> bool:
        """Whether the checkpoint has an image-text model, which :meth:`embed_volume` and :meth:`embed_text` need."""
        return self._embeddings.available

    @property
    def reads(self) -> str | None:
        """Digest of the weights whose scene the image-text model reads; None where it has an encoder of its own."""
        return self._embeddings.reads

    @torch.inference_mode()
    def embed_volume(self, volume: Volume | Session) -> np.ndarray:
        """Unit vector (D,), float32, of a whole volume; its product with that of a text is their similarity.

        A session that is open on the volume saves turning it to the canonical grid once more.
        The volume may lie on any grid: the encoder sees its canonical global view (SigLIP, arXiv 2303.15343). A head
        over the scene takes that of the session, which all its text answers share.

        Raises:
            CheckpointError: the checkpoint has no image-text model.
        """
        size = self._embeddings.view_size
        session = volume if isinstance(volume, Session) else self.open(volume)
        if size is None:
            return self.embed_scene(self.measured_scene(session))
        with self._lock:
            view, _ = language_view(session.image, session.spacing, session.volume.modality, size)
            return self._embeddings.of_view(view)

    @torch.inference_mode()
    def embed_text(self, text: str) -> np.ndarray:
        """Unit vector (D,), float32, of a report; what does not fit the text tower is left out from the end.

        Raises:
            CheckpointError: the checkpoint has no image-text model.
            PromptError: the text is empty.
        """
        with self._lock:
            return self._embeddings.of_text(text)

    @torch.inference_mode()
    def measured_scene(self, session: Session) -> MeasuredScene:
        """What the scene says of the volume (a batch of one): see :mod:`medvl_sam2.modeling.scene_facts`.

        Raises:
            CheckpointError: the checkpoint has no scene.
        """
        with self._lock:
            scene = self._look(session).scene
        if scene is None:
            raise CheckpointError("this checkpoint has no scene (SceneConfig.lesions is 0), so nothing is measured")
        return scene

    @torch.inference_mode()
    def embed_scene(self, scene: MeasuredScene) -> np.ndarray:
        """:meth:`embed_volume` of a volume whose :meth:`measured_scene` is at hand.

        Raises:
            CheckpointError: the checkpoint has no image-text model that reads scenes.
        """
        with self._lock:
            return self._embeddings.of_scene(scene)

    # --- shared ---------------------------------------------------------------------------------------------------

    def _look(self, session: Session) -> GlobalLook:
        shared = session.shared
        if shared.look is None:
            size = self.config.vision.input_size
            view, extent = language_view(session.image, session.spacing, session.volume.modality, size)
            shared.look = self.model.look(view.to(self._device), extent.to(self._device)).readable()
        return shared.look

    def _class_grounding(self, session: Session, names: Sequence[str]) -> Grounding:
        requests = [segment_prompt([spoken(n)]) for n in names]
        replies = [segment_reply([spoken(n)], [True]) for n in names]
        return self.model.ground(self._look(session), requests, replies, names)

    def _locate(self, session: Session, grounding: Grounding) -> Located:
        if session.whole is None:
            session.whole = self.named.whole_stack(session.image, session.spacing, session.intensity)
        return self.named.locate(session.whole, session.spacing, grounding)

    def _segment_grounded(
        self,
        session: Session,
        names: Sequence[str],
        grounding: Grounding,
        progress: Progress | None,
        least_share: float | None = None,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Label map on the stored grid (later names never overwrite surer ones) and scores."""
        if progress is not None:
            progress(0.05, "looking for the objects")
        located = self._locate(session, grounding)
        label_map = np.zeros(session.image.shape, dtype=np.uint8)
        # Lesions lie inside organs and must stay visible, so they win; otherwise the surer class does.
        standing = [(False, -1.0)]
        for k, name in enumerate(names):
            if progress is not None:
                progress(0.3 + 0.7 * k / len(names), f"delineating {name}")
            least = _LEAST_SHARE[name in MULTIPLE] if least_share is None else least_share
            found = self.named.delineate(located, session.spacing, k, least)
            standing.append((name in MULTIPLE, found.score))
            weaker = np.array([other <= standing[-1] for other in standing])
            label_map[found.mask] = np.where(weaker[label_map[found.mask]], k + 1, label_map[found.mask])
            del found  # a whole-body mask has 150 million voxels: one at a time
        stored = np.ascontiguousarray(session.transform.inverse_array(label_map))
        scores = {name: float(np.clip(score, 0, 1)) for name, (_, score) in zip(names, standing[1:], strict=True)}
        return stored, scores
