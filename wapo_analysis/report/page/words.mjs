// Numbers and texts as people read them.

export const CLASSES = ["pos_peak", "pos_valley", "neg_peak", "neg_valley"];

const MARKS = { " ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d" };

// Three significant digits; what is missing is said, never 0.
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "n/a";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(3)));
}

export function signed(value) {
  const text = number(value);
  return value > 0 ? `+${text}` : text;
}

export function percent(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "n/a";
  const share = 100 * value;
  return `${Math.abs(share) >= 10 || share === 0 ? share.toFixed(0) : share.toFixed(1)}%`;
}

// Control and direction characters spelled out, so that a text cannot hide or reorder anything.
export function escaped(text) {
  return String(text).replace(
    /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
    (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

// A token's text with its blanks and line breaks visible.
export function visible(text) {
  return escaped(String(text).replace(/[ \n\t\r]/g, (sign) => MARKS[sign]));
}

export function short(text, limit = 90) {
  const line = escaped(String(text ?? "").replace(/\s+/g, " ").trim());
  return line.length <= limit ? line : `${line.slice(0, limit - 1)}\u2026`;
}

export function sum(values) {
  let total = 0;
  for (const value of values) if (Number.isFinite(value)) total += value;
  return total;
}
