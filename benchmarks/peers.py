"""Rows of `llm_step` in PyTorch: transformers with PEFT, and full fine-tuning."""

import measuring
import peft as peft_lib
import torch
import transformers
from transformers.integrations import sdpa_attention


def model_of(setting: measuring.Setting, words: set[str]):
  """Returns a model of random weights, drawn on the device."""
  # transformers forms no mask for attention that it does not know; it is causal.
  transformers.AttentionInterface.register(
      'causal', sdpa_attention.sdpa_attention_forward
  )
  model = transformers.AutoModelForCausalLM.from_config(
      transformers.LlamaConfig.from_dict(setting.raw),
      dtype=torch.bfloat16,
      attn_implementation='sdpa' if 'mask' in words else 'causal',
  )
  if 'full' not in words:
    lora = peft_lib.LoraConfig(
        r=setting.rank,
        lora_alpha=setting.rank,
        target_modules='all-linear',
        task_type='CAUSAL_LM',
    )
    is_wide = 'autocast' in words
    peft_lib.get_peft_model(model, lora, autocast_adapter_dtype=is_wide)
  if 'checkpointed' in words:
    # Not reentrant: the first layer's input need not require a gradient, which
    # PEFT would ask for if this came before it.
    model.gradient_checkpointing_enable({'use_reentrant': False})
  return model


def measure(name: str, setting: measuring.Setting) -> measuring.Row:
  """Measures peft_* or hf_full_*, of the words that `llm_step` lists."""
  words = set(name.split('_'))
  known = 'peft hf full eager compiled checkpointed mask autocast'.split()
  if not words <= set(known):
    raise ValueError(f'Expected name of words in {known}, got {name!r}.')
  is_cuda = torch.cuda.is_available()
  device = 'cuda' if is_cuda else 'cpu'
  torch.set_float32_matmul_precision('high')
  torch.manual_seed(0)
  with torch.device(device):
    model = model_of(setting, words)
    shape = setting.micro_batches, setting.rows, setting.length
    tokens = torch.randint(setting.raw['vocab_size'], shape)
  model.train()
  trained = [x for x in model.parameters() if x.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, fused=True)

  def loss_of(part):
    with torch.autocast(device, torch.bfloat16, enabled='autocast' in words):
      loss = model(input_ids=part, labels=part, use_cache=False).loss
    return loss / len(tokens)

  run = loss_of
  if 'compiled' in words:
    run = torch.compile(loss_of, dynamic=False, mode=setting.compile_mode)
  losses = []

  def step():
    losses.clear()
    for part in tokens:
      torch.compiler.cudagraph_mark_step_begin()
      loss = run(part)
      loss.backward()
      losses.append(loss.detach().clone())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  found = measuring.timed(
      setting, step, torch.cuda.synchronize if is_cuda else lambda: None
  )
  per_token = measuring.flops(
      setting,
      *(() if 'full' in words else (measuring.thin_flops(setting.rank),)),
      is_full='full' in words,
  )
  names = (torch, transformers, peft_lib)
  return {
      **measuring.speed(found, per_token),
      'peak_gib': torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0,
      'loss': float(sum(losses)),
      'trained': sum(x.numel() for x in trained),
      'device': torch.cuda.get_device_name() if is_cuda else 'cpu',
      'versions': ', '.join(f'{x.__name__} {x.__version__}' for x in names),
  }
