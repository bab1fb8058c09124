"""Prints a table of finished runs and writes figures.

  python launch/report.py runs/digits --figures=figures
  python launch/report.py runs/mnist --published=configs/mnist.py --csv=mnist.csv

Run directories may be given in any number, at any depth; a run given twice counts
once. Runs that differ in the seed alone are one row and one curve, named by what
varies among them; of several learning rates the one with the lowest mean validation
loss is shown. --by names other fields that tell rows apart, --metric another number
of the summaries. A line below the tables counts diverged and unfinished runs.
--published names a config file with published figures, which the table then compares
with. Runs with clients get a second table, what they sent until they reached
--target, and figures against megabytes.
"""

from absl import flags

from bernoulli_lora_jax.training import cli
from bernoulli_lora_jax.training import figures
from bernoulli_lora_jax.training import reporting

_FIGURES = flags.DEFINE_string(
    'figures', 'figures', "Directory of the figures; '' for none."
)
_STYLE = flags.DEFINE_enum(
    'style', 'simple', ['simple', 'github', 'tsv'], 'Format of the table.'
)
_CSV = flags.DEFINE_string('csv', '', 'File for the numbers of the table.')
_PUBLISHED = flags.DEFINE_string(
    'published', '', 'Config file with PUBLISHED figures to compare with.'
)
_TARGET = flags.DEFINE_float(
    'target', 0.9, 'Validation accuracy that federated runs are to reach.'
)
_METRIC = flags.DEFINE_string(
    'metric', None, 'Metric of the table; by default what the task ends with.'
)
_BY = flags.DEFINE_list(
    'by', [], 'Fields that tell rows apart, as method.name; by default all.'
)


def main(argv: list[str]) -> None:
  if len(argv) < 2:
    raise ValueError('Expected run directories, got none.')
  runs = reporting.load_runs(argv[1:])
  published = None
  if _PUBLISHED.value:
    published = cli.run_file(_PUBLISHED.value).get('PUBLISHED')
    if published is None:
      raise ValueError(f'Expected PUBLISHED in {_PUBLISHED.value}.')
  by = _BY.value or None
  shown = reporting.comparison(runs, published, metric=_METRIC.value, by=by)
  sent = reporting.traffic(runs, _TARGET.value, by)
  for caption, rows in (*shown.items(), *sent.items()):
    print(f'{caption}\n')
    print(reporting.table(rows, _STYLE.value, is_even=True) + '\n')
  print(reporting.footer(runs, reporting.unfinished(argv[1:])))
  if _CSV.value:
    rows = reporting.statistics(runs, published, metric=_METRIC.value, by=by)
    reporting.write_csv(_CSV.value, rows)
  if _FIGURES.value:
    metrics = dict.fromkeys((*figures.METRICS, _METRIC.value or 'train_loss'))
    for path in figures.write_figures(
        runs, _FIGURES.value, metrics=list(metrics), by=by
    ):
      print(path)


if __name__ == '__main__':
  cli.run(main)
