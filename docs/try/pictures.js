// Between files, canvases and what the models take: (3, H, W) from -1 to 1, as Float32Array.

/** A bitmap of a file, a blob or an <img>; an Error in words if it is none. */
export async function readPicture(source, name) {
  const bitmap = await createImageBitmap(source).catch(() => null);
  if (bitmap) return bitmap;
  const isOther = source.type && !source.type.startsWith("image/");
  const fault = isOther ? `no picture (its type is ${source.type})`
    : "damaged, too large, or no picture that this browser can read";
  throw new Error(`${name} is ${fault}: choose a PNG, JPEG or WebP file.`);
}

/** Draws a bitmap, on white, so that its longer side has at most `longest` pixels. */
export function drawPicture(canvas, bitmap, longest) {
  const scale = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

/** The pixels of a canvas, with grey at the bottom and on the right up to multiples of `step`. */
export function toTensor(canvas, step) {
  const { width, height } = canvas;
  const [rows, columns] = [height, width].map((side) => Math.ceil(side / step) * step);
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const data = new Float32Array(3 * rows * columns);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < 3; channel++) {
        data[(channel * rows + y) * columns + x] = pixels[4 * (y * width + x) + channel] / 127.5 - 1;
      }
    }
  }
  return { data, dims: [3, rows, columns] };
}

/** Fills a canvas with `color(channel, y, x)`, from 0 to 255. */
function paint(canvas, width, height, color) {
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < 3; channel++) {
        image.data[4 * (y * width + x) + channel] = color(channel, y, x);
      }
      image.data[4 * (y * width + x) + 3] = 255;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The upper left `width` x `height` pixels of a tensor. */
export function toCanvas(canvas, { data, dims: [, rows, columns] }, width = columns, height = rows) {
  paint(canvas, width, height, (channel, y, x) => 127.5 * (data[(channel * rows + y) * columns + x] + 1));
}

/** Paints how far two tensors are from each other, `factor` times, and returns their PSNR in decibels. */
export function compare(canvas, one, other, width, height, factor) {
  const [, rows, columns] = one.dims, clip = (x) => Math.min(1, Math.max(-1, x));
  let squares = 0;
  paint(canvas, width, height, (channel, y, x) => {
    const place = (channel * rows + y) * columns + x, error = clip(one.data[place]) - clip(other.data[place]);
    squares += error * error;
    return 127.5 * factor * Math.abs(error);
  });
  return 10 * Math.log10((4 * 3 * width * height) / squares);
}
