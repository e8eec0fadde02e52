"""Distillation: losses against closed forms, a teacher that nothing moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import train_step, trees
from big_vision_like.evaluators import channel_importance
from big_vision_like.models import distill, flexivit
from big_vision_like.tasks import classification, distillation

pytestmark = pytest.mark.usefixtures("compile_quickly")

CLASSES = 5


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_of(n=4, side=12, missing=()):
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (n, side, side, 3)).astype(np.uint8),
    "label": rng.integers(0, CLASSES, n),
    "_mask": ~np.isin(np.arange(n), missing),
  }


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def loss_by_hand(task, student, teacher, labels, second=None):
  """Mean over images, of float64 arrays."""
  one_hot = np.eye(CLASSES)
  smooth = task.label_smoothing
  y = one_hot[labels] * (1 - smooth) + smooth / CLASSES
  ce = -(y * np.log(softmax(student))).sum(-1)
  read = student if second is None else second
  if task.kind == "hard":
    kd = -(one_hot[teacher.argmax(-1)] * np.log(softmax(read))).sum(-1)
  else:
    t = task.temperature
    p, q = softmax(teacher / t), softmax(read / t)
    kd = t**2 * (p * np.log(p / q)).sum(-1)
  return ((1 - task.weight) * ce + task.weight * kd).mean(), kd.mean()


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(temperature=3.0),
    dict(kind="soft", weight=0.3, temperature=2.0, label_smoothing=0.1),
    dict(kind="hard", weight=0.5),
    dict(kind="hard"),
  ],
)
def test_losses_are_their_formulas(settings, second):
  task = distillation.Task(CLASSES, **settings)
  batch = batch_of(missing=(3,))
  _, targets = task.prepare(batch, None)
  student, teacher, other = (3 * normal(4, CLASSES, seed=i) for i in range(3))
  outputs = {"logits": student, "teacher_logits": teacher}
  if second:
    outputs["distillation_logits"] = other
  outputs = jax.tree.map(jnp.asarray, outputs)
  loss, metrics = task.loss(outputs, targets)
  want, kd = loss_by_hand(
    task,
    *(x[:3].astype(np.float64) for x in (student, teacher)),
    batch["label"][:3],
    other[:3].astype(np.float64) if second else None,
  )
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(metrics["distillation"].compute(), kd, rtol=1e-5)
  assert float(metrics["loss"].count) == 3
  read = other if second else student
  np.testing.assert_allclose(
    metrics["agreement"].compute(),
    (read.argmax(-1) == teacher.argmax(-1))[:3].mean(),
    rtol=1e-6,
  )


def test_soft_loss_is_zero_only_at_the_teacher():
  task = distillation.Task(CLASSES, temperature=2.0)
  _, targets = task.prepare(batch_of(), None)
  teacher = jnp.asarray(normal(4, CLASSES))

  def loss(student):
    outputs = {"logits": student, "teacher_logits": teacher}
    return task.loss(outputs, targets)[0]

  assert abs(loss(teacher + 7.0)) < 1e-6  # The softmax sees no constants.
  assert loss(teacher * 1.1) > 1e-4
  np.testing.assert_allclose(jax.grad(loss)(teacher), 0, atol=1e-6)


def test_both_see_the_same_pixels_each_in_its_own_way():
  settings = dict(
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    teacher_mean=(0.485, 0.456, 0.406),
    teacher_std=0.25,
  )
  task = distillation.Task(CLASSES, image_size=8, teacher_size=12, **settings)
  batch = batch_of(side=12)
  pixels = batch["image"] / 255.0
  inputs, _ = task.prepare(batch, None)
  np.testing.assert_allclose(
    inputs["teacher_image"],
    (pixels - np.array(settings["teacher_mean"])) / 0.25,
    atol=1e-5,
  )
  small = jax.image.resize(pixels, (4, 8, 8, 3), "linear")
  want = (small - np.array(settings["mean"])) / np.array(settings["std"])
  np.testing.assert_allclose(inputs["image"], want, atol=1e-5)
  plain = distillation.Task(CLASSES)
  inputs, _ = plain.prepare(batch, None)
  np.testing.assert_array_equal(inputs["image"], inputs["teacher_image"])


def model_of(student=None, teacher=None):
  sizes = dict(width=12, depth=1, mlp=16, heads=2)
  return distill.Model(
    student=student
    or dict(name="flexivit", variant="S", grid=3, sizes=sizes | {"patch": 4}),
    teacher=teacher or dict(name="vit", variant="S/4", sizes=sizes),
    num_classes=CLASSES,
  )


TASK = distillation.Task(CLASSES, image_size=12, teacher_size=16)


@functools.cache
def started():
  tx = optax.adamw(1e-2, weight_decay=0.1)
  state = jax.jit(
    lambda batch: train_step.init_state(
      model_of(), TASK, tx, jax.random.key(0), batch, ema=True
    )
  )(batch_of(side=16))
  step = train_step.make_train_step(model_of(), TASK, tx, ema_decay=0.5)
  return state, jax.jit(step, static_argnums=2)


@pytest.mark.slow
def test_training_moves_the_student_and_not_the_teacher():
  state, step = started()
  batch = batch_of(side=16)
  before, losses = state, []
  for grid in (3, 3, 4, 3):
    state, metrics = step(state, batch, (("grid", grid),))
    losses.append(float(metrics["loss"].compute()))
  assert losses[-1] < losses[0]
  assert set(state.model_state) == {"teacher"}
  for name, x in trees.flatten(before.model_state).items():
    np.testing.assert_array_equal(trees.flatten(state.model_state)[name], x)
  moved = trees.flatten(state.params)
  for name, x in trees.flatten(before.params).items():
    assert not np.array_equal(moved[name], x), name


def logits(model, *args, **kw):
  return model.apply(*args, train=False, **kw)["logits"]


def test_parameters_are_the_students_under_its_own_names():
  state, _ = started()
  model = model_of()
  student = flexivit.Model(
    variant="S",
    grid=3,
    sizes=model.student["sizes"],
    num_classes=CLASSES,
  )
  image = jnp.asarray(normal(2, 12, 12, 3))
  alone = jax.eval_shape(
    lambda: student.init(jax.random.key(0), image, train=False)
  )
  shapes = lambda tree: {k: x.shape for k, x in trees.flatten(tree).items()}
  assert shapes(state.params) == shapes(alone["params"])
  # Evaluation is the student's, and pays nothing for the teacher.
  variables = {"params": state.params, **state.model_state}
  for grid in (3, 4):
    both, one = (
      jax.jit(functools.partial(logits, m, grid=grid)).lower(*args).compile()
      for m, args in (
        (model, (variables, image, jnp.zeros((2, 16, 16, 3)))),
        (student, ({"params": state.params}, image)),
      )
    )
    flops = [x.cost_analysis()["flops"] for x in (both, one)]
    assert flops[0] == flops[1]
    got = both(variables, image, jnp.zeros((2, 16, 16, 3)))
    want = one({"params": state.params}, image)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_importance_of_channels_is_that_of_the_students_loss():
  state, _ = started()
  task = distillation.Task(CLASSES, weight=0.5)
  measure = channel_importance.Evaluator().measure(model_of(), task)
  measure = jax.jit(measure, static_argnums=2)
  found = measure(state, batch_of(side=16), (("grid", 4),))
  scores = [x["scores"] for b in found["layers"].values() for x in b.values()]
  assert sum(float(x.sum()) for x in scores) > 0


def test_a_teacher_with_batch_statistics_answers_as_in_evaluation():
  from big_vision_like.models import deepvit

  sizes = dict(width=12, depth=2, mixing=1, mlp=16, heads=2, patch=4)
  settings = dict(name="deepvit", variant="S", sizes=sizes)
  model = model_of(student=settings, teacher=settings)
  image, large = (jnp.asarray(normal(2, s, s, 3)) for s in (8, 16))
  key = jax.random.key(0)
  init = jax.jit(lambda *images: model.init(key, *images, train=False))
  variables = init(image, large)
  assert set(variables) == {"params", "batch_stats", "teacher"}
  assert set(variables["teacher"]) == {"params", "batch_stats"}
  # Any teacher's variables fit in there as they are.
  rng = np.random.default_rng(1)
  teacher = jax.tree.map(
    lambda x: x + 0.1 * rng.uniform(size=x.shape).astype(np.float32),
    variables["teacher"],
  )
  out, new = jax.jit(
    functools.partial(
      model.apply, train=True, mutable=["batch_stats", "teacher"]
    )
  )({**variables, "teacher": teacher}, image, large)
  alone = deepvit.Model(variant="S", sizes=sizes, num_classes=CLASSES)
  answer = jax.jit(functools.partial(alone.apply, train=False))
  want = answer(teacher, large)["logits"]
  np.testing.assert_allclose(out["teacher_logits"], want, atol=1e-5)
  for name, x in trees.flatten(teacher).items():
    np.testing.assert_array_equal(trees.flatten(new["teacher"])[name], x)
  old = trees.flatten(variables["batch_stats"])
  for name, x in trees.flatten(new["batch_stats"]).items():
    assert not np.array_equal(x, old[name]), name


def test_no_gradient_reaches_the_teacher():
  state, _ = started()
  inputs, targets = TASK.prepare(batch_of(side=16), None)

  def loss(teacher):
    outputs = model_of().apply(
      {"params": state.params, "teacher": teacher}, **inputs, train=True
    )
    return TASK.loss(outputs, targets)[0]

  grads = jax.jit(jax.grad(loss))(state.model_state["teacher"])
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_evaluators_read_what_classification_gives():
  batch = batch_of()
  outputs = {"logits": normal(4, CLASSES), "pooled": normal(4, 3)}
  outputs = jax.tree.map(jnp.asarray, outputs)
  task = classification.Task(CLASSES, loss_name="softmax")
  want = task.predict(outputs, task.prepare(batch, None)[1])
  task = distillation.Task(CLASSES)
  got = task.predict(outputs, task.prepare(batch, None)[1])
  assert got.keys() == want.keys()
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (dict(kind="warm"), r"config\.task\.kind = 'warm'"),
    (dict(weight=0.0), r"config\.task\.weight = 0"),
    (dict(weight=1.5), r"config\.task\.weight = 1\.5"),
    (dict(temperature=0.0), r"config\.task\.temperature = 0"),
    (dict(labels="multi_label", weight=0.5), "several labels"),
    (dict(labels="boxes"), r"config\.task\.labels = 'boxes'"),
  ],
)
def test_wrong_settings_are_refused(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    distillation.Task(CLASSES, **settings)


def test_packed_rows_and_unknown_models_are_refused():
  with pytest.raises(ValueError, match="stacked images"):
    distillation.Task(CLASSES).prepare({"patches": np.zeros((1, 2, 3))}, None)
  model = model_of(teacher=dict(name="vitt"))
  image = jnp.zeros((1, 12, 12, 3))
  with pytest.raises(ValueError, match="Unknown name 'vitt'"):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), image, image, train=False)
    )
