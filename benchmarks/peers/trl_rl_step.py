"""The same GRPO step with trl's GRPOTrainer and peft: transformers generates."""

import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report

args = flags(prompts=8, each=8, new=64, steps=3, model="")

import datasets
import peft
import torch
import transformers
import trl

torch.set_num_threads(args.threads)
transformers.logging.set_verbosity_error()
STORIES = [f"Write a story about {x}." for x in "a cat,a dog,rain,a ship,snow,a king,bread,the sea".split(",")]
written: list[tuple[float, int]] = []


def short_words(completions, completion_ids, **_):
    written.append((time.perf_counter(), sum(map(len, completion_ids))))
    texts = [c[0]["content"] for c in completions]
    return [-sum(map(len, text.split())) / max(1, len(text.split())) for text in texts]


model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
rows = [{"prompt": [{"role": "user", "content": text}]} for text in STORIES[: args.prompts]]
config = trl.GRPOConfig(
    tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
    per_device_train_batch_size=args.prompts * args.each, num_generations=args.each, max_completion_length=args.new,
    max_steps=args.warmup + args.steps + 1, learning_rate=1e-5, steps_per_generation=1, logging_steps=1000,
    save_strategy="no", temperature=1.0, disable_tqdm=True,
)  # fmt: skip
lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
trainer = trl.GRPOTrainer(
    model, short_words, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
    peft_config=lora,
)  # fmt: skip
begun = time.perf_counter()
trainer.train()
first = written[0][0] - begun
spans = [(b - a, n) for (a, n), (b, _) in zip(written[args.warmup :], written[args.warmup + 1 :], strict=False)]
seconds = statistics.median(s for s, _ in spans)
report("trl GRPOTrainer step", tokens_per_s=statistics.median(n / s for s, n in spans), seconds=seconds, first_s=first)
