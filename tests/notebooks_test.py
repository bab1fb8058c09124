"""Executes the notebooks in kernels of their own, as a user would."""

import json
import pathlib
import re

import nbclient
import nbformat
import pytest

_NOTEBOOKS = pathlib.Path(__file__).parent.parent / 'notebooks'


def executed(name, tmp_path):
  """Returns the text that a notebook prints when it is run from the start."""
  notebook = nbformat.read(_NOTEBOOKS / name, as_version=4)
  stored = [cell for cell in notebook.cells if cell.get('outputs')]
  assert len(stored) >= 5, f'Expected stored outputs in {name}: make notebooks.'
  nbclient.NotebookClient(
      notebook,
      timeout=300,
      kernel_name='python3',
      resources={'metadata': {'path': str(tmp_path)}},
  ).execute()
  return ''.join(
      output.get('text', '')
      for cell in notebook.cells
      for output in cell.get('outputs', [])
  )


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_lora_family(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As at a user's.
  text = executed('lora_family.ipynb', tmp_path)
  accuracies = re.findall(
      r'^(.*?) +trains .*accuracy on 5-9: (.*)$', text, re.MULTILINE
  )
  assert [name for name, _ in accuracies] == [
      'LoRA',
      'asymmetric LoRA',
      'COLA',
      'RAC-LoRA',
      'Bernoulli-LoRA',
  ]
  before = float(re.search(r'on 0-4: .*, on 5-9: (.*)', text).group(1))
  assert before < 0.4  # Five classes: chance is 0.2.
  for _, accuracy in accuracies:
    assert float(accuracy) > 0.9
  assert f'restored, accuracy on 5-9: {accuracies[-1][1]}' in text


@pytest.mark.slow
def test_federated(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As at a user's.
  text = executed('federated.ipynb', tmp_path)
  errors = dict(re.findall(r'^(.*): the average .* by (.*)%$', text, re.M))
  # Percent of what the round changed: rounding, against a wrong average.
  assert float(errors['Bernoulli-LoRA']) < 1e-3
  assert float(errors['FedAvg of LoRA']) > 1
  results = re.findall(
      r'^(.*?) +([\d.]+) MB to 90% +at the end ([\d.]+)', text, re.M
  )
  megabytes = {name: float(size) for name, size, _ in results}
  assert len(megabytes) == 4, text
  assert megabytes['Bernoulli-LoRA'] == min(megabytes.values())
  assert megabytes['FedAvg of weights'] == max(megabytes.values())
  assert all(float(accuracy) > 0.9 for _, _, accuracy in results)


@pytest.mark.slow
def test_finetune_llm(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As at a user's.
  text = executed('finetune_llm.ipynb', tmp_path)
  # It copies, counts and stops, where the base goes on to anywhere.
  assert '--- runs/chain\nthree four five six seven eight nine.\n' in text
  found = re.findall(r'^(base|merged|base \+ adapter) +loss (.*)$', text, re.M)
  losses = {name: float(loss) for name, loss in found}
  assert losses['base'] > 1.5 and losses['merged'] < 0.5
  # bfloat16 weights are right to 0.4%, of which the loss feels less.
  assert abs(losses['base + adapter'] / losses['merged'] - 1) < 0.02
  assert 'adapter checkpoints config.json' in text
  rows = re.findall(r'^\S+_proj +2 +64 +([\d.e-]+) +[\d.e-]+$', text, re.M)
  lost = [float(part) for part in rows]
  assert len(lost) == 7 and max(lost) < 1e-5, text
  assert 'peft of step 300: adapter_rank16' in text


@pytest.mark.slow
def test_finetune_text(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As at a user's.
  text = executed('finetune_text.ipynb', tmp_path)
  rows = re.findall(r'^(\S.*?) {2,}0.01 +[\d,]+ +([\d.]+) ±', text, re.M)
  accuracies, scores, later = rows[:4], rows[4:8], rows[8:]
  names = ['linear probe', 'LoRA', 'RAC-LoRA (left frozen)', 'Bernoulli-LoRA']
  assert [name for name, _ in accuracies] == names, text
  for found, scale in ((accuracies, 100), (scores, 1), (later, 100)):
    probe, *others = (float(value) / scale for _, value in found)
    # The largest label has 40%; the probe has 86%, the others 98%.
    assert probe > 0.7 and min(others) > 0.93, text
  assert "line 201 ('elsewhere'): correct them, or unseen='count'" in text


@pytest.mark.slow
def test_theory(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')  # As at a user's.
  text = executed('theory.ipynb', tmp_path)
  assert (
      'Expected stepsize <= 0.3333333333 (T1), got stepsize=1, 3 times' in text
  )
  assert re.search(r'^best +0.75 ', text, re.MULTILINE)
  assert 'T1 with estimated constants lies above the measured mean' in text
  assert 'value 0.751667, ||grad||_2/lam 6.67' in text
  assert re.search(r'N1: value 0.270000, .*: global minimum', text)
  certified = dict(
      re.findall(
          r'^ +(\d+) +\d+ +(?:none|optimum|no).*? (\d) of 3 ',
          text,
          re.MULTILINE,
      )
  )
  assert certified['1'] == '0' and certified['24'] == '3', certified
  # Every study shows its figures, stored ones included.
  stored = json.loads((_NOTEBOOKS / 'theory.ipynb').read_text())
  images = [
      output
      for cell in stored['cells']
      for output in cell.get('outputs', [])
      if 'image/png' in output.get('data', {})
  ]
  assert len(images) == 9, len(images)
