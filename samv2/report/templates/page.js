"use strict";
/* Sorting of tables, and the choice of a layer and a walk. Without it all is shown. */

function cellValue(row, index) {
  const cell = row.cells[index];
  if (!cell) return "";
  const raw = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(String(raw).replace(/[,\s]|[%★]$/g, "").replace("−", "-"));
  return raw === "" || raw === "–" ? null : Number.isNaN(number) ? raw : number;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), undefined, { numeric: true });
}

function sortBy(table, header, index) {
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [cellValue(row, index), row]);
  rows.sort(([a], [b]) => (a === null || b === null ? compare(a, b) : (down ? -1 : 1) * compare(a, b)));
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((header, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sortBy(table, header, index));
  });
}

for (const group of document.querySelectorAll("[data-layers]")) {
  const layers = [...group.querySelectorAll("[data-layer]")];
  const choice = group.querySelector("[data-layer-choice]");
  const walks = group.querySelector("[data-walk-choice]");
  const show = () => {
    layers.forEach((layer, index) => { layer.hidden = index !== Number(choice.value); });
    for (const walk of group.querySelectorAll("[data-walk]")) {
      walk.classList.toggle("off", Boolean(walks) && walk.dataset.walk !== walks.value);
    }
  };
  choice.addEventListener("change", show);
  if (walks) walks.addEventListener("change", show);
  for (const button of group.querySelectorAll("[data-layer-step]")) {
    button.addEventListener("click", () => {
      const next = Number(choice.value) + Number(button.dataset.layerStep);
      choice.value = String((next + layers.length) % layers.length);
      show();
    });
  }
  show();
}

if (window.matchMedia("(max-width: 70rem)").matches) {
  document.querySelector(".contents details").open = false;
}
