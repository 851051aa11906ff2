// Talking to the service. Addresses are relative, so that the page also works behind a path prefix.

// A worker or a proxy without the stream answers one of these.
const NO_STREAM = new Set([404, 405, 501]);

/** An error answer in words: RFC 9457 problem details, or what stands in for them. */
export class Problem extends Error {
  constructor(details, retryAfter = null) {
    super(details.detail || details.title);
    this.status = details.status;
    this.errors = details.errors ?? [];
    this.retryAfter = retryAfter;
    this.requestId = details.request_id;
  }

  /** Everything a person should know that is not about one field. */
  get words() {
    const again = this.retryAfter ? ` Try again in ${this.retryAfter} s.` : "";
    const id = this.requestId ? ` (request ${this.requestId})` : "";
    return `${this.message}.${again}${id}`.replace("..", ".");
  }
}

/** A connection to the service; `key` is sent where it is set and kept nowhere else. */
export class Service {
  key = "";

  info() {
    return this.#send("info", {}).then((response) => response.json());
  }

  /**
   * Generate a head; tell of each step and intermediate head where the service can stream them.
   * Returns the bytes of the head.
   */
  async generate(body, { headsEvery, signal, onStep, onHead }) {
    const request = (path, content) => this.#send(path, { method: "POST", signal, ...json(content) });
    try {
      const response = await request("generate/stream", { ...body, heads_every: headsEvery });
      const head = await lastHead(response, onStep, onHead);
      if (head) return head;
    } catch (error) {
      // A stream that breaks off is a network error too; the plain request then tells what is wrong.
      const canFallBack = error instanceof Problem ? NO_STREAM.has(error.status) : error.name !== "AbortError";
      if (!canFallBack) throw error;
    }
    return new Uint8Array(await (await request("generate", body)).arrayBuffer());
  }

  async classify(head, pictures, signal) {
    const form = new FormData();
    form.append("head", new Blob([head]), "head.safetensors");
    for (const picture of pictures) form.append("image", picture, picture.name);
    return (await this.#send("classify", { method: "POST", body: form, signal })).json();
  }

  async #send(path, options) {
    const headers = { ...options.headers };
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, credentials: "same-origin" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ status: 0, title: "The service cannot be reached" });
    }
    if (!response.ok) throw await problemOf(response);
    return response;
  }
}

const json = (content) => ({ headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) });

async function problemOf(response) {
  const details = await response.json().catch(() => ({}));
  const fallback = { title: `The service answered with status ${response.status}`, status: response.status };
  return new Problem({ ...fallback, ...details }, response.headers.get("Retry-After"));
}

/** Read a stream to its end; returns the finished head, or null where the stream ends without it. */
async function lastHead(response, onStep, onHead) {
  for await (const { name, data } of serverSentEvents(response.body)) {
    if (name === "progress") onStep(data);
    else if (name === "head") onHead(bytesOf(data.head));
    else if (name === "done") return bytesOf(data.head);
    else if (name === "error") throw new Problem(data);
  }
  return null;
}

async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      text += chunk.value;
      const blocks = text.split(/\r?\n\r?\n/);
      text = blocks.pop();
      for (const block of blocks) {
        const fields = block.split(/\r?\n/).map((line) => line.match(/^(\w+): ?(.*)$/) ?? []);
        const data = fields.filter(([, field]) => field === "data").map(([, , value]) => value).join("\n");
        const name = fields.find(([, field]) => field === "event")?.[2];
        if (data) yield { name, data: JSON.parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

const bytesOf = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
