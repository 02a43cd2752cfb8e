/* What the page does without asking the server: theme, address bar, enlarging pictures, sliders over pictures. */
(() => {
  const store = { get: (k) => { try { return localStorage.getItem(k); } catch { return null; } },
                  set: (k, v) => { try { localStorage.setItem(k, v); } catch { /* private window */ } } };

  /* ---- theme: the visitor's choice, or the system's; `?__theme=` (Gradio's own) wins ---- */
  const asked = new URLSearchParams(location.search).get("__theme");
  const wantsDark = () => {
    const choice = asked || store.get("nora_theme");
    return choice ? choice === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const paint = () => {
    document.documentElement.classList.toggle("dark", wantsDark());
    document.body?.classList.toggle("dark", wantsDark());
  };
  paint();
  document.addEventListener("DOMContentLoaded", () => {
    paint();
    // Gradio sets the class from the system's preference when it mounts: keep the visitor's choice.
    let kept = 0;
    const observer = new MutationObserver(() => {
      if (document.body.classList.contains("dark") !== dark && kept++ < 20) document.body.classList.toggle("dark", dark);
    });
    let dark = wantsDark();
    observer.observe(document.body, { attributes: true, attributeFilter: ["class"] });
    const turn = (to) => {
      dark = to;
      kept = 0;
      document.documentElement.classList.toggle("dark", dark);
      document.body.classList.toggle("dark", dark);
    };
    lab.theme = () => {
      turn(!document.body.classList.contains("dark"));
      store.set("nora_theme", dark ? "dark" : "light");
    };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => turn(wantsDark()));
  });

  /* ---- address bar: each tab has its own parameters, the open tab's stand there ---- */
  const first = Object.fromEntries(new URLSearchParams(location.search));
  const kept = {};
  let current = first.tab || "subject", arrived = false;
  kept[current] = Object.fromEntries(Object.entries(first).filter(([k]) => k !== "tab" && !k.startsWith("__")));
  // An address that names a comparison opens on it: the setup is not flashed before.
  const opened = () => { delete document.documentElement.dataset.opening; };
  if (kept.subject?.comparison) { document.documentElement.dataset.opening = "1"; setTimeout(opened, 15000); }
  const write = () => {
    const query = new URLSearchParams({ tab: current, ...kept[current] });
    if (asked) query.set("__theme", asked);
    history.replaceState(null, "", `${location.pathname}?${query}`);
  };
  // The address follows the panel that is shown. Gradio's own event comes late or for its default tab, and shows that
  // one first: until the tab that the address asks for has been shown, or the visitor has gone to another, it stands.
  const panel = () => [...document.querySelectorAll(".tabitem[id^='tab-']")].find((node) => node.offsetParent)?.id.slice(4);
  const look = () => {
    const tab = panel();
    if (!tab || (tab !== current && !arrived)) return;
    arrived = true;
    if (tab !== current) { current = tab; write(); }
  };
  const turned = () => [50, 300, 1000, 3000].forEach((ms) => setTimeout(look, ms));
  new MutationObserver(turned).observe(document.documentElement, { subtree: true, attributeFilter: ["aria-selected"] });
  addEventListener("click", (event) => { if (event.target.closest?.("[role=tab], .overflow-dropdown")) { arrived = true; turned(); } }, { capture: true });
  turned();
  const lab = (window.lab = {
    params(tab, values) {
      kept[tab] = Object.fromEntries(Object.entries(values).filter(([, v]) => v !== null && v !== undefined && v !== ""));
      if (tab === current) write();
      if (tab === "subject") opened();
    },
    theme() {},
  });

  /* ---- pictures: click enlarges, arrow keys go on to the neighbours in the grid ---- */
  let box, cells = [], at = 0;
  const show = (index) => {
    at = (index + cells.length) % cells.length;
    const img = cells[at];
    box.querySelector("img").src = img.currentSrc || img.src;
    box.querySelector("img").alt = img.alt;
    box.querySelector("figcaption").textContent = img.alt;
  };
  const move = (key) => {
    const row = cells[at].closest("[data-row]");
    const width = row ? row.querySelectorAll("img[data-zoom]").length || 1 : 1;
    show(at + { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width }[key]);
  };
  const open = (img) => {
    if (!box) {
      box = document.createElement("dialog");
      box.className = "lightbox";
      box.innerHTML = '<figure><img alt=""><figcaption></figcaption></figure>' +
        '<button class="prev" aria-label="previous picture">‹</button><button class="next" aria-label="next picture">›</button>' +
        '<button class="close" aria-label="close">×</button>';
      box.addEventListener("click", (event) => {
        if (event.target.closest(".prev")) move("ArrowLeft");
        else if (event.target.closest(".next")) move("ArrowRight");
        else if (!event.target.closest("img")) box.close();
      });
      box.addEventListener("keydown", (event) => {
        if (event.key.startsWith("Arrow")) { event.preventDefault(); move(event.key); }
      });
      document.body.append(box);
    }
    cells = [...(img.closest("[data-zooms]") || img.parentElement).querySelectorAll("img[data-zoom]")];
    box.showModal();
    show(cells.indexOf(img));
  };
  document.addEventListener("click", (event) => {
    const img = event.target.closest?.("img[data-zoom]");
    if (img) { open(img); return; }
    if (event.target.closest?.("[data-theme-toggle]")) lab.theme();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches?.("img[data-zoom]")) open(event.target);
  });

  /* ---- two pictures over each other: the range input moves the cut ---- */
  document.addEventListener("input", (event) => {
    if (event.target.matches?.("input[data-cut]")) {
      event.target.closest(".over").style.setProperty("--cut", `${event.target.value}%`);
    }
  });
})();
