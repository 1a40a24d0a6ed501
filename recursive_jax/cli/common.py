"""What several commands share."""

from __future__ import annotations

import argparse
from typing import Any

MODEL = (
    "a run (RUN:name for one of several models), a round or one training; a Hugging Face folder; a .gguf; smollm2 or "
    "minilm, where their packages are installed; or openai:NAME@URL, where a model is to write"
)


def config_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("config", help="a YAML file; configs/ has one per experiment")
    override_arguments(p, "dotted keys of the config, e.g. train.steps=500")
    p.add_argument("--workdir", required=True, metavar="DIR", help="the run folder: new, or one to go on with")
    p.add_argument("--fork", metavar="DIR", help="another run folder whose unchanged results are reused")
    p.add_argument(
        "--same-environment",
        action="store_true",
        help="refuse to go on under other versions, flags or devices, instead of saying and marking it",
    )
    p.add_argument("--dry-run", action="store_true", help="print the resolved config and what it costs; write nothing")
    p.add_argument("--preview", type=int, metavar="N", help="ask N rows, show them, and what is read; write nothing")
    p.add_argument("--quiet", action="store_true", help="no progress")


def override_arguments(p: argparse.ArgumentParser, text: str) -> None:
    p.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def set_up(mesh: Any = None) -> None:
    """What comes before the first device is touched. mesh: the `MeshConfig` of the devices that the command uses."""
    from recursive_jax import mesh as meshes

    meshes.use_compilation_cache()
    meshes.start_distributed()
    if mesh is not None:
        meshes.split_cpu(mesh)
    meshes.all_devices()  # a platform that is not there is said now
