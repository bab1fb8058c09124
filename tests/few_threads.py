"""Updates of thousands of chains at once where jax's runtime has few threads.

  python tests/few_threads.py --updates=2000

Runs the same vmapped, compiled update of five matrices of different lengths in a
process for each NPROC of 1, 2 and 3, and says how many updates each has done. With
batched calls of LAPACK for the frames such a program slept for ever (jax 0.10, two
threads): each call held a thread of the pool and waited for the others.
"""

import argparse
import os
import subprocess
import sys
import time

CODE = """
import sys
import jax, jax.numpy as jnp
import bernoulli_lora_jax as bl

ones = lambda *shape: {'kernel': jnp.ones(shape)}
tree = {'a': ones(3, 7), 'b': ones(8, 2), 'c': ones(5, 5), 'h': ones(4, 2, 3),
        'layers': ones(2, 4, 6)}
rules = (bl.matrices.stacked('^layers/kernel'), bl.matrices.heads_out('^h/'))
matrices = bl.Matrices(rules=rules)

def update(key):
  tx = bl.scale_by_bernoulli_chain(key, rank=2, prob=0.3, matrices=matrices)
  return tx.update(tree, tx.init(tree))[0]

num_updates, num_runs = map(int, sys.argv[1:])
step = jax.jit(jax.vmap(update))
keys = jax.random.split(jax.random.key(0), num_runs)
for _ in range(num_updates):
  jax.block_until_ready(step(keys))
print(num_updates)
"""


def run(threads: int, updates: int, runs: int, timeout: float) -> int:
  """Returns how many updates a process with so many threads has done."""
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'NPROC': str(threads)}
  env.pop('XLA_FLAGS', None)
  command = [sys.executable, '-c', CODE, str(updates), str(runs)]
  try:
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout
    )
  except subprocess.TimeoutExpired:
    return 0
  if done.returncode:
    raise RuntimeError(done.stderr)
  return int(done.stdout)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--updates', type=int, default=2000)
  parser.add_argument('--runs', type=int, default=4000)
  parser.add_argument('--timeout', type=float, default=900, help='seconds')
  args = parser.parse_args()
  hangs = 0
  for threads in (1, 2, 3):
    begun = time.perf_counter()
    done = run(threads, args.updates, args.runs, args.timeout)
    hangs += done < args.updates
    seconds = time.perf_counter() - begun
    print(
        f'NPROC={threads}: {done} of {args.updates}, {seconds:.0f} s',
        flush=True,
    )
  raise SystemExit(1 if hangs else 0)


if __name__ == '__main__':
  main()
