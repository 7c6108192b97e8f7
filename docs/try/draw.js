// Pictures of a class, one after the other, from noise.

import { call, loading } from "./client.js";
import { toCanvas } from "./pictures.js";

const section = document.querySelector("#draw");
const find = (selector) => section.querySelector(selector);
const status = find(".status"), alert = find(".alert"), progress = find("progress");
const button = find("#start"), cancel = find("#cancel"), pictures = find(".pictures");

function settings() {
  const read = (id) => Number(find(`#${id}`).value);
  return { label: read("label"), steps: read("steps"), scale: read("scale"), rescale: read("rescale") };
}

/** A picture with its caption. */
function frame({ data, dims }, title) {
  const canvas = document.createElement("canvas"), figure = document.createElement("figure");
  toCanvas(canvas, { data, dims });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", title);
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  figure.append(canvas, caption);
  return figure;
}

async function draw(folder, names, signal) {
  const chosen = settings(), count = Number(find("#count").value), first = Number(find("#seed").value);
  const began = performance.now();
  pictures.replaceChildren();
  Object.assign(progress, { hidden: false, max: count * chosen.steps, value: 0 });
  for (let i = 0; i < count; i++) {
    const onProgress = (report) => {
      if (report.name === "steps") {
        progress.value = i * chosen.steps + report.done;
        status.textContent = `Picture ${i + 1} of ${count}, step ${report.done} of ${report.total}`;
      } else status.textContent = loading(report);
    };
    const title = `${names[chosen.label] ?? "no class"}, seed ${first + i}`;
    const drawn = await call("draw", { folder, seed: first + i, ...chosen }, { onProgress, signal });
    pictures.append(frame(drawn, title));
  }
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  status.textContent = `${count} picture${count > 1 ? "s" : ""} of ${chosen.steps} steps in ${seconds} s`;
}

/** `folder` is that of the generator. */
export async function start(folder) {
  const { generator } = await call("describe", { folder });
  const names = generator.id2label ?? {};
  for (const label of Object.keys(names).sort((a, b) => names[a].localeCompare(names[b]))) {
    find("#label").add(new Option(names[label], label));
  }
  find("#label").add(new Option("no class", generator.num_classes));
  find("#scale").value = generator.guidance_scale;
  find("#rescale").value = generator.guidance_rescale;
  button.disabled = false;
  find("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const control = new AbortController();
    cancel.onclick = () => control.abort();
    alert.textContent = "";
    [button.disabled, cancel.hidden] = [true, false];
    section.setAttribute("aria-busy", "true");
    try {
      await draw(folder, names, control.signal);
    } catch (error) {
      status.textContent = error.message === "cancelled" ? "Cancelled" : "";
      if (error.message !== "cancelled") alert.textContent = error.message;
    }
    [button.disabled, cancel.hidden, progress.hidden] = [false, true, true];
    section.setAttribute("aria-busy", "false");
  });
}
