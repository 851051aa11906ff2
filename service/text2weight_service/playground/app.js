// The playground: reads GET /info, sends POST /generate/stream, and shows what comes back.

import { ClassList } from "./classes.js";
import { curlCommand, pythonProgram } from "./code.js";
import { $, count, make, setError } from "./dom.js";
import { HeatMap, readHead, size } from "./head.js";
import { Pictures } from "./pictures.js";
import { Problem, Service } from "./service.js";

const FIELDS = ["classes", "sampler", "steps", "seed", "guidance_scale"];
const WATCHED_HEADS = 25; // most intermediate heads of one run
const DEFAULT_STEPS = 20; // of a sampler that is not the checkpoint's own
const RETRY_MS = 2000;

const service = new Service();
const classes = new ClassList(() => showCode());
const pictures = new Pictures(service, askForKey);
const map = new HeatMap($("map"), $("map-caption"));
let info = null;
let running = null;
let lastSeed = null;

async function loadInfo() {
  try {
    info = await service.info();
  } catch (error) {
    $("worker").textContent = error.words ?? error.message;
    if (error.status === 401) askForKey();
    else setTimeout(loadInfo, RETRY_MS); // it may be starting
    return;
  }
  $("key-section").hidden = true;
  $("worker").textContent = `Version ${info.version}, backbone ${info.model.backbone.name ?? "not stated"}, ${info.phase}.`;
  const { samplers, sampler } = info.model;
  $("sampler-input").replaceChildren(...samplers.map((name) => make("option", name, { selected: name === sampler })));
  $("guidance").hidden = !info.features.guidance;
  classes.configure(info);
  pictures.configure(info);
  suggestSteps();
}

function askForKey() {
  const wasGiven = Boolean(service.key);
  $("key-section").hidden = false;
  $("documentation").hidden = true; // a link carries no key
  $("key-error").textContent = wasGiven ? "The service does not accept this key." : "";
  $("worker").textContent = "The service asks for a key.";
  $("key").focus();
}

function suggestSteps() {
  const { sampler, steps } = info.model;
  const chosen = $("sampler-input").value;
  const { exact_steps: exactSteps, max_steps: most } = info.limits;
  const exact = exactSteps[chosen];
  $("steps-input").disabled = Boolean(exact);
  $("steps-input").value = exact ?? (chosen === sampler ? steps : Math.min(DEFAULT_STEPS, most));
  $("steps-hint").textContent = exact ? `${chosen} takes exactly ${exact}.` : `1 to ${most}.`;
  setError("steps", "");
  showCode();
}

/** The body of POST /generate, from the fields as they are. */
function requestBody() {
  const body = { classes: classes.names };
  const number = (field) => ($(`${field}-input`).value.trim() === "" ? null : Number($(`${field}-input`).value));
  if (number("seed") !== null) body.seed = number("seed");
  if (number("steps") !== null) body.steps = number("steps");
  if ($("sampler-input").value) body.sampler = $("sampler-input").value;
  if (!$("guidance").hidden && number("guidance_scale") !== null) body.guidance_scale = number("guidance_scale");
  return body;
}

/** What is wrong with the fields, by name. */
function faults(body) {
  const found = {};
  const whole = (value, least, most) => Number.isInteger(value) && value >= least && value <= most;
  if (body.classes.length < 2) found.classes = "Add at least 2 classes.";
  const mostSteps = info?.limits.max_steps ?? Infinity;
  if ("steps" in body && !whole(body.steps, 1, mostSteps)) found.steps = `A whole number from 1 to ${mostSteps}.`;
  if ("seed" in body && !whole(body.seed, 0, Number.MAX_SAFE_INTEGER)) {
    found.seed = `A whole number from 0 to ${Number.MAX_SAFE_INTEGER}.`;
  }
  if (Number.isNaN(body.guidance_scale)) found.guidance_scale = "A number, such as 1.5.";
  return found;
}

/** Put messages beside their fields and go to the first of them. */
function showFaults(found) {
  for (const field of FIELDS) setError(field, found[field] ?? "");
  const first = FIELDS.find((field) => found[field]);
  if (first) $(`${first}-input`).focus();
}

function showCode() {
  const address = new URL(".", location.href).href;
  const body = requestBody();
  for (const field of Object.keys(faults(body))) if (field !== "classes") delete body[field];
  $("curl").textContent = curlCommand(address, body, Boolean(service.key));
  $("python").textContent = pythonProgram(address, body, Boolean(service.key));
}

async function generate() {
  classes.addTyped();
  if ($("classes-error").textContent) return $("classes-input").focus();
  const body = requestBody();
  const found = faults(body);
  showFaults(found);
  if (Object.keys(found).length) return;
  const run = new AbortController();
  running = run;
  begin(body);
  const started = performance.now();
  try {
    const headsEvery = $("watch").checked ? Math.ceil((body.steps ?? 1) / WATCHED_HEADS) : 0;
    const current = (show) => (value) => running === run && show(value);
    const bytes = await service.generate(body, {
      headsEvery,
      signal: run.signal,
      onStep: current(showStep),
      onHead: current((head) => showWeights(readHead(head))),
    });
    if (running === run) finish(bytes, performance.now() - started);
  } catch (error) {
    if (running === run) fail(error);
  }
}

function begin(body) {
  $("problem").textContent = "";
  $("generate").ariaDisabled = "true"; // a disabled button would lose the keyboard's focus
  $("stop").hidden = false;
  $("running").hidden = false;
  $("progress").removeAttribute("value");
  $("progress").max = body.steps ?? 1;
  $("step").textContent = "";
  $("news").textContent = `Generating a head for ${count(body.classes.length, "class", "classes")}…`;
  map.reset();
}

function end() {
  running = null;
  const wasFocused = document.activeElement === $("stop");
  $("generate").ariaDisabled = null;
  $("stop").hidden = true;
  $("running").hidden = true;
  if (wasFocused) $("generate").focus();
}

function showStep({ step, steps, timestep }) {
  Object.assign($("progress"), { max: steps, value: step });
  $("step").textContent = `Step ${step} of ${steps}, timestep ${timestep}.`;
}

function showWeights(head) {
  $("weights").hidden = false;
  map.draw(head);
}

function finish(bytes, milliseconds) {
  const head = readHead(bytes);
  const { metadata } = head;
  end();
  showWeights(head);
  lastSeed = metadata.seed;
  const facts = {
    Classes: JSON.parse(metadata.classes).join(", "),
    Seed: metadata.seed,
    Sampler: `${metadata.sampler}, ${count(Number(metadata.steps), "step", "steps")}`,
    Size: `${size(head).toLocaleString("en")} numbers, ${Math.round(bytes.length / 1000)} kB`,
    Time: `${Math.round(milliseconds)} ms, seen from here`,
    Backbone: metadata.backbone,
    Checkpoint: metadata.checkpoint.slice(0, 12),
    ...(metadata.warnings && { Warnings: JSON.parse(metadata.warnings).join(" ") }),
  };
  $("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [make("dt", name), make("dd", value ?? "not stated")]),
  );
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
  $("download").download = `head-${metadata.seed}.safetensors`;
  $("result").hidden = false;
  $("news").textContent = "The head is ready.";
  pictures.useHead(bytes);
}

function fail(error) {
  end();
  if (error.name === "AbortError") {
    $("news").textContent = "Stopped.";
    return;
  }
  $("news").textContent = "No new head.";
  if (!(error instanceof Problem)) {
    $("problem").textContent = `The answer cannot be read: ${error.message}`;
    return;
  }
  const found = {};
  const names = new Set();
  const others = [];
  for (const { field, message } of error.errors) {
    const [, name, index] = field.match(/^(\w+)(?:\[(\d+)\])?$/) ?? [];
    if (FIELDS.includes(name)) found[name] ??= message;
    else others.push(`${field}: ${message}`);
    if (name === "classes" && index) names.add(Number(index));
  }
  showFaults(found);
  classes.markFaults(names);
  const general = error.errors.length ? others.join(" ") : error.words;
  $("problem").textContent = general;
  if (error.status === 401) askForKey();
}

function copyButton(button, source, what) {
  $(button).addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($(source).textContent);
      $("copy-news").textContent = `${what} copied.`;
    } catch {
      // Without https a page has no clipboard.
      getSelection().selectAllChildren($(source));
      $("copy-news").textContent = `${what} selected: copy it with the keyboard.`;
    }
  });
}

$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});
$("request").addEventListener("input", () => showCode());
$("sampler-input").addEventListener("change", suggestSteps);
$("stop").addEventListener("click", () => running?.abort());
$("reuse").addEventListener("click", () => {
  $("seed-input").value = lastSeed;
  showCode();
  $("seed-input").focus();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  service.key = $("key").value.trim();
  showCode();
  loadInfo();
});
copyButton("copy-curl", "curl", "The curl command");
copyButton("copy-python", "python", "The Python program");
showCode();
loadInfo();
