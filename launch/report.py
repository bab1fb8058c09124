"""Prints a table of finished runs and writes figures.

python launch/report.py runs/digits --figures=figures
"""

from absl import flags

from bernoulli_lora_jax.training import cli
from bernoulli_lora_jax.training import reporting

_FIGURES = flags.DEFINE_string(
    'figures', 'figures', 'Directory of the figures.'
)
_STYLE = flags.DEFINE_enum(
    'style', 'simple', ['simple', 'github', 'tsv'], 'Format of the table.'
)


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise ValueError('Expected run directories, got none.')
  runs = reporting.load_runs(argv[1:])
  print(reporting.table(reporting.comparison(runs), _STYLE.value))
  for path in reporting.write_figures(runs, _FIGURES.value):
    print(path)


if __name__ == '__main__':
  cli.run(main)
