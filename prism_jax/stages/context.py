"""What every stage is handed: the experiment, its working directory, its data and its teachers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from prism_jax import parallel, progress
from prism_jax.config import (
    BITS_VERSION,
    Dataset,
    Dtype,
    Experiment,
    Network,
    Recover,
    fingerprint_fields,
    to_dict,
)
from prism_jax.core import batching
from prism_jax.core.augment import Augment
from prism_jax.data import weights, workdir
from prism_jax.data.datasets import DatasetInfo
from prism_jax.data.exchange import ImageSet, existing_folder
from prism_jax.data.lazy import Images, LazyImages, OneByOne, hold
from prism_jax.data.sources import ImageSource, Subset, info_of, open_source
from prism_jax.data.weights import RECORD, WEIGHTS, sha256, unpack_variables
from prism_jax.errors import UserError
from prism_jax.initialise import INITIALISERS, SCORING, Patches, Start, scorer
from prism_jax.models import build
from prism_jax.teachers import TeacherPool, describe
from prism_jax.types import Normalisation, PyTree

T = TypeVar("T")


class Interrupted(Exception):
    """The run was asked to stop; everything so far is saved."""

    def __init__(self, signum: int, why: str | None = None):
        super().__init__(why or signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Say what to do where a device's memory does not suffice.

    Raises:
      UserError: it does not.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has not enough memory ({str(error).splitlines()[0]}). {remedy} What was "
            f"finished stays where it is."
        ) from error


class StopSignal:
    """Turns SIGINT and SIGTERM into a request that the running stage honours after saving.

    Where another process of the run has stopped or failed, this one is asked to stop too: what
    it waits for would never come.
    """

    SECONDS_BETWEEN_QUESTIONS = 2.0

    def __init__(self) -> None:
        self.signum: int | None = None
        self._elsewhere: str | None = None
        self._asked = 0.0

    def install(self) -> None:
        """Catch both signals from now on; a second one ends the process at once."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._request)

    def _request(self, signum: int, frame: Any) -> None:
        if self.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.signum = signum

    @property
    def requested(self) -> bool:
        if self.signum is None:
            now = time.monotonic()
            if now - self._asked >= self.SECONDS_BETWEEN_QUESTIONS:
                self._asked, self._elsewhere = now, parallel.stopped_elsewhere()
        return self.signum is not None or self._elsewhere is not None

    def check(self) -> None:
        """Raise ``Interrupted`` where a stop was requested; call it only when all is saved."""
        if self.requested:
            raise Interrupted(self.signum or signal.SIGTERM, self._elsewhere)


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """A set of images that students train on: the synthetic one, or a control.

    Attributes:
      name: "synthetic", or the control's.
      root: where its labels and students are.
      read: opens the images; most questions about a set do not need them.
      labels_N: int32 classes.
      fields: what made the images; they enter the fingerprints of labels and students.
      soft: whether it is given soft labels.
    """

    name: str
    root: epath.Path
    read: Callable[[], Images]
    labels_N: np.ndarray
    fields: dict[str, Any]
    soft: bool

    @functools.cached_property
    def images_uint8_NHWC(self) -> Images:
        return self.read()


class Context:
    """One run: configuration, paths, data, teachers, and the request to stop."""

    def __init__(
        self,
        config: Experiment,
        root: epath.PathLike,
        *,
        stop: StopSignal | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        """Write nothing yet.

        Args:
          config: the experiment.
          root: its working directory.
          stop: the request to stop.
          provenance: what makes the results: command, commit, versions, machine.
        """
        self.config = config
        self.root = epath.Path(root)
        self.stop = stop or StopSignal()
        self.provenance = dict(provenance or {})
        self.lock = workdir.Lock(self.root)
        self._made: dict[str, Any] = {}

    def acquire(self) -> None:
        """Take the workdir's lock before the first write, and record what runs: config.json.

        Of several processes the main one does, for all of them: see ``deal``.
        """
        if self.lock.held or not parallel.is_main():
            return
        self.lock.acquire()
        path = self.root / "config.json"
        if path.exists() and self.provenance:
            before = workdir.read_json(path)["provenance"].get("machine", {}).get("nproc")
            now = self.provenance["machine"]["nproc"]
            if before not in (None, now):
                self.say(
                    f"warning: this workdir was begun with NPROC={before} and goes on with "
                    f"NPROC={now}; on a CPU other bits will follow."
                )
        workdir.write_record(
            path, {"experiment": to_dict(self.config), "provenance": self.provenance}
        )

    # --- several processes ---

    def deal(
        self,
        name: str,
        items: Sequence[Any],
        pending: Callable[[], Sequence[Any]],
        prepare: Callable[[], None] = lambda: None,
    ) -> list[Any]:
        """The missing pieces of work that fall to this process.

        A process calls it where a stage begins, unless the others have already done all of it.
        The main process takes the lock, prepares the folders and says what is missing.

        Args:
          name: of the stage and what it is about; used once in a run.
          items: everything the stage makes, in the order it is worked on.
          pending: which of them are missing.
          prepare: what comes before the work; only the main process runs it.
        """
        if parallel.is_main():
            self.acquire()
            prepare()
            left = pending()
            missing = [i for i, item in enumerate(items) if item in left]
            parallel.tell(name, json.dumps(missing))
        else:
            while (told := parallel.told(name)) is None:
                self.stop.check()
            missing = json.loads(told)
        return parallel.process_share([items[i] for i in missing])

    def first(self, name: str, work: Callable[[], None]) -> None:
        """Run something on the main process alone, before any process goes on."""
        self.deal(name, (), lambda: (), work)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until the other processes have written what is missing to the working directory.

        Raises:
          Interrupted: a stop was requested.
        """
        seconds = 0.05
        while not done():
            self.stop.check()
            time.sleep(seconds)
            seconds = min(2 * seconds, 5.0)

    def train_devices(self, size: int, **division: int | None) -> int:
        """How many devices share the batches of ``size`` images of one training.

        Args:
          **division: see ``core.batching.fits``.
        """
        limit = self.config.parallel.train_devices or parallel.sharing_devices()
        return batching.most_devices(size, limit, **division)

    # --- data ---

    @functools.cached_property
    def info(self) -> DatasetInfo:
        return info_of(self.config.dataset.name, self.config.dataset.path)

    @property
    def normalisation(self) -> Normalisation:
        own = own_normalisation(self.config.dataset)
        if own and len(own.mean) != self.info.channels:
            raise UserError(
                f"dataset.mean has {len(own.mean)} numbers; {self.info.name} has "
                f"{self.info.channels} channels"
            )
        return own or self.info.normalisation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.config.dataset.image_size
        return size, size, self.info.channels

    def open(self, split: str) -> ImageSource:
        """The real images of a split ("train", "test"), opened on first use."""
        return self._open(split)

    @functools.cache  # noqa: B019 - a context lives as long as the run
    def _open(self, split: str) -> ImageSource:
        dataset = self.config.dataset
        source = open_source(
            name=dataset.name,
            source=dataset.source,
            path=dataset.path,
            split=split,
            image_size=dataset.image_size,
            damaged=dataset.damaged,
            threads=dataset.threads,
        )
        if source.num_classes != dataset.num_classes:
            if dataset.num_classes > source.num_classes:
                raise UserError(
                    f"dataset.num_classes is {dataset.num_classes}, but {dataset.name} at "
                    f"{dataset.path or dataset.source} has {source.num_classes} classes"
                )
            source = first_classes(source, dataset.num_classes)
        return source

    @functools.cached_property
    def initial_source(self) -> ImageSource:
        """Where recover starts: the training images, or the folder that the config names."""
        recover = self.config.recover
        if recover.initialise != "folder":
            return self.open("train")
        return ImageSet(
            existing_folder(recover.initialise_from),
            self.info,
            self.open("train"),
            ipc=recover.ipc,
            image_size=self.config.dataset.image_size,
        )

    def initial_images(self, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
        """Where recover starts with these images: float32, normalised."""
        initialise = INITIALISERS[self.config.recover.initialise]
        return initialise(self._start, classes_B, slots_B)

    @functools.cached_property
    def _start(self) -> Start:
        """What initialisers are given; a scorer is loaded only where one is needed."""
        recover, found = self.config.recover, None
        if recover.initialise in SCORING:
            pool = self.pool([recover.scorer or recover.primary])
            found = scorer(
                pool.teachers[0], pool.variables[0], self.normalisation, self.image_shape[0]
            )
        return Start(
            self.initial_source,
            self.normalisation,
            self.image_shape,
            self.config.seed,
            ipc=recover.ipc,
            flip=recover.flip,
            patches=Patches(
                recover.patch_factor, recover.patch_images, recover.patch_crops,
                recover.patch_choice,
            ),
            scorer=found,
        )  # fmt: skip

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` makes, made once in a run."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def hold(self, images: LazyImages) -> Images:
        """Images in memory, where they take less than ``dataset.cache_gigabytes``."""
        return hold(images, limit_bytes=1e9 * self.config.dataset.cache_gigabytes)

    def read(self, source: ImageSource, positions: np.ndarray | None = None) -> Images:
        """The images of a source at some positions, by default all: read now, or as needed."""
        positions = np.arange(len(source)) if positions is None else np.asarray(positions)
        one_by_one = OneByOne(source.image, threads=self.config.dataset.threads)
        return self.hold(
            LazyImages(lambda at: one_by_one(positions[at]), (len(positions), *self.image_shape))
        )

    @functools.cache  # noqa: B019
    def test_set(self) -> tuple[Images, np.ndarray]:
        """The real test images, uint8 NHWC, and their labels."""
        source = self.open("test")
        return self.read(source), source.labels_N

    def data_fields(self, source: ImageSource) -> dict[str, Any]:
        """What images are and how they are normalised, for fingerprints."""
        own = own_normalisation(self.config.dataset)
        return source.describe() | ({"normalisation": dataclasses.asdict(own)} if own else {})

    # --- fingerprints: what decides the bits of each folder ---

    def teacher_fields(self, name: str) -> dict[str, Any]:
        """What a teacher is made of: its network and either its training or its checkpoint."""
        network = self.config.network(name)
        fields = {"network": dataclasses.asdict(network)}
        if network.checkpoint:
            fields["network"]["checkpoint"] = _weights_digest(network.checkpoint)
        else:
            fields["squeeze"] = fingerprint_fields("squeeze", self.config.squeeze)
            fields["squeeze"]["seed"] = self.config.squeeze.seed
            fields["data"] = self.data_fields(self.open("train"))
        return fields

    def pool_fields(self, names: Sequence[str]) -> dict[str, str]:
        """Teachers by the digest of what they are made of."""
        return {name: workdir.digest(self.teacher_fields(name)) for name in names}

    def statistics_fields(self, name: str) -> dict[str, dict[str, Any]]:
        """What those statistics of real images are made of that recover matches, by kind."""
        recover, squeeze = self.config.recover, self.config.squeeze
        kinds = statistic_kinds(recover)
        if not kinds:
            return {}
        views = ("batch_size", "crop_min", "crop_pad", "flip")
        fields = {name: getattr(squeeze, name) for name in views}
        fields |= {
            "seed": squeeze.seed,
            "patch": recover.statistic_patch,
            "teacher": workdir.digest(self.teacher_fields(name)),
            "data": self.data_fields(self.open("train")),
            "bits_version": BITS_VERSION,
        }
        found = {kind: {"kind": kind, **fields} for kind in kinds}
        if "class" in found:
            found["class"]["views"] = "of whole batches"  # those of a short one were its own before
        return found

    def recover_fields(self) -> dict[str, Any]:
        """What the synthetic images are made of."""
        recover, span = self.config.recover, self.config.parallel.recover_devices
        fields = {
            "recover": fingerprint_fields("recover", recover),
            "seed": self.config.seed,
            "data": self.data_fields(self.initial_source),
            "teachers": self.pool_fields(recover.pool),
        }
        if span > 1:
            fields["devices_per_batch"] = span
        if recover.initialise in SCORING:
            fields["scorer"] = self.pool_fields([recover.scorer or recover.primary])
        if statistics := {t: found for t in recover.pool if (found := self.statistics_fields(t))}:
            fields["statistics"] = workdir.digest(statistics)
        return fields

    def relabel_fields(self, labelled: LabelledSet) -> dict[str, Any]:
        """What soft labels are made of."""
        parts = self.config.label_parts
        return {
            "relabel": fingerprint_fields("relabel", self.config.relabel),
            "seed": self.config.seed,
            "images": workdir.digest(labelled.fields),
            "teachers": self.pool_fields(self.config.relabel.teachers),
            **({"parts": parts} if parts > 1 else {}),
        }

    def validate_fields(self, labelled: LabelledSet, student: str, seed: int) -> dict[str, Any]:
        """What a trained student is made of."""
        fields = {
            "validate": fingerprint_fields("validate", self.config.validate),
            "network": dataclasses.asdict(self.config.network(student).untrained()),
            "student_seed": seed,
            "seed": self.config.seed,
            "images": workdir.digest(labelled.fields),
            "test": self.data_fields(self.open("test")),
        }
        if labelled.soft:
            fields["labels"] = workdir.digest(self.relabel_fields(labelled))
        else:
            views = ["batch_size", *(field.name for field in dataclasses.fields(Augment))]
            fields["views"] = {name: getattr(self.config.relabel, name) for name in views}
            fields["validate"]["loss"] = "ce"
        return fields

    # --- networks ---

    def build(self, name: str, *, student: bool = False, dtype: Dtype = "float32") -> nn.Module:
        """A named network's module: a student's head is the dataset's, a teacher's its weights'."""
        network = self.config.network(name)
        head = None if student else network.head_classes
        return build(
            network.architecture,
            head or self.config.dataset.num_classes,
            width=network.width,
            depth=network.depth,
            stem=network.stem,
            dtype=jnp.dtype(dtype),
        )

    def class_indices(self, name: str) -> tuple[int, ...] | None:
        """The outputs of a network's head that are the classes of the data; None: all of them.

        Unless the config states them, a head of ImageNet's 1,000 classes (or 1,001, with the
        background first) is cut to the classes that the data has of them.

        Raises:
          UserError: the head has other classes, and which of them are meant is not known.
        """
        network, classes = self.config.network(name), self.config.dataset.num_classes
        head = network.head_classes or classes
        if network.class_indices is not None or head == classes:
            return network.class_indices
        known = self.open("train").imagenet_indices
        if head in (1000, 1001) and known is not None:
            return tuple(index + head - 1000 for index in known)
        raise UserError(
            f"{name} has a head of {head} classes and the data {classes}, and which of them they "
            f"are is not known (class folders named by WordNet IDs would tell it); state "
            f"networks.{name}.class_indices"
        )

    def teacher_folder(self, name: str) -> epath.Path:
        return self.root / "squeeze" / name

    def load_variables(self, name: str) -> PyTree:
        """A squeezed teacher's variables.

        Raises:
          UserError: it is not there, or its file is not the one that was written.
        """
        folder = self.teacher_folder(name)
        if not (folder / RECORD).exists():
            raise UserError(
                f"teacher {name} is not in {folder}; run the squeeze stage first "
                f"(--stages=squeeze,...), or adopt it with --from=<workdir that has it>"
            )
        data = (folder / WEIGHTS).read_bytes() if (folder / WEIGHTS).exists() else b""
        if sha256(data) != workdir.read_record(folder / RECORD)["sha256"]:
            raise UserError(
                f"{folder / WEIGHTS} is damaged: its content is not what squeeze wrote. Delete "
                f"{folder} and run the same command again; only this teacher is redone."
            )
        return unpack_variables(data)

    def weights_digests(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of squeezed teachers' weights, by name."""
        return {
            name: workdir.read_record(self.teacher_folder(name) / RECORD)["sha256"]
            for name in names
        }

    def pool(self, names: Sequence[str], dtype: Dtype = "float32") -> TeacherPool:
        """These squeezed teachers, ready to read images of the dataset."""
        teachers, variables = [], []
        for name in names:
            network = self.config.network(name)
            teachers.append(
                describe(
                    name,
                    self.build(name, dtype=dtype),
                    self.image_shape,
                    normalisation=own_normalisation(network),
                    class_indices=self.class_indices(name),
                )
            )
            variables.append(self.load_variables(name))
        return TeacherPool(tuple(teachers), tuple(variables), self.normalisation)

    def begin(self, folder: epath.Path, fields: dict[str, Any]) -> None:
        """Take the workdir's lock and record what a folder is about to be made from.

        What was made there from other settings is deleted (squeeze and recover refuse before it
        comes to that); what does not say what it was made from is set aside.
        """
        self.acquire()
        found = workdir.read_fingerprint(folder)
        if found is not None:
            if not workdir.differences(found, fields):
                return
            self.say(f"{folder} was made from other settings; it is made again")
            workdir.remove(folder)
        elif folder.exists():
            aside = workdir.set_aside(folder)
            self.say(f"warning: {folder} has no {workdir.FINGERPRINT}; it is set aside as {aside}")
        workdir.write_fingerprint(folder, fields)

    def fits(self, folder: epath.Path, fields: dict[str, Any]) -> bool:
        """Whether what a folder holds was made from these fields."""
        found = workdir.read_fingerprint(folder)
        return found is not None and not workdir.differences(found, fields)

    def say(self, text: str) -> None:
        progress.say(text)


def statistic_kinds(recover: Recover) -> list[str]:
    """The kinds of statistics of real images that are measured for recover."""
    kinds = []
    if recover.iterations and recover.alpha_bn:
        kinds += ["conv"] if {"conv", "patch"} & set(recover.match) else []
        kinds += ["class"] if recover.class_share else []
    return kinds


def first_classes(source: ImageSource, count: int) -> ImageSource:
    """A source restricted to its first classes (``:smoke`` runs, small studies)."""
    at = np.flatnonzero(source.labels_N < count)
    found = Subset(source, at, described={"first_classes": count})
    names, indices = source.class_names, source.imagenet_indices
    found.num_classes = count
    found.class_names = None if names is None else names[:count]
    found.imagenet_indices = None if indices is None else indices[:count]
    return found


def own_normalisation(of: Network | Dataset) -> Normalisation | None:
    """The normalisation that the config states for imported weights or the data set, if any."""
    if of.mean is None or of.std is None:
        return None
    return Normalisation(of.mean, of.std)


@functools.cache
def _weights_digest(path: str) -> str:
    return weights.digest(path)
