"""New tokens per second of llama.cpp in float32, prefill counted: all rows decode as one batch through its low-level
interface, tokens drawn by the Gumbel maximum over the batch's logits. Without --model, a random Llama of --size."""

import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from common import flags, report

args = flags(batch=64, prompt=64, new=192, repeat=1, model="")

import ctypes
from pathlib import Path

import gguf
import llama_cpp as lib
import numpy as np

BATCH = 2048


def random_llama(path: Path) -> None:
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(args.width)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(args.hidden)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(args.width // args.heads)
    writer.add_vocab_size(args.vocab)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + [f"t{i}" for i in range(args.vocab - len(special))])
    writer.add_token_scores([0.0] * args.vocab)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (args.vocab - len(special)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def matrix(rows, columns, scale):
        return rng.standard_normal((rows, columns), dtype=np.float32) * scale

    ones = np.ones(args.width, np.float32)
    writer.add_tensor("token_embd.weight", matrix(args.vocab, args.width, 0.02))
    writer.add_tensor("output_norm.weight", ones)
    for i in range(args.layers):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", ones)
        for name, rows, columns in (
            ("attn_q", args.width, args.width),
            ("attn_k", args.width, args.width),
            ("attn_v", args.width, args.width),
            ("attn_output", args.width, args.width),
            ("ffn_gate", args.hidden, args.width),
            ("ffn_up", args.hidden, args.width),
            ("ffn_down", args.width, args.hidden),
        ):
            writer.add_tensor(f"blk.{i}.{name}.weight", matrix(rows, columns, columns**-0.5))
    close(writer)


def float32_copy(source: str, path: Path) -> None:
    """The same file with every tensor dequantised."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    close(writer)


def close(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


folder = tempfile.TemporaryDirectory()
path = Path(folder.name, "model.gguf")
if args.model:
    float32_copy(args.model, path)
else:
    random_llama(path)
silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
lib.llama_log_set(silence, None)
lib.llama_backend_init()
model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
wanted = lib.llama_context_default_params()
wanted.n_ctx, wanted.n_seq_max = args.batch * (args.prompt + args.new), args.batch
wanted.n_batch, wanted.n_ubatch = BATCH, 512
wanted.n_threads = wanted.n_threads_batch = args.threads
wanted.kv_unified = False
wanted.type_k = wanted.type_v = 0  # float32
wanted.flash_attn_type = 1
context = lib.llama_init_from_model(model, wanted)
assert context, "llama.cpp refused the context"
rng, batch = np.random.default_rng(0), lib.llama_batch_init(BATCH, 0, 1)


def put(at: int, token: int, position: int, row: int, wanted: bool) -> None:
    batch.token[at], batch.pos[at], batch.n_seq_id[at] = int(token), position, 1
    batch.seq_id[at][0], batch.logits[at] = row, wanted


def decode(count: int) -> None:
    batch.n_tokens = count
    assert lib.llama_decode(context, batch) == 0


def generate(new: int) -> None:
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    prompts = rng.integers(3, min(vocab, 4096), (args.batch, args.prompt))
    tokens, each = np.zeros(args.batch, np.int64), max(1, BATCH // args.prompt)
    for begin in range(0, args.batch, each):
        rows, at = range(begin, min(args.batch, begin + each)), 0
        for row in rows:
            for t in range(args.prompt):
                put(at, prompts[row, t], t, row, t == args.prompt - 1)
                at += 1
        decode(at)
        for i, row in enumerate(rows):
            at = (i + 1) * args.prompt - 1
            tokens[row] = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, at), (vocab,)).argmax()
    for step in range(new - 1):
        for row in range(args.batch):
            put(row, tokens[row], args.prompt + step, row, True)
        decode(args.batch)
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (args.batch, vocab))
        noise = np.log(rng.standard_exponential(logits.shape, dtype=np.float32))
        tokens = np.subtract(logits, noise, out=noise).argmax(-1)


begin = time.perf_counter()
generate(8)
first, rates = time.perf_counter() - begin, []
for _ in range(args.repeat):
    begin = time.perf_counter()
    generate(args.new)
    rates.append(args.batch * args.new / (time.perf_counter() - begin))
report("llama.cpp", tokens_per_s=round(statistics.median(rates), 1), first_s=round(first, 2))
