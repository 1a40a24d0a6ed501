"""PyTorch training of the same model: eager or torch.compile by hand (SDPA, fused AdamW), or the Hugging Face
Trainer."""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report, step_times

args = flags(mode="eager", device="cpu", dtype="float32")

import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(args.threads)
torch.manual_seed(0)
HEAD = args.width // args.heads


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(args.width), nn.RMSNorm(args.width)
        self.qkv = nn.Linear(args.width, 3 * args.width, bias=False)
        self.out = nn.Linear(args.width, args.width, bias=False)
        self.gate_up = nn.Linear(args.width, 2 * args.hidden, bias=False)
        self.down = nn.Linear(args.hidden, args.width, bias=False)

    def forward(self, x, cos, sin):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, args.heads, HEAD).permute(2, 0, 3, 1, 4)
        turn = lambda z: z * cos + torch.cat([-z[..., HEAD // 2 :], z[..., : HEAD // 2]], -1) * sin
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(args.vocab, args.width)
        self.blocks = nn.ModuleList(Block() for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        angle = torch.outer(torch.arange(args.length).float(), 1e4 ** (-torch.arange(0, HEAD, 2).float() / HEAD))
        angle = torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, args.vocab), labels.reshape(-1))


def hugging_face():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def trainer():
    """The Trainer's own loop, timed from step begin to step begin, so that its loader counts."""
    import logging

    from transformers import Trainer, TrainerCallback, TrainingArguments

    logging.disable(logging.WARNING)
    begins = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begins.append(time.perf_counter())

        def on_train_end(self, *_, **__):
            begins.append(time.perf_counter())

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return args.batch * (args.steps + args.warmup)

        def __getitem__(self, i):
            row = data[i // args.batch, i % args.batch, :-1]
            return {"input_ids": row, "labels": row}

    settings = TrainingArguments(
        output_dir="scratch",
        per_device_train_batch_size=args.batch,
        max_steps=args.steps + args.warmup,
        learning_rate=3e-4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        optim="adamw_torch",
        max_grad_norm=1.0,
    )
    run = Trainer(hugging_face(), settings, train_dataset=Rows(), callbacks=[Clock()])
    start = time.perf_counter()
    run.train()
    return begins[1] - start, [b - a for a, b in zip(begins[args.warmup :], begins[args.warmup + 1 :], strict=False)]


torch.set_float32_matmul_precision("high")
data = torch.randint(
    0,
    args.vocab,
    (args.steps + args.warmup + 1, args.batch, args.length + 1),
    generator=torch.Generator().manual_seed(1),
).to(args.device)
if args.mode == "trainer":
    first, times = trainer()
else:
    model = Llama().to(args.device)
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if args.mode == "compile" else model

    def step(i):
        with half:
            loss = forward(data[i, :, :-1].contiguous(), data[i, :, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    first, times = step_times(step, args.warmup, args.steps)
median = sorted(times)[len(times) // 2]
report(f"torch {args.mode}", tokens_per_second=round(args.batch * args.length / median, 1), first_s=round(first, 2))
