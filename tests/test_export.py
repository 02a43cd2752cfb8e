"""Exported files make the same pictures in a plain diffusers pipeline as the adapter they came from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lab import export as exporting
from lab import targets
from lab.bases import BASES
from lab.errors import LabError
from lab.export import export, factorise
from lab.methods import METHODS, adapters

PROMPT = "a fox in the snow"
ROLES = "attn,conv"


pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


@pytest.fixture(scope="module")
def pipe():
    return BASES["tiny-sdxl"].load("cpu", torch.float32)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    """method id → (folder of a shaken adapter, the picture it makes)."""
    made = {}

    def make(method_id, knobs=None, roles=ROLES):
        name = f"{method_id}-{knobs}-{roles}"
        if name not in made:
            method = METHODS[method_id]
            names = targets.modules(pipe.unet, roles)[::9]
            model = method.attach(pipe.unet, method.knobs.parse(knobs or {}), names, seed=3)
            noise = torch.Generator().manual_seed(1)
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(torch.randn(p.shape, generator=noise) * (1.0 if p.dim() == 1 else 0.1))
            for config in model.peft_config.values():
                config.base_model_name_or_path = "tiny-sdxl"
            run = tmp_path_factory.mktemp(method_id)
            (run / "meta.json").write_text(json.dumps({"spec": {"trigger": "sks", "class_word": "fox"}}))
            model.save_pretrained(run / "adapter", save_embedding_layers=False)
            picture = draw(pipe)
            model.unload()
            made[name] = (run / "adapter", picture)
        return made[name]

    return make


@torch.no_grad()
def draw(pipe):
    size = BASES["tiny-sdxl"].resolution
    made = pipe(
        PROMPT,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return made.images[0]


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize(("method", "roles"), [("lora", ROLES), ("nora", ROLES), ("nola", "attn"), ("pissa", "attn")])
def test_a_plain_pipeline_draws_the_same(pipe, saved, tmp_path, method, roles, to):
    folder, wanted = saved(method, roles=roles)
    result = export(folder, to, tmp_path)
    assert result["relative_error"] < 1e-6
    plain = draw(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=result["files"][0].rpartition("/")[2])
    try:
        again = draw(pipe)
    finally:
        pipe.unload_lora_weights()
    assert (wanted - plain).abs().max() > 4 / 255, "the adapter changes nothing to compare"
    assert (wanted - again).abs().max() <= 1 / 255
    assert torch.equal(draw(pipe), plain)


@pytest.fixture(scope="module")
def with_text(pipe, tmp_path_factory):
    """method id → (folder of a shaken adapter on the UNet and both text encoders, the picture it makes)."""
    from lab.networks import network

    made = {}

    def make(method_id):
        if method_id not in made:
            method, whole = METHODS[method_id], network(pipe, text_encoders=True)
            names = targets.modules(whole, "attn")[::5]
            model = method.attach(whole, method.knobs.parse({}), names, seed=3)
            noise = torch.Generator().manual_seed(1)
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(torch.randn(p.shape, generator=noise) * (1.0 if p.dim() == 1 else 0.1))
            for config in model.peft_config.values():
                config.base_model_name_or_path = "tiny-sdxl"
            folder = tmp_path_factory.mktemp(method_id) / "adapter"
            model.save_pretrained(folder, save_embedding_layers=False)
            picture = draw(pipe)
            model.unload()
            made[method_id] = (folder, picture)
        return made[method_id]

    return make


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@pytest.mark.parametrize("method", ["lora", "nora"])
def test_text_encoders_leave_with_the_unet(pipe, with_text, tmp_path, method, to):
    folder, wanted = with_text(method)
    result = export(folder, to, tmp_path)
    assert result["relative_error"] < 1e-6
    keys = list(load_file(result["files"][0]))
    starts = ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model.")
    if to == "kohya":
        starts = ("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_")
    assert all(any(key.startswith(start) for key in keys) for start in starts)
    assert all(key.startswith(starts) for key in keys)
    plain = draw(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=result["files"][0].rpartition("/")[2])
    try:
        again = draw(pipe)
        loaded = pipe.get_list_adapters()
    finally:
        pipe.unload_lora_weights()
    assert set(loaded) == {"unet", "text_encoder", "text_encoder_2"}
    assert (wanted - plain).abs().max() > 4 / 255, "the adapter changes nothing to compare"
    assert (wanted - again).abs().max() <= 1 / 255
    assert torch.equal(draw(pipe), plain)


def test_text_encoders_as_peft_folders(pipe, with_text, tmp_path):
    from peft import PeftModel

    folder, wanted = with_text("nora")
    result = export(folder, "peft", tmp_path)
    assert result["relative_error"] < 1e-6
    parts = ("unet", "text_encoder", "text_encoder_2")
    models = [PeftModel.from_pretrained(getattr(pipe, part), str(tmp_path / part)) for part in parts]
    again = draw(pipe)
    for model in models:
        model.unload()
    assert (wanted - again).abs().max() <= 1 / 255


def test_text_encoders_merged(pipe, with_text, tmp_path):
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder, wanted = with_text("nora")
    export(folder, "merged", tmp_path)
    kinds = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    own = {part: getattr(pipe, part) for part in kinds}
    for part, kind in kinds.items():
        setattr(pipe, part, kind.from_pretrained(tmp_path / part).eval())
    try:
        again = draw(pipe)
    finally:
        for part, network in own.items():
            setattr(pipe, part, network)
    assert (wanted - again).abs().max() <= 1 / 255


def test_peft_folder_needs_no_lab(pipe, saved, tmp_path):
    from peft import PeftModel

    folder, wanted = saved("nora")
    result = export(folder, "peft", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = PeftModel.from_pretrained(pipe.unet, str(tmp_path))
    again = draw(pipe)
    model.unload()
    assert result["relative_error"] < 1e-6
    assert (wanted - again).abs().max() <= 1 / 255


def test_full_rank_is_truncated_and_says_so(saved, tmp_path):
    folder, _ = saved("loha", {"r": 8}, "attn")
    coarse, fine = (export(folder, "diffusers", tmp_path / str(r), rank=r)["relative_error"] for r in (2, 16))
    assert 0.01 < fine < coarse < 1
    tensors = load_file(tmp_path / "2" / "pytorch_lora_weights.safetensors")
    assert all(v.shape[0] == 2 for k, v in tensors.items() if "lora_A" in k)


def test_merged_network_draws_the_same(pipe, saved, tmp_path):
    from diffusers import UNet2DConditionModel

    folder, wanted = saved("loha", {"r": 8}, "attn")
    export(folder, "merged", tmp_path)
    own, pipe.unet = pipe.unet, UNet2DConditionModel.from_pretrained(tmp_path)
    try:
        again = draw(pipe)
    finally:
        pipe.unet = own
    assert (wanted - again).abs().max() <= 1 / 255


def test_metadata(saved, tmp_path):
    folder, _ = saved("lora")
    (path,) = export(folder, "kohya", tmp_path / "fox.safetensors")["files"]
    with safe_open(path, "pt") as file:
        meta, keys = file.metadata(), list(file.keys())
        alphas = {float(file.get_tensor(k)) for k in keys if k.endswith(".alpha")}
        ranks = {file.get_tensor(k).shape[0] for k in keys if k.endswith("lora_down.weight")}
    assert meta["ss_base_model_version"] == "sdxl_base_v1-0"
    assert meta["ss_network_dim"] == "4"
    assert meta["modelspec.trigger_phrase"] == "sks fox"
    assert len(meta["sshs_model_hash"]) == 64
    assert alphas == {4.0}
    assert ranks == {4}
    (path,) = export(folder, "diffusers", tmp_path)["files"]
    with safe_open(path, "pt") as file:
        lora = json.loads(file.metadata()["lora_adapter_metadata"])
    assert lora["unet.r"] == lora["unet.lora_alpha"] == 4


def test_half_precision_says_its_error(saved, tmp_path):
    folder, _ = saved("lora")
    assert 1e-5 < export(folder, "diffusers", tmp_path, half=True)["relative_error"] < 1e-3


def test_an_untrained_adapter_has_nothing_to_export():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(8, 8)

    method = METHODS["lora"]
    with pytest.raises(LabError, match="nothing to export"):
        factorise(method.attach(Net(), method.knobs(), ["q"]))


def test_bad_input(saved, tmp_path):
    folder, _ = saved("lora")
    with pytest.raises(LabError, match="Unknown layout"):
        export(folder, "ckpt", tmp_path)
    with pytest.raises(LabError, match="no adapter folder"):
        export(tmp_path / "nothing", "kohya", tmp_path)
    data = (folder / "adapter_model.safetensors").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(LabError, match="damaged or incomplete"):
        adapters.load(torch.nn.Linear(2, 2), broken)
    assert exporting.FORMATS == ("diffusers", "kohya", "peft", "merged")
