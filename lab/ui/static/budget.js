/* The Budget tab in the browser: controls from the report, one call to the server a change, charts drawn in place.
   props.initial: {report, archs: [[group, [[id, name]]]], methods: [{id, name, kind, colour, knobs}]}.
   server.budget_report(state) → a report or {error}; the other server functions are called where they are used. */
const $ = (selector, from = element) => from.querySelector(selector);
const first = props.initial;
const rows = Object.fromEntries(first.methods.map((m) => [m.id, m]));
let state = JSON.parse(JSON.stringify(first.report.state));
let shown = first.report;

function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") node.className = value;
    else if (key === "style") node.setAttribute("style", value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (value !== undefined && value !== null) node[key] = value;
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}
const number = (n) => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en-US"));
const short = (n) => (Math.abs(n) >= 1e9 ? `${(n / 1e9).toPrecision(3)}B` : Math.abs(n) >= 1e6 ? `${(n / 1e6).toPrecision(3)}M` : Math.abs(n) >= 1e4 ? `${(n / 1e3).toPrecision(3)}K` : number(n));
const bytes = (n) => {
  if (n === null || n === undefined) return "–";
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size) return `${n / size >= 100 ? Math.round(n / size) : (n / size).toPrecision(3)} ${unit}`;
  return `${n} B`;
};
const share = (x) => (x >= 0.1 ? `${(100 * x).toFixed(1)} %` : x >= 1e-6 ? `${(100 * x).toPrecision(2)} %` : `${(100 * x).toExponential(1)} %`);
const times = (x) => (x === null || x === undefined ? "–" : x >= 100 ? `${Math.round(x).toLocaleString("en-US")}×` : `${x.toPrecision(3)}×`);

/* A busy server or a network that blinks is asked again before the visitor is told. */
async function asked(call) {
  for (const pause of [300, 1500, 0]) {
    try { return await call(); } catch { await new Promise((resolve) => setTimeout(resolve, pause)); }
  }
  return { error: "The page's server did not answer: check that it is running, then move a slider again." };
}

/* ---- one call at a time; the last state always wins ---- */
let busy = false, waiting = false, moved = 0;
async function update() {
  if (busy) { waiting = true; return; }
  busy = true;
  do {
    waiting = false;
    const sent = JSON.stringify(state), began = moved;
    const answer = await asked(() => server.budget_report(JSON.parse(sent)));
    if (answer.error) fail(answer.error);
    else apply(answer, began);
  } while (waiting);
  busy = false;
}
function change(edit) {
  edit(state);
  moved = performance.now();
  update();
}
function fail(sentence) {
  const box = $(".said-bad");
  box.replaceChildren(make("div", { class: "notice bad", role: "alert" }, make("b", {}, sentence)));
}
function apply(report, began) {
  $(".said-bad").replaceChildren();
  shown = report;
  if (!waiting) state = JSON.parse(JSON.stringify(report.state));
  facts(); cards(); table(); charts();
  window.lab?.params("budget", report.link);
  // For the latency measurement: the time from the last change until its result is painted.
  requestAnimationFrame(() => setTimeout(() => { element.dataset.ms = (performance.now() - began).toFixed(1); element.dataset.seen = String(began); }));
}

/* ---- architecture and layers ---- */
const NAMES = { q: "q", k: "k", v: "v", out: "out", up: "up", down: "down", gate: "gate", conv: "conv" };
function facts() {
  const arch = shown.arch, select = $("select.arch");
  if (![...select.options].some((o) => o.value === arch.id)) {
    let group = [...select.children].find((g) => g.label === "Yours");
    if (!group) { group = make("optgroup", { label: "Yours" }); select.prepend(group); }
    group.append(make("option", { value: arch.id }, arch.name));
  }
  select.value = arch.id;
  const chips = $(".targets");
  const now = arch.targets.join();
  if (chips.dataset.for !== now) {
    chips.dataset.for = now;
    chips.replaceChildren(...arch.targets.map((t) => {
      const input = make("input", { type: "checkbox", value: t, ariaLabel: `adapt ${t}` });
      input.addEventListener("change", () => change((s) => {
        s.targets = [...chips.querySelectorAll("input:checked")].map((i) => i.value);
        if (!s.targets.length) { s.targets = [t]; input.checked = true; }
      }));
      return make("label", { class: "chip" }, input, make("span", {}, NAMES[t]));
    }));
  }
  const on = new Set(shown.state.targets.flatMap((t) => ({ attn: ["q", "k", "v", "out"], mlp: ["up", "down", "gate"], all: ["q", "k", "v", "out", "up", "down", "gate"] })[t] || [t]));
  chips.querySelectorAll("input").forEach((i) => { i.checked = on.has(i.value); });
  const [low, high] = shown.state.blocks || [0, arch.blocks - 1];
  const [from, to] = element.querySelectorAll(".range input");
  for (const [input, value] of [[from, low], [to, high]]) {
    input.max = arch.blocks - 1;
    if (document.activeElement !== input) input.value = value;
  }
  $(".parts").hidden = !arch.parts.length;
  $(".parts select").replaceChildren(make("option", { value: "" }, "all towers"), ...arch.parts.map((p) => make("option", { value: p }, p)));
  $(".parts select").value = shown.state.part;
  $(".encoders").hidden = !arch.companions.length;
  $(".encoders input").checked = shown.state.te;
  $(".encoders span").textContent = arch.companions.length > 1 ? `${arch.companions.length} text encoders too` : "text encoder too";
  const line = [["", number(arch.layers), " layers adapted"], ["", number(arch.parameters), " parameters in all"], ["LoRA's floor ", number(arch.floor), " (rank 1)"]];
  $(".facts").replaceChildren(...line.map(([before, n, after]) => make("span", {}, before, make("b", {}, n), after)), arch.note ? make("span", {}, arch.note) : "", arch.source ? make("span", {}, `From ${arch.source}.`) : "");
  const budget = $(".equal input[type=number]"), slider = $(".equal input[type=range]"), tick = $(".equal input[type=checkbox]");
  tick.checked = shown.state.budget !== null;
  if (shown.state.budget !== null) {
    if (document.activeElement !== budget) budget.value = shown.state.budget;
    if (document.activeElement !== slider) slider.value = Math.log10(shown.state.budget);
  }
  paint(slider);
  $(".assume select.precision").value = shown.state.precision;
  for (const [name, of] of [["batch", ""], ["size", ""]]) {
    const input = $(`.assume input.${name}`);
    if (document.activeElement !== input) input.value = name === "size" ? sample(shown.state.size) : shown.state.batch;
  }
  const unit = arch.unit || {};
  $(".assume .of").textContent = unit.kind === "text" ? "tokens a text" : unit.latent && unit.kind === "image" ? "pixels a side" : "of the usual size";
  $(".assume").hidden = !arch.memory;
}
const whole = () => { const unit = shown.arch.unit || {}; return unit.kind === "text" ? unit.tokens : unit.side || 1; };
const sample = (size) => Math.round(size * whole());

/* ---- a card a method ---- */
function paint(slider) {
  const at = (100 * (slider.value - slider.min)) / (slider.max - slider.min || 1);
  slider.style.setProperty("--at", `${at}%`);
}
/* Where a slider of whole numbers stops: what fits, or numbers growing by a hundredth, each once. */
function stops(spec) {
  if (!spec.whole || spec.values.length) return spec.values;
  const found = [];
  for (let v = spec.low; v < spec.high; v = Math.max(v + 1, Math.round(v * 1.012))) found.push(v);
  return [...found, spec.high];
}
const place = (list, v) => (list.length ? list.reduce((best, u, i) => (Math.abs(u - v) < Math.abs(list[best] - v) ? i : best), 0) : v);
function card(row) {
  const node = make("div", { class: "bcard", style: `--c:${row.colour}`, data: { method: row.id } });
  const remove = make("button", { class: "remove", type: "button", ariaLabel: `remove ${row.name}`, title: `remove ${row.name}`, onclick: () => change((s) => { delete s.methods[row.id]; }) }, "×");
  node.append(make("div", { class: "head" }, make("b", {}, row.name), make("small", {}, row.kind), remove), make("div", { class: "count" }), make("div", { class: "sub" }));
  for (const spec of row.controls) node.append(knob(row, spec));
  const others = (rows[row.id]?.knobs || []).filter((k) => !row.controls.some((c) => c.name === k.name));
  if (others.length) {
    const more = make("details", { class: "more" }, make("summary", {}, "more settings"));
    more.addEventListener("toggle", () => { if (more.open && more.childElementCount === 1) more.append(...others.map((k) => plain(row, k))); });
    node.append(more);
  }
  return node;
}
const set = (id, { name, size }, v) => change((s) => {
  if (s.budget !== null && size) for (const r of shown.rows) s.methods[r.id] = { ...s.methods[r.id], ...sizes(r) };
  if (size) s.budget = null;
  s.methods[id] = { ...s.methods[id], [name]: v };
});
const sizes = (row) => Object.fromEntries(row.controls.map((c) => [c.name, row.knobs[c.name]]).filter(([, v]) => v !== undefined));
function knob(row, spec) {
  const slider = make("input", { type: "range", ariaLabel: `${row.name}: ${spec.name}`, title: spec.help, data: { knob: `${row.id}.${spec.name}` } });
  const logs = spec.whole && !spec.values.length;
  const list = (slider.stops = stops(spec));
  slider.min = list.length ? 0 : spec.low;
  slider.max = list.length ? list.length - 1 : spec.high;
  slider.step = list.length ? 1 : 0.005;
  const box = make("input", { type: "number", ariaLabel: `${row.name}: ${spec.name}`, min: spec.low, step: spec.whole ? 1 : "any" });
  slider.addEventListener("input", () => {
    const v = list.length ? list[Number(slider.value)] : Math.max(spec.low, Math.round(slider.value * 1000) / 1000);
    box.value = v;
    paint(slider);
    if (JSON.stringify((state.methods[row.id] || {})[spec.name]) !== JSON.stringify(v)) set(row.id, spec, v);
  });
  box.addEventListener("input", () => { if (box.value !== "") set(row.id, spec, Number(box.value)); });
  return make("div", { class: "knob-line", data: { line: spec.name } }, make("b", { title: spec.help }, spec.name), slider, box);
}
function plain(row, k) {
  const now = (shown.rows.find((r) => r.id === row.id)?.knobs || {})[k.name];
  let input;
  if (k.type === "choice") { input = make("select", {}, ...k.choices.map((c) => make("option", { value: c }, c))); input.value = now; }
  else if (k.type === "bool") input = make("input", { type: "checkbox", checked: Boolean(now) });
  else input = make("input", { type: k.type === "text" ? "text" : "number", value: now ?? "", step: k.type === "int" ? 1 : "any" });
  input.ariaLabel = `${row.name}: ${k.name}`;
  input.addEventListener("input", () => {
    const v = k.type === "bool" ? input.checked : input.value;
    change((s) => { s.methods[row.id] = { ...s.methods[row.id] }; if (v === "") delete s.methods[row.id][k.name]; else s.methods[row.id][k.name] = v; });
  });
  return make("label", { title: k.help }, k.name, input);
}
function cards() {
  const list = $(".cards-row"), adder = $(".adder");
  const wanted = shown.rows.map((r) => [r.id, r.controls.map((c) => [c.name, c.low, c.high, c.values.length, c.whole])]);
  const key = JSON.stringify(wanted);
  if (list.dataset.key !== key) {
    const open = new Set([...list.querySelectorAll(".more[open]")].map((d) => d.parentElement.dataset.method));
    const focus = document.activeElement?.dataset?.knob;
    list.dataset.key = key;
    list.replaceChildren(...shown.rows.map(card), adder);
    open.forEach((id) => { const more = $(`.bcard[data-method="${id}"] .more`); if (more) more.open = true; });
    if (focus) $(`[data-knob="${focus}"]`)?.focus();
    const select = $("select", adder), there = new Set(shown.rows.map((r) => r.id));
    select.replaceChildren(make("option", { value: "" }, "+ Add a method"), ...first.methods.filter((m) => !there.has(m.id)).map((m) => make("option", { value: m.id }, `${m.name} – ${m.kind}`)));
  }
  for (const row of shown.rows) {
    const node = $(`.bcard[data-method="${row.id}"]`);
    $(".count", node).textContent = row.count === null ? "–" : number(row.count);
    const sub = $(".sub", node);
    sub.className = `sub${row.error ? " bad" : row.note ? " wait" : ""}`;
    sub.textContent = row.error || row.note || (row.miss !== null ? (row.miss ? `${row.miss > 0 ? "+" : "−"}${number(Math.abs(row.miss))} from the budget` : "exactly the budget") : `${share(row.share)} of the model`);
    for (const spec of row.controls) {
      const line = $(`[data-line="${spec.name}"]`, node), [slider, box] = line.querySelectorAll("input");
      const v = row.knobs[spec.name] ?? (row.error ? (state.methods[row.id] || {})[spec.name] : spec.default);
      if (v === undefined || v === null) continue;
      if (document.activeElement !== slider) slider.value = place(slider.stops, v);
      if (document.activeElement !== box) box.value = spec.whole ? v : Math.round(v * 1e4) / 1e4;
      paint(slider);
    }
  }
}

/* ---- the table ---- */
const COLUMNS = [
  ["parameters", (r) => number(r.count)], ["share of model", (r) => share(r.share)],
  ["fp32", (r) => bytes(r.bytes["fp32"]), "file"], ["bf16", (r) => bytes(r.bytes["bf16"])], ["8 bit", (r) => bytes(r.bytes["8 bit"])], ["4 bit", (r) => bytes(r.bytes["4 bit"])], ["3 bit", (r) => bytes(r.bytes["3 bit"])], ["2 bit", (r) => bytes(r.bytes["2 bit"])],
  ["gradients + Adam", (r) => bytes(r.memory.gradients + r.memory.optimizer), "memory"], ["adapter activations", (r) => bytes(r.memory.adapter)], ["training", (r) => bytes(r.memory.training)],
  ["LoRA r = 1", (r) => times(r.below_floor), "smaller than"], ["LoRA here", (r) => times(r.below_lora)],
];
function table() {
  const groups = make("tr", {}, make("th", {}));
  COLUMNS.forEach(([, , group], i) => {
    if (i < 2) { groups.append(make("th", {})); return; }
    if (!group) return;
    let span = 1;
    while (COLUMNS[i + span] && !COLUMNS[i + span][2]) span += 1;
    groups.append(make("th", { class: "group first-of", colSpan: span }, { file: "file size", memory: "memory in training", "smaller than": "times smaller than" }[group]));
  });
  const head = make("tr", {}, make("th", {}, "method"), ...COLUMNS.map(([name, , group]) => make("th", { class: group ? "first-of" : "" }, name)));
  const body = shown.rows.map((row) => {
    const name = make("td", {}, make("i", { class: "dot", style: `--c:${row.colour}` }), row.name);
    if (row.count === null) return make("tr", {}, name, make("td", { class: "wide", colSpan: COLUMNS.length }, row.error));
    return make("tr", { data: { method: row.id } }, name, ...COLUMNS.map(([, cell, group]) => make("td", { class: group ? "first-of" : "" }, cell(row))));
  });
  $(".results table").replaceChildren(make("thead", {}, groups, head), make("tbody", {}, ...body));
}

/* ---- charts: drawn by static/charts.js; again when the tab is first shown and when the page changes its width ---- */
const drawn = new Map();
function charts() {
  for (const node of element.querySelectorAll(".chart")) {
    const id = node.dataset.figure, figure = shown.figures[id];
    if (!node.clientWidth) continue;
    const key = `${id} ${node.clientWidth} ${JSON.stringify(figure)}`;
    if (drawn.get(node) !== key) { drawn.set(node, key); Chart.draw(node, figure); }
  }
}
new ResizeObserver(charts).observe($(".charts"));

/* ---- what stays: selects, equal budget, bringing an architecture, copying, papers, equations ---- */
function setUp() {
  $("select.arch").replaceChildren(...first.archs.map(([group, list]) => make("optgroup", { label: group }, ...list.map(([id, name]) => make("option", { value: id }, name)))));
  $("select.arch").addEventListener("change", (event) => change((s) => { Object.assign(s, { arch: event.target.value, blocks: null, part: "", size: 1 }); s.targets = s.targets.filter((t) => t !== "conv").length ? s.targets.filter((t) => t !== "conv") : ["q", "k", "v", "out"]; }));
  const ends = element.querySelectorAll(".range input");
  ends.forEach((input) => input.addEventListener("input", () => {
    const [low, high] = [...ends].map((i) => Number(i.value));
    if ([...ends].some((i) => i.value === "") || low > high) return;
    change((s) => { s.blocks = low === 0 && high >= shown.arch.blocks - 1 ? null : [low, high]; });
  }));
  $(".parts select").addEventListener("change", (event) => change((s) => { s.part = event.target.value; }));
  $(".encoders input").addEventListener("change", (event) => change((s) => { s.te = event.target.checked; }));
  const budget = $(".equal input[type=number]"), slider = $(".equal input[type=range]");
  $(".equal input[type=checkbox]").addEventListener("change", (event) => {
    const now = Number(budget.value) || shown.rows.find((r) => r.count)?.count || 1000000;
    budget.value = now; slider.value = Math.log10(now);
    change((s) => {
      if (!event.target.checked) for (const r of shown.rows) s.methods[r.id] = { ...s.methods[r.id], ...sizes(r) };
      s.budget = event.target.checked ? now : null;
    });
  });
  slider.addEventListener("input", () => {
    const digits = Math.floor(slider.value) - 2, n = Math.max(1, Math.round(10 ** slider.value / 10 ** digits) * 10 ** digits);
    budget.value = Math.round(n); paint(slider);
    change((s) => { s.budget = Math.round(n); });
  });
  budget.addEventListener("input", () => { if (budget.value !== "") { slider.value = Math.log10(Math.max(1, budget.value)); change((s) => { s.budget = budget.value; }); } });
  $(".adder select").addEventListener("change", (event) => { const id = event.target.value; if (id) change((s) => { s.methods[id] = {}; }); });
  $(".assume input.batch").addEventListener("input", (event) => { if (event.target.value) change((s) => { s.batch = event.target.value; }); });
  $(".assume input.size").addEventListener("input", (event) => { if (event.target.value) change((s) => { s.size = event.target.value / whole(); }); });
  $(".assume select.precision").addEventListener("change", (event) => change((s) => { s.precision = event.target.value; }));
  $(".by").addEventListener("change", (event) => { $(".chart.by-layer").dataset.figure = event.target.value; charts(); });
  bringing(); copying(); equations();
}
function bringing() {
  const told = $(".bring .told");
  const take = async (kind, text, name) => {
    told.replaceChildren(make("p", { class: "hint" }, kind === "table" ? "Reading the table…" : "Laying the model out without its weights; this takes some seconds…"));
    let answer;
    try { answer = await server.budget_bring({ kind, text, name }); } catch { answer = { error: "The page's server did not take it: a model's config.json has some kilobytes." }; }
    told.replaceChildren(answer.error ? make("div", { class: "notice bad", role: "alert" }, make("b", {}, answer.error)) : make("p", { class: "hint" }, `${answer.name}: ${number(answer.parameters)} parameters, ${number(answer.layers)} layers.`));
    if (!answer.error) change((s) => { Object.assign(s, { arch: answer.id, targets: answer.targets, blocks: null, part: "", te: false, size: 1 }); });
  };
  $(".drop input").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    event.target.value = "";
    if (!file) return;
    if (file.size > 1e6) { told.replaceChildren(make("div", { class: "notice bad", role: "alert" }, make("b", {}, `The configuration has ${(file.size / 1e6).toFixed(1)} MB; a model's config.json has some kilobytes, and at most 1 MB is read.`))); return; }
    take("config", await file.text(), file.name);
  });
  $(".hub button").addEventListener("click", () => take("hub", $(".hub input").value));
  $(".hub input").addEventListener("keydown", (event) => { if (event.key === "Enter") take("hub", event.target.value); });
  $(".paste button").addEventListener("click", () => take("table", $(".paste textarea").value));
}
function copying() {
  const said = $(".copies .said"), out = $("pre.copied");
  const give = async (text, what) => {
    out.textContent = text; out.hidden = false;
    try { await navigator.clipboard.writeText(text); said.textContent = `${what} copied.`; } catch { said.textContent = "Select and copy:"; }
  };
  element.querySelectorAll(".copies button").forEach((button) => button.addEventListener("click", async () => {
    const what = button.dataset.copy;
    if (what === "link") { give(location.href, "Link"); return; }
    const answer = await server.budget_copy({ state, what }).catch(() => ({ error: "The page's server did not answer." }));
    if (answer.error) { said.textContent = answer.error; return; }
    give(answer.text, button.textContent);
  }));
}
function equations() {
  const inputs = [...element.querySelectorAll(".eq input")], out = $(".eq-out");
  let turn = 0;
  const solve = async () => {
    const mine = ++turn;
    const answer = await server.budget_equations(Object.fromEntries(inputs.map((i) => [i.name, i.value]))).catch(() => ({ error: "The page's server did not answer." }));
    if (mine !== turn) return;
    if (answer.error) { out.replaceChildren(make("p", { class: "notice bad", role: "alert" }, answer.error)); return; }
    const cell = (n, label) => make("div", {}, make("b", {}, n), make("small", {}, label));
    out.replaceChildren(cell(number(answer.lora), "P_LoRA = L · q · r · 2n  (3)"), cell(number(answer.nora), "P_NoRA = L · q · r_out · r_in · 2  (4)"), cell(times(answer.ratio), "ratio = r · n / (r_out · r_in)  (5)"), cell(times(answer.approximate), "≈ n / r_out, where r_in = r  (6)"));
  };
  inputs.forEach((i) => i.addEventListener("input", solve));
  solve();
}

setUp();
facts(); cards(); table(); charts();
const query = Object.fromEntries(new URLSearchParams(location.search));
if (query.tab === "budget" && (query.arch || query.m || query.budget)) {
  asked(() => server.budget_link(query)).then((answer) => {
    if (answer.error) { fail(answer.error); return; }
    state = answer.state; moved = performance.now(); update();
  });
}
