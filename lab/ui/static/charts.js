/* Draws the plain figures of lab/plots/budget_*.py as SVG: the part of plotly's format that they use (lines, markers,
   grouped bars; linear, log and category axes; one horizontal line with its text). plotly takes a third of a second
   for the three charts on a busy machine, this takes milliseconds, so charts move with the slider. */
const Chart = (() => {
  const text = (s) => String(s).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const si = (n) => { for (const [u, s] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (Math.abs(n) >= s) return `${+(n / s).toPrecision(3)}${u}`; return `${+n.toPrecision(3)}`; };
  const full = (n) => (typeof n === "number" ? (n >= 1000 || Number.isInteger(n) ? Math.round(n).toLocaleString("en-US") : +n.toPrecision(3)) : n);

  /* An axis: where a value stands between 0 and 1, and its ticks [[value, label, strong]]. */
  function axis(spec, values) {
    if (spec.type === "category") {
      const names = [...new Set(values)], n = names.length, every = Math.ceil(n / (spec.nticks || 24));
      const at = (v) => (names.indexOf(v) + 0.5) / n;
      return { at: spec.autorange === "reversed" ? (v) => 1 - at(v) : at, width: 1 / n, ticks: names.filter((_, i) => i % every === 0).map((v) => [v, v, true]), names };
    }
    const numbers = values.filter((v) => typeof v === "number" && (spec.type !== "log" || v > 0));
    let low = Math.min(...numbers), high = Math.max(...numbers);
    if (!numbers.length) [low, high] = [1, 10];
    if (spec.type === "log") {
      let [a, b] = [Math.log10(low), Math.log10(high)];
      const pad = Math.max(0.06, 0.04 * (b - a));
      [a, b] = [a - pad, b + pad];
      const ticks = [], dense = b - a < 3.2;
      for (let e = Math.floor(a); e <= b; e++) for (const d of dense ? [1, 2, 5] : [1]) {
        const v = d * 10 ** e;
        if (Math.log10(v) >= a && Math.log10(v) <= b) ticks.push([v, si(v), d === 1]);
      }
      return { at: (v) => (Math.log10(v) - a) / (b - a), ticks };
    }
    return { at: (v) => (v - low) / (high - low || 1), ticks: [low, (low + high) / 2, high].map((v) => [v, si(v), true]) };
  }

  function draw(node, figure) {
    const { data, layout } = figure;
    const W = Math.max(260, node.clientWidth), H = layout.height, small = W < 460;
    const all = (k) => [...data.flatMap((t) => t[k]), ...(k === "y" ? (layout.shapes || []).map((s) => s.y0) : [])].filter((v) => v !== null);
    const X = axis(layout.xaxis, all("x")), Y = axis(layout.yaxis, all("y"));
    const long = Math.max(...Y.ticks.map(([, l]) => String(l).length));
    const m = { l: 18 + 7 * long + (layout.yaxis.title?.text ? 20 : 6), r: 16, t: 8, b: layout.xaxis.title?.text ? 46 : 30 };
    const px = (v) => m.l + X.at(v) * (W - m.l - m.r), py = (v) => H - m.b - Y.at(v) * (H - m.t - m.b);
    const out = [], points = [];
    for (const [v, label, strong] of Y.ticks) {
      if (layout.yaxis.type !== "category") out.push(`<line class="g${strong ? "" : " f"}" x1="${m.l}" x2="${W - m.r}" y1="${py(v)}" y2="${py(v)}"/>`);
      if (strong || Y.ticks.length < 9) out.push(`<text x="${m.l - 8}" y="${py(v) + 4}" text-anchor="end">${text(label)}</text>`);
    }
    let last = -1e9;
    for (const [v, label, strong] of X.ticks) {
      if (layout.xaxis.type !== "category") out.push(`<line class="g${strong ? "" : " f"}" x1="${px(v)}" x2="${px(v)}" y1="${m.t}" y2="${H - m.b}"/>`);
      const half = 3.6 * String(label).length;
      if (px(v) - half < last) continue;
      last = px(v) + half + 6;
      out.push(`<text x="${px(v)}" y="${H - m.b + 17}" text-anchor="middle">${text(label)}</text>`);
    }
    if (layout.xaxis.title?.text) out.push(`<text class="t" x="${(m.l + W - m.r) / 2}" y="${H - 8}" text-anchor="middle">${text(layout.xaxis.title.text)}</text>`);
    if (layout.yaxis.title?.text) out.push(`<text class="t" transform="translate(13 ${(m.t + H - m.b) / 2}) rotate(-90)" text-anchor="middle">${text(layout.yaxis.title.text)}</text>`);
    (layout.shapes || []).forEach((s, i) => {
      const y = py(s.y0), label = layout.annotations?.[i];
      out.push(`<line x1="${m.l}" x2="${W - m.r}" y1="${y}" y2="${y}" stroke="${s.line.color}" stroke-width="1.5" stroke-dasharray="6 4"/>`);
      if (label) out.push(`<text class="t" x="${W - m.r}" y="${y - 6}" text-anchor="end">${text(label.text)}</text>`);
    });
    const bars = data.filter((t) => t.type === "bar");
    data.forEach((t) => {
      const colour = t.marker?.color || t.line?.color;
      const spots = t.x.map((x, i) => [x, t.y[i]]).filter(([x, y]) => x !== null && y !== null);
      if (t.type === "bar") {
        const slot = 0.78 * X.width * (W - m.l - m.r) / bars.length, k = bars.indexOf(t);
        for (const [x, y] of spots) {
          const left = px(x) + (k - bars.length / 2) * slot + 0.04 * slot, top = py(y);
          out.push(`<rect x="${left}" y="${top}" width="${0.92 * slot}" height="${Math.max(1, H - m.b - top)}" fill="${colour}" rx="1.5"/>`);
          points.push({ x: left + 0.46 * slot, y: top, t, colour, at: [x, y] });
        }
        return;
      }
      const line = spots.map(([x, y]) => [px(x), py(y)]);
      if (t.mode.includes("lines")) {
        const step = t.line.shape === "hvh";
        out.push(`<path d="${line.map(([x, y], i) => (i === 0 ? `M${x} ${y}` : step ? `H${(line[i - 1][0] + x) / 2}V${y}H${x}` : `L${x} ${y}`)).join("")}" fill="none" stroke="${colour}" stroke-width="${t.line.width || 2}" stroke-linejoin="round"/>`);
      }
      if (t.mode.includes("markers")) for (const [x, y] of line) out.push(`<circle class="m" cx="${x}" cy="${y}" r="${(t.marker?.size || 8) / 2}" fill="${colour}"/>`);
      line.forEach(([x, y], i) => points.push({ x, y, t, colour, at: spots[i] }));
    });
    const legend = data.filter((t) => t.showlegend !== false).map((t) => `<span><i style="background:${t.marker?.color || t.line?.color}"></i>${text(t.name)}</span>`).join("");
    node.innerHTML = `<div class="legend">${legend}</div><svg viewBox="0 0 ${W} ${H}" width="${W}" height="${H}" role="img" class="${small ? "small" : ""}">${out.join("")}</svg><div class="tip" hidden></div>`;
    node.__points = points;
    if (!node.__hover) {
      node.__hover = true;
      node.addEventListener("pointermove", (event) => hover(node, event));
      node.addEventListener("pointerleave", () => { const tip = node.querySelector(".tip"); if (tip) tip.hidden = true; });
    }
  }

  function hover(node, event) {
    const svg = node.querySelector("svg"), tip = node.querySelector(".tip");
    if (!svg || !node.__points.length) return;
    const box = svg.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const near = node.__points.reduce((a, b) => (Math.hypot(b.x - x, b.y - y) < Math.hypot(a.x - x, a.y - y) ? b : a));
    if (Math.hypot(near.x - x, near.y - y) > 48) { tip.hidden = true; return; }
    const values = { x: near.at[0], y: near.at[1] };
    tip.textContent = near.t.hovertemplate.replace("<extra></extra>", "").replace(/%\{(x|y)(:[^}]*)?\}/g, (_, k, f) => (f === ":.3s" ? si(values[k]) : full(values[k])));
    tip.hidden = false;
    tip.style.left = `${Math.min(Math.max(near.x, 90), box.width - 90)}px`;
    tip.style.top = `${near.y + svg.offsetTop}px`;
    tip.style.borderColor = near.colour;
  }
  return { draw };
})();
