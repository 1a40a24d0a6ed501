"""recursive-jax: run | status | report | profile | train | generate | evaluate | lab | import | export | doctor."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recursive_jax import allocator
from recursive_jax.errors import EXIT_BAD_INPUT, InputError, RecursiveJaxError

EPILOG = """\
a first run (a few minutes on two CPU cores, no data and no network needed):
  recursive-jax run configs/quickstart.yaml --workdir runs/quickstart
  open runs/quickstart/report.html

change anything by its dotted key; see what it would cost before it starts:
  recursive-jax run configs/quickstart.yaml rounds.count=10 sampling.temperature=0.8 --workdir runs/sharp
  recursive-jax run configs/wikitext.yaml 'data.path=corpus/*.txt' --workdir runs/mine --dry-run

killed? the same command goes on where it stopped. exit codes: 0 done, 1 failed, 2 bad input, 75 stopped, start again.
"""


MODEL = (
    "a run, a chain (RUN/<regime>), a round or one training; a Hugging Face folder; a .gguf; or smollm2, minilm where "
    "their packages are installed"
)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="recursive-jax",
        epilog=EPILOG,
        formatter_class=raw,
        description="Train models on the output of models, in JAX, and know exactly what each round gained and lost.",
    )
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return sub.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=raw,
        )

    def config_arguments(p: argparse.ArgumentParser) -> None:
        p.add_argument("config", help="a YAML file; configs/ has one per experiment")
        p.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted keys of the config, e.g. train.steps=500"
        )
        p.add_argument("--workdir", required=True, metavar="DIR", help="the run folder: new, or one to go on with")
        p.add_argument("--fork", metavar="DIR", help="another run folder whose unchanged results are reused")
        p.add_argument(
            "--dry-run", action="store_true", help="print the resolved config and what it costs; write nothing"
        )
        p.add_argument("--quiet", action="store_true", help="no progress")

    config_arguments(
        command(
            "run",
            "run a whole experiment: teacher, rounds, evaluation, report",
            "recursive-jax run configs/quickstart.yaml rounds.count=3 --workdir runs/three",
        )
    )
    config_arguments(
        command(
            "train",
            "train only the first model of a config (its round 0) and evaluate it",
            "recursive-jax train configs/wikitext.yaml data.path=corpus.txt --workdir runs/teacher",
        )
    )

    p = command(
        "status",
        "print the chain of results of a run, and what each round lost",
        "recursive-jax status runs/quickstart",
    )
    p.add_argument("run", metavar="DIR")
    p.add_argument(
        "--row",
        metavar="ID",
        help="print the ancestors of a generated row, e.g. replace/2/rows/7: the id column of rows-*.parquet",
    )
    p.add_argument("--json", action="store_true", help="print the metrics records as JSON lines")

    p = command(
        "report",
        "write report.html again from what is stored (also while the run goes on)",
        "recursive-jax report runs/quickstart\n  recursive-jax report runs/quickstart --figures paper/figures",
    )
    p.add_argument("run", metavar="DIR")
    p.add_argument("--figures", metavar="FOLDER", help="write the figures too (SVG, PNG) and the numbers (CSV, JSONL)")

    p = command(
        "profile",
        "say what anyone's samples lost, round by round, against real data; no run is needed",
        "recursive-jax profile round1.parquet round2.parquet --reference real.parquet --out profile",
    )
    p.add_argument("samples", nargs="+", metavar="FILE", help="one for each round: .parquet, .jsonl or .txt with texts")
    p.add_argument("--reference", required=True, metavar="FILE", help="real texts")
    p.add_argument(
        "--encoder",
        metavar="MODEL",
        help="embed the texts with this model, minilm for one: adds the metrics of vectors",
    )
    p.add_argument("--out", metavar="FOLDER", help="write profile.html, .jsonl, .csv and figures")
    p.add_argument("--json", action="store_true", help="print one JSON object for each round")

    p = command(
        "generate",
        "sample text from a stored model, or chat with one",
        "recursive-jax generate runs/quickstart --count 5 sampling.temperature=0.7\n"
        "  recursive-jax generate smollm2 --chat --prompt 'What is the capital of France?'\n"
        "  recursive-jax generate smollm2 --chat --in prompts.jsonl --out answers.jsonl sampling.max_tokens=200",
    )
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="sampling.* keys, e.g. sampling.top_p=0.9")
    p.add_argument("--prompt", default="", help="text to go on from; with --chat, what the user says")
    p.add_argument(
        "--in",
        dest="source",
        metavar="FILE",
        help="prompts: .jsonl or .parquet with `prompt` or `messages`, a text file with one on each line, or - for "
        "standard input",
    )
    p.add_argument("--chat", action="store_true", help="prompts are what a user says; alone: a conversation")
    p.add_argument("--system", default="", help="with --chat: the system message")
    p.add_argument("--count", type=int, default=None, help="rows of each prompt; default 3, with --chat or --in 1")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--draft", metavar="MODEL", help="a small model of the same vocabulary that guesses ahead")
    p.add_argument(
        "--out",
        metavar="FILE",
        help="write rows with tokens and log-probabilities: .jsonl, .parquet, or - for JSON lines on standard output; "
        "stopped, the same command goes on",
    )

    p = command(
        "evaluate",
        "score a stored model on real text, and its samples; prints JSON",
        "recursive-jax evaluate runs/wikitext --data corpus.txt",
    )
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="evaluate.*, sampling.* and data.* keys")
    p.add_argument(
        "--data", metavar="PATH", help="real text; default: the embedded language, for a model trained on it"
    )
    p.add_argument("--base", metavar="MODEL", help="the model that judges the samples; default: the model itself")

    p = command(
        "lab",
        "run a closed-form collapse experiment: thousands of chains in seconds, beside what theory expects",
        "recursive-jax lab gaussian samples=20 rounds=50 regime=fresh fraction=0.1 replicates=20000\n"
        "  recursive-jax lab categorical zipf=1.2 categories=5000 samples=10000 replicates=200 --json\n"
        "  recursive-jax lab kde samples=30 rounds=100 --sweep bandwidth=0.1,0.2,0.4",
    )
    p.add_argument(
        "family",
        metavar="FAMILY",
        help="gaussian, categorical, mixture, poisson, kde, regression, classifier, ngram; or a YAML of configs/lab",
    )
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options; docs/lab.md has them all")
    p.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V", help="run every value; repeat for a grid")
    p.add_argument("--json", action="store_true", help="print JSON: one object, with --sweep a list")
    p.add_argument("--out", metavar="FOLDER", help="write lab.json, lab.csv and a figure (SVG, PNG)")

    p = command(
        "import",
        "store a Hugging Face folder or a GGUF as a model of this project",
        "recursive-jax import ~/models/SmolLM2-135M models/smollm2",
    )
    p.add_argument("source", metavar="SOURCE", help="a folder with config.json and safetensors, a .gguf, or smollm2")
    p.add_argument("out", metavar="DIR", help="a new folder")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the stored params")

    p = command(
        "export",
        "write a model as a Hugging Face folder, which transformers, vLLM and llama.cpp's converter read",
        "recursive-jax export runs/snips exported/snips",
    )
    p.add_argument("model", metavar="MODEL", help=MODEL)
    p.add_argument("out", metavar="DIR", help="a new folder")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the tensors")
    p.add_argument("--adapter", action="store_true", help="write only the adapter, in the format of peft")

    command("doctor", "say what this machine offers and whether the installation works", "recursive-jax doctor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = _parse(argv)
    if argv is None and args.command in ("run", "train", "generate", "evaluate", "lab", "import", "export"):
        allocator.restart()
    try:
        return _COMMANDS[args.command](args) or 0
    except RecursiveJaxError as error:
        print(f"recursive-jax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("recursive-jax: interrupted; what was committed is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        from recursive_jax.rounds.storage import explain_disk_error

        text = explain_disk_error(error, getattr(args, "workdir", None) or error.filename)
        if text is None:
            raise
        print(f"recursive-jax: {text}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse cannot take positional overrides after options; pull every bare key=value word out first."""
    words = list(sys.argv[1:] if argv is None else argv)
    overrides, kept, takes_value = [], [], False
    for i, word in enumerate(words):
        bare = not word.startswith("-") and not takes_value and i > 0 and "=" in word and "/" not in word.split("=")[0]
        (overrides if bare else kept).append(word)
        takes_value = word in (
            "--workdir",
            "--fork",
            "--row",
            "--prompt",
            "--count",
            "--seed",
            "--out",
            "--data",
            "--base",
            "--system",
            "--dtype",
            "--in",
            "--draft",
            "--sweep",
            "--figures",
            "--reference",
        )
    args = _parser().parse_args(kept)
    if overrides and not hasattr(args, "overrides"):
        raise SystemExit(f"recursive-jax {args.command}: takes no key=value words, got {' '.join(overrides)}")
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *overrides]
    return args


def _setup(config: Any = None) -> None:
    """What comes before the first device is touched. config: a `Config` whose mesh the command uses."""
    from recursive_jax import mesh

    mesh.use_compilation_cache()
    mesh.start_distributed()
    if config is not None:
        mesh.split_cpu(config.mesh)


def _run(args: argparse.Namespace) -> int:
    from recursive_jax.config import load_config

    config = load_config(args.config, args.overrides)
    if args.command == "train":
        config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"count": 0})})
    _setup(config)
    from recursive_jax.mesh import is_main
    from recursive_jax.rounds.preflight import dry_run, preflight
    from recursive_jax.rounds.status import status_text

    if config.recipe == "finetune":
        from recursive_jax.recipes.finetune import check, finetune

        if args.command == "train":
            raise InputError("`train` trains the first model of a collapse experiment; use `run` with recipe=finetune")
        check(config)
    else:
        preflight(config)
    if args.dry_run:
        print(dry_run(config))
        return 0
    if config.recipe == "finetune":
        finetune(config, args.workdir, fork=args.fork, quiet=args.quiet)
    else:
        from recursive_jax.recipes.collapse import collapse

        collapse(config, args.workdir, fork=args.fork, quiet=args.quiet)
    if is_main():
        print(status_text(args.workdir, short=True))
        print(f"report: {Path(args.workdir) / 'report.html'}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from recursive_jax.rounds.lineage import ancestors, evaluations
    from recursive_jax.rounds.status import ancestors_text, status_text

    if args.row:
        print(ancestors_text(ancestors(args.run, args.row)))
    elif args.json:
        for record in evaluations(args.run):
            print(json.dumps(record))
    else:
        print(status_text(args.run))
    return 0


def _report(args: argparse.Namespace) -> int:
    from recursive_jax.rounds.report import write_report

    print(write_report(args.run))
    if args.figures:
        from recursive_jax.rounds.report.export import export_report

        for path in export_report(args.run, args.figures):
            print(path)
    return 0


def _profile(args: argparse.Namespace) -> int:
    from recursive_jax.collapse.profile import collapse_profile

    names = [Path(s).stem for s in args.samples]
    named = dict(zip(names, args.samples, strict=True))
    encoder = None
    if args.encoder:
        from recursive_jax.rounds.stored import load_model

        _setup()
        encoder = load_model(args.encoder)
    profile = collapse_profile(named if len(named) == len(names) else args.samples, args.reference, encoder=encoder)
    print(profile.jsonl() if args.json else profile, end="" if args.json else "\n")
    if args.out:
        print(profile.save(args.out), file=sys.stderr)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from recursive_jax.cli_generate import generate_command

    return generate_command(args, _setup)


def _import(args: argparse.Namespace) -> int:
    _setup()
    from recursive_jax.rounds.exchange import describe, foreign_path, import_model, save_imported

    path = foreign_path(args.source)
    if path is None:
        raise InputError(f"{args.source} is not a Hugging Face folder (no config.json in it) or a .gguf file")
    model = import_model(path, dtype=args.dtype)
    save_imported(model, Path(args.out))
    print(f"{describe(model)}\nstored in {args.out}")
    return 0


def _export(args: argparse.Namespace) -> int:
    _setup()
    from recursive_jax.models.peft import save_adapter
    from recursive_jax.rounds.exchange import describe, save_huggingface
    from recursive_jax.rounds.stored import load_model

    model = load_model(args.model)
    print(describe(model))
    if args.adapter:
        print(f"adapter written to {save_adapter(model, args.out)}")
    else:
        print(f"written to {save_huggingface(model, args.out, args.dtype)}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from recursive_jax.config import load_config

    overrides = list(args.overrides) + ([f"data.path={args.data}"] if args.data else [])
    config = load_config(None, overrides)
    _setup(config)
    from recursive_jax.rounds.standalone import evaluate_model

    metrics = evaluate_model(args.model, config, base=args.base)
    print("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in metrics.items()) + "\n}")
    return 0


def _lab(args: argparse.Namespace) -> int:
    from recursive_jax.cli_lab import lab_command

    return lab_command(args, _setup)


def _doctor(args: argparse.Namespace) -> int:
    _setup()
    from recursive_jax.rounds.doctor import doctor

    text, healthy = doctor()
    print(text)
    return 0 if healthy else 1


_COMMANDS = {
    "run": _run,
    "train": _run,
    "status": _status,
    "report": _report,
    "profile": _profile,
    "generate": _generate,
    "evaluate": _evaluate,
    "lab": _lab,
    "import": _import,
    "export": _export,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
