"""Engines for constrained decoding, side by side: seconds to prepare a constraint and microseconds per token mask
(advance by one token, fill the mask), on the tokenizer of SmolLM2.

pip install llguidance outlines-core; pip install --no-deps xgrammar apache-tvm-ffi   (xgrammar also needs torch,
transformers) python benchmarks/constraints.py"""

import json
import statistics
import sys
import time

import numpy as np

from recursive_jax.rounds.opening import load_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{2,12}( [A-Z][a-z]{2,12}){1,3}, (19|20)[0-9]{2}"
TEXTS = {
    "json": json.dumps({"name": "Ada Lovelace", "age": 36, "tags": ["red", "blue"]}),
    "regex": "Ada Augusta Lovelace, 1985",
}


def llguidance(tokenizer, vocab):
    import llguidance as ll
    from llguidance import numpy as masks

    found = ll.LLTokenizer(tokenizer.to_str(), n_vocab=vocab)
    for kind, grammar in (
        ("json", ll.LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": True})),
        ("regex", ll.LLMatcher.grammar_from_regex(REGEX)),
    ):
        start = time.perf_counter()
        matcher = ll.LLMatcher(found, grammar)
        bits = masks.allocate_token_bitmask(1, vocab)
        masks.fill_next_token_bitmask(matcher, bits)
        yield (
            kind,
            time.perf_counter() - start,
            lambda t, m=matcher: m.consume_token(t),
            lambda m=matcher, b=bits: masks.fill_next_token_bitmask(m, b),
        )


def outlines_core(tokenizer, vocab):
    import outlines_core as oc

    pieces = {}
    for i in range(tokenizer.get_vocab_size()):
        pieces.setdefault(tokenizer.decode([i], skip_special_tokens=False), []).append(i)
    eos = tokenizer.token_to_id("<|im_end|>")
    words = oc.Vocabulary(eos, {k: v for k, v in pieces.items() if k and eos not in v})
    for kind, regex in (("json", oc.json_schema.build_regex_from_schema(json.dumps(SCHEMA))), ("regex", REGEX)):
        start = time.perf_counter()
        guide = oc.Guide(oc.Index(regex, words))
        seconds = time.perf_counter() - start
        bits = np.zeros(vocab // 32 + 1, np.int32)
        fill = lambda g=guide, b=bits: g.write_mask_into(b.ctypes.data, b.size, b.itemsize)
        yield kind, seconds, lambda t, g=guide: g.advance(t, return_tokens=False) or True, fill


def xgrammar(tokenizer, vocab):
    import xgrammar as xg

    info = xg.TokenizerInfo(
        [tokenizer.id_to_token(i) or "" for i in range(vocab)],
        xg.VocabType.BYTE_LEVEL,
        vocab_size=vocab,
        stop_token_ids=[tokenizer.token_to_id("<|im_end|>")],
    )
    for kind in ("json", "regex"):
        start = time.perf_counter()
        compiler = xg.GrammarCompiler(info)
        found = compiler.compile_json_schema(json.dumps(SCHEMA)) if kind == "json" else compiler.compile_regex(REGEX)
        matcher = xg.GrammarMatcher(found)
        bits = xg.allocate_token_bitmask(1, vocab)
        matcher.fill_next_token_bitmask(bits)
        seconds = time.perf_counter() - start
        yield kind, seconds, matcher.accept_token, lambda m=matcher, b=bits: m.fill_next_token_bitmask(b)


model = load_model("smollm2")
backend, vocab = model.tokenizer._tokenizer, model.vocab
for engine in (llguidance, outlines_core, xgrammar):
    try:
        for kind, seconds, advance, fill in engine(backend, vocab):
            times = []
            for token in backend.encode(TEXTS[kind], add_special_tokens=False).ids:
                begin = time.perf_counter()
                taken = advance(token)
                fill()
                times.append(time.perf_counter() - begin)
                if taken is False:
                    raise RuntimeError(f"token {token} refused")
            print(
                f"{engine.__name__:<14} {kind:<6} prepare {seconds * 1e3:9.1f} ms   mask: median "
                f"{statistics.median(times) * 1e6:7.0f} us, worst {max(times) * 1e6:7.0f} us"
            )
    except Exception as error:
        print(f"{engine.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
