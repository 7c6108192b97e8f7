// Draws latents with a denoiser: flow matching in Euler's steps, guided, as `ViTokDiTPipeline` does.

import { noise } from "./random.js";

const UNSUPPORTED = ["use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
  "invert_sigmas", "stochastic_sampling", "shift_terminal"];

/** Levels of noise, one more than there are steps, of diffusers' FlowMatchEulerDiscreteScheduler with this config. */
export function noiseLevels(config, steps) {
  const odd = UNSUPPORTED.filter((name) => config[name]);
  if (config._class_name !== "FlowMatchEulerDiscreteScheduler" || odd.length) {
    throw new Error(`This page samples with FlowMatchEulerDiscreteScheduler and evenly spaced steps, but the model has
      ${config._class_name} ${odd.join(", ")}.`.replace(/\s+/g, " "));
  }
  const shifted = (sigma) => (config.shift * sigma) / (1 + (config.shift - 1) * sigma);
  const least = shifted(1 / config.num_train_timesteps);
  const levels = new Float32Array(steps + 1); // the last is 0
  for (let i = 0; i < steps; i++) {
    levels[i] = shifted(steps === 1 ? 1 : 1 + ((least - 1) * i) / (steps - 1));
  }
  return levels;
}

function spread(numbers) {
  const mean = numbers.reduce((sum, x) => sum + x, 0) / numbers.length;
  return Math.sqrt(numbers.reduce((sum, x) => sum + (x - mean) ** 2, 0) / numbers.length);
}

/** Away from the prediction without a class, towards `conditional`; `rescale` brings the spread of that one back. */
export function guide(unconditional, conditional, scale, rescale) {
  const guided = conditional.map((x, i) => unconditional[i] + scale * (x - unconditional[i]));
  const ours = spread(guided), theirs = spread(conditional);
  const factor = 1 + rescale * ((ours > 0 ? theirs / ours : 1) - 1);
  return guided.map((x) => x * factor);
}

/**
 * Normalised latents of one picture, Float32Array of c * h * w.
 *
 * `predict(latents, timestep, labels)` gives the prediction for each label, all for the same latents. `onStep` is
 * called after each step with its number, and may be asynchronous; what it throws ends the drawing.
 */
export async function drawLatents({ predict, generator, label, steps, scale, rescale, seed, onStep }) {
  const { in_channels: channels, sample_size: side, num_classes: none, scheduler } = generator;
  const levels = noiseLevels(scheduler, steps);
  const isGuided = scale > 1 && label !== none;
  let latents = noise(seed, channels * side * side);
  for (let step = 0; step < steps; step++) {
    const timestep = levels[step] * scheduler.num_train_timesteps;
    const predictions = await predict(latents, timestep, isGuided ? [none, label] : [label]);
    const velocity = isGuided ? guide(...predictions, scale, rescale) : predictions[0];
    const length = levels[step + 1] - levels[step];
    latents = latents.map((x, i) => x + length * velocity[i]);
    await onStep(step + 1);
  }
  return latents;
}

/** What the decoder takes, of normalised latents of so many channels. */
export function denormalize(latents, channels, { latents_mean: mean, latents_std: std, scaling_factor: factor }) {
  const area = latents.length / channels;
  return latents.map((x, i) => (x / factor) * std[Math.floor(i / area)] + mean[Math.floor(i / area)]);
}
