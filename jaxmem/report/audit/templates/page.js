"use strict";
// Sorting by a click on a heading, again for the reverse; rows without a value stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const heading = button.closest("th");
    const column = heading.cellIndex;
    const was = heading.getAttribute("aria-sort");
    const first = heading.dataset.first || "ascending";
    const order = was === null ? first : was === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const numeric = !heading.hasAttribute("data-text");
    const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, key: row.cells[column].dataset.value ?? "" }));
    rows.sort((a, b) => {
      if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
      return sign * (numeric ? a.key - b.key : a.key.localeCompare(b.key));
    });
    table.tBodies[0].append(...rows.map((entry) => entry.row));
  });
}
// Only the prompts that contain what was typed.
for (const input of document.querySelectorAll("input[data-filters]")) {
  const rows = document.getElementById(input.dataset.filters).tBodies[0].rows;
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase();
    for (const row of rows) row.hidden = !row.dataset.search.toLowerCase().includes(words);
  });
}
// Paper cannot be clicked: what is folded is opened for it, and all prompts are there.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const part of closed) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});
