// Tables that can be sorted by any column and filtered by words. Without it they are plain tables.
for (const part of document.querySelectorAll(".data")) {
  const body = part.querySelector("tbody"), rows = [...body.rows];
  if (rows.length < 2) continue;
  const tools = part.querySelector(".tools"), count = tools.querySelector("span");
  const filter = tools.querySelector("input"), heads = [...part.querySelectorAll("thead th")];

  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
  };

  const key = (row, column) => row.cells[column].dataset.v;
  const sort = (column, sign) => {
    const number = heads[column].classList.contains("number");
    rows.sort((a, b) => {
      const x = key(a, column), y = key(b, column);
      if (x === "" || y === "") return (x === "") - (y === "");  // unknown comes last, either way
      return sign * (number ? x - y : x.localeCompare(y, undefined, {numeric: true}));
    });
    body.append(...rows);
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      // Numbers begin with the largest, words with the first.
      const first = head.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const one of heads) one.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      sort(column, order === "ascending" ? 1 : -1);
    });
  });
  filter.addEventListener("input", show);
  show();
  tools.hidden = false;
}
