"""What the federation sees of imaging: a task, its data sets and its metrics.

Nothing here imports torch at run time, so that a coordinator can read metric specifications without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from wardround.tasks.states import MEAN, Kind, PatientMean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from wardround.imaging.datasets.split import Deal
    from wardround.imaging.orientation import Turn
    from wardround.imaging.readers.aside import Aside
    from wardround.imaging.readers.cases import Patterns
    from wardround.imaging.readers.labelled import LabelledImage
    from wardround.study.acquisitions import AcquisitionSettings
    from wardround.study.baselines import Baseline
    from wardround.study.protocols import HeaderFacts
    from wardround.tasks.charts import Charts
    from wardround.tasks.predictions import Prediction
    from wardround.tasks.scanning import ScanBatch
    from wardround.tasks.temperature import Calibration

Split: TypeAlias = Literal["train", "validation", "test"]
# A site's data folders.
Source: TypeAlias = tuple[Path, ...]
# What its own task makes of it. It moves to a site's device as one, so it is a tensor, a dataclass, mapping, list,
# tuple or named tuple of such parts, or has a method `to(device)`; see `wardround.learning.device.moved`.
Batch: TypeAlias = Any


@dataclass(frozen=True)
class MetricSpec:
    """A metric: the range and resolution in which fixed-point sums carry it, and how results are read.

    A report takes direction, `label`, `unit` and `definition` from here. A difference below `negligible` makes no
    claim; without one the resolution is that bound. `kind` says how patients add up (`tasks.states`): their mean, a
    ratio of sums or a histogram. In a metric that `may_be_absent` NaN says that an example has no value by definition
    (no tumour: no Dice), and a patient without any is counted apart; else NaN is what a diverged network gives, and the
    worst value. `source` is the key of `Task.score` where that is not the name: metrics of one source share what is
    summed. Raises ValueError where the range is empty, the resolution not positive or `negligible` below 0.
    """

    name: str
    low: float
    high: float
    resolution: float
    larger_is_better: bool
    label: str = ""
    unit: str = ""
    negligible: float = 0.0
    definition: str = "as the task defines it"
    may_be_absent: bool = False
    kind: Kind = MEAN
    source: str = ""

    def __post_init__(self) -> None:
        if not self.low < self.high or not 0.0 < self.resolution <= self.high - self.low:
            raise ValueError(f"metric {self.name!r}: needs low < high and 0 < resolution <= high - low")
        if not self.negligible >= 0.0:
            raise ValueError(f"metric {self.name!r}: negligible is a difference, 0 or more")

    def to_json(self) -> dict[str, Any]:
        """What a reader of results must know of the metric."""
        return {
            "name": self.name,
            "label": self.label or self.name.replace("_", " "),
            "unit": self.unit,
            "larger_is_better": self.larger_is_better,
            "negligible": self.negligible or self.resolution,
            "resolution": self.resolution,
            "definition": self.definition,
        }

    @property
    def key(self) -> str:
        """The key of its values in `Task.score`."""
        return self.source or self.name

    @property
    def counts_apart(self) -> bool:
        """Whether a patient can be without a value."""
        return self.may_be_absent or not isinstance(self.kind, PatientMean)

    @property
    def worst(self) -> float:
        """The bad end of the range."""
        return self.low if self.larger_is_better else self.high

    def clip(self, value: float) -> float:
        """The value inside the range; what is not a number counts as the worst."""
        return self.worst if math.isnan(value) else min(max(value, self.low), self.high)

    def is_better(self, value: float, other: float) -> bool:
        """Whether `value` beats `other` strictly."""
        return value > other if self.larger_is_better else value < other

    def rank(self, value: float) -> float:
        """A number that is larger for a better value; least where there is none (NaN)."""
        return -math.inf if math.isnan(value) else value if self.larger_is_better else -value


@dataclass(frozen=True)
class Window:
    """A grey window in which a radiologist looks at an image: values from `low` (black) to `high` (white).

    A value counts `scale` of `unit`, so that an error can be named in it.
    """

    name: str
    low: float
    high: float
    unit: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class ReportPart:
    """What a task adds to report and model card: a heading, a paragraph, and a table where it has a `head`.

    All of it is plain text and numbers: markup is shown as it is. A cell that is `None` is a dash.
    """

    title: str
    text: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str | float | None]] = ()


class Dataset(Protocol):
    """One site's data, with patients as numbers and never as names."""

    def fingerprint(self) -> str:
        """Sha256 (hex) over what training can see; never over names or paths."""
        ...

    def __len__(self) -> int:
        """Number of training examples."""
        ...

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> Batch:
        """Training examples, augmented with `random` alone, collated."""
        ...

    def owners(self) -> Sequence[int]:
        """Whose each training example is: a patient's number for each. Asked for with privacy only."""
        ...

    def patients(self, split: Split) -> int:
        """Number of patients in a split."""
        ...

    def evaluation(self, split: Split) -> Iterator[tuple[int, Batch]]:
        """Pairs of patient number and batch, patient by patient; a patient may have several batches."""
        ...


@runtime_checkable
class Headed(Protocol):
    """A data set whose files say by which scanners they were made."""

    def remarks(self) -> Sequence[str]:
        """What somebody at the site should know of the data before training on them."""
        ...

    def header_facts(self, minimum: int) -> HeaderFacts:
        """What headers of training patients say, where at least `minimum` patients have a value."""
        ...


@runtime_checkable
class Named(Protocol):
    """A data set that tells its patients apart over studies, as long as their names stay."""

    def names(self, split: Split) -> Sequence[str]:
        """A name for each patient of a split, in the order of `evaluation`. Names stay in the site's own folders."""
        ...


@runtime_checkable
class Prepared(Protocol):
    """A data set with something that is slow to make and the same for all of its examples."""

    def prepare(self, *, keep: bool) -> None:
        """Make it; without `keep` only where it stays on the disk for other processes to find."""
        ...


class Task(Protocol):
    """What a study learns."""

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """What `score` measures; the first one selects the released round."""
        ...

    def build_model(self) -> nn.Module:
        """A freshly initialised network; the caller seeds torch."""
        ...

    def dataset(self, site: str, source: Source) -> Dataset:
        """The data of a site."""
        ...

    def pooled(self, parts: Sequence[Dataset]) -> Dataset:
        """The union of several sites' data sets; its examples are numbered part after part."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar that training lowers."""
        ...

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Metric name, or source -> values of each example: (B,) of a mean, else (B, *given) as the `kind` says."""
        ...


@runtime_checkable
class Staged(Task, Protocol):
    """A task of several stages, one feeding the next, each with a loss: a study says when each one learns.

    `loss` is `tasks.stages.weighted_sum` of the losses: what a study without phases lowers.
    """

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of modules of the model, those that feed before those that are fed.

        Every parameter and buffer of the model belongs to exactly one of them.
        """
        ...

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Stage -> its loss, a scalar. A loss may depend on its own stage and on those before it."""
        ...


@runtime_checkable
class Dealing(Protocol):
    """A task that lets the site say which patients train, validate and test: it remembers who did before.

    A task without it deals its patients out by itself, and moves them when others join if it deals by their number.
    """

    def deal_by(self, deal: Deal) -> None:
        """Take the parts of patients from `deal` in every data set that is opened from now on."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A task that says more of its results than their tables do."""

    def report_parts(self, numbers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Sequence[ReportPart]:
        """Parts of the report. `numbers`: arm -> site (or `mean`, `unseen`) -> metric -> value, as `result.json` has
        them; what a site withholds is not there.
        """
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A task that reads image files, those of readers outside included where a site allows them."""

    def read_by(self, readers: Callable[[str], Mapping[str, Any]]) -> None:
        """Take from `readers`, by site, what reads files of an ending (".raw")."""
        ...


@runtime_checkable
class SettingAside(Protocol):
    """A task that can go on without patients whose files cannot be used."""

    def set_aside_by(self, quarantine: Callable[[str, int, Sequence[Aside]], None]) -> None:
        """Let `quarantine` look at whom each data set sets aside: the site, how many patients it has, and who it is.

        It raises `DataError` where those are too many. A task that is given none sets no patient aside.
        """
        ...


@runtime_checkable
class SetsAside(Protocol):
    """A data set that may have gone on without some patients."""

    def set_aside(self) -> Mapping[Split, int]:
        """How many patients of each part cannot be used."""
        ...

    def set_aside_unknown(self) -> int:
        """How many images or rows of a table cannot be used and do not say whose they are."""
        ...


@runtime_checkable
class Predicts(Task, Protocol):
    """A task whose released model a clinic applies to images of its own."""

    def patterns(self) -> Patterns:
        """How the files of an image are named, relative to a folder."""
        ...

    def input_shape(self) -> tuple[int, ...]:
        """Channels and grid of one example of a batch, as the network sees it."""
        ...

    def predict(self, model: nn.Module, image: LabelledImage) -> Prediction:
        """What the model says of one image; raises `DataError` for one that it cannot see."""
        ...


@runtime_checkable
class PredictsScans(Predicts, Protocol):
    """A task whose released model a clinic applies to raw data, or to images that are scanned first."""

    def scanned_by(self, site: str | None) -> PredictsScans:
        """The same task with the simulated scanner of a site, or of the study."""
        ...

    def scanning(self) -> AcquisitionSettings:
        """What that scanner measures."""
        ...

    def predict_scans(self, model: nn.Module, scans: ScanBatch) -> Prediction:
        """What the model says of a scan of each slice of a volume, whose targets are not known."""
        ...


@runtime_checkable
class Visited(Protocol):
    """A task that can show a scanner the patients of other sites."""

    def visits(self, site: str, sources: Mapping[str, Source]) -> Dataset:
        """The test patients of the sites in `sources`, by the splits of those sites, as the data of `site`."""
        ...


@runtime_checkable
class Compared(Protocol):
    """A task whose images are compared with the classical methods that its study names at `task.evaluation`."""

    def compare_with(self, baselines: Mapping[str, Baseline]) -> None:
        """Take them from these, by name, those of packages outside too."""
        ...


@runtime_checkable
class Imaging(Task, Protocol):
    """A task whose results are images: it has classical baselines and can show examples."""

    def baseline_parameters(self, name: str) -> tuple[float | None, ...]:
        """The weights among which validation patients choose; `(None,)` where there is nothing to choose."""
        ...

    def baseline(self, name: str, parameter: float | None, batch: Batch) -> Tensor:
        """Magnitude images (B, H, W) by a classical method."""
        ...

    def reconstruct(self, model: nn.Module, batch: Batch) -> Tensor:
        """Magnitude images (B, H, W) by the network."""
        ...

    def reference(self, batch: Batch) -> Tensor:
        """The true magnitude images (B, H, W)."""
        ...

    def score_images(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Metric name -> (B,) values of images (B, H, W) against the reference."""
        ...

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that a report shows images in; none leaves it to each image's own range."""
        ...

    def examples(self, dataset: Dataset) -> Iterator[Batch]:
        """A few single test examples (B = 1) to show in a picture report, always the same ones."""
        ...


@runtime_checkable
class ScoresBaselines(Protocol):
    """A task that measures more of a classical method than its images against the reference."""

    def score_baseline(self, name: str, parameter: float | None, batch: Batch) -> dict[str, Tensor]:
        """Metric name -> (B,) values of a classical method."""
        ...


@runtime_checkable
class Oriented(Protocol):
    """A task that knows how the patient lies in its examples."""

    def turns(self, dataset: Dataset) -> Iterator[Turn | None]:
        """How each of `Imaging.examples` is shown to people; None for as it is."""
        ...


@dataclass(frozen=True)
class Illustration:
    """A picture for people, uint8 (H, W, 3), and what stands below it; it stays at the site."""

    picture: NDArray[np.uint8]
    caption: str = ""


@runtime_checkable
class Illustrated(Task, Protocol):
    """A task that draws test patients itself, because its results are no images: outlines, classes."""

    @property
    def legend(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """What the colours in its pictures stand for: words and red, green, blue from 0 to 255."""
        ...

    def merit(self, rows: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """How well each test patient was served, (n,), larger is better, NaN where nothing says so.

        `rows` are what patients add to each metric. The site shows its worst, its median and its best patient.
        """
        ...

    def pictured(self, dataset: Dataset, places: Sequence[int]) -> Iterator[Batch]:
        """What is drawn of the test patients at these places in the order of `evaluation`: a batch for each."""
        ...

    def illustrate(self, model: nn.Module | None, batch: Batch) -> Illustration:
        """What the network found in such a batch, beside the truth; without a network the truth alone."""
        ...


@runtime_checkable
class Calibrated(Task, Protocol):
    """A task of probabilities, which each site makes come true by a calibration of its own before it tests a model."""

    def calibration(self, model: nn.Module, batches: Iterable[tuple[int, Batch]]) -> Calibration | None:
        """What fits the model to validation patients (patient number, batch); None if none does."""
        ...

    def calibrated(self, calibration: Calibration) -> Task:
        """The same task, which scores with this calibration too."""
        ...


@runtime_checkable
class Repeating(Task, Protocol):
    """A task whose network may see the same input again and again, so that what never changes of it can be kept."""

    @property
    def repeats(self) -> bool:
        """Whether a training example is the same each time it is taken."""
        ...


@runtime_checkable
class ComparesUntrained(Task, Protocol):
    """A task that compares what learned with what did not: its model as a study starts it, say."""

    @property
    def untrained(self) -> Mapping[str, tuple[str, str]]:
        """Name, as the task's settings have it in `compares_with` -> label, and what it is."""
        ...

    def score_untrained(self, name: str, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """As `Task.score`; `model` is what the study starts from."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A data set that knows how many different images a network sees of it, in all of its parts."""

    def pictures(self) -> int:
        """Their number; each is the same whenever it is seen, where the task `Repeating.repeats`."""
        ...


@runtime_checkable
class Charted(Protocol):
    """A task whose test patients make charts in the report of a run on one machine."""

    def charts(self, rows: Mapping[str, NDArray[Any]]) -> Charts:
        """Sums over the patients, from what each adds to each metric: name -> (n, *shape)."""
        ...
