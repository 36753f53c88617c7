"use strict";
// Sorting and filtering of the table, and a line under each plot that says what is pointed at. The page is whole without.
for (const figure of document.querySelectorAll("figure")) {
  const said = figure.querySelector("output");
  const say = (event) => {
    const title = event.target.closest("rect, circle, polyline, text")?.querySelector("title");
    if (title) said.textContent = title.textContent;
  };
  figure.addEventListener("pointerover", say);
  figure.addEventListener("click", say);
}
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending" && (column > 0 || head.hasAttribute("aria-sort"));
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[column], given = cell.dataset.v;
      return [given === undefined ? cell.textContent : given === "" ? null : Number(given), row];
    });
    const order = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    keyed.sort(([a], [b]) => a === null ? (b === null ? 0 : 1) : b === null ? -1 : down ? order(b, a) : order(a, b));
    body.append(...keyed.map(([, row]) => row));
  }));
}
const filter = document.querySelector("input[type=search]");
filter?.addEventListener("input", () => {
  const wanted = filter.value.toLowerCase();
  let count = 0;
  for (const row of document.querySelector("#tensors").tBodies[0].rows) {
    const hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    row.classList.toggle("hidden", hidden);
    count += hidden ? 0 : 1;
  }
  document.querySelector("#shown").textContent = `${count} shown`;
});
