"use strict";
for (const map of document.querySelectorAll(".map")) {
  const frame = map.querySelector(".frame"), svg = map.querySelector("svg"), said = map.querySelector("output");
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  const points = [...svg.querySelectorAll("[id$='-records'] > use")];
  const fingers = new Map();
  let x = 0, y = 0, zoom = 1, moved = 0;

  function show() {
    x = Math.min(Math.max(x, 0), width - width / zoom);
    y = Math.min(Math.max(y, 0), height - height / zoom);
    svg.setAttribute("viewBox", [x, y, width / zoom, height / zoom].join(" "));
    // Points grow less than the map, so that near ones part.
    svg.style.setProperty("--point", zoom ** -0.7);
    // The whole map lets a finger scroll the page.
    frame.style.touchAction = zoom > 1 ? "none" : "pan-y";
  }

  function zoomTo(wanted, at) {
    const next = Math.min(Math.max(wanted, 1), 64);
    x = at.x - (at.x - x) * zoom / next;
    y = at.y - (at.y - y) * zoom / next;
    zoom = next;
    show();
  }

  function place(event) {
    const box = svg.getBoundingClientRect();
    const scale = width / zoom / box.width;
    return { x: x + (event.clientX - box.left) * scale, y: y + (event.clientY - box.top) * scale, scale };
  }

  const middle = () => ({ x: x + width / zoom / 2, y: y + height / zoom / 2 });

  function name(event) {
    const at = place(event);
    let nearest = null, least = 16 * at.scale;
    for (const point of points) {
      point.classList.remove("chosen");
      const distance = Math.hypot(point.getAttribute("x") - at.x, point.getAttribute("y") - at.y);
      if (distance < least) [nearest, least] = [point, distance];
    }
    nearest?.classList.add("chosen");
    said.textContent = nearest?.querySelector("title")?.textContent ?? "";
  }

  frame.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event);
    if (fingers.size === 1) moved = 0;
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const other = [...fingers.values()].find((finger) => finger.pointerId !== event.pointerId);
    const scale = place(event).scale / fingers.size;
    x -= (event.clientX - before.clientX) * scale;
    y -= (event.clientY - before.clientY) * scale;
    moved += Math.hypot(event.clientX - before.clientX, event.clientY - before.clientY);
    fingers.set(event.pointerId, event);
    if (other) {
      const apart = (finger) => Math.hypot(finger.clientX - other.clientX, finger.clientY - other.clientY);
      const between = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
      zoomTo(zoom * apart(event) / Math.max(apart(before), 1), place(between));
    } else show();
  });
  frame.addEventListener("pointerup", (event) => {
    if (fingers.size === 1 && moved < 5) name(event);
    fingers.delete(event.pointerId);
  });
  frame.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  frame.addEventListener("dblclick", (event) => zoomTo(zoom * 2, place(event)));
  frame.addEventListener("wheel", (event) => {
    // Without a key, or the map in use, the wheel scrolls the page.
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== frame) return;
    event.preventDefault();
    zoomTo(zoom * 2 ** (-event.deltaY / 200), place(event));
  }, { passive: false });
  frame.addEventListener("keydown", (event) => {
    const step = width / zoom / 8;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in moves) {
      x += moves[event.key][0];
      y += moves[event.key][1];
      show();
    } else if ("+=".includes(event.key)) zoomTo(zoom * 1.5, middle());
    else if (event.key === "-") zoomTo(zoom / 1.5, middle());
    else if (event.key === "0") zoomTo(1, middle());
    else return;
    event.preventDefault();
  });
  for (const button of map.querySelectorAll("button"))
    button.addEventListener("click", () => zoomTo(zoom * button.dataset.zoom, middle()));
  map.querySelector(".buttons").hidden = false;
  show();
}
