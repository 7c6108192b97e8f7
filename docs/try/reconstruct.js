// A picture, its code and what comes out of it again.

import { call, loading } from "./client.js";
import { compare, drawPicture, readPicture, toCanvas, toTensor } from "./pictures.js";

const AMPLIFICATION = 4; // of the difference
const BYTES = 2; // of a number of the code, float16

const section = document.querySelector("#reconstruct");
const find = (selector) => section.querySelector(selector);
const [original, reconstruction, difference] = section.querySelectorAll("canvas");
const status = find(".status"), alert = find(".alert"), facts = find(".facts");
const rate = find("#rate"), models = find("#model");
const format = (number) => number.toLocaleString("en");

let model, bitmap, name; // of the picture that is wanted
let waiting; // a file that is not read yet
let shown; // the picture that is encoded, and its code
let queue = Promise.resolve(), newest = 0;

/** Makes the page show what is wanted; of several that wait, one is enough. */
function refresh() {
  const mine = ++newest;
  queue = queue.then(async () => {
    if (mine !== newest) return;
    alert.textContent = "";
    section.setAttribute("aria-busy", "true");
    try {
      await update();
    } catch (error) {
      status.textContent = "";
      alert.textContent = error.message;
    }
    section.setAttribute("aria-busy", "false");
  });
  return queue;
}

async function update() {
  if (model?.folder !== models.value) await setModel();
  if (waiting) {
    const { source, title } = waiting;
    waiting = undefined;
    [bitmap, name] = [await readPicture(source, title), title];
  }
  if (!bitmap) return;
  const wanted = { bitmap, longest: Number(find("#longest").value), folder: model.folder };
  if (Object.keys(wanted).some((key) => shown?.[key] !== wanted[key])) await encode(wanted);
  await decode();
}

const onProgress = (progress) => {
  status.textContent = loading(progress);
};

async function encode(wanted) {
  const { width, height } = bitmap;
  drawPicture(original, bitmap, wanted.longest);
  const isWhole = original.width === width && original.height === height;
  const note = isWhole ? "" : `, scaled down from ${width} x ${height}`;
  const title = `${name}: ${original.width} x ${original.height}${note}`;
  const picture = toTensor(original, model.patch_size);
  status.textContent = "Encoding …";
  shown = undefined;
  const encoded = await call("encode", { folder: model.folder, ...picture }, { onProgress });
  shown = { ...wanted, ...encoded, picture, title };
}

async function decode() {
  const { picture, latents, grid, milliseconds, device, title } = shown, { width, height } = original;
  const numChannels = model.channel_counts ? model.channel_counts[rate.value] : grid[0];
  status.textContent = "Decoding …";
  const decoded = await call("decode", { folder: model.folder, latents, grid, numChannels }, { onProgress });
  const output = { data: decoded.data, dims: picture.dims };
  toCanvas(reconstruction, output, width, height);
  const psnr = compare(difference, picture, output, width, height, AMPLIFICATION);
  const bytes = BYTES * numChannels * grid[1] * grid[2], pixels = 3 * width * height;
  for (const [key, text] of Object.entries({
    psnr: `${psnr.toFixed(2)} dB`,
    bytes: `${format(bytes)} bytes`,
    grid: `${numChannels} x ${grid[1]} x ${grid[2]} numbers of 16 bits; the pixels are ${format(pixels)} bytes, ${
      (pixels / bytes).toFixed(1)} times as many`,
    time: `${milliseconds.toFixed(0)} ms to encode, ${decoded.milliseconds.toFixed(0)} ms to decode (${
      device === "webgpu" ? "WebGPU" : "WebAssembly"})`,
  })) find(`[data-fact=${key}]`).textContent = text;
  facts.hidden = find(".views").hidden = false;
  status.textContent = title;
}

function show(source, title) {
  waiting = { source, title };
  refresh();
}

function setRate() {
  const count = model.channel_counts[rate.value];
  rate.setAttribute("aria-valuetext", `${count} of ${model.latent_channels} channels`);
  find("#rate-text").textContent = `${count} of ${model.latent_channels} channels`;
}

async function setModel() {
  const folder = models.value;
  model = { ...(await call("describe", { folder })), folder };
  find(".rate").hidden = !model.channel_counts;
  if (model.channel_counts) {
    rate.max = model.channel_counts.length - 1; // before the value, which cannot be above it
    rate.value = rate.max;
    setRate();
  }
}

function connectFiles() {
  const file = find("#file");
  const choose = () => {
    if (file.files.length) show(file.files[0], file.files[0].name);
    file.value = ""; // so that the same can be chosen again
  };
  file.addEventListener("change", choose);
  choose(); // what was chosen while the page was loaded
  for (const event of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(event, (drag) => {
      drag.preventDefault();
      document.body.classList.toggle("dragging", event === "dragover");
      const dropped = event === "drop" && drag.dataTransfer.files[0];
      if (dropped) show(dropped, dropped.name);
    });
  }
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files.length) show(clipboardData.files[0], "The picture of the clipboard");
  });
  for (const button of section.querySelectorAll("[data-sample]")) {
    const image = button.querySelector("img");
    button.addEventListener("click", () => show(image, image.alt));
  }
}

function connectWipe() {
  const wipe = find("#wipe"), pair = find(".wipe");
  const move = () => pair.style.setProperty("--wipe", `${wipe.value}%`);
  wipe.addEventListener("input", move);
  pair.addEventListener("pointermove", ({ buttons, pointerType, clientX }) => {
    if (pointerType !== "touch" && !buttons) return;
    const { left, width } = pair.getBoundingClientRect();
    wipe.value = (100 * (clientX - left)) / width;
    move();
  });
  move();
}

/** `folders` are those of the autoencoders, by name. */
export async function start(folders) {
  for (const [title, folder] of Object.entries(folders)) models.add(new Option(title, folder));
  find(".model").hidden = models.length < 2;
  models.addEventListener("change", refresh);
  find("#longest").addEventListener("change", refresh);
  rate.addEventListener("input", () => {
    setRate();
    refresh();
  });
  connectFiles();
  connectWipe();
  await refresh();
}
