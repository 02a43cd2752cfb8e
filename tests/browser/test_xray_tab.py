"""The X-ray tab in a real browser: a file is sent, refused, opened, read, and laid beside another."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lab.base_weights import weights
from tests.browser import browser, marks

PATIENCE_MS = 180_000
NAMES = [f"down_blocks.1.attentions.0.transformer_blocks.0.attn{i}.to_{p}" for i in (1, 2) for p in "qkv"]

pytestmark = marks(600)


def adapter(path: Path, seed: int, rank: int = 3) -> str:
    """A LoRA on six layers of the embedded base, as diffusers writes it."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name in NAMES:
        m, n = weights("tiny-sdxl").layers()[name]
        tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, n, generator=draw)
        tensors[f"unet.{name}.lora_B.weight"] = torch.randn(m, rank, generator=draw) * 0.1
    save_file(tensors, path)
    return str(path)


def test_send_open_compare_and_take(page_address: str, tmp_path: Path) -> None:
    with browser() as chrome:
        page: Any = chrome.new_context(viewport={"width": 390, "height": 844}, accept_downloads=True).new_page()
        page.set_default_timeout(PATIENCE_MS)
        wrong: list[str] = []
        page.on("pageerror", lambda problem: wrong.append(str(problem)))
        page.goto(f"{page_address}?tab=xray")
        page.locator("#xray-facts .empty").wait_for()
        sent = page.locator("#xray-upload input[type=file]")

        # A pickle is refused with the reason, and the next file is taken.
        (tmp_path / "style.safetensors").write_bytes(b"\x80\x04anything else")
        sent.set_input_files(str(tmp_path / "style.safetensors"))
        page.locator("#xray-notice .notice", has_text="can run any code").wait_for()
        sent.set_input_files(adapter(tmp_path / "first fox.safetensors", 1))
        page.locator(".xray-facts h3", has_text="first fox").wait_for()
        assert "Tiny SDXL" in page.locator(".xray-facts").inner_text()
        assert page.locator("#xray-notice .notice").count() == 0
        page.wait_for_url("**adapter=file*")

        # The map in two colourings, the table's rows, a layer's spectrum.
        page.locator("#xray-map .heatmaplayer image").first.wait_for()
        page.locator("#xray-show label", has_text="intruders").click()
        page.locator("#xray-map .cbtitle", has_text="intruders").wait_for()
        assert page.locator("#xray-table tbody tr").count() == len(NAMES)
        other = page.locator("#xray-table tbody tr").nth(2).locator("[data-do=layer]")
        layer = other.get_attribute("data-id")
        other.click()
        page.locator("#xray-words b", has_text=layer).wait_for()
        assert page.locator("#xray-spectrum .point").count() == 3
        with page.expect_download() as got:
            page.locator("#xray-take a").click()
        got.value.save_as(tmp_path / "layers.csv")
        rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
        assert {row["layer"] for row in rows} == set(NAMES)
        assert all(row["rank"] == "3" and row["intruders"] for row in rows)

        # A second one, laid beside the first.
        sent.set_input_files(adapter(tmp_path / "second fox.safetensors", 2))
        page.locator(".xray-facts h3", has_text="second fox").wait_for()
        page.locator("#xray-overlap-section > button").click()
        page.locator("#xray-others input").click()
        page.locator("#xray-others [role=option]", has_text="first fox").click()
        page.locator("#xray-overlap-said td", has_text="second fox").wait_for()
        page.locator("#xray-overlap-map .heatmaplayer image").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out on a phone

        # Nobody else opens it by its address.
        stranger = chrome.new_context().new_page()
        stranger.goto(page.url)
        stranger.locator("#xray-facts .empty").wait_for(timeout=PATIENCE_MS)
        assert "fox" not in stranger.locator("#xray-facts").inner_text()
        assert not wrong
