"""recursive-jax generate: one prompt, a file of them, or a conversation."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

from recursive_jax.cli.common import MODEL, set_up
from recursive_jax.errors import EXIT_PREEMPTED, InputError

LONG = 1024  # contexts beyond this get a limit of new tokens
NEW = 512


HELP = "sample text from a stored model, or chat with one"
EXAMPLE = (
    "recursive-jax generate runs/quickstart --count 5 sampling.temperature=0.7\n"
    "  recursive-jax generate smollm2 --chat --prompt 'What is the capital of France?'\n"
    "  recursive-jax generate smollm2 --chat --in prompts.jsonl --out answers.jsonl sampling.max_tokens=200"
)


def arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="sampling.*, mesh.* and remote.* keys, e.g. sampling.top_p=0.9",
    )
    p.add_argument("--prompt", default="", help="text to go on from; with --chat, what the user says")
    p.add_argument(
        "--in",
        dest="source",
        metavar="FILE",
        help="prompts: .jsonl or .parquet with `prompt` or `messages`, a text file with one on each line, or - for "
        "standard input",
    )
    p.add_argument("--field", metavar="NAME", help="with --in: the column that holds the prompt")
    p.add_argument(
        "--template",
        metavar="FILE",
        help="with --in: a YAML file that says what each row is asked and how the reply is read",
    )
    p.add_argument("--preview", type=int, metavar="N", help="with --template: ask N rows, show all, write nothing")
    p.add_argument("--attempts", type=int, default=1, help="with --template: times that what failed is asked, at most")
    p.add_argument(
        "--constrained", action="store_true", help="with --template: hold the replies to what its parser reads"
    )
    p.add_argument("--chat", action="store_true", help="prompts are what a user says; alone: a conversation")
    p.add_argument("--system", default="", help="with --chat: the system message")
    p.add_argument("--count", type=int, default=None, help="rows of each prompt; default 3, with --chat or --in 1")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--same-environment",
        action="store_true",
        help="with --out: refuse to go on under other versions, flags or devices, instead of saying so",
    )
    p.add_argument("--draft", metavar="MODEL", help="a small model of the same vocabulary that guesses ahead")
    p.add_argument(
        "--out",
        metavar="FILE",
        help="write rows with tokens and log-probabilities: .jsonl, .parquet, or - for JSON lines on standard output; "
        "stopped, the same command goes on",
    )


def run(args: argparse.Namespace) -> int:
    from recursive_jax.config.loader import parse_section
    from recursive_jax.rounds.options import GenerateOptions

    config = parse_section(GenerateOptions, {}, args.overrides, "generate")
    sampling = config.sampling
    count = args.count if args.count is not None else 1 if args.chat or args.source else 3
    _check(args, count)
    set_up(config.mesh)
    from recursive_jax.generate.files import Prompts
    from recursive_jax.generate.generate import sampling_for
    from recursive_jax.generate.request import Draft
    from recursive_jax.mesh import make_mesh
    from recursive_jax.rounds.opening import chosen_name, load_model, model_name

    remote = config.remote.model_dump(exclude_unset=True)
    model = load_model(args.model, make_mesh(config.mesh), remote=remote)
    draft = Draft(load_model(args.draft, model.mesh)) if args.draft else None
    notes = chosen_name(args.model) or f"model: {model_name(args.model)}"
    asked = sampling.model_dump(exclude_unset=True)
    sampling = sampling_for(model, asked)
    own = [
        f"{k}={getattr(sampling, k)}" for k, v in model.sampling.items() if k not in asked and getattr(sampling, k) == v
    ]
    if own:
        notes += f"\nsampling as its files say: {', '.join(own)}; sampling.KEY=VALUE changes it"
    if sampling.max_tokens is None and model.max_length > LONG:
        notes += f"\nat most {NEW} new tokens a row; sampling.max_tokens=N changes it"
        sampling = sampling.model_copy(update={"max_tokens": NEW})
    template = None
    if args.template:
        from recursive_jax.data.template_file import load_template
        from recursive_jax.generate.reading import constrained_by

        template = load_template(args.template, model.tokenizer)
        sampling = constrained_by(template, sampling) if args.constrained else sampling
    if args.chat and not args.prompt and not args.source:
        return _conversation(model, args, sampling.model_copy(update={"batch": 1, "chunk": 1}), draft, notes)
    prompts = Prompts(args.source, args.prompt, count, args.chat, args.system, args.field, template)
    if args.preview is not None:
        from recursive_jax.generate.preview import preview_text

        print(notes, file=sys.stderr)
        requests = list(itertools.islice(prompts.requests(model.tokenizer, sampling, bytearray()), args.preview))
        if not requests:
            raise InputError(f"--in={args.source}: there is no row in it")
        print(preview_text(model, requests, sampling, template, args.seed))
        return 0
    if not args.source:
        first = next(prompts.requests(model.tokenizer, sampling, bytearray()))
        if len(first.prompt) >= model.max_length:
            raise InputError(
                f"--prompt has {len(first.prompt)} tokens, the model reads at most {model.max_length}; shorten it"
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
    if args.field and not args.source:
        raise InputError("--field is for --in: the column of the file that holds the prompt")
    if args.template and not args.source:
        raise InputError("--template asks the rows of --in FILE")
    if args.template and (args.chat or args.system or args.field):
        raise InputError("--template says what is asked: --chat, --system and --field have no use with it")
    if not args.template and (args.preview is not None or args.attempts != 1 or args.constrained):
        raise InputError("--preview, --attempts and --constrained are for --template")
    if args.attempts < 1 or args.attempts > 255:
        raise InputError(f"--attempts={args.attempts}: 1 to 255 are wanted")
    if args.attempts > 1 and (args.out in (None, "-") or args.source == "-"):
        raise InputError("--attempts needs a file to read and one to write: --in FILE --out FILE")
    if args.preview is not None and (args.preview < 1 or args.source == "-"):
        raise InputError("--preview takes at least one row of a file")
    if args.source and args.prompt:
        raise InputError("--prompt and --in: one of the two")


def _write(model: Any, prompts: Any, sampling: Any, args: argparse.Namespace, draft: Any) -> int:
    from recursive_jax.environment import require_same
    from recursive_jax.generate.files import generate_file
    from recursive_jax.train import signals

    require_same(args.same_environment)
    restore = signals.install()
    try:
        whole = generate_file(
            model,
            prompts,
            args.out,
            sampling,
            seed=args.seed,
            draft=draft,
            attempts=args.attempts,
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
    from recursive_jax.waiting import Wait

    requests = list(prompts.requests(model.tokenizer, sampling, bytearray()))
    with Wait("generating"):
        rows = generate(model, requests, sampling, seed=args.seed, draft=draft)
    if prompts.template is not None:
        from recursive_jax.generate.preview import read_lines
        from recursive_jax.generate.reading import read_replies

        print("\n".join(read_lines(read_replies(rows, prompts.template), prompts.template)))
        return 0
    same = sampling.temperature == 0 or sampling.beams > 1  # then the rows of a prompt are equal
    for text in dict.fromkeys(rows.column("text")) if same and not args.source else rows.column("text"):
        print(f"{'' if args.chat else args.prompt}{text}\n")
    return 0


class _Spoken:
    """Prints an answer as it is written."""

    def __init__(self, wait: Any):
        self.wait, self.shown = wait, ""

    def __call__(self, row: Any) -> None:
        from recursive_jax.generate.text import said_for_sure

        self.show(said_for_sure(row.text_of(row.tokens).lstrip(), row.stop_texts))

    def show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self.wait.close()
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def _conversation(model: Any, args: argparse.Namespace, sampling: Any, draft: Any, notes: str) -> int:
    """Reads what the user says, a line at a time, until the end of the input. /reset forgets what was said, /exit
    ends."""
    from recursive_jax.data import chat
    from recursive_jax.generate.generate import stream
    from recursive_jax.generate.request import Request
    from recursive_jax.waiting import Wait

    messages = [{"role": "system", "content": args.system}] if args.system else []
    chat.render(model.tokenizer, [*messages, {"role": "user", "content": "."}], True)  # a model without one says so now
    print(notes, file=sys.stderr)
    shown = "you: " if sys.stdin.isatty() else ""
    for turn in range(10**9):
        try:
            said = input(shown).strip()
        except EOFError:
            return 0
        if said in ("/exit", "/quit"):
            return 0
        if said == "/reset":
            del messages[1 if args.system else 0 :]
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        prompt = chat.encode_prompt(model.tokenizer, messages)
        if len(prompt) >= model.max_length:
            raise InputError(f"the conversation has {len(prompt)} tokens, the model reads at most {model.max_length}")
        with Wait("reading") as wait:
            spoken = _Spoken(wait)
            request = Request(turn, prompt, opened=True)
            (row,) = stream(model, [request], sampling, seed=args.seed, draft=draft, partial=spoken)
        answer = row.text.strip()
        spoken.show(answer)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
    return 0
