"""Tokenizers, chat templates, GGUF files, templates and the fine-tuning recipe, without the packages they come from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tokenizers

from recursive_jax import ParseError, Template, load_model
from recursive_jax.cli import main
from recursive_jax.data import chat
from recursive_jax.data.gguf_tokenizer import gguf_tokenizer
from recursive_jax.data.template import examples_dataset, preview
from recursive_jax.data.tokenizer_files import read_tokenizer, write_tokenizer
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, Special, tokenizer_from_json
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request
from tests.conftest import ROOT
from tests.helpers import write_llama_gguf
from tests.test_families import FOLDER

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello, friend"},
    {"role": "user", "content": "who?"},
    {"role": "assistant", "content": "me"},
]


def speaking(template=CHATML):
    texts = ["hi there hello friend who me user assistant the cat sat"] * 50
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return FileTokenizer(inner, Special(1, 2, None, (2, 0), False), template)


@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_the_loss_is_on_what_the_assistant_wrote(template):
    tokenizer = speaking(template)
    text = chat.render(tokenizer, TALK)
    assert text.startswith("<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\nhello, friend<|im_end|>\n")
    tokens, mask = chat.encode(tokenizer, TALK)
    runs = np.split(tokens[mask], np.flatnonzero(np.diff(np.flatnonzero(mask)) > 1) + 1)
    assert [tokenizer._tokenizer.decode(r, skip_special_tokens=False) for r in runs] == [
        "hello, friend<|im_end|>",
        "me<|im_end|>",
    ]
    prompt = chat.encode_prompt(tokenizer, TALK[:3])
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)  # asked exactly as it was taught


def test_templates_are_sandboxed_and_may_refuse():
    with pytest.raises(InputError, match="refuses these messages: only users"):
        chat.render(speaking("{{ raise_exception('only users') }}"), TALK)
    with pytest.raises(InputError, match="refuses"):
        chat.render(speaking("{{ ''.__class__.__mro__[1].__subclasses__() }}"), TALK)
    with pytest.raises(InputError, match="not valid Jinja"):
        chat.render(speaking("{% for %}"), TALK)
    with pytest.raises(InputError, match="no chat template"):
        chat.render(ByteTokenizer(), TALK)
    assert chat.render(speaking("{{ {'a': '<é>'} | tojson }}"), TALK) == '{"a": "<é>"}'


def test_a_row_is_rendered_learnt_and_read_back():
    tokenizer = speaking()
    template = Template("Say {word}.", "I say: {word}!", chat=True)
    row = {"word": "cat"}
    example = template.example(row, tokenizer)
    prompt = template.request(row, tokenizer)
    np.testing.assert_array_equal(example.tokens[: len(prompt)], prompt)
    assert not example.loss[: len(prompt)].any()
    assert tokenizer.decode(example.tokens[example.loss]) == "I say: cat!"
    assert template.parse(" I say: cat! ") == {"word": "cat"}
    assert template.parse("cat") == ParseError("cat")
    plain = Template("Say {word}.", " {word}").example(row, tokenizer)
    assert tokenizer.decode(plain.tokens[plain.loss]) == " cat" and plain.tokens[-1] == tokenizer.eos
    with pytest.raises(InputError, match="wants 'other'; the row's fields are: word"):
        Template("{other}", "").request(row, tokenizer)
    data = examples_dataset([row, {"word": "me"}], template, tokenizer)
    shown = preview(data, tokenizer, 80)
    assert "«I say: cat!<|im_end|>»" in shown and "count in the loss" in shown


def test_a_stored_tokenizer_is_the_same(tmp_path):
    tokenizer = speaking()
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    write_tokenizer(tmp_path, tokenizer, 64)
    read = read_tokenizer(tmp_path, 400)
    for other in (again, read):
        assert other.encode("the cat, 12 é\n") == tokenizer.encode("the cat, 12 é\n")
        assert (other.bos, other.eos, set(other.stops)) == (1, 2, {0, 2})
        assert chat.render(other, TALK) == chat.render(tokenizer, TALK)


def test_padding_equal_to_the_end_is_repaired_with_a_message(tmp_path, capsys):
    tokenizer = speaking()
    write_tokenizer(tmp_path, tokenizer, 64)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|im_end|>"}))
    assert read_tokenizer(tmp_path, 400).pad == 0
    assert "<|endoftext|> pads instead" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"ids up to .*, the embedding has 100 rows"):
        read_tokenizer(tmp_path, 100)


def test_bytes_as_a_library_tokenizer_have_equal_ids(tmp_path):
    write_tokenizer(tmp_path, ByteTokenizer(), 64)
    again = read_tokenizer(tmp_path, 300)
    text = "naïve café 漢字 🙂\n\ttabs  and 'quotes'"
    assert again.encode(text) == ByteTokenizer().encode(text)
    assert again.decode(again.encode(text)) == text


def sentencepiece_model():
    spm = pytest.importorskip("sentencepiece")
    import io

    model = io.BytesIO()
    lines = ["the cat sat on the mat", "a naïve café in the town", "hello there, friend", "the theme of the hat"] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue()), model.getvalue()


def test_a_sentencepiece_model_reads_as_its_library_does(tmp_path):
    """Both ways in: the file itself, and its pieces and scores as a GGUF carries them."""
    processor, proto = sentencepiece_model()
    size = processor.get_piece_size()
    kind = lambda i: (
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
    )
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    (tmp_path / "tokenizer.model").write_bytes(proto)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    found = [gguf_tokenizer(fields, size, "x.gguf"), read_tokenizer(tmp_path, size)]
    found.append(tokenizer_from_json(json.loads(json.dumps(found[1].to_json()))))
    for text in ("the cat sat", "a naïve theme, 漢 🙂", "  two  blanks"):
        for tokenizer in found:
            assert tokenizer.encode(text) == processor.encode(text), text
            assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))
        assert found[0].has_bos and found[0].bos == 1


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_gguf_is_read_as_what_it_dequantises_to(kind, mesh, tmp_path):
    """A file as llama.cpp's converter writes it: q and k rows permuted, tokenizer inside."""
    pytest.importorskip("gguf")
    expected = write_llama_gguf(tmp_path / "m.gguf", kind)
    model = load_model(tmp_path / "m.gguf", mesh)
    query = np.asarray(model.params["blocks"]["attention"]["query"])[1].reshape(32, 32)
    np.testing.assert_array_equal(query, expected["model.layers.1.self_attn.q_proj.weight"].T)
    np.testing.assert_array_equal(np.asarray(model.params["embedding"])[:48], expected["model.embed_tokens.weight"])
    if kind == "F32":
        stored = np.load(FOLDER / "llama" / "expected.npz")
        found = np.asarray(model.logits(stored["tokens"], stored["mask"]))
        assert np.abs(found - stored["logits"])[stored["mask"] > 0].max() < 1e-4
        assert model.tokenizer.eos == 2 and model.tokenizer.encode("t") == []
        whole = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 3])
        with pytest.raises(InputError, match="truncated or damaged"):
            load_model(tmp_path / "cut.gguf", mesh)


def test_a_model_without_a_tokenizer_reads_and_writes_ids(mesh, capsys):
    model = load_model(FOLDER / "llama", mesh)
    assert "texts are token ids" in capsys.readouterr().err
    assert model.tokenizer.encode("5 6 7") == [5, 6, 7]
    rows = generate(model, [Request(0, np.array([5, 6])), Request(1, np.array([5, 6]), opened=True)])
    assert rows.column("status")[0] in ("ok", "length")
    with pytest.raises(InputError, match="not a list of token ids"):
        model.tokenizer.encode("words")


@pytest.fixture
def task(tmp_path):
    draw = np.random.default_rng(0)
    rows = [{"seen": f"{a} {b}", "next": str(a)} for a, b in draw.integers(3, 8, (60, 2))]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "task.yaml").write_text(
        f"""
name: copy
recipe: finetune
base: {FOLDER / "llama"}
task: {{path: {tmp_path / "task.jsonl"}, prompt: "{{seen}}", completion: "{{next}}", chat: false}}
lora: {{rank: 8, alpha: 16}}
train: {{steps: 60, batch: 8, learning_rate: 3.0e-2, length: 24, weight_decay: 0.0}}
sampling: {{max_tokens: 3, batch: 16}}
mesh: {{data: 1}}
"""
    )
    return tmp_path


def test_rows_are_shown_as_they_are_asked_before_anything_starts(task, capsys):
    assert main(["run", str(task / "task.yaml"), "--workdir", str(task / "run"), "--preview", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("what is asked") == shown.count("the reply") == 2 and not (task / "run").exists()
    assert '"id": "rows/1", "status": ' in shown
    arguments = ["run", str(ROOT / "configs" / "quickstart.yaml"), "--workdir", str(task / "run"), "--preview"]
    for rows, says in (("2", "recipe collapse asks nothing through a template"), ("0", "at least one row")):
        assert main([*arguments, rows]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_from_a_config_learns_is_resumed_and_goes_back(task, capsys, mesh):
    run = task / "run"
    assert main(["run", str(task / "task.yaml"), "--workdir", str(run)]) == 0
    shown = capsys.readouterr()
    assert "count in the loss" in shown.out + shown.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = (r["metrics"] for r in records)
    assert after["accuracy"] > before["accuracy"] + 0.4 and after["format"] >= after["accuracy"]
    assert after["ce_task"] < before["ce_task"]
    assert "Right answers" in (run / "report.html").read_text()
    assert main(["run", str(task / "task.yaml"), "--workdir", str(run), "--quiet"]) == 0  # nothing is made again
    model = load_model(run, mesh)
    assert model.network.lora is not None
    tokens = np.array([[2, 4, 5, 2, 3]])
    assert main(["export", str(run), str(task / "out")]) == 0
    np.testing.assert_allclose(load_model(task / "out", mesh).logits(tokens), model.logits(tokens), atol=1e-4)
    assert main(["export", str(run), str(task / "adapter"), "--adapter"]) == 0
    assert json.loads((task / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert main(["import", str(task / "out"), str(task / "in")]) == 0
    np.testing.assert_array_equal(
        load_model(task / "in", mesh).logits(tokens), load_model(task / "out", mesh).logits(tokens)
    )
    assert main(["generate", str(task / "out"), "--prompt", "4 5", "--count", "1", "sampling.max_tokens=2"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["import", "nowhere", "out"], "not a Hugging Face folder"),
        (["generate", str(FOLDER / "llama"), "--chat", "--prompt", "3"], "no chat template"),
        (["generate", str(FOLDER / "bert"), "--prompt", "3"], "mask token"),
        (["export", str(FOLDER / "llama"), str(FOLDER)], "not an empty folder"),
        (["export", str(FOLDER / "llama"), "x", "--adapter"], "no adapter"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("base=null", "recipe=finetune needs base"),
        ("task.path=gone.jsonl", "gone.jsonl does not exist"),
        ('task.prompt="{other}"', "the row's fields are: seen, next"),
        ("task.chat=true", "has no chat template"),
        ("lora.targets=[q_proj]", "names no weight"),
        ("train.length=2", "longer than a row of 3 tokens"),
        ("recipe=collapse", "is for recipe=finetune"),
    ],
)
def test_bad_tasks_are_named(change, says, task, capsys):
    assert main(["run", str(task / "task.yaml"), change, "--workdir", str(task / "run")]) == 2
    assert says in capsys.readouterr().err


def test_an_imported_model_is_teacher_and_student(tmp_path, mesh):
    """The Curse of Recursion's protocol: every generation fine-tunes the imported weights, not a random start."""
    draw = np.random.default_rng(0)
    for name in ("train", "held"):
        rows = [" ".join(map(str, draw.integers(3, 20, 12))) for _ in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    words = [
        f"base={FOLDER / 'gpt2'}", f"data.path={tmp_path / 'train.jsonl'}", 
        f"data.validation={tmp_path / 'held.jsonl'}",
        "train.steps=3", "train.batch=4", "train.length=16", "rounds.count=2", "rounds.token_budget=120",
        "sampling.batch=8",
        "evaluate.rows=8", "evaluate.samples=8", "evaluate.token_budget=64", "mesh.data=1",
    ]  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text("name: base\n")
    assert main(["run", str(config), *words, "--workdir", str(tmp_path / "run"), "--quiet"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in records] == [0, 1, 2] and all("ce_real" in r["metrics"] for r in records)
    start, student = load_model(FOLDER / "gpt2", mesh), load_model(tmp_path / "run", mesh)
    moved = np.abs(np.asarray(student.params["positions"]) - np.asarray(start.params["positions"])).max()
    assert 0 < moved < 0.02  # three steps of 1e-3 from the imported weights, not from a new start
    assert student.network.config.family == "gpt2"


LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_sentencepiece_conversation_has_its_special_tokens(tmp_path):
    """`bos_token` and `eos_token` of a chat template were encoded as their letters: training had no end token. And what
    is asked at rollout is the beginning of what was learnt."""
    processor, proto = sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(proto)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": LLAMA_CHAT, "bos_token": "<s>", "eos_token": "</s>"})
    )
    tokenizer = read_tokenizer(tmp_path, processor.get_piece_size())
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"},
            {"role": "user", "content": "on the mat"}, {"role": "assistant", "content": "hello"}]  # fmt: skip
    ids, mask = chat.encode(tokenizer, talk)
    assert ids[0] == 1 and (ids == 1).sum() == 1 and (ids == 2).sum() == 2  # one start, an end of each answer
    assert mask[ids == 2].all() and not mask[0]
    for turn in (0, 2):
        prompt = chat.encode_prompt(tokenizer, talk[: turn + 1])
        assert ids[: len(prompt)].tolist() == prompt.tolist() and mask[len(prompt)]
    text = chat.render(tokenizer, talk)
    assert processor.decode([int(i) for i in ids]).split() == text.replace("<s>", "").replace("</s>", "").split()
    answer = Template("{q}", "{a}", chat=True).example({"q": "the cat", "a": "sat"}, tokenizer)
    assert answer.tokens[answer.loss].tolist()[-1] == 2


def test_a_sentencepiece_model_has_the_tokens_of_its_companion_files(tmp_path):
    """Vicuna and its kind: a chat's tokens stand in added_tokens.json, beyond the pieces of tokenizer.model. They were
    letters, and the end token that the config names was not found."""
    processor, proto = sentencepiece_model()
    size = processor.get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes(proto)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1}))
    added = {"<|im_end|>": size, "<pad>": size + 1, "<note>": size + 2, "</s>": 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    decoder = {
        str(size): {"content": "<|im_end|>", "special": True},
        str(size + 1): {"content": "<pad>", "special": True},
    }
    settings = {
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "added_tokens_decoder": decoder,
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = read_tokenizer(tmp_path, size + 10)  # an embedding with rows that no token has
    for tokenizer in (read, tokenizer_from_json(json.loads(json.dumps(read.to_json())))):
        assert (tokenizer.eos, tokenizer.pad, tokenizer.vocab) == (size, size + 1, size + 3)
        ids = tokenizer.encode("the cat<note>sat<|im_end|>")
        assert ids.count(size) == ids.count(size + 2) == 1 and ids[-1] == size
        assert tokenizer.decode([*ids, size + 7]) == "the cat<note>sat"
        rest = [i for i in ids if i < size]
        assert processor.decode(rest) == "the catsat", "no blank comes in behind an added token"
        assert tokenizer.token(size) == "<|im_end|>" and tokenizer.token(size + 7) == ""
        assert size in tokenizer.special_ids and size + 2 not in tokenizer.special_ids
        pieces, special = tokenizer.pieces()
        assert pieces[size + 2] == b"<note>" and len(pieces) == size + 3 and size in special
        prompt = chat.encode_prompt(tokenizer, [{"role": "user", "content": "the cat"}])
        assert (prompt == size).sum() == 1
    wrong = {"<|im_end|>": 5}
    (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
    settings.pop("added_tokens_decoder")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"has the id 5 in its companion files, which is another piece of its {size}"):
        read_tokenizer(tmp_path, size)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": 9}))
    with pytest.raises(InputError, match="has the id 9 in its companion files, 2 in the tokenizer"):
        read_tokenizer(tmp_path, size)


def test_a_weights_index_opens_nothing_outside_its_folder(mesh, tmp_path):
    for name in ("../model.safetensors", "/etc/passwd"):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(FOLDER / "llama", tmp_path / "m")
        (tmp_path / "m" / "model.safetensors").rename(tmp_path / "model.safetensors")
        (tmp_path / "m" / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"lm_head.weight": name}})
        )
        with pytest.raises(InputError, match="lies outside"):
            load_model(tmp_path / "m", mesh)


def test_shards_in_folders_below_are_part_of_the_name(mesh, tmp_path):
    """The fingerprint is of the bytes that were opened: with its weights set to zero a model had the same one."""
    from safetensors.numpy import load_file, save_file

    def sharded(folder, scale):
        shutil.copytree(FOLDER / "llama", folder)
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "shards").mkdir()
        save_file({k: (v * scale).astype(v.dtype) for k, v in tensors.items()}, folder / "shards" / "a.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "shards/a.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return load_model(folder, mesh)

    one, same, other = (sharded(tmp_path / str(i), scale) for i, scale in enumerate((1, 1, 0)))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "keys, scaling",
    [
        ({}, None),
        ({"rope__scaling__factor": 4.0}, ("linear", 4.0)),  # without a type it is linear
        ({"rope__scale_linear": 2.0}, ("linear", 2.0)),  # the old name
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 0.0}, None),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, ("yarn", 4.0)),
        ({"rope__dimension_count": 8}, None),
    ],
)
def test_absent_rotary_keys_of_a_gguf_mean_what_they_mean_to_llama_cpp(keys, scaling, mesh, tmp_path):
    pytest.importorskip("gguf")
    write_llama_gguf(tmp_path / "m.gguf", **keys)
    found = load_model(tmp_path / "m.gguf", mesh).network.config.rope_scaling
    assert (found and (found.kind, found.factor)) == scaling


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"rope__dimension_count": 4}, "rope.dimension_count=4, heads have 8"),
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type='longrope' is not supported"),
        ({"attention__value_length": 4}, "value_length differs"),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__attn_factor": 2.0},
            "attn_factor",
        ),
    ],
)
def test_what_llama_cpp_refuses_of_a_gguf_is_refused(keys, says, mesh, tmp_path):
    pytest.importorskip("gguf")
    write_llama_gguf(tmp_path / "m.gguf", **keys)
    with pytest.raises(InputError, match=says):
        load_model(tmp_path / "m.gguf", mesh)


LETTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def bpe_fields(**changes):
    """The fields of a byte-level vocabulary with one merge and two end tokens."""
    tokens = [*LETTERS, "hi", "<s>", "<|im_end|>", "<|end_of_text|>"]
    fields = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "merges": ["h i"], "token_type": [1] * len(tokens)}
    fields |= {"bos_token_id": 257, "eos_token_id": 259} | changes
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def test_absent_tokenizer_keys_of_a_gguf_mean_what_they_mean_to_llama_cpp(capsys):
    """src/llama-vocab.cpp, llama_vocab::impl::load."""
    read = lambda **changes: gguf_tokenizer(bpe_fields(**changes), 300, "m.gguf")
    whole = read()
    assert whole.has_bos and whole.bos == 257 and set(whole.stops) == {258, 259}  # llama-bpe opens; names end
    assert whole.decode([ord("h") - 0, 258]) == whole.decode([ord("h") - 0])  # special whatever its type says
    assert not read(pre="gpt-2").has_bos and read(pre="gpt-2", add_bos_token=True).has_bos
    capsys.readouterr()
    without = read(eos_token_id=None, bos_token_id=None)
    assert without.eos == 11 and without.bos == 11 and 11 in without.stops
    assert "no tokenizer.ggml.eos_token_id: 11" in capsys.readouterr().err
    assert read(bos_token_id=10**6).bos == 11 and "is not the id of a token" in capsys.readouterr().err
    assert read(token_type=None).stops == whole.stops
    default = read(pre=None)
    assert "no tokenizer.ggml.pre" in capsys.readouterr().err
    pieces = [p for p, _ in default._tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345, x=y")]
    assert pieces == ["it", "'", "s", "\u0120", "123", "45", ",", "\u0120x", "=", "y"]


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"merges": None}, "merges is missing"),
        ({"model": "llama", "scores": None}, "scores is missing"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "the token 'a' stands twice, as 0 and 2"),
        ({"token_type": [1, 2]}, "token_type is a list of 260 numbers"),
        ({"pre": "unheard-of"}, "pre='unheard-of' is not supported"),
        ({"model": "rwkv"}, "model='rwkv' is not supported"),
        ({"eos_token_id": [1, "x"]}, "a token id"),
    ],
)
def test_a_gguf_tokenizer_that_does_not_fit_together_is_refused(changes, says):
    with pytest.raises(InputError, match=says):
        gguf_tokenizer(bpe_fields(**changes), 300, "m.gguf")


def changed(tmp_path, tensors=None, **files):
    """The stored Llama with other tensors and files."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(FOLDER / "llama", folder)
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    for name, value in files.items():
        stored = json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").exists() else {}
        (folder / f"{name}.json").write_text(json.dumps({**stored, **value}))
    return folder


def test_a_head_of_its_own_is_kept_whatever_the_flag_says(mesh, tmp_path, capsys):
    """transformers 5: a tied flag does not throw away a head in the file that differs from the embedding."""
    stored = np.load(FOLDER / "llama" / "expected.npz")
    found = load_model(changed(tmp_path, config={"tie_word_embeddings": True}), mesh)
    assert not found.network.config.tied and "the file is right" in capsys.readouterr().err
    logits = np.asarray(found.logits(stored["tokens"], stored["mask"]))
    assert np.abs(logits - stored["logits"])[stored["mask"] > 0].max() < 1e-4
    same = lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    tied = load_model(changed(tmp_path / "same", same, config={"tie_word_embeddings": True}), mesh)
    assert tied.network.config.tied


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, "float8_e4m3fn"])
def test_quantised_tensors_are_no_floats(kind, mesh, tmp_path):
    import ml_dtypes

    kind = getattr(ml_dtypes, kind) if isinstance(kind, str) else kind
    name = "model.layers.0.mlp.up_proj.weight"
    folder = changed(tmp_path, lambda tensors: {**tensors, name: tensors[name].astype(kind)})
    with pytest.raises(InputError, match=f"{name} is of type .*quantised weights are not read"):
        load_model(folder, mesh)


def test_companion_files_add_tokens_and_name_roles(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    words = {w: i for i, w in enumerate(("<unk>", "a", "b", "</s>"))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 4}))
    decoder = {"5": {"content": "<|user|>", "special": True}}
    settings = {"added_tokens_decoder": decoder, "eos_token": {"content": "<|end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_tokenizer(folder, 6)
    assert found.encode("a<|user|>b<|end|>") == [1, 5, 2, 4] and found.eos == 4 and found.decode([1, 5]) == "a"
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 7}))
    with pytest.raises(InputError, match="has the id 5 in its companion files and 4"):
        read_tokenizer(folder, 9)
    (folder / "added_tokens.json").unlink()
    settings["added_tokens_decoder"] = {"4": decoder["5"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"eos_token is '<\|end\|>', which is not a token"):
        read_tokenizer(folder, 6)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match="no end token"):
        read_tokenizer(folder, 6)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 99]}))
    assert read_tokenizer(folder, 6).stops == (3,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 99}))
    with pytest.raises(InputError, match="99 is beyond the embedding's 6 rows"):
        read_tokenizer(folder, 6)
