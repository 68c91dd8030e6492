import { Classifier } from "./classifier.js";

const SHOWN = 5;
const element = (id) => document.getElementById(id);
const state = { classifier: null, image: null };

element("model").addEventListener("change", ({ target }) => attempt(() => openModel(target.files[0])));
element("image").addEventListener("change", ({ target }) => attempt(() => openImage(target.files[0])));
attempt(async () => {
  const response = await fetch("model.onnx");
  if (response.ok) await openModel(response);
  else say("Choose a network.");
});

async function openModel(/** @type {Blob | Response} */ source) {
  say("Opening the network ...");
  const file = new Uint8Array(await source.arrayBuffer());
  state.classifier = await Classifier.open(file);
  say(`${state.classifier.architecture}, ${state.classifier.classes.length} classes, ${(file.length / 1e6).toFixed(2)} MB. Choose an image.`);
  await classify();
}

async function openImage(/** @type {File} */ file) {
  state.image = await createImageBitmap(file, { colorSpaceConversion: "none" });
  element("preview").src = URL.createObjectURL(file);
  element("preview").hidden = false;
  await classify();
}

async function classify() {
  if (!state.classifier || !state.image) return;
  const { ranked, logits, milliseconds } = await state.classifier.classify(state.image);
  element("classes").replaceChildren(...ranked.slice(0, SHOWN).map(row));
  say(`${milliseconds.toFixed(1)} ms`);
  element("classes").dataset.logits = JSON.stringify(logits);
}

function row({ name, probability }) {
  const line = document.createElement("tr");
  const meter = Object.assign(document.createElement("meter"), { value: probability });
  line.append(cell(name), cell(meter), cell(`${(100 * probability).toFixed(1)} %`));
  return line;
}

function cell(content) {
  const data = document.createElement("td");
  data.append(content);
  return data;
}

async function attempt(action) {
  try {
    await action();
  } catch (error) {
    say(error.message);
  }
}

function say(text) {
  element("status").textContent = text;
}
