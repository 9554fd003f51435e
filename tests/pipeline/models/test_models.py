"""Models by name, by file and as objects; the errors a user can make."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from foundation.errors import ModelError, WeightsError
from pipeline import models
from pipeline.models import from_transformers, network

SIZE = (3, 32, 32)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = weights_of(a), weights_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(
    "spec",
    [
        "resnet18",
        "mobilenet_v2",
        "googlenet",
        "vit_b_16",
        "timm:resnet18",
        "timm:vit_tiny_patch16_224",
        "hf:resnet",
    ],
)
def test_a_name_builds_a_classifier_for_the_given_size_and_classes(spec):
    source = models.load(spec, num_classes=10, input_size=SIZE)
    model = source.build()
    assert not model.training
    assert models.check(model, models.example(source, 3), 10).shape == (3, 10)


def test_inception_has_one_output_and_builds_without_a_warning(recwarn):
    source = models.load("inception_v3", num_classes=4, input_size=(3, 96, 96))
    model = source.build().train()
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]
    assert isinstance(model(torch.randn(2, 3, 96, 96)), torch.Tensor)


@pytest.mark.parametrize(("spec", "shape"), [("lraspp_mobilenet_v3_large", (2, 5, 32, 32)), ("r3d_18", (2, 5))])
def test_segmentation_and_video_names_build_without_a_download(spec, shape):
    source = models.load(spec, num_classes=5, input_size=SIZE)
    assert models.check(source.build(), models.example(source)).shape == shape


def test_without_a_class_count_the_library_decides():
    assert models.check(models.load("resnet18").build(), models.example((3, 32, 32))).shape == (2, 1000)


def test_transformers_text_models_take_tokens_and_return_logits(tmp_path):
    transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).save_pretrained(tmp_path)
    for spec in (f"hf:{tmp_path}", f"hf:{tmp_path / 'config.json'}"):
        source = models.load(spec, num_classes=7)
        ids, mask = models.example(source, 3)
        assert ids.dtype == torch.int64
        assert ids.max() < 50
        assert models.check(source.build(), (ids, mask), 7).shape == (3, 7)


def test_encoder_decoders_are_fed_both_sentences(tmp_path):
    transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    ).save_pretrained(tmp_path)
    source = models.load(f"hf:{tmp_path}")
    assert [one.name for one in source.inputs] == ["input_ids", "attention_mask", "decoder_input_ids"]
    inputs = models.example(source, 2)
    changed = (*inputs[:2], (inputs[2] + 1) % 50)
    model = source.build()
    with torch.no_grad():
        assert not torch.equal(model(*inputs)[0], model(*changed)[0])


def test_sentences_of_an_encoder_decoder_hold_the_token_that_ends_them_once(tmp_path):
    transformers.BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=7,
        architectures=["BartForSequenceClassification"],
    ).save_pretrained(tmp_path)  # fmt: skip
    source = models.load(f"hf:{tmp_path}", num_classes=3)
    ids, *others = models.example(source, 40)
    assert bool((ids[:, -1] == 7).all()) and int((ids == 7).sum()) == 40
    assert set(ids.flatten().tolist()) == set(range(50))
    assert source.ranges["input_ids"] == (0, 50, 7)
    with torch.no_grad():  # it looks for that token, and fails where sentences hold different numbers of it
        assert models.check(source.build(), (ids, *others), 3).shape == (40, 3)


def test_a_chat_model_with_several_tokens_that_end_a_sentence_is_read(tmp_path):
    transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=[7, 8, 9], architectures=["LlamaForSequenceClassification"],
    ).save_pretrained(tmp_path)  # fmt: skip
    source = models.load(f"hf:{tmp_path}", num_classes=3)
    assert models.check(source.build(), models.example(source, 4), 3).shape == (4, 3)


def test_mixtures_of_experts_are_plain_operators(tmp_path):
    transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    ).save_pretrained(tmp_path)  # fmt: skip
    source = models.load(f"hf:{tmp_path}")
    program = torch.export.export(source.build(), models.example(source, 2))
    called = {str(n.target).partition(".")[0] for n in program.graph.nodes if n.op == "call_function"}
    assert "transformers" not in called
    assert "aten" in called


def test_models_of_two_kinds_of_input_are_fed_both(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
        architectures=["CLIPModel"],
    ).save_pretrained(tmp_path)
    source = models.load(f"hf:{tmp_path}", input_size=(3, 16, 16))
    assert {one.name: one.shape for one in source.inputs} == {
        "input_ids": (16,), "attention_mask": (16,), "pixel_values": (3, 16, 16)
    }  # fmt: skip
    with torch.no_grad():
        outputs = source.build()(*models.example(source, 2))
    assert {tuple(y.shape) for y in outputs.values()} >= {(2, 2), (2, 8)}


def test_clips_bring_their_own_length():
    assert models.load("r3d_18", input_size=(3, 4, 32, 32)).inputs[0].shape == (3, 4, 32, 32)
    with pytest.raises(ModelError, match="takes images, not input of shape"):
        models.load("resnet18", input_size=(3, 4, 32, 32))


def test_sentences_and_spectrograms_of_a_given_length(tmp_path):
    transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_source_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, architectures=["WhisperModel"],
    ).save_pretrained(tmp_path / "sound")  # fmt: skip
    source = models.load(f"hf:{tmp_path / 'sound'}", input_size=(80, 40))
    assert source.inputs[0].shape == (80, 40)
    models.check(source.build(), models.example(source, 2))
    transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    ).save_pretrained(tmp_path / "text")  # fmt: skip
    source = models.load(f"hf:{tmp_path / 'text'}", input_size=(9,))
    assert [one.shape for one in source.inputs] == [(9,), (9,)]
    models.check(source.build(), models.example(source, 2))


def test_a_transformers_config_that_wants_its_own_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}')
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ModelError, match="never run"):
        models.load(f"hf:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_a_transformers_class_that_does_not_exist_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForNothing"]}')
    with pytest.raises(ModelError, match="BertForNothing"):
        models.load(f"hf:{tmp_path}")


def test_builds_are_equal_by_seed_and_leave_the_global_generators_alone():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    source = models.load("resnet18", num_classes=10, seed=5)
    first, second = source.build(), source.build()
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert same(first, second)
    assert not same(first, models.load("resnet18", num_classes=10, seed=6).build())


def test_the_fingerprint_follows_every_argument_and_nothing_else():
    base = models.load("resnet18", num_classes=10, input_size=SIZE)
    assert base.initial
    assert base.fingerprint == models.load("resnet18", num_classes=10, input_size=SIZE).fingerprint
    others = [
        models.load("resnet34", num_classes=10, input_size=SIZE),
        models.load("resnet18", num_classes=11, input_size=SIZE),
        models.load("resnet18", num_classes=10, input_size=(3, 64, 64)),
        models.load("resnet18", num_classes=10, input_size=SIZE, seed=1),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5


OWN = """
import torch
from torch import nn
from blocks import Block

class Net(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.block = Block()
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.block(x))

def make():
    return Net(num_classes=6)

def wrong():
    return "net"

def broken():
    raise RuntimeError("no luck")
"""
BLOCKS = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(OWN)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    monkeypatch.delitem(sys.modules, "blocks", raising=False)
    return tmp_path / "net.py"


def test_a_file_gives_a_class_or_a_function_and_imports_its_neighbours(own):
    path_before = list(sys.path)
    by_class = models.load(f"{own}:Net", num_classes=10, input_size=(3, 8, 8))
    assert models.check(by_class.build(), models.example(by_class), 10).shape == (2, 10)
    by_function = models.load(f"{own}:make", num_classes=10, input_size=(3, 8, 8))
    assert models.check(by_function.build(), models.example(by_function)).shape == (2, 6)
    assert sys.path == path_before


def test_an_edit_to_the_file_or_to_a_class_beside_it_changes_the_fingerprint(own, monkeypatch):
    before = models.load(f"{own}:make").fingerprint
    assert models.load(f"{own}:make").fingerprint == before
    own.write_text(OWN + "\n# a comment\n")
    edited = models.load(f"{own}:make").fingerprint
    assert edited != before
    monkeypatch.delitem(sys.modules, "blocks")
    (own.parent / "blocks.py").write_text(BLOCKS.replace("mean((2, 3))", "amax((2, 3))"))
    assert models.load(f"{own}:make").fingerprint != edited


def test_a_module_on_the_path_gives_a_model(own, monkeypatch):
    monkeypatch.syspath_prepend(str(own.parent))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    source = models.load("net:Net", num_classes=4, input_size=(3, 8, 8))
    assert models.check(source.build(), models.example(source), 4).shape == (2, 4)
    monkeypatch.delitem(sys.modules, "net")


def test_an_object_is_copied_and_its_weights_are_part_of_the_fingerprint():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    source = models.load(net, input_size=(3, 2, 2))
    built = source.build()
    assert built is not net
    assert not source.initial
    assert same(built, net)
    with torch.no_grad():
        net[1].weight.add_(1)
    assert not same(source.build(), net)
    assert models.load(net, input_size=(3, 2, 2)).fingerprint != source.fingerprint


def test_a_callable_is_called_with_what_it_takes():
    def make(num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

    source = models.load(make, num_classes=9, input_size=(3, 2, 2))
    assert models.check(source.build(), models.example(source), 9).shape == (2, 9)
    plain = models.load(lambda: nn.Linear(2, 2), num_classes=9)
    assert same(plain.build(), plain.build())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resnet5", "Did you mean resnet50"),
        ("resnet10t", "timm:resnet10t"),
        ("timm:resnet1", "Did you mean resnet18"),
        ("hf:bertt", "Did you mean bert"),
        ("hf:./nowhere", "no such folder"),
        ("", "No model was named"),
        ("best.pt", "is a checkpoint"),
        ("net.py", "net.py:CALLABLE"),
        ("nowhere.py:make", "no such file"),
        ("nowhere.models:make", "'nowhere'"),
        ("{own}:mak", "Did you mean make"),
        ("{own}:wrong", "not a torch.nn.Module"),
        ("{own}:broken", r"RuntimeError: no luck \(net.py, line 22\)"),
    ],
)
def test_a_wrong_spec_is_one_line_with_what_to_do(spec, says, own):
    with pytest.raises(ModelError, match=says) as caught:
        models.load(spec.replace("{own}", str(own)))
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_file_with_a_syntax_error_names_the_place(own):
    own.write_text("def make(:\n")
    with pytest.raises(ModelError, match=r"SyntaxError"):
        models.load(f"{own}:make")


def test_something_that_is_no_model_at_all_is_refused():
    with pytest.raises(ModelError, match="int is not a model"):
        models.load(3)


def test_a_size_that_the_model_does_not_take_is_named():
    source = models.load("alexnet", num_classes=10, input_size=SIZE)
    with pytest.raises(ModelError, match="does not take input of shape 2x3x32x32"):
        models.check(source.build(), models.example(source), 10, "alexnet")


@pytest.mark.parametrize(
    ("spec", "size"), [("vit_b_16", (3, 32, 48)), ("maxvit_t", SIZE), ("timm:vit_tiny_patch16_224", (3, 8, 8))]
)
def test_a_size_that_the_library_refuses_is_a_model_error(spec, size):
    with pytest.raises(ModelError):
        models.check((source := models.load(spec, input_size=size)).build(), models.example(source))


def test_fewer_outputs_than_classes_is_an_error_and_more_are_not():
    net, image = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), models.example((3, 2, 2))
    with pytest.raises(ModelError, match="2x5 but the data has 6 classes"):
        models.check(net, image, 6)
    assert models.check(net, image, 4).shape == (2, 5)


def test_check_leaves_the_training_mode_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).train()
    models.check(net, models.example((3, 2, 2)))
    assert net.training


def test_examples_are_seeded():
    assert torch.equal(models.example(SIZE, 4, seed=1)[0], models.example(SIZE, 4, seed=1)[0])
    assert not torch.equal(models.example(SIZE, 4, seed=1)[0], models.example(SIZE, 4, seed=2)[0])


def test_pretrained_weights_without_a_network_say_so(monkeypatch):
    monkeypatch.setattr(from_transformers, "reachable", lambda host: False)
    with pytest.raises(ModelError, match="Without a network"):
        models.load("hf:owner/name")


def test_pretrained_weights_of_a_transformers_folder_are_read(tmp_path):
    config = transformers.ViTConfig(
        image_size=32, patch_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    saved = transformers.ViTForImageClassification(config)
    saved.save_pretrained(tmp_path)
    found = models.load(f"hf:{tmp_path}", input_size=SIZE).pretrained()
    assert found.fresh == ()
    assert torch.equal(found.state["net.classifier.weight"], saved.classifier.weight)
    other_head = models.load(f"hf:{tmp_path}", num_classes=9, input_size=SIZE).pretrained()
    assert other_head.fresh == ("net.classifier.bias", "net.classifier.weight")
    key = "net.vit.embeddings.cls_token"
    assert torch.equal(other_head.state[key], found.state[key])


def test_a_config_alone_and_own_code_have_no_pretrained_weights():
    with pytest.raises(WeightsError, match="brings no weights"):
        models.load("hf:resnet").pretrained()
    with pytest.raises(WeightsError, match="no pretrained weights"):
        models.load(nn.Linear(2, 2)).pretrained()


def test_a_host_is_taken_for_reachable_behind_a_proxy(monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not network.reachable("no-such-host.invalid")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert network.reachable("no-such-host.invalid")


def test_timm_and_transformers_import_beside_a_torchvision_built_for_another_torch():
    script = "import pipeline.models.find, timm, transformers, torchvision; print(torchvision.ops.nms.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "nms"
    assert done.stderr == ""
