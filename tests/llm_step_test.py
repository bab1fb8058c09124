"""The benchmark of a step: names, FLOPs, kinds of kernels, a table of tiny rows."""

import gzip
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

from absl.testing import parameterized
import pytest

from bernoulli_lora_jax.models import hf
from bernoulli_lora_jax.models import hf_config

_BENCHMARKS = pathlib.Path(__file__).parents[1] / 'benchmarks'
sys.path.insert(0, str(_BENCHMARKS))
import measuring  # noqa: E402
import profiling  # noqa: E402

sys.path.remove(str(_BENCHMARKS))  # It has a decoders.py, as the tests have.

_RAW = dict(
    model_type='llama',
    vocab_size=48,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act='silu',
    tie_word_embeddings=False,
)


def _setting(**fields):
  defaults = dict(
      raw=_RAW,
      rank=2,
      period=10,
      rows=2,
      length=0,
      micro_batches=3,
      chunk=8,
      learning_rate=0.1,
      steps=4,
      synchronised=14,
      compile_mode='default',
      trace='',
  )
  return measuring.Setting(**defaults | fields)


def _folder(test) -> pathlib.Path:
  return pathlib.Path(test.enterContext(tempfile.TemporaryDirectory()))


# What XLA writes: computations, then fusions that call them.
_PROGRAM = """HloModule jit_step

%fused.1 (p.0: bf16[64,16], p.1: f32[16]) -> bf16[64,16] {
  %a = bf16[64,16]{1,0} multiply(%p.0, %p.1), metadata={op_name="jit(step)/jvp(Decoder)/layers_0/input_layernorm/mul"}
  ROOT %b = bf16[64,16]{1,0} convert(%a), metadata={op_name="jit(step)/jvp()/convert_element_type"}
}

%fused.2 (p.0: bf16[64,40]) -> bf16[64,40] {
  ROOT %a = bf16[64,40]{1,0} add(%p.0, %p.0), metadata={op_name="jit(step)/transpose(jvp(Decoder))/layers_0/mlp/mul"}
}

%fused.3 (p.0: bf16[16,40], p.1: f32[16,40]) -> bf16[16,40] {
  ROOT %a = bf16[16,40]{1,0} add(%p.0, %p.1), metadata={op_name="jit(step)/add"}
}

%dot.4 (p.0: bf16[64,16], p.1: bf16[16,2]) -> bf16[64,2] {
  ROOT %a = bf16[64,2]{1,0} dot(%p.0, %p.1), metadata={op_name="jit(step)/jvp()/dot_general"}
}

%dot.5 (p.0: bf16[64,16], p.1: bf16[16,40]) -> bf16[64,40] {
  ROOT %a = bf16[64,40]{1,0} dot(%p.0, %p.1), metadata={op_name="jit(step)/jvp()/dot_general"}
}

%fused.6 (p.0: bf16[16,40]) -> bf16[16,40] {
  ROOT %a = bf16[16,40]{1,0} add(%p.0, %p.0), metadata={op_name="jit(step)/jvp()/add_any"}
}

ENTRY %main (x: bf16[64,16]) -> bf16[64,16] {
  %loop_norm_fusion.7 = bf16[64,16]{1,0} fusion(%x, %s), kind=kLoop, calls=%fused.1, metadata={op_name="jit(step)/jvp()/convert_element_type"}
  %loop_add_fusion = bf16[64,40]{1,0} fusion(%x), kind=kLoop, calls=%fused.2
  %loop_add_fusion.3 = bf16[16,40]{1,0} fusion(%w, %u), kind=kLoop, calls=%fused.3
  %gemm_fusion_dot.4 = bf16[64,2]{1,0} fusion(%x, %q), kind=kCustom, calls=%dot.4
  %gemm_fusion_dot.5 = bf16[64,40]{1,0} fusion(%x, %w), kind=kCustom, calls=%dot.5
  ROOT %loop_add_fusion.6 = bf16[16,40]{1,0} fusion(%w), kind=kLoop, calls=%fused.6
}
"""


class NamesTest(parameterized.TestCase):

  @parameterized.parameters(
      ('sketched_rac_left', 'sketched_rac_left', {}),
      ('sketched_rac_left_r128', 'sketched_rac_left', {'r': 128}),
      ('bare_lora_r4_memory_len512', 'bare_lora_memory', {'r': 4, 'len': 512}),
  )
  def test_ends_are_parsed(self, name, kind, given):
    self.assertEqual(measuring.parsed(name), (kind, given))

  def test_rows_come_at_each_length_and_rank_where_these_matter(self):
    names = ['matmul', 'floor_dx', 'bare_lora_r8']
    self.assertEqual(
        measuring.expanded(names, ['8', '16'], ['2', '4']),
        [
            *('matmul', 'floor_dx_len8', 'floor_dx_len16'),
            *('bare_lora_r8_len8', 'bare_lora_r8_len16'),
        ],
    )
    self.assertEqual(
        measuring.expanded(['bare_lora', 'floor_dx_len8'], ['4'], ['2', '4']),
        ['bare_lora_len4_r2', 'bare_lora_len4_r4', 'floor_dx_len8'],
    )


class FlopsTest(parameterized.TestCase):

  @parameterized.parameters((False, 4), (True, 6))
  def test_base_counts_the_weights_of_a_decoder(self, is_full, each):
    config = hf_config.from_dict(_RAW, scan_layers=False)
    numbers = sum(
        math.prod(x.shape)
        for path, x in hf.param_shapes(config).items()
        if 'kernel' in path or path.startswith('lm_head')
    )
    found = measuring.flops(_setting(), is_full=is_full)
    self.assertEqual(found, each * numbers)

  @parameterized.parameters(
      # x L, (x L) R; dy R^T, (dy R^T) L^T; x^T (..), (x L)^T dy.
      (None, False, 4 * 2 * 100 + 2 * 2 * 100),
      ('left', False, 4 * 2 * 100 + 2 * 2 * 60),
      ('right', False, 4 * 2 * 100 + 2 * 2 * 40),
      ('left', True, 2 * 2 * 100),
      ('bernoulli', True, 2 * 2 * 2 * 100),
  )
  def test_thin_products(self, side, is_sketched, expected):
    self.assertEqual(
        measuring.thin_flops(2, side, is_sketched)(40, 60), expected
    )

  def test_a_step_counts_all_micro_batches(self):
    calls = []
    setting = _setting(length=5)
    found = measuring.timed(setting, lambda: calls.append(1), lambda: None)
    self.assertLen(calls, 1 + 3 + 14 + 4)
    self.assertEqual(setting.batch, 6)
    self.assertGreater(found['tokens_per_second'], 0)


class ProfileTest(parameterized.TestCase):

  def test_kinds_of_fusions(self):
    self.assertEqual(
        profiling.kinds_of(_PROGRAM, {(16, 40), (40, 16)}, rank=2),
        {
            'loop_norm_fusion_7': 'norms',
            'loop_add_fusion': 'activation',
            'loop_add_fusion_3': 'update of W',
            'gemm_fusion_dot_4': 'thin products',
            'gemm_fusion_dot_5': None,
            # Of the backward pass, as large as W by chance.
            'loop_add_fusion_6': 'other elementwise',
        },
    )

  def test_kernels_are_summed_by_kind_a_step(self):
    meta = lambda name, tid, value: {
        'ph': 'M',
        'pid': 1,
        'tid': tid,
        'name': name,
        'args': {'name': value},
    }
    run = lambda name, tid: {
        'ph': 'X',
        'pid': 1,
        'tid': tid,
        'name': name,
        'dur': 3000,
    }
    names = ['loop_a_1', 'nvjet_x', 'gemm_fusion_dot_5', 'input_b', 'cudnn_f']
    events = [
        meta('process_name', 0, '/device:GPU:0'),
        meta('thread_name', 2, 'Stream #2'),
        meta('thread_name', 3, 'XLA Ops'),
        *(run(x, 2) for x in names),
        run('loop_a_1', 3),  # The same again, in another line of the trace.
    ]
    path = _folder(self) / 'x.trace.json.gz'
    path.write_bytes(
        gzip.compress(json.dumps({'traceEvents': events}).encode())
    )
    found = profiling.milliseconds(
        path, {'loop_a_1': 'norms', 'gemm_fusion_dot_5': None}
    )
    self.assertEqual(
        {kind: value for kind, value in found.items() if value},
        {
            'norms': 1.0,
            'products, cuBLAS': 1.0,
            'products, Triton': 1.0,
            'other elementwise': 1.0,
            'attention': 1.0,
            'all': 5.0,
        },
    )


class TableTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_tiny_rows_are_written_and_compared(self):
    out = _folder(self)
    only = 'floor_dx,bare_lora_memory,sketched_rac_left_coordinate,bare_wrong'
    table = subprocess.run(
        [
            *(sys.executable, str(_BENCHMARKS / 'llm_step.py')),
            *('--shapes=tiny', '--batch=1', '--micro_batches=2', '--steps=2'),
            *('--lengths=32', '--ranks=4', '--against=bare_lora_memory'),
            *(f'--only={only}', f'--out={out}'),
        ],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = (out / 'llm_step.jsonl').read_text().splitlines()
    rows = {x['row']: x for x in map(json.loads, lines)}
    self.assertIn('x bare_lora_memory', table)
    self.assertIn('2 x 2 x 32', table)  # Twice as many rows, half as long.
    self.assertIn("got 'wrong'", rows.pop('bare_wrong_len32_r4')['error'])
    self.assertSequenceEqual(
        list(rows),
        [
            'floor_dx_len32',
            'bare_lora_memory_len32_r4',
            'sketched_rac_left_coordinate_len32_r4',
        ],
    )
    for row in rows.values():
      self.assertGreater(row['tokens_per_second'], 0)
      # Random weights know nothing: close to the logarithm of the vocabulary.
      self.assertBetween(row['loss'], 5, 8)
