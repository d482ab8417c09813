"use strict";
// Every figure of the page: `pageCharts.draw(hidden)` draws them, less the traces whose `meta.part` is hidden.
const pageCharts = (() => {
  const root = document.documentElement;
  root.classList.remove("no-script");
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

  function draw(hidden = new Set()) {
    const style = getComputedStyle(root);
    // A finger on a chart scrolls the page; only a mouse drags to zoom.
    const dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
    for (const { box, figure } of figures) {
      const { data, layout } = themed(figure, style);
      for (const trace of data) if (trace.meta && hidden.has(trace.meta.part)) trace.visible = false;
      Plotly.react(box, data, { ...layout, dragmode }, { responsive: true, displayModeBar: false });
    }
  }

  return { draw };
})();
