"""Eight CPU devices in the test process, so that every mesh can be tried; tests take small ones unless they say so."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

#: `device`: on what JAX finds, a GPU say (benchmarks/accelerator.sh); what wants more devices than that is skipped.
ON_DEVICE = os.environ.get("RECURSIVE_JAX_TESTS_ON") == "device"
if not ON_DEVICE:
    os.environ["JAX_PLATFORMS"] = "cpu"
# The suite compiles far more than it computes: LLVM without its optimisations, and XLA's older way to lower fusions
# (which each version names by a flag of its own), take a third of the time; the processes it starts, the workers and
# the next run share what is compiled.
FUSIONS = {"0.10": " --xla_cpu_use_fusion_emitters=false", "0.12": " --xla_cpu_use_new_xtile_lowering=false"}
OLDER = FUSIONS.get(".".join(version("jaxlib").split(".")[:2]), "")
if not ON_DEVICE:
    os.environ.setdefault(
        "XLA_FLAGS", f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true{OLDER}"
    )
os.environ["RECURSIVE_JAX_CACHE"] = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla")

import jax  # noqa: E402
import pytest  # noqa: E402

if not ON_DEVICE:
    jax.config.update("jax_num_cpu_devices", 8)

from recursive_jax.config import LanguageConfig, MeshConfig, ModelConfig  # noqa: E402
from recursive_jax.data.language import Language  # noqa: E402
from recursive_jax.data.tokenizers import LanguageTokenizer  # noqa: E402
from recursive_jax.errors import InputError  # noqa: E402
from recursive_jax.mesh import make_mesh, use_compilation_cache  # noqa: E402

use_compilation_cache()

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except InputError as error:
        if ON_DEVICE and "devices" in str(error) and "mesh" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="session")
def language():
    return Language(LanguageConfig(types=2, nouns=4, verbs=2, first_names=5, last_names=5, attributes=2, values=5))


@pytest.fixture(scope="session")
def tokenizer(language):
    return LanguageTokenizer(language)


@pytest.fixture
def tiny():
    return ModelConfig(layers=2, d_model=32, heads=4, kv_heads=2, d_ff=64, max_length=32)


MAPPED = 40_000  # of the 65,530 pieces of memory that Linux lets a process map; XLA takes some for every program


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """A worker that has compiled thousands of programs dies without a word at the system's limit."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPED:
        jax.clear_caches()
