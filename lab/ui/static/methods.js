/* Which methods are compared, and their settings.
   props.value: {chosen: [id], knobs: {id: {name: value}}}; props.rows: the registry; props.counts: {id: {text, error}}. */
const list = element.querySelector(".methods");
const details = element.querySelector("details");
const rest = element.querySelector(".rest");
const search = element.querySelector("input.search");
const PINNED = props.pinned || 6;
const value = () => JSON.parse(JSON.stringify(props.value || { chosen: [], knobs: {} }));

function commit(change, wait = 0) {
  const now = value();
  change(now);
  props.value = now;
  clearTimeout(commit.timer);
  commit.timer = setTimeout(() => trigger("input"), wait);
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function control(row, knob) {
  const given = (value().knobs[row.id] || {})[knob.name];
  const now = given === undefined ? knob.default : given;
  let input;
  if (knob.type === "choice") {
    input = make("select");
    knob.choices.forEach((c) => { const o = make("option", "", c); o.value = c; input.append(o); });
    input.value = now;
  } else {
    input = make("input");
    input.type = knob.type === "bool" ? "checkbox" : knob.type === "text" ? "text" : "number";
    if (knob.type === "bool") input.checked = Boolean(now);
    else {
      input.value = now === null ? "" : now;
      if (now === null || knob.default === null) input.placeholder = "automatic";
      if (knob.low !== null) input.min = knob.low;
      if (knob.high !== null) input.max = knob.high;
      if (input.type === "number") input.step = knob.type === "int" ? 1 : "any";
    }
  }
  input.dataset.knob = `${row.id}.${knob.name}`;
  input.addEventListener("input", () => {
    const set = knob.type === "bool" ? input.checked : input.value;
    commit((now) => {
      const mine = (now.knobs[row.id] = now.knobs[row.id] || {});
      if (set === "" || set === knob.default || String(set) === String(knob.default)) delete mine[knob.name];
      else mine[knob.name] = set;
    }, 250);
  });
  const label = make("label", "knob");
  const words = make("span");
  words.append(make("b", "", knob.name), make("small", "", knob.help));
  label.append(words, input);
  return label;
}

function card(row) {
  const node = make("div", "method");
  node.dataset.method = row.id;
  node.style.setProperty("--c", row.colour);
  const head = make("div", "head");
  const label = make("label");
  const tick = make("input");
  tick.type = "checkbox";
  tick.name = row.id;
  tick.checked = value().chosen.includes(row.id);
  node.classList.toggle("on", tick.checked);
  tick.addEventListener("change", () => {
    node.classList.toggle("on", tick.checked);
    commit((now) => {
      now.chosen = now.chosen.filter((id) => id !== row.id);
      if (tick.checked) now.chosen.push(row.id);
    });
  });
  const names = make("span", "names");
  names.append(make("b", "", row.name), make("small", "", row.kind));
  label.append(tick, make("i", "dot"), names);
  head.append(label, make("span", "count"));
  node.append(head, make("p", "summary-line", row.summary));
  if (row.knobs.length) {
    const settings = make("details");
    const open = make("summary", "", "Settings");
    const panel = make("div", "knobs");
    settings.append(open, panel);
    settings.addEventListener("toggle", () => {
      if (settings.open && !panel.childElementCount) panel.append(...row.knobs.map((k) => control(row, k)));
    });
    node.append(settings);
  }
  return node;
}

function counts() {
  element.querySelectorAll(".method").forEach((node) => {
    const known = (props.counts || {})[node.dataset.method];
    const badge = node.querySelector(".count");
    badge.textContent = known ? known.text : "";
    badge.title = known ? known.error || "trainable parameters with these settings" : "";
    badge.classList.toggle("bad", Boolean(known && known.error));
  });
}

function draw() {
  const chosen = value().chosen, rows = props.rows || [];
  const pinned = rows.filter((r, i) => i < PINNED || chosen.includes(r.id));
  const others = rows.filter((r) => !pinned.includes(r));
  list.replaceChildren(...pinned.map(card));
  rest.replaceChildren(...others.map(card));
  details.hidden = !others.length;
  details.querySelector("summary").textContent = `${others.length} more methods`;
  counts();
}

search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const byId = Object.fromEntries((props.rows || []).map((r) => [r.id, `${r.id} ${r.name} ${r.kind} ${r.summary}`.toLowerCase()]));
  rest.querySelectorAll(".method").forEach((node) => {
    node.hidden = !words.every((w) => byId[node.dataset.method].includes(w));
  });
});
watch(["value", "rows"], draw);
watch("counts", counts);
draw();
