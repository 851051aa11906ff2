// Reading a head artifact (safetensors) and drawing its weights.

/** Parse the header and the fp32 tensors: {metadata, tensors: {name: {shape, values}}}. */
export function readHead(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const { __metadata__: metadata, ...entries } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [first, end] }] of Object.entries(entries)) {
    if (dtype !== "F32") throw new Error(`tensor ${name} is ${dtype}: expected F32`);
    tensors[name] = { shape, values: new Float32Array(bytes.slice(start + first, start + end).buffer) };
  }
  return { metadata, tensors };
}

/** How many numbers the head itself has. */
export function size(head) {
  const weights = Object.entries(head.tensors).filter(([name]) => name !== "class_embeddings");
  return weights.reduce((sum, [, { values }]) => sum + values.length, 0);
}

/** A heat map of linear1.weight: one row per hidden unit. The colours of a run keep the scale of its first head. */
export class HeatMap {
  #scale = 0;
  #last = null;

  constructor(canvas, caption) {
    this.canvas = canvas;
    this.caption = caption;
  }

  /** Begin another run. */
  reset() {
    this.#scale = 0;
    this.#last = null;
  }

  draw(head) {
    const { shape: [rows, columns], values } = head.tensors["linear1.weight"];
    this.#scale ||= quantile(values, 0.98);
    const image = new ImageData(columns, rows);
    values.forEach((value, i) => {
      // Zero is transparent and shows the page's own background, light or dark.
      const alpha = Math.min(255, Math.round((255 * Math.abs(value)) / this.#scale));
      image.data.set(value < 0 ? [37, 99, 235, alpha] : [234, 88, 12, alpha], 4 * i);
    });
    Object.assign(this.canvas, { width: columns, height: rows });
    this.canvas.getContext("2d").putImageData(image, 0, 0);
    this.#describe(rows, columns, values);
  }

  #describe(rows, columns, values) {
    const moved = this.#last ? distance(values, this.#last) : 0;
    this.#last = values;
    const change = moved ? ` It differs by ${percent(moved)} from the one before.` : "";
    this.caption.textContent =
      `First layer: ${rows} hidden units, one row each, by ${columns} inputs. ` +
      `Blue is negative, orange positive, stronger colour is larger.${change}`;
  }
}

export const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

function quantile(values, share) {
  const sorted = values.map(Math.abs).sort();
  return sorted[Math.floor(share * (sorted.length - 1))] || 1;
}

function distance(values, others) {
  let squares = 0;
  let total = 0;
  values.forEach((value, i) => {
    squares += (value - others[i]) ** 2;
    total += value ** 2;
  });
  return Math.sqrt(squares / total);
}
