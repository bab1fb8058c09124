"""Audits a finished run: estimates its constants and checks its guarantee.

  python launch/train.py --config=configs/linear_regression.py --workdir=runs/gd
  python launch/audit.py runs/gd --figures=figures

Replays the run (as long as it took), prints the constants seen along its path, the
realised lambda, which assumptions held, and the bound with estimated constants
beside the measured mean squared gradient norm; draws both curves.
"""

from absl import flags

from bernoulli_lora_jax.studies import audit
from bernoulli_lora_jax.studies import study
from bernoulli_lora_jax.training import cli

_POINTS = flags.DEFINE_integer(
    'points', 8, 'Points of the path at which constants are estimated.'
)
_PRODUCTS = flags.DEFINE_integer(
    'products', 12, 'Hessian-vector products a point.'
)
_BATCHES = flags.DEFINE_integer('batches', 32, 'Minibatches a point.')
_FIGURES = flags.DEFINE_string(
    'figures', 'figures', 'Directory of the figure and the tables.'
)
_STYLE = flags.DEFINE_enum(
    'style', 'simple', ['simple', 'github', 'tsv'], 'Format of the tables.'
)


def main(argv: list[str]) -> None:
  if len(argv) != 2:
    raise ValueError(f'Expected one run directory, got {argv[1:]}.')
  if _FIGURES.value:
    study.check_directory(_FIGURES.value)
  result = audit.audit(
      argv[1],
      num_points=_POINTS.value,
      num_products=_PRODUCTS.value,
      num_batches=_BATCHES.value,
  )
  name = f'audit_{audit.name_of(argv[1])}'
  study.show(result, _FIGURES.value, name, _STYLE.value)


if __name__ == '__main__':
  cli.run(main)
