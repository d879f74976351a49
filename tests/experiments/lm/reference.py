"""A decoder in plain NumPy: one row, one head at a time, float64 if asked.

Written from the published equations. It reads tensors under the names and in
the layout of Hugging Face, and shares no code with the stack.
"""

import math

import numpy as np


def inverse_frequencies(config):
  """From the fields of a config.json."""
  base = config.get('rope_theta', 10_000.0)
  width = config.get('head_dim') or (
    config['hidden_size'] // config['num_attention_heads']
  )
  result = []
  scaling = config.get('rope_scaling') or {}
  for i in range(width // 2):
    f = base ** (-2 * i / width)
    if scaling.get('rope_type') == 'linear':
      f = f / scaling['factor']
    if scaling.get('rope_type') == 'llama3':
      wave = 2 * math.pi / f
      context = scaling['original_max_position_embeddings']
      low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
      if wave > context / low:
        f = f / scaling['factor']
      elif wave >= context / high:
        smooth = (context / wave - low) / (high - low)
        f = (1 - smooth) * f / scaling['factor'] + smooth * f
    result.append(f)
  return np.array(result)


def norm(x, weight, epsilon):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def turn(x, angles):
  """Of (length, width): pair i is coordinates i and i + width / 2."""
  half = x.shape[-1] // 2
  cos, sin = np.cos(angles), np.sin(angles)
  out = np.empty_like(x)
  out[:, :half] = x[:, :half] * cos - x[:, half:] * sin
  out[:, half:] = x[:, half:] * cos + x[:, :half] * sin
  return out


def forward(config, tensors, tokens, dtype=np.float64):
  """Logits (length, vocabulary) of one row of tokens."""
  get = lambda name: np.asarray(tensors[name], dtype)
  heads, kv = config['num_attention_heads'], config['num_key_value_heads']
  epsilon = config['rms_norm_eps']
  embed = get('model.embed_tokens.weight')
  x = embed[np.asarray(tokens)]
  length = len(tokens)
  angles = np.arange(length)[:, None] * inverse_frequencies(config)
  angles = angles.astype(dtype)
  future = np.triu(np.ones((length, length), bool), 1)
  for i in range(config['num_hidden_layers']):
    at = f'model.layers.{i}.'
    h = norm(x, get(at + 'input_layernorm.weight'), epsilon)
    projected = {}
    for name in 'qkv':
      projected[name] = h @ get(f'{at}self_attn.{name}_proj.weight').T
      if f'{at}self_attn.{name}_proj.bias' in tensors:
        projected[name] = projected[name] + get(
          f'{at}self_attn.{name}_proj.bias'
        )
    width = projected['q'].shape[1] // heads
    out = []
    for head in range(heads):
      shared = head // (heads // kv)
      q = projected['q'][:, head * width : (head + 1) * width]
      k = projected['k'][:, shared * width : (shared + 1) * width]
      v = projected['v'][:, shared * width : (shared + 1) * width]
      if f'{at}self_attn.q_norm.weight' in tensors:
        q = norm(q, get(at + 'self_attn.q_norm.weight'), epsilon)
        k = norm(k, get(at + 'self_attn.k_norm.weight'), epsilon)
      if config.get('no_rope_layers', [1] * (i + 1))[i]:
        q, k = turn(q, angles), turn(k, angles)
      scores = q @ k.T / math.sqrt(width)
      scores = np.where(future, -np.inf, scores)
      share = np.exp(scores - scores.max(-1, keepdims=True))
      out.append(share / share.sum(-1, keepdims=True) @ v)
    x = x + np.concatenate(out, 1) @ get(at + 'self_attn.o_proj.weight').T
    h = norm(x, get(at + 'post_attention_layernorm.weight'), epsilon)
    gate = h @ get(at + 'mlp.gate_proj.weight').T
    gate = gate / (1 + np.exp(-gate)) * (h @ get(at + 'mlp.up_proj.weight').T)
    x = x + gate @ get(at + 'mlp.down_proj.weight').T
  x = norm(x, get('model.norm.weight'), epsilon)
  head = embed if config['tie_word_embeddings'] else get('lm_head.weight')
  return x @ head.T


def mean_loss(logits, tokens):
  """Nats per token, without the first one."""
  tokens = np.asarray(tokens)
  logits = np.asarray(logits, np.float64)[:-1]
  largest = logits.max(-1)
  total = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
  return float(np.mean(total - logits[np.arange(len(total)), tokens[1:]]))
