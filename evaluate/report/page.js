// Each column heading of a plain table becomes a button that sorts it; the page reads the same without.
const number = (cell) => parseFloat(cell.textContent.replaceAll(",", ""));
const compare = (a, b) => {
  const [x, y] = [number(a), number(b)];
  return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || a.textContent.localeCompare(b.textContent) : x - y;
};
const sort = (heading) => {
  const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
  const descending = heading.ariaSort !== "descending" && column > 0;
  const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column]));
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...(descending ? rows.reverse() : rows));
};
for (const heading of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => sort(heading));
}
