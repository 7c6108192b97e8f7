// ONNX Runtime and the models, in the worker: fetched when they are first needed, on the GPU if there is one.

const RUNTIMES = { // the module, and the name of the WebAssembly and of the script that starts it
  webgpu: ["ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi"],
  wasm: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded"],
};

/** Whether there is a graphics processor; one that the browser only imitates is slower than WebAssembly. */
async function hasGpu() {
  if (!self.navigator.gpu || !("Suspending" in WebAssembly)) return false;
  const adapter = await self.navigator.gpu.requestAdapter().catch(() => null);
  return Boolean(adapter && !adapter.info.isFallbackAdapter && adapter.info.architecture !== "swiftshader");
}

async function fetchFile(path) {
  const response = await fetch(new URL(path, import.meta.url)).catch((error) => {
    throw new Error(`${path} could not be loaded (${error.message}): are you online?`);
  });
  if (!response.ok) {
    throw new Error(`${path} is missing (${response.status}): its maker has to build this page anew.`);
  }
  return response;
}

/** What `use` makes of a file, or an Error that names it. */
async function named(path, use) {
  try {
    return await use();
  } catch (error) {
    throw new Error(`${path} cannot be used (${error.message ?? error}): its maker has to build this page anew.`);
  }
}

/** The bytes of a file, with `report(name, bytes so far, bytes in all)` while they come. */
async function fetchBytes(path, report) {
  const response = await fetchFile(path);
  const total = Number(response.headers.get("Content-Length")), chunks = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    report(path.split("/").pop(), (length += value.length), Math.max(total, length));
  }
  return new Blob(chunks);
}

export class Engine {
  #runtime;
  #files = new Map(); // promises of sessions and descriptions, by path
  #last = Promise.resolve(); // the runtime takes one call at a time

  /** `device` is "wasm", "webgpu", or `null`: WebGPU where there is a graphics processor. */
  constructor(device) {
    this.device = device;
  }

  async #start(report) {
    this.device ??= (await hasGpu()) ? "webgpu" : "wasm";
    if (!(this.device in RUNTIMES)) throw new Error(`There is no device "${this.device}": take wasm or webgpu.`);
    const [module, binary] = RUNTIMES[this.device];
    const ort = await import(`./onnxruntime/${module}`).catch((error) => {
      throw new Error(`onnxruntime/${module} could not be loaded: ${error.message}`);
    });
    const path = `onnxruntime/${binary}.wasm.gz`, packed = await fetchBytes(path, report);
    const unpacked = packed.stream().pipeThrough(new DecompressionStream("gzip"));
    ort.env.wasm.wasmBinary = await named(path, () => new Response(unpacked).arrayBuffer());
    ort.env.wasm.wasmPaths = { mjs: new URL(`onnxruntime/${binary}.mjs`, import.meta.url).href };
    return ort;
  }

  /** The same promise for the same path; one that failed is forgotten, so that it is tried again. */
  #once(path, load) {
    if (!this.#files.has(path)) {
      this.#files.set(path, load().catch((error) => {
        this.#files.delete(path);
        throw error;
      }));
    }
    return this.#files.get(path);
  }

  #enqueue(task) {
    const turn = this.#last.then(task);
    this.#last = turn.catch(() => null);
    return turn;
  }

  describe(folder) {
    const path = `${folder}/model.json`;
    return this.#once(path, async () => {
      const response = await fetchFile(path);
      return named(path, () => response.json());
    });
  }

  session(folder, name, report) {
    const path = `${folder}/${name}.onnx`;
    return this.#once(path, async () => {
      const ort = await this.#once("runtime", () => this.#start(report));
      const bytes = new Uint8Array(await (await fetchBytes(path, report)).arrayBuffer());
      const options = { executionProviders: [this.device] };
      return named(path, () => this.#enqueue(() => ort.InferenceSession.create(bytes, options)));
    });
  }

  /** The first output of a model, as Float32Array with its dimensions: `inputs` are {name: [type, data, dims]}. */
  async run(folder, name, inputs, report) {
    const session = await this.session(folder, name, report), ort = await this.#files.get("runtime");
    const feeds = {};
    for (const [key, [type, data, dims]] of Object.entries(inputs)) feeds[key] = new ort.Tensor(type, data, dims);
    const output = (await this.#enqueue(() => session.run(feeds)))[session.outputNames[0]];
    return { data: output.data, dims: output.dims };
  }
}
