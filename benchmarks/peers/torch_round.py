"""A whole round with the Hugging Face Trainer and `generate` in one process: train, generate as many tokens,
evaluate."""

import logging
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report

args = flags(rounds=3, generate_batch=64, evaluate_rows=64)

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

logging.disable(logging.WARNING)
torch.set_num_threads(args.threads)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=args.length + 1,
        tie_word_embeddings=True,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
)
count = args.steps * args.batch
data = torch.randint(3, args.vocab, (count, args.length))
held_out = torch.randint(3, args.vocab, (args.evaluate_rows, args.length))


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


rounds = []
for _ in range(args.rounds):
    t0 = time.perf_counter()
    settings = TrainingArguments(
        output_dir="scratch",
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=3e-4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        optim="adamw_torch",
        max_grad_norm=1.0,
    )
    Trainer(model, settings, train_dataset=Rows(data)).train()
    t1 = time.perf_counter()
    model.eval()
    rows = []
    with torch.inference_mode():
        for begin in range(0, count, args.generate_batch):
            n = min(args.generate_batch, count - begin)
            out = model.generate(
                torch.zeros(n, 1, dtype=torch.long),
                attention_mask=torch.ones(n, 1, dtype=torch.long),
                do_sample=True,
                top_k=0,
                temperature=1.0,
                max_new_tokens=args.length,
                use_cache=True,
            )
            rows.append(torch.nn.functional.pad(out[:, 1:], (0, args.length - out.shape[1] + 1), value=1))
        t2 = time.perf_counter()
        for begin in range(0, args.evaluate_rows, 16):
            batch = held_out[begin : begin + 16]
            float(model(input_ids=batch, labels=batch).loss)
    t3 = time.perf_counter()
    data = torch.cat(rows)
    rounds.append((t1 - t0, t2 - t1, t3 - t2, int((data != 1).sum())))
later = [statistics.median(r[i] for r in rounds[1:]) for i in range(4)]
seconds = sum(later[:3])
report(
    "HF Trainer + generate",
    rounds_per_hour=round(3600 / seconds, 2),
    seconds=round(seconds, 2),
    train_s=round(later[0], 2),
    generate_s=round(later[1], 2),
    evaluate_s=round(later[2], 2),
    generated_tokens=later[3],
    first_s=round(sum(rounds[0][:3]), 2),
)
