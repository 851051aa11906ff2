// The list of class names: typed, pasted, taken from an example, removed again.

import { $, count, make, setError } from "./dom.js";

const EXAMPLES = {
  Household: ["clock", "cup", "lamp", "chair", "telephone", "bottle"],
  Vehicles: ["bicycle", "bus", "train", "tractor", "rocket", "motorcycle"],
  Pets: ["tabby", "golden retriever", "goldfish"],
};
const SEPARATORS = /[\n\r,;\t]+/;

// The service takes two names for equal when these forms are.
const tidy = (name) => name.normalize("NFC").replaceAll("_", " ").replace(/\s+/g, " ").trim();
const comparable = (name) => tidy(name).toLowerCase();

export class ClassList {
  names = [];
  #limits = { max_classes: Infinity, max_name_length: Infinity };
  #known = null;
  #onChange;

  /** `onChange` is called after every change of `names`. */
  constructor(onChange) {
    this.#onChange = onChange;
    const input = $("classes-input");
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing || !input.value.trim()) return;
      event.preventDefault(); // an empty field lets Enter submit the form
      this.addTyped();
    });
    input.addEventListener("paste", (event) => {
      const text = event.clipboardData.getData("text");
      if (!SEPARATORS.test(text.trim())) return;
      event.preventDefault();
      this.#add(`${input.value}\n${text}`);
      input.value = "";
    });
    $("add").addEventListener("click", () => {
      this.addTyped();
      input.focus();
    });
    $("clear").addEventListener("click", () => {
      this.#set([]);
      input.focus();
    });
    $("examples").append(
      ...Object.entries(EXAMPLES).map(([title, names]) =>
        make("button", title, { type: "button", onclick: () => this.#set(names) }),
      ),
    );
    this.#show();
  }

  /** Take over what GET /info says about names. */
  configure({ limits, known_classes: known }) {
    this.#limits = limits;
    this.#known = known && new Set(known.map(comparable));
    $("known").replaceChildren(...(known ?? []).map((name) => make("option", "", { value: name })));
    this.#show();
  }

  /** Add what stands in the field, if anything. */
  addTyped() {
    if (this.#add($("classes-input").value)) $("classes-input").value = "";
  }

  /** Mark the chips that an error answer names, such as classes[3]. */
  markFaults(indices) {
    [...$("chips").children].forEach((chip, i) => chip.classList.toggle("fault", indices.has(i)));
  }

  #add(text) {
    const names = [...this.names];
    const taken = new Set(names.map(comparable));
    const wrong = [];
    for (const name of text.split(SEPARATORS).map(tidy).filter(Boolean)) {
      const { max_classes: most, max_name_length: longest } = this.#limits;
      if (taken.has(comparable(name))) wrong.push(`${name} is there already.`);
      else if (name.length > longest) wrong.push(`A name has ${name.length} characters: at most ${longest} are allowed.`);
      else if (names.length >= most) wrong.push(`${name} is left out: at most ${most} classes are allowed.`);
      else names.push(name);
      taken.add(comparable(name));
    }
    if (names.length > this.names.length) this.#set(names);
    setError("classes", wrong.slice(0, 3).join(" "));
    return wrong.length === 0;
  }

  #set(names) {
    this.names = names;
    setError("classes", "");
    this.#show();
    this.#onChange();
  }

  #remove(index) {
    this.#set(this.names.filter((_, i) => i !== index));
    // Focus stays where the list was, so that several names can be removed in a row.
    const buttons = $("chips").querySelectorAll("button");
    (buttons[Math.min(index, buttons.length - 1)] ?? $("classes-input")).focus();
  }

  #show() {
    const unknown = this.names.filter((name) => this.#known && !this.#known.has(comparable(name)));
    $("chips").replaceChildren(
      ...this.names.map((name, i) => {
        const remove = make("button", "✕", { type: "button", ariaLabel: `Remove ${name}`, onclick: () => this.#remove(i) });
        return make("li", [make("span", name), remove], { className: unknown.includes(name) ? "unknown" : "" });
      }),
    );
    $("count").textContent = count(this.names.length, "class", "classes");
    $("clear").disabled = this.names.length === 0;
    $("unknown").textContent = unknown.length ? `The text encoder was not trained on ${unknown.join(", ")}: results may be poor.` : "";
  }
}
