// A file of `siman export --with-preprocess`, run by stock ONNX Runtime Web: nothing here knows what a binary convolution is.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

const METADATA_PROPS = 14; // field numbers of onnx.proto: ModelProto, and StringStringEntryProto below
const KEY = 1;
const VALUE = 2;
const LENGTH_DELIMITED = 2;

/** A network that classifies decoded images. Throws an Error with a line for the user where the file is something else. */
export class Classifier {
  /** @param {Uint8Array} file content of model.onnx */
  static async open(file) {
    const description = readDescription(file);
    if (!description) throw new Error("This file was not written by siman export.");
    const session = await ort.InferenceSession.create(file);
    if (session.inputMetadata[0].type !== "uint8") {
      throw new Error("This model takes normalised numbers, not images: write it with siman export --with-preprocess.");
    }
    return new Classifier(session, description);
  }

  constructor(session, description) {
    this.session = session;
    this.classes = description.classes;
    this.architecture = description.architecture;
  }

  /** Classes with their probabilities, the likeliest first, and the milliseconds the network took. */
  async classify(/** @type {ImageBitmap} */ image) {
    const pixels = new ort.Tensor("uint8", rgb(image), [1, image.height, image.width, 3]);
    const start = performance.now();
    const outputs = await this.session.run({ [this.session.inputNames[0]]: pixels });
    const milliseconds = performance.now() - start;
    const logits = outputs[this.session.outputNames[0]].data;
    const ranked = Array.from(softmax(logits), (probability, index) => ({ name: this.classes[index], probability }));
    return { ranked: ranked.sort((a, b) => b.probability - a.probability), logits: Array.from(logits), milliseconds };
  }
}

/** Red, green and blue of each pixel, rows from the top: what PIL's image.convert("RGB") holds. */
function rgb(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const rgba = context.getImageData(0, 0, image.width, image.height).data;
  return Uint8Array.from({ length: (rgba.length / 4) * 3 }, (_, i) => rgba[Math.floor(i / 3) * 4 + (i % 3)]);
}

function softmax(logits) {
  const highest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** What siman wrote into the file beside the network (class names, architecture): ONNX Runtime Web shows no metadata. */
function readDescription(file) {
  const text = new TextDecoder();
  for (const [number, entry] of fields(file)) {
    if (number !== METADATA_PROPS) continue;
    const property = new Map(fields(entry));
    if (text.decode(property.get(KEY)) === "siman") return JSON.parse(text.decode(property.get(VALUE)));
  }
  return null;
}

/** The length-delimited fields of a protobuf message, [number, bytes] each. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      if (byte === undefined) throw new Error("This is not an ONNX file.");
      value += (byte & 127) * scale; // not by shifts: they stop at 32 bits
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const size = varint();
    if (tag % 8 !== LENGTH_DELIMITED) continue; // then that was its value: ONNX's other top-level fields are varints
    yield [Math.floor(tag / 8), bytes.subarray(at, at + size)];
    at += size;
  }
}
