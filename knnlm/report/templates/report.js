"use strict";
(() => {
  const hidden = new Set();
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
    pageCharts.draw(hidden);
  }

  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (head) sortBy(head);
  });
  for (const button of document.querySelectorAll("button.part")) button.addEventListener("click", () => togglePart(button.dataset.part));
  const more = document.querySelector(".extra-toggle");
  more.addEventListener("click", () => more.setAttribute("aria-pressed", String(table.classList.toggle("all-columns"))));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => pageCharts.draw(hidden));
  pageCharts.draw(hidden);
})();
