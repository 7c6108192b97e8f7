// Computes beside the page, which stays responsive. Takes {id, method, argument}; answers {id, result} or {id, error},
// and {id, progress} before. {id, method: "cancel"} ends the drawing of that id.

import { Engine } from "./engine.js";
import { denormalize, drawLatents } from "./sampler.js";

const engine = new Engine(new URL(self.location).searchParams.get("device"));
const cancelled = new Set();

/** The picture of the first channels of a code, (channels, h, w). */
async function decodeChannels(folder, code, grid, report) {
  const { fill, latent_channels: channels } = await engine.describe(folder);
  const whole = new Float32Array(channels * grid[0] * grid[1]).fill(fill); // which stands for what is missing
  whole.set(code);
  return engine.run(folder, "decoder", { latents: ["float32", whole, [1, channels, ...grid]] }, report);
}

const methods = {
  /** The model.json of a folder. */
  describe: ({ folder }) => engine.describe(folder),

  /** A picture (C, H, W), its sides multiples of the patch size -> its code, and the milliseconds without loading. */
  async encode({ folder, data, dims }, report) {
    await engine.session(folder, "encoder", report);
    await engine.session(folder, "decoder", report);
    const began = performance.now();
    const { data: latents, dims: [, ...grid] } = await engine.run(folder, "encoder", {
      pixel_values: ["float32", data, [1, ...dims]],
    });
    return { latents, grid, milliseconds: performance.now() - began, device: engine.device };
  },

  /** The first `numChannels` channels of a code -> a picture. */
  async decode({ folder, latents, grid, numChannels }, report) {
    const code = latents.subarray(0, (numChannels * latents.length) / grid[0]);
    await engine.session(folder, "decoder", report);
    const began = performance.now();
    const { data } = await decodeChannels(folder, code, grid.slice(1), report);
    return { data, milliseconds: performance.now() - began };
  },

  /** A picture (3, H, W) of a class; `progress` are steps. */
  async draw({ folder, label, steps, scale, rescale, seed }, report, id) {
    const model = await engine.describe(folder), { generator } = model;
    const grid = [generator.sample_size, generator.sample_size], shape = [generator.in_channels, ...grid];
    const predict = async (latents, timestep, labels) => {
      const repeated = new Float32Array(labels.length * latents.length);
      labels.forEach((_, i) => repeated.set(latents, i * latents.length));
      const { data } = await engine.run(folder, "transformer", {
        hidden_states: ["float32", repeated, [labels.length, ...shape]],
        timestep: ["float32", new Float32Array(labels.length).fill(timestep), [labels.length]],
        class_labels: ["int64", BigInt64Array.from(labels, BigInt), [labels.length]],
      }, report);
      const length = data.length / labels.length; // may be twice that of the latents, with variances behind
      return labels.map((_, i) => data.slice(i * length, i * length + latents.length));
    };
    const onStep = async (step) => {
      report("steps", step, steps);
      await new Promise((resolve) => setTimeout(resolve)); // lets "cancel" in
      if (cancelled.delete(id)) throw new Error("cancelled");
    };
    await engine.session(folder, "transformer", report);
    const latents = await drawLatents({ predict, generator, label, steps, scale, rescale, seed, onStep });
    const code = denormalize(latents, generator.in_channels, model);
    const { data, dims: [, ...dims] } = await decodeChannels(folder, code, grid, report);
    return { data, dims };
  },
};

self.onmessage = async ({ data: { id, method, argument } }) => {
  if (method === "cancel") {
    cancelled.add(id);
    return;
  }
  const report = (name, done, total) => self.postMessage({ id, progress: { name, done, total } });
  try {
    self.postMessage({ id, result: await methods[method](argument, report, id) });
  } catch (error) {
    self.postMessage({ id, error: error.message ?? String(error) });
  }
};
