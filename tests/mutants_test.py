"""The faults of `make mutants` fit the package as it is."""

import pathlib
import re
import shlex
import sys

from absl.testing import parameterized

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import mutants  # noqa: E402 (a script beside this file)

ROOT = pathlib.Path(__file__).resolve().parent.parent


class DataTest(parameterized.TestCase):

  def test_faults_are_in_the_code(self):
    """Each text is there once, and the file with the fault compiles."""
    found = mutants.load()
    self.assertGreaterEqual(len(found), 60)
    for mutant in found:
      mutants.mutated(mutant)

  def test_no_fault_is_there_twice(self):
    found = [(m.file, m.find, m.replace) for m in mutants.load()]
    self.assertLen(set(found), len(found))

  def test_named_tests_are_there(self):
    for mutant in mutants.load():
      name, *options = shlex.split(mutant.test)
      file, *parts = name.split('::')
      with self.subTest(mutant.fault):
        text = (ROOT / file).read_text()
        for word in re.findall(r'\w+', ' '.join([*parts, *options])):
          if word not in ('k', 'or', 'and', 'not'):
            # One of a parameterised test ends with its number.
            self.assertIn(re.sub(r'\d+$', '', word), text)
