// What the browser keeps from one visit to the next. It may refuse: private windows, no room left.

const PREFIX = "edge-vlm.";

// What is kept may be of another version of the page: what has another form is left out.
export function recall(name, otherwise) {
  return read("localStorage", name, otherwise) ?? otherwise;
}

// Whether it is kept.
export function keep(name, value) {
  return write("localStorage", name, value);
}

// The same for what each tab has of its own; a new tab begins with what was kept last.
export function recallOwn(name, otherwise) {
  return read("sessionStorage", name, otherwise) ?? recall(name, otherwise);
}

export function keepOwn(name, value) {
  if (!write("sessionStorage", name, value)) remove("sessionStorage", name);
  return keep(name, value);
}

function read(store, name, otherwise) {
  try {
    const value = JSON.parse(globalThis[store].getItem(PREFIX + name));
    if (Array.isArray(otherwise)) return Array.isArray(value) ? value.filter(isEntry) : null;
    return typeof value === typeof otherwise && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}

const isEntry = (each) => typeof (each?.question ?? each?.note) === "string";

function write(store, name, value) {
  try {
    globalThis[store].setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function remove(store, name) {
  try {
    globalThis[store].removeItem(PREFIX + name);
  } catch { /* then there is nothing to remove either */ }
}
