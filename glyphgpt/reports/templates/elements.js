// Parts of the pages of reports.

// ---------------------------------------------------------------- elements: strings become text nodes, never markup

const fill = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter(child => child !== null));
  return node;
};
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

// Replace control characters, except tabs and newlines, with Unicode's symbols, and lone surrogates with U+FFFD.
const visible = text => text.replace(/\p{Surrogate}/gu, "\ufffd").replace(/[\0-\x08\x0b-\x1f\x7f]/g,
  found => String.fromCharCode(found === "\x7f" ? 0x2421 : 0x2400 + found.charCodeAt()));

const section = (title, ...children) => html("section", { "aria-label": title }, ...children);

// Items are [name, value, note].
const highlights = items => html("dl", { class: "highlights" }, ...items.map(([name, value, note]) =>
  html("div", {}, html("dt", {}, name), html("dd", {}, value), html("dd", { class: "muted" }, note))));

// Columns are [name, class]. A row is a list of cells, or a string: a heading above the rows that follow.
const table = (columns, rows) => html("table", { class: "responsive" },
  html("thead", {}, html("tr", {}, ...columns.map(([name, kind]) => html("th", { scope: "col", class: kind }, name)))),
  html("tbody", {}, ...rows.map(row => html("tr", {}, ...(typeof row === "string"
    ? [html("th", { colspan: columns.length, scope: "colgroup" }, row)]
    : row.map((cell, i) => html("td", { class: columns[i][1], "data-column": columns[i][0] }, visible(cell))))))));
