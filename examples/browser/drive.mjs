// Headless Chromium on this page, for the tests and benchmarks/browser.py. Prints one JSON document.
//
//   node drive.mjs CHROMIUM URL classify MODEL IMAGE...  what a user sees who chooses these files
//   node drive.mjs CHROMIUM URL time ROUNDS FILE...      milliseconds of each round and file, in turns, batch 1, one thread
import puppeteer from "puppeteer-core";

const [executablePath, url, command, ...rest] = process.argv.slice(2);
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox"] });
try {
  const page = await browser.newPage();
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("console", (message) => {
    // A page without a model.onnx beside it asks for one all the same: Chromium reports the 404, the page says what to do.
    const optional = message.location().url?.endsWith("/model.onnx");
    if (message.type() === "error" && !optional) complaints.push(message.text());
  });
  await page.goto(url, { waitUntil: "networkidle0" });
  const result = command === "classify" ? await classify(page, ...rest) : await time(page, Number(rest[0]), rest.slice(1));
  console.log(JSON.stringify({ ...result, complaints }));
} finally {
  await browser.close();
}

async function classify(page, model, ...images) {
  const opened = await choose(page, "#model", model);
  const answers = [];
  for (const image of images) {
    const status = await choose(page, "#image", image);
    answers.push(await page.$eval("#classes", (classes, status) => ({
      status,
      rows: Array.from(classes.rows, (row) => [row.cells[0].textContent, row.cells[2].textContent]),
      logits: JSON.parse(classes.dataset.logits ?? "null"),
    }), status));
  }
  return { opened, answers };
}

/** Choose a file as a user does; what the page says when it is done with it. */
async function choose(page, input, file) {
  await page.$eval("#status", (status) => (status.textContent = ""));
  await (await page.$(input)).uploadFile(file);
  await page.waitForFunction(() => !/^$|Opening|Looking/.test(document.getElementById("status").textContent));
  return page.$eval("#status", (status) => status.textContent);
}

async function time(page, rounds, files) {
  const input = await page.evaluateHandle(() => Object.assign(document.createElement("input"), { type: "file", multiple: true }));
  await input.uploadFile(...files);
  return page.evaluate(
    async (input, rounds) => {
      const ort = await import("./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
      ort.env.wasm.numThreads = 1;
      const runs = [];
      const openings = [];
      for (const file of input.files) {
        const start = performance.now();
        const session = await ort.InferenceSession.create(new Uint8Array(await file.arrayBuffer()));
        openings.push(performance.now() - start);
        const shape = [1, ...session.inputMetadata[0].shape.slice(1)];
        const numbers = Float32Array.from({ length: shape.reduce((a, b) => a * b) }, () => 2 * Math.random() - 1);
        const feeds = { [session.inputNames[0]]: new ort.Tensor("float32", numbers, shape) };
        runs.push(() => session.run(feeds));
        await session.run(feeds);
      }
      const milliseconds = [];
      for (let round = 0; round < rounds; round++) {
        const row = [];
        for (const run of runs) {
          const start = performance.now();
          await run();
          row.push(performance.now() - start);
        }
        milliseconds.push(row);
      }
      return { milliseconds, openings };
    },
    input,
    rounds,
  );
}
