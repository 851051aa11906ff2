// Finding and filling elements. Text is only ever set as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** A new element with text or children, and properties. */
export function make(tag, content = "", properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...[content].flat());
  return element;
}

/** Say what is wrong with a field beside it; an empty message takes the old one away. */
export function setError(field, message) {
  $(`${field}-error`).textContent = message;
  const control = $(`${field}-input`);
  if (message) control.setAttribute("aria-invalid", "true");
  else control.removeAttribute("aria-invalid");
}

/** Count something in words: "1 class", "3 classes". */
export const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;
