"""Files that are broken, hostile or for something else: one clear sentence each, and bounded memory."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lab.adapter_files import _header, read
from lab.errors import LabError

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0"


def sentence(path, base=None, **options):
    """The one sentence that opening, or the first layer of it, gives."""

    def everything():
        for update in read(path, base, **options).updates.values():
            update.dense()

    with pytest.raises(LabError) as caught:
        everything()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", ")"))
    assert str(path.parent) not in text
    return text


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw(path, header, data=b"", length=None):
    """A safetensors file by hand: whatever header, whatever it says of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def lora(m=8, n=8, r=2, at=0):
    """A header of one whole LoRA layer, and its data."""
    a, b = 4 * r * n, 4 * m * r
    head = {f"{LAYER}.attn1.to_q.lora_A.weight": entry([r, n], at, at + a),
            f"{LAYER}.attn1.to_q.lora_B.weight": entry([m, r], at + a, at + a + b)}  # fmt: skip
    return head, bytes(a + b)


# -- pickles ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt", "a.PT", "a.pkl"])
def test_pickles_are_refused_by_name_unopened(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"anything")
    text = sentence(path)
    assert "is a pickle, which can run any code when it is opened" in text
    assert "safetensors" in text


class Boom:
    """A pickle that says so when it is run."""

    ran: list[int] = []

    def __reduce__(self):
        return (self.ran.append, (1,))


@pytest.mark.parametrize("protocol", [2, 4, 5, "torch", "legacy"])
def test_a_pickle_under_another_name_is_not_run(protocol, tmp_path):
    path = tmp_path / "style.safetensors"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps({"x": Boom()}, protocol))
    else:
        torch.save({"x": torch.ones(2), "y": Boom()}, path, _use_new_zipfile_serialization=protocol == "torch")
    Boom.ran.clear()
    text = sentence(path)
    assert "pickle under another name" in text
    assert "'style.safetensors'" in text
    assert not Boom.ran


def test_a_folder_or_zip_with_a_pickle(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert "pickle" in sentence(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(tmp_path / "adapter_model.bin", "a/adapter_model.bin")
    assert "holds a pickle" in sentence(tmp_path / "a.zip")


# -- zips ---------------------------------------------------------------------------------------------------
def zipped(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def test_a_zip_of_a_peft_folder_opens_from_any_depth(tmp_path):
    tensors = {f"base_model.model.{LAYER}.attn1.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / "w.safetensors")
    config = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6})
    path = zipped(
        tmp_path / "run.zip",
        ("run/adapter/adapter_config.json", config),
        ("run/adapter/adapter_model.safetensors", (tmp_path / "w.safetensors").read_bytes()),
        ("run/adapter/README.md", "a card"),
        ("__MACOSX/run/._adapter_model.safetensors", "x"),
        ("../../outside.txt", "x"),
    )
    file = read(path)
    assert (file.name, file.format, file.alpha) == ("run", "peft", 6.0)
    assert torch.equal(next(iter(file.updates.values())).dense(), torch.full((2, 2), 6.0))
    assert not (tmp_path.parent.parent / "outside.txt").exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = zipped(tmp_path / "bomb.zip", ("a.safetensors", bytes(64 << 20)))
    assert path.stat().st_size < 1 << 18
    monkeypatch.setattr("lab.adapter_files._zip.MAX_BYTES", 32 << 20)
    assert "unpacks to more than 32 MiB" in sentence(path)
    # the same, with a directory that claims it is small: what comes out is counted
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = (1000).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    assert "bomb.zip" in sentence(path)
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()


def test_a_zip_of_a_million_names_is_not_listed(tmp_path):
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as file:
        for i in range(2000):
            file.writestr(f"{i}", "")
    assert "more than 1000 files" in sentence(path)
    (tmp_path / "huge.zip").write_bytes(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 5, 5, 1 << 30, 0, 0))
    assert "more than 1000 files" in sentence(tmp_path / "huge.zip")


def test_other_zips(tmp_path):
    assert "no .safetensors" in sentence(zipped(tmp_path / "none.zip", ("a.txt", "x")))
    assert "holds 2 adapters" in sentence(zipped(tmp_path / "two.zip", ("a.safetensors", "x"), ("b.safetensors", "y")))
    (tmp_path / "cut.zip").write_bytes(zipped(tmp_path / "x.zip", ("a.safetensors", "x" * 999)).read_bytes()[:-30])
    assert "cut off" in sentence(tmp_path / "cut.zip")
    (tmp_path / "r.safetensors").write_bytes((tmp_path / "none.zip").read_bytes())
    assert "zip under another name" in sentence(tmp_path / "r.safetensors")
    locked = bytearray(zipped(tmp_path / "l.zip", ("a.safetensors", "x")).read_bytes())
    locked[6] |= 1
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "l.zip").write_bytes(locked)
    assert "encrypted" in sentence(tmp_path / "l.zip")


# -- headers that lie -----------------------------------------------------------------------------------------
def lies():
    head, data = lora()
    a, b = list(head)
    size = len(data)
    yield "beyond", head, data[:-8], None, "ends at byte 128 of 120"
    yield "longer than the file", head, data, 1 << 40, "its header claims"
    yield "huge header", head, data, 17 << 20, "its header claims"
    yield "empty header", b"", data, 0, "header"
    yield "no JSON", b"{nonsense", data, None, "not JSON"
    yield "no table", b"[1, 2]", data, None, "no table of tensors"
    yield "overlap", {a: head[a], b: entry([8, 2], 0, 64)}, data[:64], None, "overlaps"
    yield "hole", {a: head[a], b: entry([8, 2], 72, 136)}, data + bytes(8), None, "belong to no tensor"
    yield "tail", head, data + bytes(5), None, "5 bytes at its end"
    yield "too small", {a: entry([2, 800], 0, 64), b: head[b]}, data, None, "needs 6,400 bytes and claims 64"
    yield "huge shape", {a: entry([2, 1 << 40], 0, 64), b: head[b]}, data, None, "has the shape 2 × 1099511627776"
    yield "negative", {a: entry([-2, -8], 0, 64), b: head[b]}, data, None, "has the shape -2 × -8"
    yield "backwards", {a: entry([2, 8], 64, 0), b: head[b]}, data, None, "lying header"
    yield "floats", {a: entry([2.5, 8], 0, 64), b: head[b]}, data, None, "has the shape 2.5"
    yield "no shape", {a: {"dtype": "F32"}, b: head[b]}, data, None, "does not say type, shape and place"
    yield "type", {a: entry([2, 8], 0, 64, "C64"), b: head[b]}, data, None, "a type that cannot be read"
    twice = json.dumps(head)[:-1] + f', "{a}": {json.dumps(head[a])}}}'
    yield "twice", twice.encode(), data, None, f"names {a} twice"
    yield "deep", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", data, None, "nested too deep"
    yield "number", json.dumps(head).replace("128", "9" * 100_000).encode(), data, None, "shape"
    yield "long name", {"x" * 2000: head[a], b: head[b]}, data, None, "2,000 characters"
    yield "metadata", {"__metadata__": {"a": [1]}, **head}, data, None, "metadata"
    yield "nothing", {"__metadata__": {}}, b"", None, "holds no tensors"
    assert size == 128


@pytest.mark.parametrize(("header", "data", "length", "says"), [pytest.param(*x[1:], id=x[0]) for x in lies()])
def test_a_lying_header(header, data, length, says, tmp_path):
    assert says in sentence(raw(tmp_path / "a.safetensors", header, data, length))


def test_what_is_no_file_of_tensors(tmp_path):
    page = tmp_path / "page.safetensors"
    page.write_text("<!DOCTYPE html><html>please log in</html>")
    assert "web page" in sentence(page)
    page.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    assert "pointer" in sentence(page)
    page.write_bytes(b"")
    assert "empty" in sentence(page)
    assert "cannot be read" in sentence(tmp_path / "gone.safetensors")
    assert "has no adapter_config.json" in sentence(tmp_path / "gone") if (tmp_path / "gone").mkdir() is None else False


def test_a_header_of_every_size_is_parsed_in_bounded_memory(tmp_path):
    empty = {f"lora_unet_x_{i}.lora_down.weight": entry([0], 0, 0) for i in range(41_000)}
    path = raw(tmp_path / "a.safetensors", empty)
    tracemalloc.start()
    assert "41,000 tensors" in sentence(path)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()


def test_a_file_beyond_a_gibibyte(tmp_path):
    head, data = lora()
    path = raw(tmp_path / "a.safetensors", head, data)
    with path.open("r+b") as file:
        file.truncate((1 << 30) + 10)
    assert "1.0 GiB" in sentence(path)


def test_a_big_file_is_opened_without_being_read(tmp_path):
    side = 1 << 14
    head = {}
    for i in range(4):
        at = i * 2 * 4 * side * 1024
        head[f"layers.{i}.q_proj.lora_A.weight"] = entry([1024, side], at, at + 4 * side * 1024)
        head[f"layers.{i}.q_proj.lora_B.weight"] = entry([side, 1024], at + 4 * side * 1024, at + 8 * side * 1024)
    path = raw(tmp_path / "a.safetensors", head)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 4 * 8 * side * 1024)  # 512 MiB, of which the disk holds nothing
    tracemalloc.start()
    assert len(read(path).updates) == 4
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


# -- adapters that are wrong ------------------------------------------------------------------------------------
def save(path, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def wrong_shapes():
    q = f"{LAYER}.attn1.to_q"
    z = torch.zeros
    yield {f"{q}.lora_A.weight": z(2, 8), f"{q}.lora_B.weight": z(8, 3)}, "down has rank 2, up has rank 3"
    yield {f"{q}.lora_A.weight": z(2, 8), f"{q}.lora_B.weight": z(8)}, "down is 2 × 8 and up is 8"
    yield {f"{q}.lora_A.weight": z(2, 8)}, "no up"
    yield {f"{q}.lora_B.weight": z(2, 8)}, "up alone"
    yield (
        {f"{q}.lora_A.weight": z(2, 8), f"{q}.lora_B.weight": z(8, 2), f"{q}.alpha": z(3)},
        "alpha is 3, not one number",
    )
    yield {f"{q}.hada_w1_a": z(8, 2), f"{q}.hada_w1_b": z(2, 8)}, "no hada_w2_a"
    parts = {f"{q}.hada_w1_a": z(8, 2), f"{q}.hada_w1_b": z(2, 8), f"{q}.hada_w2_a": z(7, 2), f"{q}.hada_w2_b": z(2, 8)}
    yield parts, "hada_w2_a is 7 × 2"
    yield {f"{q}.lokr_w1": z(2, 2), f"{q}.lokr_w2_a": z(4, 2), f"{q}.lokr_w2_b": z(3, 4)}, "lokr_w2_b is 3 × 4"
    yield {f"{q}.lokr_w1": z(2), f"{q}.lokr_w2": z(4, 2)}, "lokr_w1 is 2"
    yield {f"{q}.diff": z(9)}, "no matrix"
    wide = {f"{q}.lora_A.weight": z(1, 1 << 18), f"{q}.lora_B.weight": z(1 << 18, 1)}
    yield wide, "262144 × 262144, a size that no layer has"
    magnitude = {f"{q}.lora_A.weight": z(2, 8), f"{q}.lora_B.weight": z(8, 2), f"{q}.dora_scale": z(5, 1)}
    yield magnitude, "the magnitude is 5 × 1"


@pytest.mark.parametrize(("tensors", "says"), wrong_shapes())
def test_tensors_of_wrong_shape(tensors, says, tmp_path):
    text = sentence(save(tmp_path / "a.safetensors", tensors))
    assert says in text
    assert "attn1.to_q" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(value, tmp_path):
    tensors = {f"{LAYER}.attn1.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    tensors[f"{LAYER}.attn1.to_q.lora_B.weight"][1, 1] = value
    assert "NaN or infinity in" in sentence(save(tmp_path / "a.safetensors", tensors))


def test_ten_thousand_layers(tmp_path):
    head = {}
    for i in range(10_000):
        head[f"lora_unet_layer_{i}.lora_down.weight"] = entry([1, 1], 8 * i, 8 * i + 4)
        head[f"lora_unet_layer_{i}.lora_up.weight"] = entry([1, 1], 8 * i + 4, 8 * i + 8)
    path = raw(tmp_path / "a.safetensors", head, bytes(80_000))
    assert "10,000 layers: at most 5,000" in sentence(path)


def test_an_adapter_for_another_base(tmp_path):
    def adapter(width, layer="attn2.to_k", m=640):
        g = torch.Generator().manual_seed(0)
        name = f"down_blocks.1.attentions.0.transformer_blocks.0.{layer}"
        parts = {"lora_A": torch.randn(2, width, generator=g), "lora_B": torch.randn(m, 2, generator=g)}
        return save(tmp_path / "fox.safetensors", {f"unet.{name}.{k}.weight": v for k, v in parts.items()})

    text = sentence(adapter(768), "tiny-sdxl")
    assert "was made for SD 1.5: its cross-attention is 768 wide, Tiny SDXL (embedded)'s is 320" in text
    assert "was made for SDXL: its cross-attention is 2048 wide" in sentence(adapter(2048), "tiny-sdxl")
    assert "is 640 × 77 in it and 128 × 128 in Tiny SDXL" in sentence(adapter(77, "attn1.to_k"), "tiny-sdxl")
    assert "does not have" in sentence(adapter(128, "attn3.to_k"), "tiny-sdxl")
    assert read(adapter(768)).family.name == "SD 1.5"  # without a base it opens, and says whose it is


def test_other_files(tmp_path):
    many = {f"down_blocks.{i}.conv.weight": torch.zeros(1) for i in range(150)}
    assert "a whole model" in sentence(save(tmp_path / "m.safetensors", many))
    assert "its tensors are called x" in sentence(save(tmp_path / "x.safetensors", {"x": torch.zeros(1)}))
    head, data = lora()
    q = list(head)
    names = {q[0].replace("to_q", "<b>"): head[q[0]], q[1].replace("to_q", "<b>"): head[q[1]]}
    assert "letters that no layer's name has" in sentence(raw(tmp_path / "n.safetensors", names, data))
    twice = {"lora_unet_mid_block_attentions_0_proj_in": 1, "lora_unet_middle_block_1_proj_in": 1}
    tensors = {f"{k}.lora_{x}.weight": torch.zeros(2, 2) for k in twice for x in ("down", "up")}
    assert "twice, under two names" in sentence(save(tmp_path / "t.safetensors", tensors))
    whole = {f"{LAYER}.attn1.to_q.lora_{x}.weight": torch.zeros(2, 2, dtype=torch.int8) for x in "AB"}
    assert "quantised" in sentence(save(tmp_path / "i.safetensors", whole))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "which kind of adapter"),
        ('{"peft_type": 3}', "which kind of adapter"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": "many"}', "must be a number"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+$": 1}}', "expression"),
        ('{"peft_type": "NORA"}', "choose its base"),
        ('{"peft_type": "PREFIX_TUNING"}', "changes no weights"),
        ('{"peft_type": "NOSUCH", "base_model_name_or_path": "tiny-sdxl"}', "does not know"),
    ],
)
def test_configurations(config, says, tmp_path):
    tensors = {f"base_model.model.{LAYER}.attn1.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(config)
    assert says in sentence(tmp_path)


def test_a_configuration_names_no_path_that_is_followed(tmp_path):
    """Only registered bases are taken from a stranger's configuration, never a folder or a Hub id."""
    tensors = {f"base_model.model.{LAYER}.attn1.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save(tmp_path / "adapter_model.safetensors", tensors)
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "/etc/somebody/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(given))
    file = read(tmp_path)
    assert file.base is None
    assert file.metadata["base_model_name_or_path"] == "model"


def test_names_in_sentences_are_short_and_on_one_line(tmp_path):
    assert _header.name_of(tmp_path / ("x" * 200)).count("x") == 57
    assert "\n" not in _header.name_of(tmp_path / "a\nb")
    assert "'mine.safetensors'" in sentence(raw(tmp_path / "a.safetensors", b"{"), name="mine.safetensors")
