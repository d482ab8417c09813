"use strict";
(() => {
  const root = document.documentElement;
  root.classList.remove("no-script");
  const hidden = new Set();
  const figures = [...document.querySelectorAll("script[data-chart]")].map((element) => ({
    box: document.getElementById(element.dataset.chart),
    figure: JSON.parse(element.textContent),
  }));

  // Figures name colours as CSS variables; plotly needs their values, which differ between light and dark.
  function themed(value, style) {
    if (typeof value === "string") return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    return value;
  }

  function draw() {
    const style = getComputedStyle(root);
    // A finger on a chart scrolls the page; only a mouse drags to zoom.
    const dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
    for (const { box, figure } of figures) {
      const { data, layout } = themed(figure, style);
      for (const trace of data) if (trace.meta && hidden.has(trace.meta.part)) trace.visible = false;
      Plotly.react(box, data, { ...layout, dragmode }, { responsive: true, displayModeBar: false });
    }
  }

  const table = document.getElementById("layers");
  const body = table.tBodies[0];

  function compare(column, descending) {
    const number = (row) => row.cells[column].dataset.order;
    return (a, b) => {
      const [x, y] = [number(a), number(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return descending ? y - x : x - y;
    };
  }

  function sortBy(head) {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...[...body.rows].sort(compare(head.cellIndex, descending)));
  }

  function togglePart(part) {
    hidden.has(part) ? hidden.delete(part) : hidden.add(part);
    for (const button of document.querySelectorAll("button.part")) button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.part)));
    for (const row of body.rows) row.hidden = hidden.has(row.dataset.part) && !row.dataset.marked;
    draw();
  }

  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (head) sortBy(head);
  });
  for (const button of document.querySelectorAll("button.part")) button.addEventListener("click", () => togglePart(button.dataset.part));
  const more = document.querySelector(".extra-toggle");
  more.addEventListener("click", () => more.setAttribute("aria-pressed", String(table.classList.toggle("all-columns"))));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
})();
