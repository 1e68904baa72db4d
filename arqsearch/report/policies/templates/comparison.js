"use strict";
// Sortable tables: numbers by their data-key, the rest by text; equal rows keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const upward = head.getAttribute("aria-sort") === "descending" || (column === 0 && !head.hasAttribute("aria-sort"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", upward ? "ascending" : "descending");
      const sign = upward ? 1 : -1;
      const value = (row) => {
        const key = row.cells[column].dataset.key;
        return key === undefined ? row.cells[column].textContent.trim() : Number(key);
      };
      const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      const rows = [...table.tBodies[0].rows].sort((a, b) => sign * order(value(a), value(b)));
      table.tBodies[0].append(...rows);
    });
  });
}

// Plots: the page's own colours and font, the legend below on narrow pages, drawn again when the width changes.
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const NARROW = 640;

function merged(base, extra) {
  const out = { ...base };
  for (const [key, value] of Object.entries(extra)) {
    const plain = value && typeof value === "object" && !Array.isArray(value);
    out[key] = plain ? merged(base[key] || {}, value) : value;
  }
  return out;
}

function layout(figure, width, paper) {
  const style = getComputedStyle(document.body);
  const ink = paper ? "#1d2126" : style.color;
  const grid = "rgba(138,147,160,.25)";
  const narrow = width < NARROW;
  const names = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
  const axis = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, fixedrange: narrow };
  const rows = Math.ceil(names / Math.max(1, Math.floor(width / 118)));
  const legend = narrow
    ? { orientation: "h", x: 0, y: -0.28, yanchor: "top", font: { size: 11 } }
    : { x: 1.01, y: 1, font: { size: 12 } };
  const own = figure.layout;
  return merged(
    {
      width,
      height: own.height || (narrow ? 300 + 20 * rows : Math.max(400, 90 + 27 * names)),
      margin: { l: 12, r: 12, t: 12, b: narrow && names ? 60 + 20 * rows : 48 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: style.fontFamily, size: narrow ? 11 : 13, color: ink },
      hoverlabel: { font: { family: style.fontFamily, size: 12 } },
      legend,
      xaxis: axis,
      yaxis: axis,
    },
    own,
  );
}

function draw(paper) {
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById(name);
    const options = { displaylogo: false, responsive: false, displayModeBar: false };
    Plotly.react(place, figure.data, layout(figure, place.clientWidth, paper), options);
  }
}

draw(false);
let timer;
window.addEventListener("resize", () => {
  clearTimeout(timer);
  timer = setTimeout(() => draw(false), 150);
});
dark.addEventListener("change", () => draw(false));
window.addEventListener("beforeprint", () => draw(true));
window.addEventListener("afterprint", () => draw(false));
document.documentElement.dataset.ready = "yes";
