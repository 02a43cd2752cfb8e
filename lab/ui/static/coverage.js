/* The Coverage tab in the browser: saves a plot as a PNG. Gradio shows no button of plotly's, so its layers are drawn
   onto a canvas here, with the colours that the page's style sheet gives them written into the copy. */
const LOOKS = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "opacity", "font-family", "font-size", "font-weight", "text-anchor"];
function copied(svg) {
  const copy = svg.cloneNode(true), from = svg.querySelectorAll("*"), to = copy.querySelectorAll("*");
  from.forEach((node, i) => {
    const look = getComputedStyle(node);
    for (const name of LOOKS) to[i].style.setProperty(name, look.getPropertyValue(name));
  });
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  return copy;
}
async function picture(id) {
  const plot = document.querySelector(`#${id} .js-plotly-plot`);
  const layers = [...plot.querySelectorAll("svg.main-svg")], { width, height } = layers[0].getBoundingClientRect();
  const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
  const paint = canvas.getContext("2d");
  paint.fillStyle = getComputedStyle(document.body).backgroundColor;
  paint.fillRect(0, 0, canvas.width, canvas.height);
  for (const layer of layers) {
    const copy = copied(layer);
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
    await image.decode();
    paint.drawImage(image, 0, 0, canvas.width, canvas.height);
  }
  return canvas.toDataURL("image/png");
}
element.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-png]");
  if (!button) return;
  const link = document.createElement("a");
  link.href = await picture(button.dataset.png);
  link.download = button.dataset.name;
  link.click();
});
