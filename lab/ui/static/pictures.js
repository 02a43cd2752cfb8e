/* The pictures of a draft: what is trained on (a square that can be dragged and resized) and its caption.
   props.value: [{id, name, width, height, crop: [left, top, size], caption}], crop in pixels of the picture. */
const root = element.querySelector(".pics"), foot = element.querySelector(".picsfoot");
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const items = () => JSON.parse(JSON.stringify(props.value || []));
const whole = (p) => {
  const size = Math.min(p.width, p.height);
  return [Math.floor((p.width - size) / 2), Math.floor((p.height - size) / 2), size];
};

function commit(index, change, redraw = false) {
  const list = items();
  if (!list[index]) return;
  if (change === null) list.splice(index, 1); else Object.assign(list[index], change);
  props.value = list;
  if (redraw) draw();
  trigger("input");
}

function place(square, p, crop) {
  const [left, top, size] = crop;
  Object.assign(square.style, {
    left: `${(100 * left) / p.width}%`, top: `${(100 * top) / p.height}%`,
    width: `${(100 * size) / p.width}%`, height: `${(100 * size) / p.height}%`,
  });
}

function cropper(p, index) {
  const square = document.createElement("div");
  square.className = "crop";
  square.tabIndex = 0;
  square.setAttribute("role", "group");
  square.setAttribute("aria-label", `square of picture ${index + 1} that is trained on: arrow keys move it, plus and minus resize it`);
  const handle = document.createElement("i");
  square.append(handle);
  let crop = p.crop || whole(p);
  place(square, p, crop);
  const least = Math.min(32, p.width, p.height);
  const moved = ([left, top, size]) => {
    size = Math.round(clamp(size, least, Math.min(p.width, p.height)));
    crop = [Math.round(clamp(left, 0, p.width - size)), Math.round(clamp(top, 0, p.height - size)), size];
    place(square, p, crop);
  };
  square.addEventListener("pointerdown", (start) => {
    start.preventDefault();
    square.setPointerCapture(start.pointerId);
    const scale = p.width / square.parentElement.clientWidth, from = [...crop], resizing = start.target === handle;
    const drag = (event) => {
      const dx = (event.clientX - start.clientX) * scale, dy = (event.clientY - start.clientY) * scale;
      if (resizing) {
        const size = Math.min(from[2] + Math.max(dx, dy), p.width - from[0], p.height - from[1]);
        moved([from[0], from[1], size]);
      } else moved([from[0] + dx, from[1] + dy, from[2]]);
    };
    const stop = () => {
      square.removeEventListener("pointermove", drag);
      square.removeEventListener("pointerup", stop);
      square.removeEventListener("pointercancel", stop);
      commit(index, { crop });
    };
    square.addEventListener("pointermove", drag);
    square.addEventListener("pointerup", stop);
    square.addEventListener("pointercancel", stop);
  });
  square.addEventListener("keydown", (event) => {
    const step = Math.max(1, Math.round(p.width / 50));
    const by = { ArrowLeft: [-step, 0, 0], ArrowRight: [step, 0, 0], ArrowUp: [0, -step, 0], ArrowDown: [0, step, 0],
                 "+": [-step, -step, 2 * step], "=": [-step, -step, 2 * step], "-": [step, step, -2 * step] }[event.key];
    if (!by) return;
    event.preventDefault();
    moved(crop.map((v, i) => v + by[i]));
    commit(index, { crop });
  });
  return square;
}

function card(p, index) {
  const pic = document.createElement("div");
  pic.className = "pic";
  const box = document.createElement("div");
  box.className = "box";
  const frame = document.createElement("div");
  frame.className = "frame";
  frame.style.aspectRatio = `${p.width} / ${p.height}`;
  frame.style[p.width >= p.height ? "width" : "height"] = "100%";
  const img = document.createElement("img");
  img.src = `files/drafts/${encodeURIComponent(p.id)}.png`;
  img.alt = `picture ${index + 1}`;
  img.draggable = false;
  frame.append(img, cropper(p, index));
  box.append(frame);

  const remove = document.createElement("button");
  remove.className = "remove";
  remove.type = "button";
  remove.textContent = "×";
  remove.title = "Leave this picture out";
  remove.setAttribute("aria-label", `leave picture ${index + 1} out`);
  remove.addEventListener("click", () => commit(index, null, true));

  const caption = document.createElement("textarea");
  caption.rows = 2;
  caption.maxLength = 300;
  caption.value = p.caption || "";
  caption.placeholder = props.placeholder || "a caption";
  caption.setAttribute("aria-label", `caption of picture ${index + 1}`);
  caption.addEventListener("input", () => {
    const list = items();
    if (list[index]) { list[index].caption = caption.value; props.value = list; }
  });
  caption.addEventListener("change", () => trigger("input"));

  const foot = document.createElement("div");
  foot.className = "foot";
  const size = document.createElement("span");
  size.textContent = `${p.width}×${p.height}`;
  const reset = document.createElement("button");
  reset.type = "button";
  reset.textContent = "reset crop";
  reset.addEventListener("click", () => commit(index, { crop: whole(p) }, true));
  foot.append(size, reset);
  pic.append(box, remove, caption, foot);
  return pic;
}

function draw() {
  const list = items();
  root.replaceChildren(...list.map(card));
  foot.replaceChildren();
  if (!list.length) return;
  const clear = document.createElement("button");
  clear.type = "button";
  clear.className = "act";
  clear.textContent = "Start over";
  clear.addEventListener("click", () => { props.value = []; draw(); trigger("input"); });
  foot.append(`${list.length} of 3 to 20 pictures`, clear);
}
watch("value", draw);
watch("placeholder", () => root.querySelectorAll("textarea").forEach((t) => { t.placeholder = props.placeholder; }));
draw();
