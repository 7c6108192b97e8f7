// Starts both halves of the page on the models that page.json names.

import * as draw from "./draw.js";
import * as reconstruct from "./reconstruct.js";

const tell = (section) => (error) => {
  document.querySelector(`#${section} .alert`).textContent = error.message;
};

async function start() {
  const response = await fetch("page.json");
  if (!response.ok) throw new Error("This page has no models yet: examples/build_web_page.py puts them beside it.");
  const { autoencoders, generator, bytes } = await response.json().catch((error) => {
    throw new Error(`page.json is damaged (${error.message}): build this page anew.`);
  });
  for (const place of document.querySelectorAll("[data-megabytes]")) {
    place.textContent = (bytes[place.dataset.megabytes] / 1e6).toFixed(0);
  }
  await Promise.all([reconstruct.start(autoencoders), draw.start(generator).catch(tell("draw"))]);
  document.body.classList.add("ready");
}

start().catch(tell("reconstruct"));
