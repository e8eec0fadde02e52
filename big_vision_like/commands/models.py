"""Lists all models with their sizes, parameters and multiply-adds.

Multiply-adds are those of matrix products and convolutions in one forward pass
of one image of the published size, padding included, as the papers count them.
Constants, such as frozen BatchNorms, are no parameters.
"""

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vision_like import flops, resolve, trees
from big_vision_like.benchmarks import measure

Size = int | tuple[int, int]
CLASSES = 1000
_TPU = jax.sharding.AbstractMesh(
  (), (), abstract_device=jax.sharding.AbstractDevice("TPU v4", 1, "tpu")
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Which models."""
  parser.add_argument("names", nargs="*", help="files in models/; all if none")


def main(args: argparse.Namespace) -> int:
  """Prints a table in markdown."""
  rows = []
  for name in args.names or resolve.available("models"):
    published = published_sizes(name)
    for variant, size in published.items():
      params, products = measure_model(name, variant, size)
      rows.append(
        {
          "model": name,
          "variant": variant,
          "pixels": size if isinstance(size, int) else "{} x {}".format(*size),
          "parameters": f"{params:,}",
          "multiply-adds": f"{products / 1e9:,.3f} G",
          "classes": f"{count_classes(name, variant):,}",
        }
      )
  print(
    measure.table("Models", rows, "With the heads of the published models.")
  )
  return 0


def _module(name):
  return importlib.import_module(f"{resolve.PACKAGE}.models.{name}")


def count_classes(name: str, variant: str) -> int:
  """Of the head that was published: CLASSES of a model's file, or 1,000."""
  return getattr(_module(name), "CLASSES", {}).get(variant, CLASSES)


def published_sizes(name: str) -> dict[str, Size]:
  """The variants that were published, with the side of their images.

  Or height and width. A model's file says so as PUBLISHED; without, all
  VARIANTS but "local" were, at IMAGE_SIZE. One that has neither stands on other
  models.
  """
  module = _module(name)
  if hasattr(module, "PUBLISHED"):
    return dict(module.PUBLISHED)
  if not hasattr(module, "IMAGE_SIZE"):
    return {}
  return {v: module.IMAGE_SIZE for v in module.VARIANTS if v != "local"}


def measure_model(name: str, variant: str, size: Size) -> tuple[int, float]:
  """Parameters, and multiply-adds of one image of `size`."""
  classes = count_classes(name, variant)
  model = resolve.make(
    "models",
    "Model",
    "models",
    dict(name=name, variant=variant, num_classes=classes),
  )
  height, width = (size, size) if isinstance(size, int) else size
  return count(model, dict(image=jnp.zeros((1, height, width, 3))))


def count(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, float]:
  """Parameters and multiply-adds of a model; nothing is computed."""
  if hasattr(model, "attention"):
    model = model.clone(attention="xla")
  # Compiled for a CPU, depthwise convolutions would be sums that no one counts.
  with jax.sharding.use_abstract_mesh(_TPU):
    variables = jax.eval_shape(
      lambda: model.init(jax.random.key(0), train=False, **inputs)
    )
    program = jax.make_jaxpr(
      lambda v, x: model.apply(v, train=False, **x)["logits"]
    )(variables, inputs)
  products = flops.count_jaxpr(program, padding=True) / 2
  return trees.count(variables["params"]), products
