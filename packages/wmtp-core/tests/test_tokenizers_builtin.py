"""Tokenizers: exact round trips, also of texts encoded apart; nothing added to a vocabulary; the same after saving."""

import json
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wmtp.errors import ConfigError, WMTPError
from wmtp.tokenizers.bytes import BytesTokenizer
from wmtp.tokenizers.config import Bytes, HfSentencePiece, HfTransformers
from wmtp.tokenizers.hf import HfTokenizer
from wmtp.tokenizers.load import load_tokenizer
from wmtp.tokenizers.sentencepiece import SentencePieceTokenizer
from wmtp.tokenizers.texts import token_texts

CORPUS = ["def add(a, b):\n    return a + b\n", "hello  world, how are you", "  indented\n\ttabs", "the quick brown fox"] * 30
TEXTS = ["def f(x):\n", "    return x\n", "  two  spaces", "hello", " hello", "äöü 日本", "\n", "\ta", ""]


def train_sentencepiece(folder, name="tokenizer", **options):
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    defaults = {
        "model_type": "bpe",
        "vocab_size": 320,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(folder / name), **defaults | options)
    return folder / f"{name}.model"


def train_bpe(style):
    """A small BPE tokenizer: ``gpt2`` on bytes; ``llama`` and ``metaspace`` with a space put before every text."""
    specials = ["<unk>", "<s>", "</s>", "<|user|>"]
    if style == "gpt2":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS, trainer)
        return tokenizer
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials + byte_tokens, show_progress=False)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replaced = [text.replace(" ", "▁") for text in CORPUS]
    tokenizer.train_from_iterator(replaced, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    byte_rules = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*byte_rules, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence([*byte_rules[1:], decoders.Metaspace(prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save_hf(folder, style="gpt2", **names):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=train_bpe(style), **({"eos_token": "</s>", "bos_token": "<s>"} | names))
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "gpt2", "llama", "metaspace"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "bytes":
            return Bytes().build(None)
        case "sentencepiece":
            return HfSentencePiece().build(train_sentencepiece(folder))
        case style:
            return HfTransformers().build(save_hf(folder, style))


@pytest.mark.parametrize("first", TEXTS)
def test_texts_encoded_apart_decode_to_their_concatenation(tokenizer, first):
    for second in TEXTS:
        ids = tokenizer.encode(first) + tokenizer.encode(second)
        assert tokenizer.decode(ids) == first + second
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eos_id not in ids
        framed = [tokenizer.eos_id, *ids, tokenizer.eos_id]
        assert tokenizer.decode(framed if tokenizer.bos_id is None else [tokenizer.bos_id, *framed]) == first + second


@pytest.mark.parametrize("text", [*TEXTS, "👩‍🔬 é한글 \u0000</script>&lt;", "a  b \n\n c"])
def test_each_token_has_its_text(tokenizer, text):
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, [*ids, tokenizer.eos_id])
    assert len(texts) == len(ids) + 1
    assert texts[-1] == tokenizer.token(tokenizer.eos_id)
    assert "".join(texts[:-1]) == text
    for end in range(len(ids)):  # cut anywhere, inside a character too
        cut = token_texts(tokenizer, ids[:end])
        assert len(cut) == end
        assert text.startswith("".join(cut).rstrip("\ufffd"))


def test_many_texts_are_encoded_as_one_by_one(tokenizer):
    texts = ["a b", " b\n", "", "def f():\n    return 1", "ä€ 🙂"]
    assert list(tokenizer.encode_many(texts)) == [tokenizer.encode(text) for text in texts]
    assert list(tokenizer.encode_many(texts, first=True)) == [tokenizer.encode_first(text) for text in texts]
    assert list(tokenizer.encode_many_with_offsets(texts)) == [tokenizer.encode_with_offsets(text) for text in texts]


def test_every_token_has_a_name_of_its_own(tokenizer):
    names = [tokenizer.token(token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == tokenizer.vocab_size
    with pytest.raises(IndexError):
        tokenizer.token(tokenizer.vocab_size)


def test_a_saved_tokenizer_is_the_same_when_opened_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert type(again) is type(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert (again.vocab_size, again.eos_id, again.bos_id) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    again.save(tmp_path / "twice")
    assert load_tokenizer(tmp_path / "twice").fingerprint() == tokenizer.fingerprint()


def test_a_fingerprint_is_the_same_in_another_process(tmp_path):
    made = [HfTokenizer(save_hf(tmp_path / style, style)) for style in ("gpt2", "llama")]
    made += [SentencePieceTokenizer(train_sentencepiece(tmp_path)), BytesTokenizer()]
    for number, tokenizer in enumerate(made):
        tokenizer.save(tmp_path / str(number))
    code = (
        "import sys; from pathlib import Path; from wmtp.tokenizers.load import load_tokenizer\n"
        "for number in range(4): print(load_tokenizer(Path(sys.argv[1], str(number))).fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [tokenizer.fingerprint() for tokenizer in made]
    assert len(set(done.stdout.split())) == 4


# bytes


@settings(deadline=None)
@given(st.text())
def test_bytes_hold_every_text(text):
    tokenizer = BytesTokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) == text


def test_bytes_that_are_no_text_decode_to_a_replacement():
    assert BytesTokenizer().decode([0x61, 0xE6, 0x62]) == "a�b"
    assert (BytesTokenizer().vocab_size, BytesTokenizer().eos_id, BytesTokenizer().bos_id) == (258, 256, 257)
    assert [BytesTokenizer().token(i) for i in (97, 10, 256, 257)] == ["a", "<0x0A>", "<eos>", "<bos>"]


# transformers


def test_the_ids_are_those_of_transformers(tmp_path):
    save_hf(tmp_path, "llama")
    ours, theirs = HfTokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))
    # theirs puts a space before the text; after it, the ids are the same
    assert ours.encode(" hello world") == theirs("hello world", add_special_tokens=False)["input_ids"]
    assert ours.bos_id == theirs.bos_token_id
    assert ours.encode("<|user|>") == [3]
    assert ours.decode([3, *ours.encode("x")]) == "x"


def test_transformers_opens_what_was_saved(tmp_path):
    tokenizer = HfTokenizer(save_hf(tmp_path / "a"))
    tokenizer.save(tmp_path / "b")
    before, after = (AutoTokenizer.from_pretrained(str(tmp_path / name)) for name in "ab")
    assert after.get_vocab() == before.get_vocab()
    assert (after.eos_token, after.bos_token, after.pad_token) == ("</s>", "<s>", None)
    assert after("hello world")["input_ids"] == before("hello world")["input_ids"]


def test_a_begin_token_that_is_not_put_by_itself_is_not_put(tmp_path):
    assert HfTokenizer(save_hf(tmp_path, "gpt2")).bos_id is None


def test_the_end_token(tmp_path):
    save_hf(tmp_path, eos_token=None)
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token: .* names no end-of-sequence token"):
        HfTokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token: '<end>' is not in the vocabulary"):
        HfTokenizer(tmp_path, eos_token="<end>")
    tokenizer = HfTransformers(eos_token="<|user|>").build(tmp_path)
    assert tokenizer.eos_id == 3
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 3
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "saved"))) == tokenizer.vocab_size


def test_ids_of_added_tokens_count(tmp_path):
    backend = train_bpe("gpt2")
    backend.add_tokens([AddedToken("<extra>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(str(tmp_path))
    tokenizer = HfTokenizer(tmp_path)
    assert tokenizer.encode("<extra>") == [tokenizer.vocab_size - 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer that transformers can open: none of tokenizer.json"),
        ({"tokenizer.json": b"{"}, "transformers cannot open this tokenizer"),
        ({"a.gguf": b"", "b.gguf": b""}, r"several .gguf files \(a.gguf, b.gguf\); set gguf_file"),
        ({"a.gguf": b"no"}, r"a.gguf: transformers cannot open this tokenizer"),
    ],
)
def test_a_folder_without_a_tokenizer(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WMTPError, match=message):
        HfTokenizer(tmp_path)


def test_missing_places(tmp_path):
    with pytest.raises(WMTPError, match=r"no such folder or \.gguf file"):
        HfTokenizer(tmp_path / "missing")
    with pytest.raises(WMTPError, match=r"x\.gguf: no such file"):
        HfTokenizer(tmp_path, gguf_file="x.gguf")
    with pytest.raises(WMTPError, match="no such file or folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(WMTPError, match=r"tokenizer\.model: no SentencePiece model can be read there"):
        SentencePieceTokenizer(tmp_path)
    for config in (HfTransformers(), HfSentencePiece()):
        with pytest.raises(ConfigError, match=r"tokenizer\.uri: is not set"):
            config.build(None)


def test_another_plugins_tokenizer_is_not_guessed(tmp_path):
    (tmp_path / "wmtp_tokenizer.json").write_text('{"type": "characters"}')
    with pytest.raises(WMTPError, match="'characters'"):
        load_tokenizer(tmp_path)
    (tmp_path / "wmtp_tokenizer.json").write_text("{")
    with pytest.raises(WMTPError, match=r"wmtp_tokenizer\.json: cannot be read as JSON"):
        load_tokenizer(tmp_path)


def write_gguf(file, eos_id):
    """A file with nothing but a tokenizer; its vocabulary."""
    gguf = pytest.importorskip("gguf")
    backend = train_bpe("gpt2")
    vocab = backend.get_vocab()
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    writer.add_token_types([3 if vocab[token] < 4 else 1 for token in sorted(vocab, key=vocab.__getitem__)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return vocab


def test_a_gguf_file_whose_last_token_does_not_exist(tmp_path):
    write_gguf(tmp_path / "small.gguf", 10**6)
    with pytest.raises(WMTPError, match=r"small\.gguf: "):
        load_tokenizer(tmp_path)


def test_the_tokenizer_in_a_gguf_file(tmp_path):
    file = tmp_path / "small.gguf"
    vocab = write_gguf(file, 2)
    for tokenizer in (load_tokenizer(file), load_tokenizer(tmp_path), HfTransformers(gguf_file=file.name).build(tmp_path)):
        assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.token(2)) == (len(vocab), 2, "</s>")
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint() == tokenizer.fingerprint()
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "saved"))) == len(vocab)


# sentencepiece


def test_the_pieces_are_those_of_sentencepiece(tmp_path):
    file = train_sentencepiece(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(tmp_path)  # a folder with nothing but tokenizer.model
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode(" hello  world\n") == theirs.encode("hello  world\n")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, theirs.get_piece_size())
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == file.read_bytes()


def test_the_end_piece(tmp_path):
    file = train_sentencepiece(tmp_path, eos_id=-1, bos_id=-1, user_defined_symbols=["<end>"])
    with pytest.raises(ConfigError, match=r"tokenizer\.eos_token: .* has no end-of-sequence piece"):
        SentencePieceTokenizer(file)
    with pytest.raises(ConfigError, match="'<none>' is not in the vocabulary"):
        SentencePieceTokenizer(file, eos_token="<none>")
    tokenizer = SentencePieceTokenizer(file, eos_token="<end>")
    assert tokenizer.bos_id is None
    assert tokenizer.token(tokenizer.eos_id) == "<end>"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == tokenizer.eos_id


def test_a_model_that_loses_line_breaks_is_warned_of(tmp_path, caplog):
    file = train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc", byte_fallback=False, vocab_size=60)
    SentencePieceTokenizer(file)
    assert "changes line breaks" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no model at all", None])
def test_a_damaged_sentencepiece_model(tmp_path, content):
    file = tmp_path / "a.model"
    file.write_bytes(train_sentencepiece(tmp_path).read_bytes()[:-100] if content is None else content)
    with pytest.raises(WMTPError, match=r"a\.model: not a SentencePiece model, or damaged"):
        SentencePieceTokenizer(file)
