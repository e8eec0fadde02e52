"""A student that learns from a frozen teacher: two models in one.

Used by FlexiViT (Beyer et al., arXiv 2212.08013, section 3.3) and EfficientViT
(Liu et al., arXiv 2305.07027). The loss is in tasks/distillation.py.

The model's parameters are the student's, under the student's own names, so
that a run starts from a student's checkpoint and leaves one behind. All
variables of the teacher lie in the collection "teacher", as {"params": ...,
"batch_stats": ...}: no optimizer, decay or moving average ever sees them.
"""

from collections.abc import Hashable, Mapping

import flax
import flax.linen as nn
import jax
from jaxtyping import Array, Float

from big_vision_like import resolve

TEACHER = "teacher"


class Distill(nn.Module):
  """Student and teacher.

  Attributes:
    student: settings of its model, as those of config.model.
    teacher: likewise.
    num_classes: outputs of both heads.
  """

  student: Mapping[str, Hashable]
  teacher: Mapping[str, Hashable]
  num_classes: int | None = None

  def __post_init__(self):
    for name in ("student", "teacher"):  # Models are hashable.
      settings = flax.core.FrozenDict(getattr(self, name))
      object.__setattr__(self, name, settings)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "b h w c"],
    teacher_image: Float[Array, "b th tw c"],
    *,
    train: bool,
    **static: Hashable,
  ) -> dict[str, Array]:
    """Reads the same images twice, each as its model wants them.

    Args:
      image: for the student.
      teacher_image: for the teacher, in another size and normalisation.
      train: of the student; the teacher always answers as in evaluation.
      **static: compile-time keywords of the student, such as `grid`.

    Returns:
      What the student returns, and `teacher_logits` float32 [B,C], through
      which no gradient passes. Where no one reads them, the teacher is pruned
      from the compiled program.
    """
    student = self.make("student", name="student")
    nn.share_scope(self, student)
    outputs = dict(student(image, train=train, **static))
    if self.is_initializing():
      self.init_teacher(teacher_image)
    teacher = self.make("teacher", parent=None)
    answer = teacher.apply(self.variables[TEACHER], teacher_image, train=False)
    outputs["teacher_logits"] = jax.lax.stop_gradient(answer["logits"])
    return outputs

  def init_teacher(self, image):
    teacher = self.make("teacher", parent=None)
    fresh = teacher.init(self.make_rng("params"), image, train=False)
    for collection, tree in fresh.items():
      self.variable(TEACHER, collection, lambda tree=tree: tree)

  def make(self, which, **extra):
    settings = {"num_classes": self.num_classes, **getattr(self, which)}
    return resolve.make(
      "models", "Model", f"config.model.{which}", settings, **extra
    )


Model = Distill
