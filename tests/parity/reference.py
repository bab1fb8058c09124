"""The reference: checkpoints run by transformers on PyTorch, in float32."""

import numpy as np
import torch
import transformers


def load(folder, dtype=torch.float32):
  """Returns the model of a folder."""
  transformers.utils.logging.disable_progress_bar()
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=dtype, attn_implementation='eager'
  )


def results(folder, tokens, layer=1):
  """Returns logits, loss and the gradient of one kernel, (in, out)."""
  model = load(folder)
  given = torch.tensor(np.asarray(tokens)).long()
  out = model(given, labels=given)
  out.loss.backward()
  kernel = model.model.layers[layer].self_attn.q_proj.weight
  return {
      'logits': out.logits.detach().numpy(),
      'loss': out.loss.detach().numpy(),
      'grad': kernel.grad.numpy().T,
  }
