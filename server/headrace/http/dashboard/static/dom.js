// Elements made of text and attributes only: nothing that comes from a server is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Make the children of `target` like `children`, changing as little as possible: focus, scrolling and selections stay. */
export function show(target, ...children) {
  patchChildren(target, fill(document.createElement("div"), null, children));
}

function isAlike(one, other) {
  if (one.nodeType !== other.nodeType || one.nodeName !== other.nodeName) return false;
  return one.nodeType !== Node.ELEMENT_NODE || one.getAttribute("data-key") === other.getAttribute("data-key");
}

function patchChildren(target, source) {
  const keyed = new Map();
  for (const child of target.children) {
    const key = child.getAttribute("data-key");
    if (key !== null) keyed.set(key, child);
  }
  let place = target.firstChild;
  for (const wanted of [...source.childNodes]) {
    const key = wanted.nodeType === Node.ELEMENT_NODE ? wanted.getAttribute("data-key") : null;
    let found = key !== null ? keyed.get(key) : place;
    if (!found || !isAlike(found, wanted)) {
      target.insertBefore(wanted, place);
      continue;
    }
    if (found !== place) target.insertBefore(found, place);
    else place = place.nextSibling;
    patch(found, wanted);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function patch(target, source) {
  if (target.nodeType !== Node.ELEMENT_NODE) {
    if (target.nodeValue !== source.nodeValue) target.nodeValue = source.nodeValue;
    return;
  }
  // Not "open": people open and close.
  for (const { name } of [...target.attributes]) if (name !== "open" && !source.hasAttribute(name)) target.removeAttribute(name);
  for (const { name, value } of source.attributes) if (target.getAttribute(name) !== value) target.setAttribute(name, value);
  patchChildren(target, source);
}
