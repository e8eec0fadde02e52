"""The contract that every part of the code keeps. Read this file first.

Letter key, used in comments, jaxtyping strings and suffix names everywhere:

  B  batch rows (images, or packed rows)      L  tokens in a packed row
  M  image slots in a packed row              P  patch side in pixels
  H W C  image height, width, channels        N  tokens of one image
  D  model width    K  heads    E  embedding  O  objects    Q  queries

A batch is a dict of arrays with leading axis B. A stacked batch carries
`image` uint8 [B,H,W,3]; a packed batch carries the rows of NaViT:

  patches       uint8 [B,L,3P²]  pixels as (row, col, channel), channel fastest
  segment_ids   int32 [B,L]      0 padding, images are 1..M and contiguous
  positions     int32 [B,L,2]    (row, col) in the image's own full grid
  grid_hw       int32 [B,M,2]    that grid, in patches
  example_mask  bool  [B,M]      False for slots without an image

A model that answers several tasks returns `logits/NAME` for each, and as
`logits` those of the one that is asked for: by its settings, or for one call by
the compile-time keyword `task`. Losses and evaluators read `logits`.

Labels are `label` int32 (-1: none) and `multi_label` uint8 [..., classes],
with leading [B] when stacked and [B,M] when packed. `_mask` bool [B] is False
for rows that only fill up the batch. What only the host reads stays there
(HOST_KEYS): `example_id` and `image_hw` (the original size) of each image,
`broken_id` of those that could not be read, `num_tokens` of each packed row.

Texts (config.data.text) are `text` int32 [B,T] beside stacked images; where an
image has none, `_mask` is False. Those of the images in a packed row share a
row too:

  text              int32 [B,L']  tokens of the captions
  text_segment_ids  int32 [B,L']  0 padding; m + 1: the caption of slot m
  text_positions    int32 [B,L']  in the caption

A slot m whose m + 1 does not occur has no text. On the host stay `text_id`
(equal for equal texts, -1 for none) and `text_flags` (see data/text.py).

Images with objects (config.data.objects) lie top-left on a canvas, one of a
closed set for each batch, that is 0 elsewhere:

  size        int32   [B,2]    (height, width) of the image on the canvas
  boxes       float32 [B,O,4]  (cx, cy, w, h) in fractions of that image
  box_label   int32   [B,O]    class of the object, -1 where there is none
  box_id_map  uint8 or uint16 [B,H,W], with data.objects.masks: 0, or 1 + the
              position in `boxes` of the segment that the pixel belongs to

Training has no crowds; an evaluation has them among the boxes. On the host it
also has `box_crowd` bool [B,O], and of the original image `box_pixels` float32
[B,O,4], (x0, y0, x1, y1), and `box_area` float32 [B,O], that of the object;
with masks also `original_id_map` [B,H',W'], `box_id_map` at `image_hw`.
`object_counts` says what was wrong with boxes (see data/objects.py).

A model of two towers returns `zimg` and `ztxt`, float32 [B,E] or [B,M,E] of
length 1 (0 in empty slots), and the scalars `t` and `b` (0 if it has none):
t * <zimg, ztxt> + b are the logits.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import flax
import jax

Array = jax.Array
PyTree = Any
Batch = dict[str, Array]
Inputs = dict[str, Array]  # exactly the array keywords of model.__call__
Targets = dict[str, Array]  # what the loss may see and the model may not
Outputs = dict[str, Array]  # documented per model; unused ones cost nothing
Static = tuple[tuple[str, Hashable], ...]  # compile-time keywords of the model
Example = dict[str, Any]  # one item of a Source, nothing decoded

HOST_KEYS = (
  "example_id",
  "image_hw",
  "broken_id",
  "num_tokens",
  "text_id",
  "text_flags",
  "object_counts",
  "box_pixels",
  "box_area",
  "box_crowd",
  "original_id_map",
)
# Mesh axes, in order. The batch is split over the first two.
MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Parameters of scanned layers live under this key, stacked on axis 0.
SCANNED = "blocks"
# The collection of running statistics, which are averaged like parameters.
STATISTICS = "batch_stats"
# The collection in which models lend what is inside them, see capture.py.
INTERMEDIATES = "intermediates"


@flax.struct.dataclass
class TrainState:
  """Everything that training changes, and nothing else.

  `rng` is constant: the key of a step is `fold_in(rng, step)`. `model_state`
  holds the other flax collections (batch_stats), {} if there are none. `ema`
  averages what evaluation takes from it, {"params": ...} and, where the model
  has running statistics, "batch_stats"; or is None.
  """

  step: Array
  params: PyTree
  model_state: PyTree
  opt_state: PyTree
  rng: Array
  ema: PyTree | None = None

  def variables(self) -> dict[str, PyTree]:
    """What evaluation applies: the moving average, where there is one."""
    own = {"params": self.params, **self.model_state}
    return own | (self.ema or {})


class Metric(Protocol):
  """A pytree of sums: merged over batches and devices, then computed."""

  def merge(self, other: "Metric") -> "Metric": ...

  def compute(self) -> Array: ...


class Task(Protocol):
  """A frozen dataclass of hyper-parameters with three pure functions.

  `separable` says that the loss is a mean over examples, so that a batch may
  be split into micro-batches. `loss` then returns a `loss` metric whose
  `count` is the number of examples in the mean.
  """

  separable: ClassVar[bool]

  def prepare(self, batch: Batch, rng: Array | None) -> tuple[Inputs, Targets]:
    """Runs on the device: dtype, normalisation, mixup. No rng: evaluation."""

  def loss(
    self, outputs: Outputs, targets: Targets
  ) -> tuple[Array, dict[str, Metric]]: ...

  def predict(self, outputs: Outputs, targets: Targets) -> dict[str, Array]:
    """What evaluators read; every leaf has the leading axis of the batch."""


class Source(Protocol):
  """Random access to undecoded examples; picklable; never touches a device.

  Items are dicts with `image` (encoded bytes, or uint8 [H,W,3]) and `id` (the
  index), and what the source has of `label` (int), `multi_label` (uint8
  [classes]), `objects`, masks and `caption` (str, or a list of several).
  `objects` is a dict of arrays: `boxes` float32 [O,4], (x0, y0, x1, y1) in
  pixels, `label` int32 [O], and maybe `is_crowd` bool [O] and `area` float32
  [O]; `instance_mask` [H,W] is 0 or 1 + a position in them.
  `label_names` names the classes; of a source with objects, those of `objects`.
  `hw(i)` is the image's (height, width) without decoding its pixels, `name(i)`
  what a log should call it (its file).
  A source may also have `notes` and `faults`, lines about what it found and
  what is wrong with it, `max_objects` of an image, and, if it is panoptic,
  `is_thing` of each class.
  """

  label_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...

  def hw(self, index: int) -> tuple[int, int]: ...

  def name(self, index: int) -> str: ...


class Tokenizer(Protocol):
  """Texts to token ids 0 to vocab_size - 1; picklable.

  0 stands for no token and `eos` for the end of a text; calls give neither.
  `fingerprint` differs where the same ids mean different tokens.
  """

  vocab_size: int
  eos: int
  fingerprint: str

  def __call__(self, text: str) -> list[int]: ...


# predict(batch) -> numpy leaves of the global batch, on every process.
Predict = Callable[[Batch], dict[str, Any]]
# (state, batch, static) -> what the loop compiles and lends as `Predict`.
Measure = Callable[..., dict[str, Any]]


class Batches(Protocol):
  """Lent to an evaluator by the loop: opens a pass over evaluation data."""

  label_names: tuple[str, ...]
  is_thing: tuple[bool, ...] | None  # of each class, for panoptic data

  def __call__(
    self, *, split: str | None = None, **overrides: Any
  ) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Yields (device batch, host-only arrays). Each example comes once."""

  def texts(
    self, texts: Sequence[str]
  ) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Batches of the same shapes that hold these texts and no image.

    `example_id` on the host says where text i lies.
    """


class Evaluator(Protocol):
  """A frozen dataclass of settings, from `evaluators/<name>.py`.

  One that needs more of a model than its predictions also has

    def measure(self, model: nn.Module, task: Task) -> Measure

  which returns a pure function. The loop compiles it with the shardings of the
  state and lends it to `run` in the place of `predict`.
  """

  def run(
    self, *, predict: Predict, batches: Batches, folder: Path
  ) -> dict[str, float]:
    """Scores a model. `folder` is the place for its tables and pictures."""
