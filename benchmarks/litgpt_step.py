"""Tokens a second of LitGPT's pretraining step, in the virtual environment that LitGPT is installed in; prints one JSON line.

Its own model, Fabric, loss and optimizer with the defaults of its `pretrain`: torch.compile, AdamW, clipping, micro-batch 4,
and the precision that it picks for this machine (bf16-mixed) or the one that is named.
"""

import json
import statistics
import sys
import time

import lightning
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy, get_default_supported_precision, instantiate_torch_optimizer

layers, width, heads, context, vocab, steps = map(int, sys.argv[1:7])
precision = sys.argv[7] if len(sys.argv) > 7 else get_default_supported_precision(training=True)
MICRO_BATCH = 4  # the default of its pretrain

fabric = lightning.Fabric(devices=1, accelerator="cpu", precision=precision)
fabric.seed_everything(0)
config = Config(
    name="peer", block_size=context, n_layer=layers, n_head=heads, n_embd=width, vocab_size=vocab, padded_vocab_size=vocab,
    rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    intermediate_size=width * 8 // 3,
)  # fmt: skip
with fabric.init_module():
    model = GPT(config)
model = fabric.setup(torch.compile(model))
optimizer = fabric.setup_optimizers(instantiate_torch_optimizer("AdamW", model.parameters(), fused=False))
times = []
for _ in range(steps + 3):  # the first steps compile
    rows = torch.randint(vocab, (MICRO_BATCH, context + 1))
    started = time.perf_counter()
    logits = model(rows[:, :-1].contiguous())
    loss = chunked_cross_entropy(logits, rows[:, 1:].contiguous())
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - started)
print(json.dumps({"tokens_per_s": MICRO_BATCH * context / statistics.median(times[3:]), "precision": precision}))
