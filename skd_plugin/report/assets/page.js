// What charts and traces share: the theme, small helpers, and unpacking the traces.
"use strict";

const Report = {
  element: (tag, properties = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.includes("-") || name === "role") made.setAttribute(name, value);
      else made[name] = value;
    }
    made.append(...children);
    return made;
  },
  byId: (id) => document.getElementById(id),
  colour: (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim(),
  percent: (share) => {
    if (Math.abs(share) >= 1e15) return Report.number(share);
    const value = 100 * share;
    if (value >= 99.95 || value === 0) return `${Math.round(value)}\u00a0%`;
    if (value < 1e-4) return "<\u00a00.0001\u00a0%";
    return value >= 0.1 ? `${value.toFixed(1)}\u00a0%` : `${value.toPrecision(1)}\u00a0%`;
  },
  number: (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e15) return value.toPrecision(4);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return size >= 1e-3 ? String(Number(value.toPrecision(4))) : value.toExponential(1);
  },
  themeListeners: [],
};

(() => {
  const root = document.documentElement;
  const button = Report.byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;

  function show(theme) {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    Report.themeListeners.forEach((listener) => listener());
  }
  const wanted = () => chosen ?? (system.matches ? "dark" : "light");

  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    show(chosen);
  });
  system.addEventListener("change", () => show(wanted()));
  addEventListener("beforeprint", () => show("light"));
  addEventListener("afterprint", () => show(wanted()));
  show(wanted());
})();

// -> {header, column(name)}: see report/traces.py for the layout.
Report.unpack = async (base64) => {
  const text = atob(base64);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const raw = await new Response(stream).arrayBuffer();
  const length = new DataView(raw).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, length)));
  const types = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array };
  const column = (name) => {
    const [type, offset, count] = header.columns[name];
    return new types[type](raw, 4 + length + offset, count);
  };
  return { header, column };
};
