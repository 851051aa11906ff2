// Pictures to classify: chosen or dropped, shown with a bar per class.

import { $, count, make, setError } from "./dom.js";
import { percent } from "./head.js";

const TYPES = new Set(["image/jpeg", "image/png", "image/webp"]);
const SHOWN_CLASSES = 5;

export class Pictures {
  #files = [];
  #head = null;
  #service;
  #onKeyWanted;
  #running = null;
  #most = Infinity;

  /** `onKeyWanted` is called when the service asks for a key. */
  constructor(service, onKeyWanted) {
    this.#service = service;
    this.#onKeyWanted = onKeyWanted;
    const input = $("image-input");
    const drop = $("drop");
    input.addEventListener("change", () => this.#add(input.files));
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      this.#add(event.dataTransfer.files);
    });
    $("remove-pictures").addEventListener("click", () => {
      this.#set([]);
      input.value = ""; // so that the same file can be chosen again
      input.focus();
    });
  }

  /** Offer pictures only where the worker can classify them, and as many as it takes. */
  configure({ features, limits }) {
    this.#most = limits.max_pictures;
    $("drop").hidden = !features.classify;
    $("no-backbone").hidden = features.classify;
  }

  /** Classify with this head from now on. */
  useHead(bytes) {
    this.#head = bytes;
    return this.#classify();
  }

  #add(files) {
    const wrong = [...files].filter((file) => !TYPES.has(file.type)).map((file) => `${file.name} is no JPEG, PNG or WebP.`);
    const all = [...this.#files, ...[...files].filter((file) => TYPES.has(file.type))];
    const most = this.#most;
    if (all.length > most) wrong.push(`At most ${most} pictures: ${all.length - most} are left out.`);
    this.#set(all.slice(0, most));
    setError("image", wrong.join(" "));
  }

  #set(files) {
    this.#files = files;
    for (const image of $("gallery").querySelectorAll("img")) URL.revokeObjectURL(image.src);
    $("gallery").replaceChildren(
      ...files.map((file) => {
        const image = make("img", "", { src: URL.createObjectURL(file), alt: "" });
        return make("li", [image, make("p", file.name), make("ol"), make("p", "", { className: "error" })]);
      }),
    );
    $("remove-pictures").hidden = files.length === 0;
    setError("image", "");
    this.#classify();
  }

  async #classify() {
    this.#running?.abort(); // what it was to tell is no longer asked for
    this.#running = null;
    for (const note of $("gallery").querySelectorAll(".error")) note.textContent = "";
    if (!this.#files.length || !this.#head) {
      $("picture-news").textContent = this.#files.length ? "Generate a head, then the pictures are classified." : "";
      return;
    }
    const run = new AbortController();
    this.#running = run;
    $("picture-news").textContent = "Classifying…";
    try {
      const { images } = await this.#service.classify(this.#head, this.#files, run.signal);
      images.forEach(({ classes }, i) => this.#showClasses(i, classes));
      $("picture-news").textContent = `${count(images.length, "picture", "pictures")} classified.`;
    } catch (error) {
      if (error.name !== "AbortError") this.#showProblem(error);
    }
  }

  #showClasses(index, classes) {
    const rows = classes.slice(0, SHOWN_CLASSES).map(({ name, probability }) => {
      const bar = make("span", "", { className: "bar", ariaHidden: "true" });
      bar.style.width = `${100 * probability}%`;
      return make("li", [bar, make("span", name), make("span", percent(probability))]);
    });
    const rest = classes.length - rows.length;
    if (rest > 0) rows.push(make("li", make("span", `and ${rest} more`)));
    $("gallery").children[index].querySelector("ol").replaceChildren(...rows);
  }

  #showProblem(problem) {
    $("picture-news").textContent = "";
    for (const list of $("gallery").querySelectorAll("ol")) list.replaceChildren();
    const others = [];
    for (const { field, message } of problem.errors ?? []) {
      const chip = $("gallery").children[field.match(/^image\[(\d+)\]$/)?.[1]];
      if (chip) chip.querySelector(".error").textContent = message;
      else others.push(message);
    }
    const named = problem.errors?.length > others.length;
    setError("image", named ? ["A picture cannot be used.", ...others].join(" ") : (problem.words ?? problem.message));
    if (problem.status === 401) this.#onKeyWanted();
  }
}
