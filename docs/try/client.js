// The page's side of the worker: calls with progress, which can be cancelled.

// The query of the page, with which "?device=wasm" keeps it from the graphics processor, is the worker's, too.
const worker = new Worker(new URL(`worker.js${window.location.search}`, import.meta.url), { type: "module" });
const calls = new Map();
let count = 0, ended; // the error that ended the worker

worker.onmessage = ({ data: { id, progress, result, error } }) => {
  const call = calls.get(id);
  if (!call) return;
  if (progress) {
    call.onProgress?.(progress);
    return;
  }
  calls.delete(id);
  if (error === undefined) call.resolve(result);
  else call.reject(new Error(error));
};
worker.onerror = (event) => {
  ended = new Error(`The worker ended: ${event.message ?? "it could not start"}. Load the page again.`);
  for (const call of calls.values()) call.reject(ended);
  calls.clear();
};

/** What a method of worker.js answers. An AbortSignal cancels it: then it throws an Error "cancelled". */
export function call(method, argument, { onProgress, signal } = {}) {
  return new Promise((resolve, reject) => {
    if (ended || signal?.aborted) throw ended ?? new Error("cancelled");
    const id = ++count;
    calls.set(id, { resolve, reject, onProgress });
    signal?.addEventListener("abort", () => worker.postMessage({ id, method: "cancel" }));
    worker.postMessage({ id, method, argument });
  });
}

/** What is being loaded, in words. */
export function loading({ name, done, total }) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  return `Loading ${name}: ${megabytes(done)} of ${megabytes(total)} MB`;
}
