"""Layer tables: the sizes that are published, shapes, selections, and everything that visitors may bring."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lab import architectures, budget, layer_tables
from lab.errors import LabError
from lab.methods import METHODS
from lab.targets import role_of

PARAMETERS = {
    "sdxl-unet": 2_567_463_684,
    "sdxl-te1": 123_060_480,
    "sdxl-te2": 694_659_840,
    "sd15-unet": 859_520_964,
    "ssd-1b": 1_331_334_404,
    "flux1-dev": 11_901_408_320,
    "clip-vit-b16": 149_620_737,
    "clip-vit-b32": 151_277_313,
    "clip-vit-l14": 427_616_513,
    "openclip-bigg14": 2_539_567_105,
    "vit-b16": 86_567_656,
    "vit-l16": 304_326_632,
    "dinov2-base": 86_580_480,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
}


def test_every_published_size() -> None:
    assert {id: architectures.load(id).parameters for id in PARAMETERS} == PARAMETERS


def test_every_id_is_listed_with_a_name_and_says_what_a_sample_keeps() -> None:
    assert set(architectures.ids()) >= {*PARAMETERS, "tiny-sdxl", "tiny-clip"}
    assert list(architectures.names()) == architectures.ids()
    for id in architectures.ids():
        arch = architectures.load(id)
        assert arch.memory, f"run assets/architectures/make.py {id}"
        assert all(row.tokens > 0 for row in arch.rows if row.layer.role != "conv"), id


@pytest.mark.parametrize(
    ("id", "k", "layers"),
    [
        ("llama3-8b", (1024, 4096), 32),
        ("mistral-7b", (1024, 4096), 32),
        ("llama2-70b", (1024, 8192), 80),
        ("qwen2.5-7b", (512, 3584), 28),
        ("llama-7b", (4096, 4096), 32),
    ],
)
def test_grouped_queries(id: str, k: tuple[int, int], layers: int) -> None:
    rows = architectures.load(id).select("k")
    assert [(row.layer.out, row.layer.in_) for row in rows] == [k] * layers


def test_sdxl_unet_has_the_layers_it_is_known_for() -> None:
    arch = architectures.load("sdxl-unet")
    attention = arch.select("attn")
    assert len(attention) == 560  # 70 blocks, two attentions of four layers
    assert {(r.layer.out, r.layer.in_) for r in attention} == {(640, 640), (640, 2048), (1280, 1280), (1280, 2048)}
    up = [r.layer for r in arch.select("up")]
    assert {(x.out, x.in_) for x in up} == {(5120, 640), (10240, 1280)}  # GEGLU: twice four times the width
    conv = arch.select("conv")[0].layer
    assert (conv.name, conv.m, conv.n) == ("conv_in", 320, 36)
    assert arch.companions == ("sdxl-te1", "sdxl-te2")


def test_fused_layers_are_whole_for_all_three_and_split_for_some() -> None:
    gpt2 = architectures.load("gpt2-medium")
    assert {(r.layer.out, r.layer.in_) for r in gpt2.select("q,v")} == {(1024, 1024)}
    assert len(gpt2.select("q,v")) == 48
    assert gpt2.fused("q,v") == "split"
    assert {(r.layer.out, r.layer.in_) for r in gpt2.select("q,k,v")} == {(3072, 1024)}
    assert len(gpt2.select("attn")) == 48
    assert gpt2.fused("attn") == "whole"
    assert gpt2.fused("mlp") == ""


def test_blocks_and_towers() -> None:
    clip = architectures.load("clip-vit-b16")
    assert clip.parts == ["text", "vision"]
    assert {r.layer.in_ for r in clip.select("q", part="text")} == {512}
    assert len(clip.select("q", blocks=(0, 2))) == 6
    unet = architectures.load("sdxl-unet")
    middle = unet.select("attn", blocks=(3, 3))
    assert all(r.layer.name.startswith("mid_block") for r in middle)
    with pytest.raises(LabError, match="no layer called gate"):
        unet.select("gate")
    with pytest.raises(LabError, match="has blocks 0 to 6, got 40 to 50"):
        unet.select("attn", blocks=(40, 50))
    with pytest.raises(LabError, match="no tower called 'visual': it has text and vision"):
        clip.select("q", part="visual")


@pytest.mark.parametrize(
    ("id", "path"),
    [
        ("tiny-sdxl", "tiny-sdxl/unet/config.json"),
        ("tiny-sdxl-te1", "tiny-sdxl/text_encoder/config.json"),
        ("tiny-sdxl-te2", "tiny-sdxl/text_encoder_2/config.json"),
        ("tiny-clip", "tiny-clip/open_clip_config.json"),
    ],
)
def test_embedded_tables_are_of_the_embedded_bases(id: str, path: str) -> None:
    config = json.loads((architectures.FOLDER.parent / path).read_text())
    model = layer_tables.build(config)
    arch, hint = architectures.load(id), f"run assets/architectures/make.py {id}"
    assert arch.parameters == layer_tables.parameters(model), hint
    shapes = [(row["name"], row["out"], row["in"]) for row in layer_tables.rows(model)]
    assert [(r.layer.name, r.layer.out, r.layer.in_) for r in arch.rows] == shapes, hint


def test_unknown_architecture_offers_the_nearest() -> None:
    with pytest.raises(LabError, match="did you mean sdxl-unet"):
        architectures.load("sdxl-unett")
    with pytest.raises(LabError, match="Unknown architecture"):
        architectures.load("../../etc/passwd")


# -- tables of shapes ------------------------------------------------------------------------------------
def test_pasted_table() -> None:
    arch = architectures.from_table("name out in\nq 4096 4096 times 32\nv, 1024, 4096 x 32\nconv 320 4 3 3\n# none\n")
    assert len(arch.rows) == 65
    assert arch.targets == ["q", "v", "conv"]
    assert arch.parameters == 32 * 4096 * 4096 + 32 * 1024 * 4096 + 320 * 36
    assert arch.blocks == 32


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("q 4096", "Line 1 of the table cannot be read"),
        ("q 4096 4096\nwhat is this", "Line 2 of the table cannot be read"),
        ("thing 4 4", "cannot tell what 'thing' is"),
        ("q 0 4096", "outside 1 to"),
        ("q 99999999999 4096", "outside 1 to"),
        ("q 4 4 times 999999999", "outside 1 to"),
        ("q 4 4 times 20000\nk 4 4", "more than 20,000 layers"),
        ("q 4 4\n" * 300_000, "larger than 1 MB"),
    ],
)
def test_bad_tables_say_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(LabError, match=said) as raised:
        architectures.from_table(text)
    assert "\n" not in str(raised.value)


# -- configurations --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{not json", "is not JSON"),
        (b'"a string"', "names no model"),
        (b"[]", "names no model"),
        (b"{}", "names no model"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b" " * 50_000_000, "has 50.0 MB"),
        (b"[" * 1000 + b"]" * 1000, "nested more than 32 deep"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested more than 32 deep"),
        (b'{"model_type": "llama", "num_hidden_layers": 100000}', "num_hidden_layers is 100000"),
        (b'{"model_type": "llama", "hidden_size": 1e300}', "hidden_size is"),
        (b'{"model_type": "llama", "vocab_size": -5}', "vocab_size is -5"),
    ],
)
def test_bad_configurations_are_refused_before_anything_is_built(text: bytes, said: str) -> None:
    with pytest.raises(LabError, match=said) as raised:
        architectures.check_config(text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 240


def test_brackets_inside_strings_are_no_depth() -> None:
    config = {"model_type": "bert", "note": "[" * 500 + '\\"{'}
    assert architectures.check_config(json.dumps(config)) == config


def test_a_configuration_becomes_a_table_without_code_or_weights() -> None:
    config = {
        "model_type": "bert",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "auto_map": {"AutoModel": "somebody/code--modeling.Model"},
    }
    arch = architectures.from_config(json.dumps(config), "mine")
    assert (arch.name, arch.blocks, len(arch.rows)) == ("mine", 3, 18)
    assert {(r.layer.out, r.layer.in_) for r in arch.select("up")} == {(96, 64)}


def test_lora_counts_that_others_have_printed() -> None:
    """Trainable parameters as PEFT's and diffusers' examples, QLoRA, CLIP-LoRA and the LoRA paper report them."""
    lora = METHODS["lora"]
    for id, targets, r, printed in (
        ("llama-7b", "q,v", 8, 4_194_304),
        ("llama2-7b", "all", 64, 159_907_840),
        ("llama2-13b", "all", 64, 250_347_520),
        ("llama2-70b", "all", 64, 828_375_040),
        ("llama3-8b", "all", 16, 41_943_040),
        ("mistral-7b", "all", 16, 41_943_040),
        ("qwen2.5-7b", "all", 16, 40_370_176),
        ("gpt2", "q,k,v", 8, 294_912),
        ("roberta-base", "q,v", 8, 294_912),
        ("roberta-large", "q,v", 8, 786_432),
        ("clip-vit-b16", "q,k,v", 2, 184_320),
        ("sd15-unet", "attn", 4, 797_184),
        ("sdxl-unet", "attn", 4, 5_806_080),
    ):
        layers = architectures.shapes(architectures.load(id).select(targets))
        assert budget.count(lora, layers, lora.knobs.parse({"r": r})) == printed, id


@pytest.mark.parametrize("id", architectures.ids())
def test_target_names_are_the_same_everywhere(id: str) -> None:
    arch = architectures.load(id)
    single = {name: len(arch.select(name)) for name in arch.targets}
    assert {"q", "k", "v", "out", "up", "down"} <= set(single)
    assert ("gate" in single) == id.startswith(("llama", "mistral", "qwen"))
    fused = arch.fused("q,k,v") == "whole"
    assert len(arch.select("attn")) == single["out"] + (
        single["q"] if fused else single["q"] + single["k"] + single["v"]
    )
    assert len(arch.select("mlp")) == single["up"] + single["down"] + single.get("gate", 0)
    assert len(arch.select("all")) == len(arch.select("attn")) + len(arch.select("mlp"))


def test_fused_layers_that_are_no_three_squares_are_not_split() -> None:
    arch = architectures.from_table("attn.qkv_proj 5120 4096 times 2")
    assert len(arch.select("q,k,v")) == 2
    with pytest.raises(LabError, match="choose q, k and v together"):
        arch.select("q")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("single_transformer_blocks.3.proj_out", "down"),
        ("transformer_blocks.3.ff.net.2", "down"),
        ("proj_out", ""),
        ("decoder.block.1.layer.1.EncDecAttention.k", "k"),
        ("encoder.layer.2.attention.attn.o", "out"),
        ("h.1.self_attention.query_key_value", "qkv"),
        ("layers.0.attention.dense", "out"),
        ("encoder.layer.0.attention.output.dense", "out"),
        ("encoder.layer.0.output.dense", "down"),
        ("model.decoder.layers.4.fc1", "up"),
        ("transformer_blocks.7.txt_mlp.net.2", "down"),
        ("pooler.dense", ""),
        ("lm_head", ""),
    ],
)
def test_roles_of_the_libraries_names(name: str, role: str) -> None:
    assert role_of(name) == role


def test_a_configuration_cannot_make_its_library_fetch_anything() -> None:
    config = {
        "model_type": "dpt",
        "is_hybrid": False,
        "use_pretrained_backbone": True,
        "backbone": "facebook/dinov2-base",
    }
    with pytest.raises(LabError, match="asks for other files to be fetched"):
        architectures.from_config(json.dumps(config))
    foreign = {"auto_map": {"AutoModel": "x--y.Z"}, "trust_remote_code": True, "inner": [{"_name_or_path": "/etc"}]}
    assert layer_tables.plain({**foreign, "use_pretrained_backbone": True}) == {
        "inner": [{}],
        "use_pretrained_backbone": False,
    }


def test_the_child_process_refuses_connections() -> None:
    code = (
        "import socket, sys; from lab.architecture_child import _alone; sys.addaudithook(_alone);"
        "socket.create_connection(('127.0.0.1', 9), 2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "a configuration alone is read here" in done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "model-of-tomorrow", "auto_map": {"AutoModel": "x--y.Z"}},
            "knows no model type 'model-of-tomorrow'",
        ),
        ({"_class_name": "DiffusionPipeline"}, "is not a model that diffusers"),
        ({"_class_name": "__import__"}, "is not a model that diffusers"),
        ({"model_type": "bert", "hidden_size": 99}, "No model could be built from this"),
    ],
)
def test_models_that_nobody_knows(config: dict, said: str) -> None:
    with pytest.raises(LabError, match=said) as raised:
        layer_tables.build(config)
    assert "\n" not in str(raised.value)


def test_a_name_on_the_hub_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    with pytest.raises(LabError, match="The Hub did not answer for openai-community/gpt2"):
        architectures.from_hub("https://huggingface.co/openai-community/gpt2")
    assert [url.rsplit("/", 1)[-1] for url in asked] == ["config.json"]
    for name in ("gpt2 ; rm", "../x/y", "a/b/c", "", "x" * 300):
        with pytest.raises(LabError, match="is no model's name"):
            architectures.from_hub(name)


def test_a_configuration_from_the_hub_is_the_only_file_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    import types

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    fetched: list[str] = []
    path = tmp_path / "config.json"
    path.write_text('{"_class_name": "nothing"}')

    def metadata(url: str, **_: object) -> types.SimpleNamespace:
        if not url.endswith("/unet/config.json"):
            raise EntryNotFoundError(url)
        return types.SimpleNamespace(size=path.stat().st_size)

    def download(repo: str, file: str, **_: object) -> str:
        fetched.append(f"{repo}/{file}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(architectures, "from_config", lambda text, name: (text, name))
    assert architectures.from_hub("owner/pipeline") == (path.read_bytes(), "owner/pipeline")
    assert fetched == ["owner/pipeline/unet/config.json"]


def test_what_a_command_line_names(tmp_path) -> None:
    table = tmp_path / "shapes.txt"
    table.write_text("q 8 4 times 2\n")
    assert len(architectures.resolve(str(table)).rows) == 2
    assert architectures.resolve("gpt2").id == "gpt2"
    big = tmp_path / "config.json"
    big.write_bytes(b" " * 1_500_000)
    with pytest.raises(LabError, match=r"1\.5 MB"):
        architectures.resolve(str(big))
