"""What `blora finetune` prints before and after training."""

import math
import pathlib
from typing import Any

import jax
from ml_collections import config_dict

from bernoulli_lora_jax.tasks import task as task_lib
from bernoulli_lora_jax.training import experiment
from bernoulli_lora_jax.training import finetune_checks
from bernoulli_lora_jax.training import finetune_modes
from bernoulli_lora_jax.training import programs
from bernoulli_lora_jax.training import reporting
from bernoulli_lora_jax.training import tuned


def show_start(
    config: config_dict.ConfigDict,
    program: programs.Program,
    directory: pathlib.Path,
    rate_from: str,
) -> None:
  """Prints what a user looks at before training.

  Args:
    config: of the run.
    program: of it, compiled.
    directory: of it.
    rate_from: what its learning rate was chosen from; '' where it was given.
  """
  task, settings = program.task, program.settings
  print(task.preview)
  print()
  rows = _by_kind(experiment.selection(config, task))
  print(reporting.table(rows))
  print()
  trained = experiment.trained_parameters(config, task)
  numbers = sum(x.size for x in jax.tree.leaves(task_lib.shapes(task)))
  how = ', sketched' if config.method.mode == 'sketched' else ''
  print(f'trained a step: {trained:,.0f} of {numbers:,} numbers{how}')
  if program.sides != (None,):
    print('one coin a link for all matrices: a program for each side')
  rate = f'learning rate: {config.method.learning_rate:g}'
  print(rate + (f', from {rate_from}' if rate_from else ''))
  of = finetune_modes.bytes_of(program)
  memory = ', '.join(f'{k} {v / 2**30:.2f}' for k, v in of.items() if v)
  limit = finetune_modes.memory()
  print(
      f'memory, GiB: {memory}' + (f' of {limit / 2**30:.1f}' if limit else '')
  )
  epochs = settings.num_steps * task.batch_size / task.num_samples
  print(
      f'{settings.num_steps:,} steps of {task.num_tokens:,} tokens in'
      f' {task.batch_size} rows of {config.task.kwargs.max_length:,}'
      f' ({epochs:.2f} epochs of {task.num_samples:,} rows) on'
      f' {jax.devices()[0].device_kind}, into {directory}'
  )


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a table of matrices with layers of a kind in one row."""
  made: dict[Any, dict[str, Any]] = {}
  for row in rows:
    shape = row['shape'].rpartition(' x ')
    sides = f'{shape[0].split(" x ")[-1]} x {shape[2]}'
    stacked = row['shape'].split(' x ')
    layers = int(stacked[0]) if len(stacked) > 2 else 1
    name = tuned.kind(row['matrix']) or row['matrix']
    rest = {k: row[k] for k in ('rank', 'P(left)', 'scale') if k in row}
    key = name, sides, *rest.values()
    own = made.setdefault(
        key, {'matrix': name, 'layers': 0, 'shape': sides, **rest, 'trained': 0}
    )
    own['layers'] += layers
    own['trained'] += row['trained']
  return list(made.values())


def show_end(
    directory: pathlib.Path,
    chosen: list[str],
    summary: dict[str, Any],
    end: dict[str, Any],
) -> None:
  """Prints what a run has come to.

  Args:
    directory: of the run.
    chosen: what it has exported, of `finetune_checks.finetune_checks.EXPORTS`.
    summary: of `loop.train`.
    end: what merges have lost, and the samples.
  """
  (run,) = reporting.load_runs([directory])
  if end['lost']:
    is_sketched = run.config['method'].get('mode') == 'sketched'
    what = 'Steps' if is_sketched else 'Merges'
    what += ' and adapter against base + sum of links'
    if is_sketched and not run.config['training'].get('recipe'):
      what = 'Adapter against the change of weights'
    print(f'\n{what}, parts lost:\n')
    print(reporting.table(end['lost']))
  first = next((line for line in run.metrics if line['step'] == 0), {})
  rows = [
      {
          'text': name,
          'loss before': first.get(f'{split}_loss', math.nan),
          'after': summary[f'{split}_loss'],
          'perplexity before': first.get(f'{split}_perplexity', math.nan),
          'after ': summary[f'{split}_perplexity'],
      }
      for split, name in (('validation', 'held out'), ('watched', 'watched'))
      if f'{split}_loss' in summary
  ]
  if rows:
    print('\n' + reporting.table(rows))
  best = summary['best_step']  # Which is kept with early stopping alone.
  keeps_best = run.config['training']['patience'] and best != summary['step']
  peak = summary.get('peak_memory_bytes')
  # None of a run that was killed after its last step.
  speed = summary.get('tokens_per_second')
  facts = [
      f'{summary["step"]:,} steps'
      + (f', the weights those of {best:,}' if keeps_best else ''),
      f'{summary["seconds"]:,.0f} s and {summary["compile_seconds"]:,.0f} s to'
      ' compile',
      *([f'{speed:,.0f} tokens/s'] if speed else []),
      *([f'at most {peak / 2**30:.1f} GiB'] if peak else []),
  ]
  print('\n' + '; '.join(facts))
  print(f'\nprompt: {end["begins"]!r}')
  print(f'before: {end["before"]!r}')
  print(f'after:  {end["after"]!r}\n')
  for name in chosen:
    print(
        f'{finetune_checks.EXPORTS[name][0]}: {directory / finetune_checks.EXPORTS[name][0]}'
    )
  print(f'losses: {directory / "loss.png"}')
  print(f'more:   blora generate {directory} --prompt ...')
