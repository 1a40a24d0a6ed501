"""New tokens per second of `transformers`' generate with its default cache, prefill counted, after one warm-up."""

import logging
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report

args = flags(batch=64, prompt=64, new=192, beams=1, repeat=1, model="")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
torch.set_num_threads(args.threads)
torch.manual_seed(0)
torch.set_grad_enabled(False)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
else:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
    )
model.eval()
how = {"num_beams": args.beams, "do_sample": False} if args.beams > 1 else {"do_sample": True, "top_k": 0}
rates, first = [], 0.0
for run in range(args.repeat + 1):
    ids = torch.randint(3, 4096, (args.batch, args.prompt))
    new = args.new if run else 8
    begin = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, pad_token_id=1, **how
    )
    seconds = time.perf_counter() - begin
    assert out.shape[1] == args.prompt + new
    if run:
        rates.append(args.batch * new / seconds)
    else:
        first = seconds
report("transformers generate", tokens_per_s=round(statistics.median(rates), 1), first_s=round(first, 2))
