"""The drawing of a method shows every tensor of its row, dashed where it is frozen."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from lab.methods import METHODS
from lab.plots import colour
from lab.ui.diagrams import boxes, diagram


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.id)
def test_every_tensor_is_drawn_as_what_it_is(method):
    drawn = {box.name: box.trained for box in boxes(method)}
    told = dict.fromkeys(method.tensors["frozen"], False) | dict.fromkeys(method.tensors["trained"], True)
    assert drawn == {"W": False} | told
    svg = ElementTree.fromstring(diagram(method))
    rects = svg.findall("rect")
    trained = [r for r in rects if r.get("fill") == colour(method.id)]
    assert all(("stroke-dasharray" in r.attrib) != (r in trained) for r in rects)
    copies = {box.name: 3 if box.many else 1 for box in boxes(method)}
    assert len(trained) == sum(copies[name] for name in method.tensors["trained"])
    width, height = (float(v) for v in svg.get("viewBox").split()[2:])
    for r in rects:
        assert 0 <= float(r.get("x")) <= width - float(r.get("width"))
        assert 0 <= float(r.get("y")) <= height - float(r.get("height"))
    assert width <= 505
    assert set(method.product) <= told.keys()
