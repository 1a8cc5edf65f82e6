// Elements from names, attributes and children. Text is always set as text, never as markup.

export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (key === "style") node.style.cssText = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function fill(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter(Boolean));
  return node;
}

export const byId = (id) => document.getElementById(id);

// A table; numeric columns are right-aligned. `rows` hold texts or nodes.
export function table(header, rows, { numeric = [], caption = null } = {}) {
  const cell = (tag) => (content, i) => el(tag, {
    class: numeric.includes(i) ? "num" : null, scope: tag === "th" ? "col" : null }, content);
  return el("table", {}, caption && el("caption", {}, caption),
    el("thead", {}, el("tr", {}, header.map(cell("th")))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell("td"))))));
}

export function swatch(cls) {
  return el("span", { class: "swatch", style: `background:var(--${cls.replace("_", "-")})`, "aria-hidden": "true" });
}

export function classTag(cls) {
  return el("span", { class: "cls" }, swatch(cls), cls);
}
