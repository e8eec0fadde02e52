"""Parameters and multiply-adds of all models, against published counts."""

import jax
import jax.numpy as jnp
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import flops
from big_vision_like.commands import models

# Parameters; multiply-adds in G at the published size, where they are known.
PUBLISHED = {
  "efficientvit": {
    "M0": (2_349_436, 0.0792),
    "M1": (2_980_560, 0.1671),
    "M2": (4_187_554, 0.2010),
    "M3": (6_900_722, 0.2627),
    "M4": (8_804_228, 0.2993),
    "M5": (12_473_772, 0.5216),
  },
  "mobilevit": {
    "XXS": (1_272_024, 0.407),
    "XS": (2_317_848, 1.026),
    "S": (5_578_632, 2.001),
  },
  "mobilevit_v2": {
    "0.5": (1_370_593, 0.465),
    "0.75": (2_866_009, 1.028),
    "1.0": (4_901_841, 1.812),
    "1.25": (7_478_089, 2.817),
    "1.5": (10_594_753, 4.043),
    "1.75": (14_251_833, 5.489),
    "2.0": (18_449_329, 7.156),
  },
  "deepvit": {
    "16B": (24_426_664, None),
    "24B": (36_261_448, None),
    "32B": (48_096_232, None),
    "S": (27_312_632, None),
    "L": (58_883_708, None),
  },
  "vit": {
    "Ti/16": (5_717_416, None),
    "S/32": (22_878_952, None),
    "S/16": (22_050_664, None),
    "B/32": (88_224_232, None),
    "B/16": (86_567_656, 17.56),
    "B/8": (86_576_872, None),
    "L/16": (304_326_632, None),
    "H/14": (632_045_800, None),
    "R+Ti/16": (6_337_704, None),
    "R26+S/32": (36_431_912, None),
    "R50+B/16": (98_659_112, None),
    "R50+L/32": (328_994_856, None),
  },
  "detr": {
    "R50": (41_524_768, 81.25),
    "R50-DC5": (41_524_768, 173.25),
    "R101": (60_464_672, 144.69),
    "R101-DC5": (60_464_672, 236.70),
    "R50-panoptic": (42_899_288, 236.61),
    "R50-DC5-panoptic": (42_899_288, None),
    "R101-panoptic": (61_839_192, None),
  },
  "resnet": {"R50": (25_557_032, 4.089), "R101": (44_549_160, 7.801)},
}
# We project the sum over patches to a key, not each patch: fewer products for
# the same numbers. These are the pixels and widths of the layers, by scale.
LEVELS = ((32**2, 128, 2), (16**2, 192, 4), (8**2, 256, 3))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_counts_are_the_published_ones(name):
  sizes = models.published_sizes(name)
  assert set(sizes) == set(PUBLISHED[name])
  for variant, (params, products) in PUBLISHED[name].items():
    counted, ours = models.measure_model(name, variant, sizes[variant])
    assert counted == params
    if name == "mobilevit_v2":
      scale = float(variant)
      ours += sum(
        (pixels - 4) * (width * scale) ** 2 * depth
        for pixels, width, depth in LEVELS
      )
    if name == "detr" and "panoptic" in variant:
      # Likewise what the first convolution reads of the image, for a query.
      ours += (100 - 1) * 25 * 34 * 3**2 * 256 * 264
    if products is not None:
      assert ours == pytest.approx(products * 1e9, rel=0.01)


def test_padding_counts_only_when_asked():
  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)))

  image = jax.ShapeDtypeStruct((1, 1, 5, 7), jnp.float32)
  kernel = jax.ShapeDtypeStruct((1, 1, 3, 3), jnp.float32)
  program = jax.make_jaxpr(convolve)(image, kernel)
  assert flops.count_jaxpr(program, padding=True) == 2 * 5 * 7 * 9
  # Each axis loses one tap at either end.
  assert flops.count_jaxpr(program) == 2 * (5 * 3 - 2) * (7 * 3 - 2)


def test_the_verb_prints_a_table(capsys):
  assert command_line.main(["models", "resnet"]) == 0
  out = capsys.readouterr().out
  assert "| resnet | R50     | 224    | 25,557,032 | 4.089 G" in out
