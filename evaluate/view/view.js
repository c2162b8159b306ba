"use strict";
const get = (id) => document.getElementById(id);
const stage = get("stage"), sheet = get("sheet"), line = get("line");
const images = [...document.querySelectorAll(".layer")], abouts = [...document.querySelectorAll(".about")];
const area = () => stage.getBoundingClientRect();
let scale = 1, x = 0, y = 0;

// The right layer is cut off left of the line, wherever the sheet was moved to.
function draw() {
  const left = Number(get("left").value), right = Number(get("right").value);
  const share = get("swipe").value / 1000, width = area().width;
  sheet.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
  line.style.left = `${share * width}px`;
  images.forEach((image, index) => {
    image.style.visibility = index === left || index === right ? "visible" : "hidden";
    image.style.zIndex = index === right ? 1 : 0;
    image.style.opacity = index === right && left !== right ? get("opacity").value / 100 : 1;
    const cut = index === right && left !== right ? (share * width - x) / scale : 0;
    image.style.clipPath = cut > 0 ? `inset(0 0 0 ${cut}px)` : "none";
    image.classList.toggle("near", scale > 3);
  });
  abouts.forEach((about, index) => { about.hidden = index !== left && index !== right; });
}

function zoom(factor, atX, atY) {
  const next = Math.min(40, Math.max(1, scale * factor));
  x = atX - (atX - x) * next / scale;
  y = atY - (atY - y) * next / scale;
  scale = next;
  move(0, 0);
}

// No edge of the sheet comes inside the stage.
function move(byX, byY) {
  x = Math.min(0, Math.max(area().width * (1 - scale), x + byX));
  y = Math.min(0, Math.max(area().height * (1 - scale), y + byY));
  draw();
}

stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = area();
  zoom(event.deltaY < 0 ? 1.25 : 0.8, event.clientX - box.left, event.clientY - box.top);
}, { passive: false });
stage.addEventListener("pointerdown", (event) => stage.setPointerCapture(event.pointerId));
stage.addEventListener("pointermove", (event) => {
  if (event.buttons) move(event.movementX, event.movementY);
});
for (const id of ["left", "right", "swipe", "opacity"]) get(id).addEventListener("input", draw);
get("in").addEventListener("click", () => zoom(1.5, area().width / 2, area().height / 2));
get("out").addEventListener("click", () => zoom(1 / 1.5, area().width / 2, area().height / 2));
get("fit").addEventListener("click", () => { scale = 1; x = 0; y = 0; draw(); });
addEventListener("resize", () => move(0, 0));
draw();
