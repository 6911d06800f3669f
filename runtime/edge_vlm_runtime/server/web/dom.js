// Short hands for the elements of the page.

export const $ = (id) => document.getElementById(id);

// An element with properties and children: make("li", { className: "note" }, "text", child).
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const clock = (date) =>
  date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
