"""What a foreign file says of itself beside its weights: the header of a GGUF, and how the model samples."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax import ByteTokenizer, SamplingConfig, transformer
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import sampling_for
from recursive_jax.models import own_sampling
from recursive_jax.models.gguf import _dequantized
from recursive_jax.models.gguf_header import Tensor, read_header
from recursive_jax.rounds.writing import save_imported
from tests.helpers import write_llama_gguf


def test_a_gguf_header_reads_as_the_package_reads_it(tmp_path):
    """The oracle: gguf's own reader."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_llama_gguf(path, "Q8_0", rope__scaling__factor=4.0, rope__scaling__type="linear")
    oracle = gguf.GGUFReader(str(path))
    fields, tensors = read_header(path, {int(k): v for k, v in gguf.GGML_QUANT_SIZES.items()})
    assert fields == {n: f.contents() for n, f in oracle.fields.items() if not n.startswith("GGUF.")}
    assert [t.name for t in tensors] == [t.name for t in oracle.tensors]
    for ours, theirs in zip(tensors, oracle.tensors, strict=True):
        assert (ours.shape, ours.kind) == (tuple(theirs.shape.tolist()), int(theirs.tensor_type))
        assert ours.data.tobytes() == theirs.data.tobytes()


def test_a_type_that_cannot_be_dequantised_is_named():
    """Of `rope_freqs.weight`, which is read before the others, it was a traceback."""
    gguf = pytest.importorskip("gguf")
    tensor = Tensor("rope_freqs.weight", (4,), int(gguf.GGMLQuantizationType.I8), np.zeros(4, np.uint8))
    with pytest.raises(InputError, match=r"model\.gguf: rope_freqs\.weight is I8"):
        _dequantized(tensor, "model.gguf")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        # transformers is greedy where `do_sample` is not true, whatever else is named; the penalty stays.
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
         {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}),
        ({"bos_token_id": 1, "eos_token_id": 2}, {}),
        (None, {}),
    ],
)  # fmt: skip
def test_a_model_samples_as_its_generation_config_says(given, wanted, tmp_path):
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert own_sampling.of_folder(tmp_path) == wanted


def test_a_gguf_samples_as_llama_cpp_does():
    assert own_sampling.of_gguf({}, "f") == {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    named = {"general.sampling.temp": 0.6, "general.sampling.min_p": 0.0, "general.sampling.penalty_repeat": 1.1}
    wanted = {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
    assert own_sampling.of_gguf(named, "f") == wanted
    with pytest.raises(InputError, match=r"(?s)file.*temperature=-1"):
        own_sampling.of_gguf({"general.sampling.temp": -1}, "file")


def test_what_is_asked_for_stands_over_the_models_own(tiny, mesh, tmp_path):
    model = dataclasses.replace(transformer(tiny, ByteTokenizer(), mesh), sampling={"temperature": 0.5, "top_k": 3})
    assert sampling_for(model) == SamplingConfig(temperature=0.5, top_k=3)
    assert sampling_for(model, {"top_k": 7}, {"max_tokens": 2}) == SamplingConfig(
        temperature=0.5, top_k=7, max_tokens=2
    )
    assert sampling_for(model, SamplingConfig()) == SamplingConfig(), "a SamplingConfig says all"
    assert sampling_for(model, None, {"beams": 2}) == SamplingConfig(beams=2), "beams do not sample"
    save_imported(model.initialized(0), tmp_path / "m")
    assert rj.load_model(tmp_path / "m", mesh).sampling == model.sampling, "it is stored with the model"


@pytest.mark.parity
def test_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    ours = {k: v for k, v in own_sampling.TRANSFORMERS.items() if k != "min_p"}
    assert ours == {k: defaults[k] for k in ours} and defaults["do_sample"] is False and "min_p" not in defaults
