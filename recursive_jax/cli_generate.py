"""recursive-jax generate: one prompt, a file of them, or a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from recursive_jax.errors import EXIT_PREEMPTED, InputError

LONG = 1024  # contexts beyond this get a limit of new tokens
NEW = 512


def generate_command(args: argparse.Namespace, setup: Callable[[Any], None]) -> int:
    from recursive_jax.config import load_config

    foreign = [o for o in args.overrides if not o.startswith(("sampling.", "mesh."))]
    if foreign:
        raise InputError(f"generate takes sampling.* and mesh.* keys only, not {' '.join(foreign)}")
    config = load_config(None, args.overrides)
    sampling = config.sampling
    count = args.count if args.count is not None else 1 if args.chat or args.source else 3
    _check(args, count)
    setup(config)
    from recursive_jax.generate.files import Prompts
    from recursive_jax.generate.request import Draft
    from recursive_jax.mesh import make_mesh
    from recursive_jax.rounds.stored import load_model, model_name

    model = load_model(args.model, make_mesh(config.mesh))
    draft = Draft(load_model(args.draft, model.mesh)) if args.draft else None
    notes = f"model: {model_name(args.model)}"
    if sampling.max_tokens is None and model.context > LONG:
        notes += f"\nat most {NEW} new tokens a row; sampling.max_tokens=N changes it"
        sampling = sampling.model_copy(update={"max_tokens": NEW})
    if args.chat and not args.prompt and not args.source:
        return _conversation(model, args, sampling.model_copy(update={"batch": 1}), draft, notes)
    prompts = Prompts(args.source, args.prompt, count, args.chat, args.system)
    if not args.source:
        sampling = sampling.model_copy(
            update={"batch": min(sampling.batch, count * max(sampling.best_of, sampling.beams))}
        )
        first = next(prompts.requests(model.tokenizer, sampling, bytearray()))
        if len(first.prompt) >= model.context:
            raise InputError(
                f"--prompt has {len(first.prompt)} tokens, the model's context is {model.context}; shorten it"
            )
    print(notes, file=sys.stderr)
    if args.out is None:
        return _show(model, prompts, sampling, args, draft)
    return _write(model, prompts, sampling, args, draft)


def _check(args: argparse.Namespace, count: int) -> None:
    if count < 1:
        raise InputError(f"--count={args.count}: at least 1 is wanted")
    if args.out and args.out != "-" and not args.out.endswith((".jsonl", ".parquet")):
        raise InputError(f"--out={args.out}: a name ending in .jsonl or .parquet is wanted, or -")
    if args.system and not args.chat:
        raise InputError("--system is for --chat")
    if args.source and args.prompt:
        raise InputError("--prompt and --in: one of the two")


def _write(model: Any, prompts: Any, sampling: Any, args: argparse.Namespace, draft: Any) -> int:
    from recursive_jax.generate.files import generate_file
    from recursive_jax.train import signals

    restore = signals.install()
    try:
        whole = generate_file(
            model,
            prompts,
            args.out,
            sampling,
            seed=args.seed,
            draft=draft,
            progress=True,
            stopped=signals.stop_requested,
        )
    finally:
        restore()
    if not whole:
        print(f"stopped by a signal; what is done is in {args.out}.partial, the same command goes on", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0


def _show(model: Any, prompts: Any, sampling: Any, args: argparse.Namespace, draft: Any) -> int:
    """Texts for people, in order."""
    from recursive_jax.generate.generate import generate

    requests = list(prompts.requests(model.tokenizer, sampling, bytearray()))
    rows = generate(model, requests, sampling, seed=args.seed, draft=draft)
    words = model.tokenizer.to_json()["kind"] == "language"
    for text in rows.column("text"):
        blank = " " if args.prompt and words and not text.startswith(" ") else ""
        print(f"{'' if args.chat else args.prompt}{blank}{text}\n")
    return 0


def _conversation(model: Any, args: argparse.Namespace, sampling: Any, draft: Any, notes: str) -> int:
    """Reads what the user says, a line at a time, until the end of the input."""
    from recursive_jax.data import chat
    from recursive_jax.generate.generate import generate
    from recursive_jax.generate.request import Request

    messages = [{"role": "system", "content": args.system}] if args.system else []
    chat.render(model.tokenizer, [*messages, {"role": "user", "content": "."}], True)  # a model without one says so now
    print(notes, file=sys.stderr)
    shown = "you: " if sys.stdin.isatty() else ""
    for turn in range(10**9):
        try:
            said = input(shown).strip()
        except EOFError:
            return 0
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        prompt = chat.encode_prompt(model.tokenizer, messages)
        if len(prompt) >= model.context:
            raise InputError(f"the conversation has {len(prompt)} tokens, the model's context is {model.context}")
        rows = generate(model, [Request(turn, prompt, opened=True)], sampling, seed=args.seed, draft=draft)
        answer = rows.column("text")[0].strip()
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})
    return 0
