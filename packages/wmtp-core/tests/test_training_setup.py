"""The models that a trainer needs besides the base model: checked before anything is computed, and ready to run."""

import shutil

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import wmtp
from wmtp.config.places import Place
from wmtp.config.schema import (
    Config,
    DataConfig,
    DevicesConfig,
    Fp8Config,
    HeadsConfig,
    LoraConfig,
    ModelConfig,
    TrainDataConfig,
)
from wmtp.data.config import TextFiles
from wmtp.errors import ConfigError, WMTPError
from wmtp.evaluation.config import InferenceSpeed, PassAtK, Speculative
from wmtp.models.config import HfModel, ScratchModel
from wmtp.models.mapped import open_tensors
from wmtp.plugins.contract import TokenizerConfig, TrainerConfig
from wmtp.tokenizers.config import Bytes, HfTransformers, OwnTokenizer
from wmtp.trainers import Trainer
from wmtp.training.dry_run import dry_run
from wmtp.training.setup import load_base_model, load_extra_model, open_source
from wmtp_algos import BaselineMTP

WORDS = ["</s>", "def", "return", "x", "y", "+", "=", "1"]


@attrs.frozen(kw_only=True)
class NeedsReference(TrainerConfig):
    type = "needs-reference"
    required_models = ("ref",)

    def build(self):
        return Trainer()


@attrs.frozen(kw_only=True)
class Words(TokenizerConfig):
    """A tokenizer of another package, which only the config that names it can open."""

    type = "words"

    def build(self, path):
        from wmtp.tokenizers.bytes import BytesTokenizer

        class WordsTokenizer(BytesTokenizer):
            def save(self, folder):
                from wmtp.tokenizers.saved import write_saved

                write_saved(folder, "words")

        return WordsTokenizer()


def save_model(folder, words=WORDS, *, vocab_size=None, max_positions=64, eos_token=WORDS[0]):
    """A tiny model with a tokenizer that knows ``words``."""
    shape = {"hidden_size": 16, "layers": 1, "attention_heads": 2, "intermediate_size": 24, "max_positions": max_positions}
    loaded = ScratchModel(vocab_size=vocab_size or len(words), **shape).build().load(None, dtype=torch.float32, seed=0)
    loaded.model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token).save_pretrained(str(folder))
    return folder


@pytest.fixture
def base(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.txt").write_text("def x = 1 return x + y")
    return save_model(tmp_path / "base")


def config_of(base, reference, tokenizer=None, **train):
    return Config(
        models={"base": ModelConfig(loader=HfModel(uri=str(base))), "ref": ModelConfig(loader=reference)},
        tokenizer=tokenizer,
        datasets={"code": TextFiles(uri=str(base.parent / "code"))},
        data=DataConfig(
            train=TrainDataConfig(**{"max_length": 32, "batch_size": 1} | train), cache_dir=str(base.parent / "tokens")
        ),
        trainer=NeedsReference(),
        run=wmtp.config.schema.RunConfig(output_dir=str(base.parent / "runs")),
    )


def refused(base, reference, **options):
    """The message with which both a run and a dry run refuse a reference."""
    config = config_of(base, HfModel(uri=str(reference)), **options)
    with pytest.raises(WMTPError) as caught:
        dry_run(config)
    with pytest.raises(type(caught.value)):
        open_source(config)
    return str(caught.value)


def test_a_copy_of_the_base_model_is_a_reference(base):
    assert dry_run(config_of(base, HfModel(uri=str(base))))["steps"] == "1 of 1 rows"


def test_settings_of_fp8_that_the_model_excludes_are_refused_by_both(base):
    fp8 = DevicesConfig(precision="fp8", fp8=Fp8Config(emulate=True, first_layers=9))
    config = attrs.evolve(config_of(base, HfModel(uri=str(base))), devices=fp8)
    for read in (open_source, dry_run):
        with pytest.raises(ConfigError, match=r"devices.fp8.first_layers: 9 decoder layers .* this model has"):
            read(config)


def test_maps_to_exclude_that_the_model_lacks_are_refused_by_both(base):
    fp8 = DevicesConfig(precision="fp8", fp8=Fp8Config(emulate=True, min_features=16, exclude=("*.k_proj", "*.k_porj")))
    config = attrs.evolve(config_of(base, HfModel(uri=str(base))), devices=fp8)
    for read in (open_source, dry_run):
        with pytest.raises(
            ConfigError, match=r"devices.fp8.exclude: '\*.k_porj' names no linear map of the layers; did you mean"
        ):
            read(config)


def test_a_reference_with_more_rows_but_the_same_tokens(base, tmp_path):
    padded = save_model(tmp_path / "ref", vocab_size=64)
    open_source(config_of(base, HfModel(uri=str(padded))))


def test_one_token_that_differs_is_named(base, tmp_path):
    other = save_model(tmp_path / "ref", ["</s>", "def", "return", "x", "z", "+", "=", "1"])
    assert "models.ref: its tokenizer differs from the base model's: token 4 is 'z' in place of 'y'" in refused(base, other)


def test_a_larger_vocabulary(base, tmp_path):
    other = save_model(tmp_path / "ref", [*WORDS, "z"])
    assert "models.ref: its tokenizer has 9 tokens, that of the base model 8" in refused(base, other)


def test_another_kind_of_tokenizer_with_as_many_tokens(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.txt").write_text("def x = 1 return x + y")
    many = ["</s>", *(f"w{i}" for i in range(257))]
    base = save_model(tmp_path / "base", many)
    for file in base.glob("tokenizer*"):  # or that one would be missed first
        file.unlink()
    message = refused(base, save_model(tmp_path / "ref", many), tokenizer=Bytes())
    assert "models.ref: its tokenizer" in message


def test_a_tokenizer_that_is_not_the_base_models(base, tmp_path):
    shuffled = save_model(tmp_path / "other", ["</s>", *reversed(WORDS[1:])])
    config = config_of(base, HfModel(uri=str(base)), tokenizer=HfTransformers(uri=str(shuffled)))
    with pytest.raises(
        ConfigError, match=r"tokenizer: it is not .* of 7 ids compared 6 mean .*token 1 is '1' in place of 'def'"
    ):
        open_source(config)
    with pytest.raises(ConfigError, match=r"remove .tokenizer. to use the one beside the model"):
        dry_run(config)


def test_a_tokenizer_that_is_not_the_base_models_and_ends_by_another_token(base, tmp_path):
    other = save_model(tmp_path / "other", ["<end>", *reversed(WORDS[1:])], eos_token="<end>")
    named = HfTransformers(uri=str(other), eos_token="<end>")
    with pytest.raises(ConfigError, match="tokenizer: it is not the base model's"):
        open_source(config_of(base, HfModel(uri=str(base)), tokenizer=named))


def test_a_tokenizer_with_a_reserved_token_renamed(base, tmp_path):
    renamed = save_model(tmp_path / "other", [*WORDS[:-1], "<think>"])
    config = config_of(renamed, HfModel(uri=str(renamed)), tokenizer=HfTransformers(uri=str(renamed)))
    open_source(attrs.evolve(config, models={"base": ModelConfig(loader=HfModel(uri=str(base)))}, trainer=BaselineMTP()))


def test_what_cannot_be_measured_after_the_training_is_said_before_it(base):
    config = attrs.evolve(
        config_of(base, HfModel(uri=str(base))),
        eval=(
            Speculative(max_new_tokens=64),
            InferenceSpeed(prompt_length=40, new_tokens=24),
            InferenceSpeed(prompt_length=41),
        ),
    )
    for look in (dry_run, open_source):
        with pytest.raises(ConfigError) as caught:
            look(config)
        assert [problem.split("; ")[0] for problem in caught.value.problems] == [
            "eval.0: 'speculative' needs extra heads, and this model has none (H = 1)",
            "eval.0: 'speculative' needs positions for 65 tokens, and the model has 64",
            "eval.2: 'inference-speed' needs positions for 105 tokens, and the model has 64",
        ]
    heads = ModelConfig(loader=HfModel(uri=str(base)), heads=HeadsConfig(horizon=2))
    open_source(attrs.evolve(config, models=config.models | {"base": heads}, eval=(Speculative(max_new_tokens=63),)))
    few = (Speculative(max_new_tokens=8, drafts=2), PassAtK(speculative=1), PassAtK(speculative=3))
    with pytest.raises(ConfigError) as caught:
        open_source(attrs.evolve(config, models=config.models | {"base": heads}, eval=few))
    assert [problem.split("; ")[0] for problem in caught.value.problems] == [
        "eval.0: 'speculative' needs 2 extra heads, and this model has 1 (H = 2)",
        "eval.2: 'pass-at-k' needs 3 extra heads, and this model has 1 (H = 2)",
    ]


def test_ids_beyond_the_rows_are_refused_if_a_document_has_one(base, tmp_path):
    (tmp_path / "code/a.txt").write_text("def return x y")
    small = save_model(tmp_path / "ref", vocab_size=5)
    for config in (config_of(base, HfModel(uri=str(small))), config_of(small, HfModel(uri=str(base)))):
        dry_run(config)  # as Gemma 3, whose tokenizer has one id more than the model has rows
    (tmp_path / "code/b.txt").write_text("def x = 1")
    for config, name in (
        (config_of(base, HfModel(uri=str(small))), r"\[models\.ref\]"),
        (config_of(small, HfModel(uri=str(base))), "the model"),
    ):
        with pytest.raises(ConfigError, match=rf"datasets\.code: b\.txt has token 6 \('='\), and {name} has a vocabulary of 5"):
            dry_run(config)


def test_an_end_beyond_the_rows_is_refused(base, tmp_path):
    small = save_model(tmp_path / "ref", vocab_size=5, eos_token="1")
    with pytest.raises(ConfigError, match=r"models\.base: .* ends a text with token 7 \('1'\), which would be outside"):
        open_source(config_of(small, HfModel(uri=str(small))))


def test_a_models_own_tokenizer_may_have_far_fewer_ids_than_it_has_rows(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.txt").write_text("def x")
    base = save_model(tmp_path / "base", vocab_size=2000)  # gpt-oss has 1,069 rows more
    open_source(config_of(base, HfModel(uri=str(base))))
    copied = save_model(tmp_path / "copied")
    other = config_of(base, HfModel(uri=str(base)), tokenizer=HfTransformers(uri=str(copied)))
    with pytest.raises(ConfigError, match="only 8: it is not this model's tokenizer"):
        open_source(other)


def test_one_key_changes_just_that_of_the_models_own_tokenizer(base):
    config = config_of(base, HfModel(uri=str(base)), tokenizer=OwnTokenizer(eos_token="1"))
    assert open_source(config).tokenizer.eos_id == 7


def test_too_few_positions(base, tmp_path):
    short = save_model(tmp_path / "ref", max_positions=16)
    message = refused(base, short)
    assert "data.train.max_length: 32, but [models.ref] has positions for 16 tokens; write at most 16" in message


def test_no_tokenizer_beside_it(base, tmp_path):
    bare = save_model(tmp_path / "ref")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    message = refused(base, bare)
    assert message.startswith("models.ref: its vocabulary must be the base model's, and cannot be read: ")
    assert "put the files of its tokenizer beside the model" in message
    # the base's vocabulary is the base's
    open_source(config_of(bare, HfModel(uri=str(bare)), tokenizer=HfTransformers(uri=str(base))))


def test_a_tokenizer_that_names_no_end_token_has_the_configs(base):
    named = HfTransformers(eos_token=WORDS[0])
    without = save_model(base.parent / "ref", eos_token=None)
    assert "models.ref: its vocabulary must be the base model's" in refused(base, without)
    open_source(config_of(base, HfModel(uri=str(without)), tokenizer=named))
    open_source(config_of(without, HfModel(uri=str(without)), tokenizer=named))


def test_a_model_that_gives_nan_is_named(base, tmp_path):
    damaged = save_model(tmp_path / "ref")
    state = load_file(damaged / "model.safetensors")
    state["model.norm.weight"].fill_(torch.nan)
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    config = config_of(base, HfModel(uri=str(damaged)))
    with pytest.raises(
        ConfigError, match=r"^models\.ref: LlamaForCausalLM cannot get .*: its logits are NaN: its file is damaged"
    ):
        load_extra_model(config, Place.of(config), torch.device("cpu"))("ref")


def test_no_weights(base, tmp_path):
    empty = save_model(tmp_path / "ref")
    (empty / "model.safetensors").unlink()
    assert str(empty) in refused(base, empty)


def test_a_tokenizer_of_another_package(tmp_path):
    """It is named by the config, so it can be opened beside the reference too."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.txt").write_text("def x")
    many = ["</s>", *(f"w{i}" for i in range(257))]
    base = save_model(tmp_path / "base", many)
    reference = save_model(tmp_path / "ref", many)
    for folder in (base, reference):
        Words().build(None).save(folder)
    open_source(config_of(base, HfModel(uri=str(reference)), tokenizer=Words()))
    with pytest.raises(ConfigError, match="its tokenizer is a 'words', which only the config that names it can open"):
        open_source(config_of(base, HfModel(uri=str(reference)), tokenizer=Bytes()))


def test_a_model_for_a_trainer_is_frozen_and_has_head_1_alone(base):
    config = config_of(base, HfModel(uri=str(base)))
    load = load_extra_model(config, Place.of(config), torch.device("cpu"))
    model = load("ref")
    assert model.horizon == 1
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load("ref", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert next(load("ref", device=torch.device("meta")).parameters()).is_meta
    with pytest.raises(ConfigError, match=r"models\.rm: the trainer needs this model; add the table \[models\.rm\]"):
        load("rm")


def test_a_base_in_bf16_is_mapped_and_fp32_decides_where_few_bits_fail(base, monkeypatch):
    import wmtp.models.build as build

    state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = config_of(base, HfModel(uri=str(base)))
    source = open_source(config)
    mapped = load_base_model(config, source)
    assert {parameter.dtype for parameter in mapped.base.parameters()} == {torch.bfloat16}
    assert mapped.stored["base.lm_head.weight"] == "lm_head.weight"

    real = build.build_model

    def in_fp32_alone(loaded, *args, **kwargs):
        if loaded.model.dtype == torch.bfloat16:
            raise ConfigError("models.base: a trial failed")
        return real(loaded, *args, **kwargs)

    monkeypatch.setattr(build, "build_model", in_fp32_alone)
    whole = load_base_model(config, source)
    assert not whole.stored
    for name, parameter in whole.base.named_parameters():
        assert torch.equal(parameter, state[name].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("in_bin", [False, True])
def test_a_base_in_few_bits_is_mapped_with_an_adapter_on_it_too(base, dtype, adapted, in_bin):
    if adapted:
        pytest.importorskip("peft")
    state = {name: tensor.to(dtype) for name, tensor in load_file(base / "model.safetensors").items()}
    if in_bin:
        (base / "model.safetensors").unlink()
        torch.save(state, base / "pytorch_model.bin")
    else:
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    lora = LoraConfig(rank=2) if adapted else None
    config = config_of(base, HfModel(uri=str(base)))
    config = attrs.evolve(config, models={**config.models, "base": attrs.evolve(config.models["base"], lora=lora)})
    model = load_base_model(config, open_source(config))
    parameters = dict(model.named_parameters())
    assert model.stored.keys() <= parameters.keys()
    assert len(model.stored) == len(state)
    for name, own in model.stored.items():
        assert parameters[name].dtype == dtype
        assert torch.equal(parameters[name], state[own])
    others = {name: parameter for name, parameter in parameters.items() if name not in model.stored}
    assert any("lora_A" in name for name in others) == adapted
    assert {parameter.dtype for parameter in others.values()} <= {torch.float32}
    for name, tensor in open_tensors(base, model.stored).items():
        assert torch.equal(tensor, parameters[name])


def test_a_bin_file_from_before_it_could_be_mapped_is_read_by_rank_0_alone(base):
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    config = config_of(base, HfModel(uri=str(base)))
    model = load_base_model(config, open_source(config))
    assert not model.stored
    assert torch.equal(dict(model.named_parameters())["base.lm_head.weight"], state["lm_head.weight"])


def test_an_adapter_that_learns_on_is_put_on_a_mapped_base_and_a_merged_one_on_its_own_copy(base, tmp_path):
    pytest.importorskip("peft")
    state = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = config_of(base, HfModel(uri=str(base)))
    lora = LoraConfig(rank=2)
    config = attrs.evolve(config, models={**config.models, "base": attrs.evolve(config.models["base"], lora=lora)})
    model = load_base_model(config, open_source(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-4)  # too little for bf16 beside most weights
    model.save_pretrained(tmp_path / "adapter")
    for file in base.glob("*token*"):
        shutil.copy(file, tmp_path / "adapter")
    learned = attrs.evolve(config.models["base"], loader=HfModel(uri=str(tmp_path / "adapter"), base_uri=str(base)))
    on = attrs.evolve(config, models={**config.models, "base": learned})
    again = load_base_model(on, open_source(on))
    assert again.stored == model.stored
    assert again.stored
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
    merged = attrs.evolve(config, models={**config.models, "base": attrs.evolve(learned, lora=None)})
    whole = load_base_model(merged, open_source(merged))
    assert not whole.stored
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


def test_a_reference_that_lets_documents_see_each_other(base, tmp_path):
    """Packed rows need a model that keeps documents apart: Bloom counts its positions along the row."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    folder = tmp_path / "ref"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(folder)
    for packing in (True, False):
        config = config_of(base, HfModel(uri=str(folder)), packing=packing)
        load = load_extra_model(config, Place.of(config), torch.device("cpu"))
        if not packing:
            load("ref")
            continue
        with pytest.raises(ConfigError, match=r"data\.train\.packing: \[models\.ref\]: .*; set data\.train\.packing = false"):
            load("ref")
